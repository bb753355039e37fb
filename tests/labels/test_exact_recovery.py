"""Format-free recovery of noiseless gradients: label, feature, scale and format, for every family and head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax import LabelKind, Recovery, Verdict, observe, recover
from softinv_jax.client.gradients import last_layer_gradient
from softinv_jax.labels.assumptions import Assumption

KINDS = {
    "hard": LabelKind.HARD,
    "smoothing": LabelKind.SMOOTHING,
    "mixup": LabelKind.MIXUP,
    "smoothed_mixup": LabelKind.SMOOTHED_MIXUP,
    "three_way_mixup": LabelKind.MIXUP,
}
SEEDS = range(6)


def assert_recovered(found: Recovery, sample: object, tolerance: float, factor: float = 1.0) -> None:
    assert found.verdict_name == "unique"
    assert np.abs(found.label - sample.label).max() < tolerance
    # The features are worth as many digits as the scalar, of which the label's entries see a part.
    distance = np.linalg.norm(found.feature - sample.feature)
    assert distance < 100 * tolerance * np.linalg.norm(sample.feature)
    np.testing.assert_allclose(
        abs(found.scalar),
        np.linalg.norm(sample.feature if sample.bias is None else np.append(sample.feature, 1.0)),
        rtol=100 * tolerance,
    )
    np.testing.assert_allclose(found.scale, factor, rtol=100 * tolerance)


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("unknown_scale", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "signed"])
@pytest.mark.parametrize("family", KINDS)
def test_without_a_bias(
    draw: Callable, recover_one: Callable, family: str, kind: str, unknown_scale: bool, thorough: bool
) -> None:
    for seed in SEEDS:
        factor = float(np.random.default_rng(seed).choice([-0.01, 1.0, 30.0])) if unknown_scale else 1.0
        sample = draw(family, seed, kind=kind, factor=factor)
        found = recover_one(sample, unknown_scale=unknown_scale, thorough=thorough)
        assert_recovered(found, sample, 1e-6 if unknown_scale else 3e-7, factor)


@pytest.mark.parametrize("unknown_scale", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_with_a_bias(draw: Callable, recover_one: Callable, family: str, unknown_scale: bool) -> None:
    for seed in SEEDS:
        factor = -0.1 if unknown_scale else 1.0
        sample = draw(family, seed, kind="signed", has_bias=True, factor=factor)
        found = recover_one(sample, unknown_scale=unknown_scale)
        assert_recovered(found, sample, 3e-6, factor)


@pytest.mark.parametrize("family", ["dirichlet", "teacher"])
def test_a_bias_and_the_scale_give_a_dense_label_on_condition(
    draw: Callable, recover_one: Callable, family: str
) -> None:
    for seed in SEEDS:
        sample = draw(family, seed, has_bias=True)
        found = recover_one(sample, unknown_scale=False)
        assert found.verdict_name == "conditional"
        assert found.assumptions.rests_on & Assumption.LOSS
        assert found.assumptions.rests_on & Assumption.SCALE
        np.testing.assert_allclose(found.label, sample.label, atol=3e-6)


@pytest.mark.parametrize("family", ["uniform", "one_zero"])
def test_a_bias_and_the_scale_give_any_structured_label(draw: Callable, recover_one: Callable, family: str) -> None:
    for seed in SEEDS:
        sample = draw(family, seed, has_bias=True)
        assert_recovered(recover_one(sample, unknown_scale=False), sample, 3e-6)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("number_of_classes", [33, 100])
def test_many_classes(draw: Callable, recover_one: Callable, family: str, number_of_classes: int) -> None:
    for seed in SEEDS:
        sample = draw(family, seed, number_of_classes=number_of_classes)
        assert_recovered(recover_one(sample, thorough=False), sample, 3e-7)


def test_a_thousand_classes(draw: Callable, recover_one: Callable) -> None:
    for family in KINDS:
        sample = draw(family, 0, number_of_classes=1000, features=16)
        assert_recovered(recover_one(sample, thorough=False), sample, 3e-7)


@pytest.mark.parametrize("family", ["hard", "smoothing"])
def test_five_classes_suffice_for_one_class_singled_out(draw: Callable, recover_one: Callable, family: str) -> None:
    for seed in SEEDS:
        sample = draw(family, seed, number_of_classes=5)
        assert_recovered(recover_one(sample), sample, 1e-6)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("unknown_scale", [False, True])
def test_format_is_read_off(draw: Callable, recover_one: Callable, family: str, unknown_scale: bool) -> None:
    for seed in SEEDS:
        sample = draw(family, seed)
        found = recover_one(sample, unknown_scale=unknown_scale).format
        level = np.median(sample.label)
        excess = sample.label - level
        order = np.argsort(-excess)[: np.sum(excess > 1e-9)]
        assert found.kind == KINDS[family]
        assert found.count == order.size
        assert found.classes[: order.size].tolist() == order.tolist()
        assert set(found.classes[order.size :].tolist()) == {-1}
        np.testing.assert_allclose(found.weights[: order.size], excess[order] / excess.sum(), atol=1e-5)
        assert not found.weights[order.size :].any()
        np.testing.assert_allclose(found.smoothing, 10 * level, atol=1e-5)


def test_the_uniform_label_is_full_smoothing(draw: Callable, recover_one: Callable) -> None:
    found = recover_one(draw("uniform", 0)).format
    assert (found.kind, found.count) == (LabelKind.SMOOTHING, 0)
    np.testing.assert_allclose(found.smoothing, 1, atol=1e-6)


@pytest.mark.parametrize("family", KINDS)
def test_recovered_label_is_a_distribution(draw: Callable, recover_one: Callable, family: str) -> None:
    for seed in SEEDS:
        label = recover_one(draw(family, seed)).label
        np.testing.assert_allclose(label.sum(), 1, atol=1e-6)
        assert label.min() >= 0


@pytest.mark.parametrize("family", KINDS)
def test_the_gradient_jax_computes_in_float32(
    draw: Callable, recover_one: Callable, client: Callable, family: str
) -> None:
    for seed in SEEDS:
        sample = draw(family, seed)
        gradient = last_layer_gradient(
            sample.weight, sample.feature.astype(np.float32), sample.label.astype(np.float32)
        )
        uploaded = type(sample)(sample.weight, sample.feature, sample.label, np.asarray(gradient.weight))
        assert_recovered(recover_one(uploaded), sample, 3e-6)


@pytest.mark.parametrize("family", KINDS)
def test_float64_gradients_give_float64_labels(draw: Callable, recover_one: Callable, family: str) -> None:
    for seed in SEEDS:
        sample = draw(family, seed, dtype=np.float64)
        found = recover_one(sample)
        assert found.label.dtype == found.feature.dtype == np.float64
        assert found.evidence.is_noiseless
        assert_recovered(found, sample, 1e-13)


def test_the_evidence_counts_the_classes_that_agree(draw: Callable, recover_one: Callable) -> None:
    for family, agreeing in (("hard", 9), ("mixup", 8), ("three_way_mixup", 7), ("uniform", 10)):
        evidence = recover_one(draw(family, 0)).evidence
        assert evidence.agreeing == agreeing
        assert evidence.distinct_logits == 10
        assert evidence.is_noiseless
        assert evidence.residual < 1e-6


@pytest.mark.parametrize("thorough", [False, True])
def test_label_deviations_cover_the_errors(draw: Callable, recover_one: Callable, thorough: bool) -> None:
    """The fast search expects independent roundings; the thorough one allows for sums that drift, five times as far."""
    errors = []
    for seed in range(40):
        sample = draw("smoothed_mixup", seed)
        found = recover_one(sample, thorough=thorough)
        errors.append(np.abs(found.label - sample.label) / found.evidence.label_deviation)
    assert np.max(errors) < 6
    assert np.mean(np.square(errors)) > (0.01 / 25 if thorough else 0.01)


def test_vmap_of_one_is_the_compiled_recovery(draw: Callable, recover_one: Callable, quick_jit: Callable) -> None:
    sample = draw("mixup", 0)
    expected = recover_one(sample, thorough=False)

    def one(gradient: jax.Array) -> Recovery:
        return recover(observe(sample.weight, gradient), thorough=False)

    found = quick_jit(jax.vmap(one))(sample.gradient[None])
    assert found.verdict.tolist() == [Verdict.UNIQUE]
    np.testing.assert_allclose(found.label[0], expected.label, atol=1e-7)
    np.testing.assert_allclose(found.feature[0], expected.feature, rtol=1e-6)


def test_a_user_who_has_x64_enabled_gets_the_same(draw: Callable, recover_one: Callable, quick_jit: Callable) -> None:
    sample = draw("mixup", 0)
    expected = recover_one(sample, thorough=False)
    with jax.enable_x64(True):
        found = quick_jit(lambda observation: recover(observation, thorough=False))(sample.observation)
    assert found.label.dtype == jnp.float32
    np.testing.assert_allclose(found.label, expected.label, atol=1e-7)
