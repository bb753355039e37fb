"""Every assumption, broken: the recovery says so, or finds what is so, and never calls a wrong label unique."""

from collections.abc import Callable

import numpy as np
import pytest

import softinv_jax
from softinv_jax import Assumption, Loss, explain_assumptions

SEEDS = range(6)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def with_gradient(sample: object, error: np.ndarray, dtype: type = np.float32) -> object:
    """The same client with another dL/dz."""
    gradient = np.outer(error, sample.feature).astype(dtype)
    bias_gradient = None if sample.bias is None else error.astype(dtype)
    return type(sample)(sample.weight, sample.feature, sample.label, gradient, sample.bias, bias_gradient)


def logits(sample: object) -> np.ndarray:
    return sample.weight.astype(float) @ sample.feature + (0 if sample.bias is None else sample.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factor", [0.5, 0.1, 3.0, -1.0])
def test_a_forgotten_factor_is_found(draw: Callable, recover_one: Callable, factor: float, bias: bool) -> None:
    for seed in SEEDS:
        sample = draw("hard", seed, has_bias=bias, factor=factor)
        found = recover_one(sample)
        assert found.verdict_name == "unique"
        assert found.assumptions.loss == Loss.WEIGHTED_CROSS_ENTROPY
        assert found.assumptions.refuted & Assumption.SCALE
        np.testing.assert_allclose(found.scale, factor, rtol=1e-4)
        np.testing.assert_allclose(found.label, sample.label, atol=1e-5)
        # A factor of its own gives other losses room for other shares.
        found = recover_one(draw("mixup", seed, has_bias=bias, factor=factor))
        assert found.verdict_name in ("conditional", "ambiguous", "unidentifiable")


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_is_found(draw: Callable, recover_one: Callable, temperature: float) -> None:
    for seed in SEEDS:
        sample = draw("smoothing", seed, has_bias=True)
        sample = with_gradient(sample, (softmax(logits(sample) / temperature) - sample.label) / temperature)
        found = recover_one(sample)
        assert found.verdict_name == "unique"
        assert found.assumptions.loss == Loss.TEMPERED_CROSS_ENTROPY
        np.testing.assert_allclose(found.assumptions.temperature, temperature, rtol=1e-4)
        np.testing.assert_allclose(found.label, sample.label, atol=1e-5)
        np.testing.assert_allclose(found.feature * temperature, sample.feature, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ones", [1, 3])
def test_independent_sigmoids_are_found(draw: Callable, recover_one: Callable, ones: int, bias: bool) -> None:
    for seed in SEEDS:
        sample = draw("hard", seed, has_bias=bias)
        label = np.zeros(10)
        label[np.random.default_rng(seed).permutation(10)[:ones]] = 1
        sample = with_gradient(sample, (sigmoid(logits(sample)) - label) / 10)
        found = recover_one(sample)
        assert found.verdict_name == "unique"
        assert found.assumptions.loss == Loss.BINARY_CROSS_ENTROPY
        assert found.assumptions.refuted & Assumption.SOFTMAX
        np.testing.assert_array_equal(found.label, label)


def test_without_a_bias_signed_features_leave_sigmoids_and_their_complement(
    draw: Callable, recover_one: Callable
) -> None:
    for seed in SEEDS:
        sample = draw("hard", seed, kind="signed")
        found = recover_one(with_gradient(sample, (sigmoid(logits(sample)) - sample.label) / 10))
        assert found.verdict_name != "unique"


@pytest.mark.parametrize("bias", [False, True])
def test_two_examples_are_not_one(draw: Callable, recover_one: Callable, bias: bool) -> None:
    for seed in SEEDS:
        first, second = (draw("smoothing", seed, has_bias=bias) for _ in range(2))
        rng = np.random.default_rng(seed)
        # Nearly parallel, as in untrained networks: the second differs by a hundredth.
        feature = (first.feature * (1 + 0.01 * rng.normal(size=first.feature.shape))).astype(np.float32)
        label = np.roll(first.label, 3)
        error = softmax(first.weight.astype(float) @ feature + (0 if first.bias is None else first.bias)) - label
        gradient = (first.gradient + np.outer(error, feature).astype(np.float32)) / 2
        bias_gradient = None if first.bias is None else (first.bias_gradient + error.astype(np.float32)) / 2
        found = recover_one(type(second)(first.weight, feature, label, gradient, first.bias, bias_gradient))
        assert found.verdict_name == "refuted"
        assert found.assumptions.refuted & Assumption.ONE_EXAMPLE
        assert found.assumptions.examples == 2
        if bias:
            truth = (first.label + label) / 2
            assert np.all(np.abs(found.mean.label - truth) <= 6 * found.mean.deviation)


def test_noise_is_no_second_example(draw: Callable, recover_one: Callable) -> None:
    for seed in SEEDS:
        sample = draw("smoothing", seed, has_bias=True)
        noise = 1e-4 * np.abs(sample.gradient).max() * np.random.default_rng(seed).normal(size=sample.gradient.shape)
        found = recover_one(
            type(sample)(
                sample.weight,
                sample.feature,
                sample.label,
                (sample.gradient + noise).astype(np.float32),
                sample.bias,
                (sample.bias_gradient + noise[:, 0]).astype(np.float32),
            )
        )
        assert not found.assumptions.refuted
        assert np.all(np.abs(found.label - sample.label) <= 6 * found.evidence.label_deviation)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_set_to_zero_are_missed(draw: Callable, recover_one: Callable, count: int, bias: bool) -> None:
    for seed in SEEDS:
        sample = draw("smoothing", seed, has_bias=bias)
        weakest = np.argsort(np.linalg.norm(sample.gradient, axis=1))[:count]
        sample.gradient[weakest] = 0
        if bias:
            sample.bias_gradient[weakest] = 0
        found = recover_one(sample)
        assert found.verdict_name in ("refuted", "unidentifiable")
        assert np.isnan(found.label).all()


@pytest.mark.parametrize("bias", [False, True])
def test_signs_are_no_gradient(draw: Callable, recover_one: Callable, bias: bool) -> None:
    for seed in SEEDS:
        sample = draw("hard", seed, has_bias=bias, kind="signed")
        step = type(sample)(
            sample.weight,
            sample.feature,
            sample.label,
            np.sign(sample.gradient) * np.float32(0.5),
            sample.bias,
            None if not bias else np.sign(sample.bias_gradient) * np.float32(0.5),
        )
        found = recover_one(step)
        assert found.verdict_name == "refuted"
        assert found.assumptions.refuted & Assumption.GRADIENT
        assert found.format.classes[0] == np.argmax(sample.label)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_float64_arrays_of_float32_numbers(draw: Callable, recover_one: Callable, converted: bool, bias: bool) -> None:
    for seed in SEEDS:
        sample = draw("smoothing", seed, has_bias=bias)
        error = (softmax(logits(sample)) - sample.label).astype(np.float32)
        if converted:
            held = with_gradient(sample, error.astype(float))
            wide = type(sample)(
                sample.weight,
                sample.feature,
                sample.label,
                held.gradient.astype(float),
                sample.bias,
                None if not bias else held.bias_gradient.astype(float),
            )
        else:  # Exact products of float32 factors.
            wide = with_gradient(sample, error.astype(float), np.float64)
        found = recover_one(wide)
        assert found.verdict_name == "unique"
        np.testing.assert_allclose(found.label, sample.label, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_coarse_logits_of_the_client(draw: Callable, recover_one: Callable, bias: bool) -> None:
    """As TF32 leaves them: p off by a thousandth, the outer product exact."""
    for seed in SEEDS:
        sample = draw("hard", seed, has_bias=bias)
        errors = 1e-3 * np.random.default_rng(seed).normal(size=10)
        found = recover_one(with_gradient(sample, softmax(logits(sample) + errors) - sample.label))
        assert found.verdict_name in ("unique", "conditional")
        assert found.assumptions.refuted & Assumption.PARAMETERS
        assert 1e-4 < found.assumptions.logit_error < 1e-2
        assert np.all(np.abs(found.label - sample.label) <= 6 * found.evidence.label_deviation + 1e-6)


@pytest.mark.parametrize("family", ["hard", "smoothing"])
def test_two_classes_with_a_bias_are_closed_form(client: Callable, recover_one: Callable, family: str) -> None:
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        weight, bias = rng.uniform(-0.5, 0.5, (2, 32)).astype(np.float32), rng.normal(size=2).astype(np.float32)
        label = np.array([1.0, 0.0]) if family == "hard" else np.array([0.7, 0.3])
        found = recover_one(client(weight, rng.uniform(size=32), label, bias))
        assert found.verdict_name == "conditional"
        np.testing.assert_allclose(found.label, label, atol=1e-5)


def test_one_sigmoid_output_with_a_bias_is_closed_form(draw: Callable, recover_one: Callable) -> None:
    for seed in SEEDS:
        drawn = draw("hard", seed, has_bias=True)
        one = type(drawn)(drawn.weight[:1], drawn.feature, np.array([seed % 2]), None, drawn.bias[:1])
        found = recover_one(with_gradient(one, sigmoid(logits(one)) - seed % 2))
        assert found.verdict_name == "conditional"
        assert found.assumptions.loss == Loss.BINARY_CROSS_ENTROPY
        np.testing.assert_allclose(found.label, [seed % 2], atol=1e-5)


def test_a_loss_that_is_told_is_the_only_one_tried(draw: Callable) -> None:
    sample = draw("hard", 0, has_bias=True, factor=0.5)
    found = softinv_jax.recover(sample.observation, loss="cross_entropy")
    assert found.verdict_name in ("conditional", "refuted")
    with pytest.raises(ValueError, match=r"loss must be one of auto, .* not 'hinge'"):
        softinv_jax.recover(sample.observation, loss="hinge")


def test_every_assumption_has_words() -> None:
    every = Assumption(0)
    for one in Assumption:
        every |= one
    words = explain_assumptions(every)
    assert [one.code for one in words] == [str(one.name).lower() for one in Assumption]
    assert all(one.sentence.endswith(".") and one.remedy.endswith(".") for one in words)
