"""Counts of classes in batches too large to separate, against the classes that were drawn."""

import itertools

import numpy as np
import pytest

import softinv_jax
from softinv_jax.batches.class_counts import ClassCounts, count_classes, whole_counts

CLASSES, FEATURES = 24, 32


def draw(
    seed: int, size: int, *, has_bias: bool = True, spread: float = 0.005, hard: bool = True, reduction: str = "mean"
) -> tuple[softinv_jax.Observation, np.ndarray]:
    """A float32 gradient of the loss over a batch, and its mean label (C,)."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.uniform(-0.3, 0.3, (CLASSES, FEATURES)), has_bias * rng.uniform(-0.3, 0.3, CLASSES)
    features = rng.uniform(0.5, 1.0, FEATURES) * (1 + spread * rng.normal(size=(size, FEATURES)))
    labels = np.eye(CLASSES)[rng.integers(CLASSES, size=size)]
    if not hard:
        labels = 0.83 * labels + 0.17 * rng.dirichlet(np.ones(CLASSES), size)
    powers = np.exp(features @ weight.T + bias)
    error = (powers / powers.sum(axis=1, keepdims=True) - labels) / (size if reduction == "mean" else 1)
    head = (bias.astype(np.float32), error.sum(axis=0).astype(np.float32)) if has_bias else (None, None)
    gradient = (error.T @ features).astype(np.float32)
    return softinv_jax.observe(weight.astype(np.float32), gradient, *head), labels.mean(axis=0)


def holds(found: ClassCounts, true: np.ndarray) -> bool:
    return bool(np.all((found.interval[:, 0] <= true) & (true <= found.interval[:, 1])))


@pytest.mark.parametrize("size", [24, 60, 300])
def test_counts_with_a_bias(size: int) -> None:
    for seed in range(5):
        observation, true = draw(seed, size)
        found = count_classes(observation, size)
        assert holds(found, true)
        assert found.is_whole
        np.testing.assert_array_equal(found.likeliest, np.round(size * true))
        assert np.all((found.count == found.likeliest) | (found.certainty < 0.99))
        assert np.mean(found.count >= 0) > 0.5


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2])
def test_without_a_bias_the_interval_holds_and_no_count_is_wrong(spread: float) -> None:
    for seed, size in itertools.product(range(5), (8, 40)):
        observation, true = draw(seed, size, has_bias=False, spread=spread)
        found = count_classes(observation, size)
        assert holds(found, true), (seed, size)
        told = found.count >= 0
        np.testing.assert_array_equal(found.count[told], np.round(size * true)[told])


def test_soft_labels_have_a_mean_but_no_counts() -> None:
    observation, true = draw(0, 50, hard=False)
    found = count_classes(observation, 50)
    assert holds(found, true)
    assert np.max(np.abs(found.label - true)) < 0.1 / 50
    assert not found.is_whole
    assert np.all(found.count == -1)


def test_examples_too_different_to_count_are_not_counted() -> None:
    observation, true = draw(0, 300, spread=1.0)
    found = count_classes(observation, 300)
    assert holds(found, true)
    wrong = (found.count >= 0) & (found.count != np.round(300 * true))
    assert not np.any(wrong)
    assert np.any(found.count == -1)


def test_the_sum_over_the_batch_is_divided_by_its_size() -> None:
    counts = [
        count_classes(draw(1, 40, reduction=reduction)[0], 40, reduction=reduction).count
        for reduction in ("mean", "sum")
    ]
    np.testing.assert_array_equal(*counts)
    assert np.all(counts[0] >= 0)


def test_a_size_not_told_gives_the_mean_label_alone() -> None:
    observation, true = draw(2, 40)
    found = count_classes(observation)
    assert holds(found, true)
    assert np.all(found.count == -1)
    assert found.batch_size is None


def test_a_size_told_wrong_is_no_whole_number() -> None:
    observation, _ = draw(3, 40)
    found = count_classes(observation, 41)
    assert not found.is_whole
    assert np.all(found.count == -1)


def test_a_gradient_at_another_scale_is_no_label() -> None:
    observation, _ = draw(4, 40)
    gradient, bias_gradient = 50 * observation.weight_gradient, 50 * observation.bias_gradient
    found = count_classes(softinv_jax.observe(observation.weight, gradient, observation.bias, bias_gradient), 40)
    assert np.all(np.isnan(found.label))
    assert np.all(np.isinf(found.deviation))
    assert np.all(found.count == -1)
    nothing = count_classes(
        softinv_jax.observe(observation.weight, 0 * gradient, observation.bias, 0 * bias_gradient), 40
    )
    assert np.all(np.isnan(nothing.label))


def test_recover_gives_counts_for_as_many_examples_as_classes() -> None:
    observation, true = draw(5, 40)
    found = softinv_jax.recover(observation, batch_size=40)
    assert isinstance(found, ClassCounts)
    np.testing.assert_array_equal(found.count, np.round(40 * true))


def test_integer_least_squares_is_the_least_of_all() -> None:
    rng = np.random.default_rng(0)
    every = np.array([one for one in itertools.product(range(7), repeat=4) if sum(one) == 6])
    for _ in range(20):
        counts, deviation = rng.uniform(-1, 4, 4), rng.uniform(0.1, 1, 4)
        costs = np.sum(((every - counts) / deviation) ** 2, axis=1)
        found = whole_counts(counts, deviation, 6)
        assert found.sum() == 6
        assert np.sum(((found - counts) / deviation) ** 2) <= costs.min() + 1e-9


@pytest.mark.parametrize("size", [0, -3, True])
def test_a_size_that_is_none_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        count_classes(draw(0, 8)[0], size)


def test_what_cannot_be_counted_is_refused() -> None:
    observation, _ = draw(0, 8)
    with pytest.raises(ValueError, match="needs batch_size"):
        count_classes(observation, reduction="sum")
    several = softinv_jax.observe(
        observation.weight,
        np.stack([observation.weight_gradient] * 2),
        observation.bias,
        np.stack([observation.bias_gradient] * 2),
    )
    with pytest.raises(ValueError, match="takes one gradient"):
        count_classes(several, 8)
