"""Counts of classes in large batches: never wrong where they are told, and refused in words where they cannot be."""

import itertools

import numpy as np
import pytest

import softinv_jax
from softinv_jax.batches.class_counts import ClassCounts, count_classes, whole_counts


def observation(
    seed: int, size: int, *, bias: bool = True, spread: float = 0.05, smoothing: float = 0.0, classes: int = 40
) -> tuple[softinv_jax.Observation, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.2, 0.2, (classes, 30)).astype(np.float32)
    offset = rng.uniform(-0.2, 0.2, classes).astype(np.float32) * bias
    features = np.maximum(rng.uniform(0, 1, 30) + spread * rng.normal(size=(size, 30)), 0)
    labels = np.eye(classes)[rng.integers(classes, size=size)]
    powers = np.exp(features @ weight.T + offset)
    error = powers / powers.sum(axis=1, keepdims=True) - ((1 - smoothing) * labels + smoothing / classes)
    arrays = [weight, (error.T @ features / size).astype(np.float32)]
    if bias:
        arrays += [offset, error.mean(axis=0).astype(np.float32)]
    return softinv_jax.observe(*arrays), labels.sum(axis=0)


@pytest.mark.parametrize("size", [40, 200, 1000])
def test_counts_are_right_where_they_are_told(size: int) -> None:
    for seed in range(10):
        seen, truth = observation(seed, size)
        found = softinv_jax.recover(seen, batch_size=size)
        assert isinstance(found, ClassCounts)
        told = found.count >= 0
        np.testing.assert_array_equal(found.count[told], truth[told])
        assert found.likeliest.sum() == size
        assert np.all((found.interval[:, 0] <= truth / size) & (truth / size <= found.interval[:, 1]))


def test_smoothed_labels_are_no_counts() -> None:
    seen, truth = observation(0, 50, smoothing=0.2)
    found = count_classes(seen, 50)
    assert not found.is_whole
    assert (found.count == -1).all()
    assert np.all(np.abs(found.label - 0.8 * truth / 50 - 0.2 / 40) <= 6 * found.deviation)


def test_without_a_bias_there_are_intervals() -> None:
    for seed in range(5):
        seen, truth = observation(seed, 50, bias=False)
        found = count_classes(seen, 50)
        assert np.all((found.interval[:, 0] <= truth / 50 + 1e-9) & (truth / 50 <= found.interval[:, 1] + 1e-9))


def test_wide_features_leave_counts_open() -> None:
    seen, _ = observation(0, 1000, spread=3.0)
    found = count_classes(seen, 1000)
    assert (found.count == -1).any()


def test_integer_least_squares_is_the_optimum() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts, deviation = rng.uniform(0, 3, 3), rng.uniform(0.1, 1, 3)
        found = whole_counts(counts, deviation, 5)
        every = [np.array(c) for c in itertools.product(range(6), repeat=3) if sum(c) == 5]
        costs = [np.sum(((c - counts) / deviation) ** 2) for c in every]
        np.testing.assert_allclose(np.sum(((found - counts) / deviation) ** 2), min(costs))


def test_nothing_is_made_up_of_nothing() -> None:
    zero = softinv_jax.observe(np.ones((4, 5)), np.zeros((4, 5)), np.ones(4), np.zeros(4))
    found = count_classes(zero, 10)
    assert np.isnan(found.label).all()
    assert (found.count == -1).all()


@pytest.mark.parametrize("size", [0, -3, True])
def test_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        count_classes(observation(0, 8)[0], size)


def test_an_unknown_scale_leaves_nothing() -> None:
    with pytest.raises(ValueError, match="only at a known scale"):
        softinv_jax.recover(observation(0, 50)[0], batch_size=50, unknown_scale=True)
