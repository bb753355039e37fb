"""`recover_many` against one recovery at a time, its chunks, and how often it compiles."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from softinv_jax import Observation, Recovery, Verdict, observe, recover_many
from softinv_jax.labels import many

EXAMPLES = 24
FAMILIES = ("hard", "smoothing", "mixup", "dirichlet", "smoothed_mixup", "three_way_mixup")


@pytest.fixture(scope="module")
def samples(draw: Callable, client: Callable) -> list:
    """Twenty-four gradients of one head: uniquely recoverable ones, dense labels, a zero gradient, a noisy one."""
    weight = draw("hard", 0).weight
    drawn = [draw(FAMILIES[seed % len(FAMILIES)], seed) for seed in range(EXAMPLES)]
    uploads = [client(weight, sample.feature, sample.label) for sample in drawn]
    uploads[5] = client(weight, drawn[5].feature, drawn[5].label, factor=0.0)
    noise = np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    uploads[7].gradient[:] += 1e-4 * np.abs(uploads[7].gradient).max() * noise
    return uploads


@pytest.fixture(scope="module")
def observation(samples: list) -> Observation:
    return observe(samples[0].weight, np.stack([sample.gradient for sample in samples]))


@pytest.fixture(scope="module")
def together(observation: Observation) -> Recovery:
    return recover_many(observation)


def assert_same(found: Recovery, index: int, expected: Recovery) -> None:
    assert found.verdict[index] == expected.verdict
    assert found.format.kind[index] == expected.format.kind
    assert found.format.classes[index].tolist() == expected.format.classes.tolist()
    np.testing.assert_allclose(found.label[index], expected.label, atol=1e-6)
    np.testing.assert_allclose(found.feature[index], expected.feature, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.interval[index], expected.interval, rtol=1e-4)


def test_every_example_is_recovered_as_by_itself(samples: list, together: Recovery, recover_one: Callable) -> None:
    for index, sample in enumerate(samples):
        fast = recover_one(sample, thorough=False)
        sharp = fast.verdict == Verdict.UNIQUE and fast.evidence.label_deviation.max() < 1e-5
        settled = sharp or fast.verdict == Verdict.NO_SIGNAL
        assert_same(together, index, fast if settled else recover_one(sample, thorough=True))


def test_verdicts_are_what_was_put_in(together: Recovery) -> None:
    expected = ["unidentifiable" if FAMILIES[i % 6] == "dirichlet" else "unique" for i in range(EXAMPLES)]
    expected[5] = "no_signal"
    assert together.verdict_name.tolist() == expected


def test_results_are_numpy_arrays_with_a_leading_axis(together: Recovery) -> None:
    for leaf in jax.tree.leaves(together):
        assert isinstance(leaf, np.ndarray)
        assert leaf.shape[0] == EXAMPLES


def test_chunk_boundaries_do_not_show(
    observation: Observation, together: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three chunks, the last one padded.
    monkeypatch.setattr(many, "CHUNK_BYTES", 10 * observation.weight_gradient[0].nbytes)
    chunked = recover_many(observation)
    for index in range(EXAMPLES):
        assert_same(chunked, index, jax.tree.map(lambda leaf, i=index: leaf[i], together))


def test_progress_ends_with_all_examples(observation: Observation) -> None:
    reports: list[tuple[int, int]] = []
    recover_many(observation, progress=lambda done, total: reports.append((done, total)))
    assert {total for _, total in reports} == {EXAMPLES}
    assert reports[-1] == (EXAMPLES, EXAMPLES)


def count_programs(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Every stage that is traced from now on, with the shape of its gradients or logits."""
    traced: list[tuple] = []
    for name in ("read", "search", "verdict_of"):
        stage = getattr(many.recovery, name)

        def counted(first: object, *rest: object, stage: Callable = stage, name: str = name) -> object:
            traced.append((name, *(leaf.shape for leaf in jax.tree.leaves(first)[:2])))
            return stage(first, *rest)

        monkeypatch.setattr(many.recovery, name, counted)
    return traced


def test_equal_shapes_compile_once(
    observation: Observation, together: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = count_programs(monkeypatch)
    # In another order, fewer of them, and with one more that is not settled by the fast search.
    gradients = np.array(observation.weight_gradient[::-1][: EXAMPLES - 3])
    gradients[0] = gradients[FAMILIES.index("dirichlet")]
    recover_many(Observation(observation.weight, gradients))
    assert traced == []


def test_the_search_is_compiled_once_for_heads_of_any_size(
    observation: Observation, together: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = count_programs(monkeypatch)
    doubled = np.tile(observation.weight, 2), np.tile(observation.weight_gradient, 2)
    recover_many(Observation(*doubled))
    assert {name for name, *_ in traced} == {"read"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(observation: Observation, bad: float) -> None:
    gradients = np.array(observation.weight_gradient)
    gradients[3, 2, 1] = bad
    with pytest.raises(ValueError, match=r"weight_gradient holds 1 entries .* index \(3, 2, 1\)"):
        recover_many(Observation(observation.weight, gradients))


def test_a_single_gradient_is_refused(observation: Observation) -> None:
    with pytest.raises(ValueError, match=r"recover_many takes weight_gradient \(N, C, d\)"):
        recover_many(Observation(observation.weight, observation.weight_gradient[0]))


def test_devices_of_another_process_are_refused(observation: Observation) -> None:
    foreign = SimpleNamespace(process_index=7)
    with pytest.raises(ValueError, match=r"belong to another process; give some of jax.local_devices\(\)"):
        recover_many(observation, devices=[foreign])


def test_named_devices_give_what_the_default_one_gives(observation: Observation) -> None:
    named = recover_many(observation, method="idlg", devices=jax.local_devices()[:1])
    default = recover_many(observation, method="idlg")
    pair = [replace(one, stored_feature=one.feature) for one in (named, default)]
    jax.tree.map(np.testing.assert_array_equal, *pair)
