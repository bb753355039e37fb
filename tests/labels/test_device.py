"""`recover_many` of arrays on a device: results stay there, nothing travels unasked, few programs are made.

Host-to-device copies are what `jax.transfer_guard` sees on a CPU; what is fetched is counted by size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from softinv_jax import Observation, Recovery, Verdict, observe, recover, recover_many
from softinv_jax.labels.lanes import Place

EXAMPLES, CLASSES, FEATURES = 24, 10, 32
FAMILIES = ("hard", "smoothing", "mixup", "smoothed_mixup")
SIZES, NEW_SIZES = (17, 40), (20, 23, 33, 57)
TRACING = "/jax/core/compile/jaxpr_trace_duration"


def gradients_of(draw: Callable, client: Callable, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight and gradients of one head: mostly unique ones, a dense label, a zero gradient, a noisy one."""
    weight = draw("hard", 0).weight
    families = [FAMILIES[seed % len(FAMILIES)] for seed in range(examples)]
    families[3] = "dirichlet"
    drawn = [draw(family, seed) for seed, family in enumerate(families)]
    gradients = np.stack([client(weight, sample.feature, sample.label).gradient for sample in drawn])
    gradients[5] = 0
    noise = np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    gradients[7] += 1e-4 * np.abs(gradients[7]).max() * noise
    return weight, gradients


@pytest.fixture(scope="module")
def on_host(draw: Callable, client: Callable) -> Observation:
    return observe(*gradients_of(draw, client, EXAMPLES))


@pytest.fixture(scope="module")
def on_device(on_host: Observation) -> Observation:
    return placed(on_host)


@pytest.fixture(scope="module")
def expected(on_host: Observation) -> Recovery:
    """By the NumPy path."""
    return recover_many(on_host)


@pytest.fixture(scope="module")
def found(on_device: Observation) -> Recovery:
    return recover_many(on_device)


def placed(observation: Observation) -> Observation:
    """The same on the device."""
    return jax.tree.map(jax.device_put, observation)


def first(observation: Observation, count: int) -> Observation:
    """Some of them, repeated where they do not suffice; NumPy."""
    chosen = np.arange(count) % EXAMPLES
    return Observation(observation.weight, observation.weight_gradient[chosen])


def test_numpy_in_numpy_out(expected: Recovery) -> None:
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(expected))
    assert isinstance(expected.feature, np.ndarray)


@pytest.mark.parametrize("thorough", [False, True], ids=["fast", "thorough"])
def test_what_is_on_a_device_stays_there(on_device: Observation, thorough: bool) -> None:
    recovery = recover_many(on_device, thorough=thorough)
    leaves = [*jax.tree.leaves(recovery), recovery.feature]
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert {device for leaf in leaves for device in leaf.devices()} == on_device.weight_gradient.devices()


def test_verdicts_are_what_was_put_in(found: Recovery) -> None:
    verdicts = dict.fromkeys(range(EXAMPLES), Verdict.UNIQUE) | {3: Verdict.UNIDENTIFIABLE, 5: Verdict.NO_SIGNAL}
    assert np.asarray(found.verdict).tolist() == list(verdicts.values())


def test_results_are_those_of_the_numpy_path(found: Recovery, expected: Recovery) -> None:
    def same(own: jax.Array, other: np.ndarray) -> None:
        assert own.dtype == other.dtype
        if np.issubdtype(other.dtype, np.floating):
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(own, other)

    # All that is said of a label. How far something fits, in units of its own rounding, may differ more.
    for name in ("label", "feature", "scalar", "scale", "verdict", "interval"):
        same(getattr(found, name), getattr(expected, name))
    jax.tree.map(same, found.format, expected.format)
    np.testing.assert_array_equal(found.evidence.agreeing, expected.evidence.agreeing)
    np.testing.assert_array_equal(found.assumptions.refuted, expected.assumptions.refuted)


def test_features_made_on_demand_are_those_of_single_recoveries(
    on_host: Observation, found: Recovery, expected: Recovery
) -> None:
    for index in (0, 1, 2, 3, 5, 7):
        one = recover(Observation(on_host.weight, on_host.weight_gradient[index]))
        for feature in (found.feature[index], expected.feature[index]):
            np.testing.assert_allclose(feature, one.feature, rtol=1e-4, atol=1e-6)
    # NaN exactly where no label is given, and with the length that the scalar says.
    given = np.asarray(found.verdict) >= Verdict.AMBIGUOUS
    np.testing.assert_array_equal(np.isfinite(found.feature).all(axis=1), given)
    length = np.linalg.norm(np.asarray(found.feature)[given], axis=1)
    np.testing.assert_allclose(length, np.abs(np.asarray(found.scalar)[given]), rtol=1e-4)


@pytest.fixture
def guarded() -> Iterator[Callable[[], None]]:
    """From when it is called, transfers that nobody asked for are errors, in all threads."""
    yield lambda: jax.config.update("jax_transfer_guard", "disallow")
    jax.config.update("jax_transfer_guard", "allow")


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("thorough", [False, True], ids=["fast", "thorough"])
def test_nothing_travels_unasked(on_device: Observation, thorough: bool, guarded: Callable[[], None]) -> None:
    recover_many(on_device, thorough=thorough).feature  # noqa: B018 - compiling moves constants
    guarded()
    recovery = recover_many(on_device, thorough=thorough)
    jax.block_until_ready((recovery.verdict, recovery.feature))


def test_the_guard_sees_what_it_should(on_host: Observation, guarded: Callable[[], None]) -> None:
    double = jax.jit(lambda array: 2 * array)
    double(on_host.weight)
    guarded()
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        double(on_host.weight)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is treated as an accelerator with little memory."""
    monkeypatch.setattr(Place, "is_cpu", False)
    monkeypatch.setattr(Place, "free_bytes", 48 * 2**20)  # For groups as large as a CPU has them.


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all device arrays that are made NumPy arrays from now on."""
    sizes: list[int] = []

    def counting(convert: Callable) -> Callable:
        def counted(value: Any, *rest: Any, **options: Any) -> Any:
            sizes.extend(leaf.size for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array))
            return convert(value, *rest, **options)

        return counted

    for module, name in ((np, "asarray"), (np, "array"), (jax, "device_get")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return sizes


@pytest.mark.usefixtures("accelerator")
def test_an_accelerator_gives_the_same(on_device: Observation, expected: Recovery) -> None:
    recovery = recover_many(on_device)
    np.testing.assert_array_equal(recovery.verdict, expected.verdict)
    np.testing.assert_allclose(recovery.label, expected.label, atol=1e-6)
    np.testing.assert_allclose(recovery.feature, expected.feature, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("thorough", [False, True], ids=["fast", "thorough"])
def test_no_more_than_a_flag_an_example_is_fetched(on_device: Observation, thorough: bool, fetched: list[int]) -> None:
    recover_many(on_device, thorough=thorough)
    assert max(fetched) <= 4 * EXAMPLES  # Padded, perhaps.


def test_fetching_is_seen(on_device: Observation, fetched: list[int]) -> None:
    np.asarray(on_device.weight_gradient)
    assert max(fetched) == EXAMPLES * CLASSES * FEATURES


@pytest.fixture
def traces() -> Iterator[Callable[[], list[float]]]:
    """Seconds of each program that was traced since it was last asked."""
    seconds: list[float] = []

    def note(event: str, duration: float, **_: Any) -> None:
        if event == TRACING:
            seconds.append(duration)

    def since() -> list[float]:
        found = list(seconds)
        seconds.clear()
        return found

    jax.monitoring.register_event_duration_secs_listener(note)
    yield since
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("place", [lambda seen: seen, placed], ids=["numpy", "device"])
def test_a_second_call_makes_no_program(
    on_host: Observation, place: Callable, traces: Callable[[], list[float]]
) -> None:
    observation = place(on_host)
    recover_many(observation)
    traces()
    recover_many(observation)
    assert traces() == []


def test_programs_do_not_grow_with_the_number_of_examples(
    on_host: Observation, traces: Callable[[], list[float]]
) -> None:
    jax.clear_caches()
    for size in SIZES:
        recover_many(placed(first(on_host, size)))
    longest = max(traces())
    for size in NEW_SIZES:  # How many need the thorough search differs as well.
        recover_many(placed(first(on_host, size)))
    found = traces()
    # No search among them: at most what pads and cuts off, a few small programs for each new N.
    assert len(found) <= 4 * len(NEW_SIZES)
    assert max(found, default=0.0) < longest / 5


def test_gradients_that_are_not_finite_are_named_on_the_device_too(on_host: Observation) -> None:
    gradients = np.array(on_host.weight_gradient)
    gradients[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match=r"weight_gradient holds 1 entries .* index \(3, 2, 1\)"):
        recover_many(placed(Observation(on_host.weight, gradients)))
