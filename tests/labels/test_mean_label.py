"""The mean label of several examples behind one gradient, against labels that were drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.labels.mean_label import mean_label

CLASSES, FEATURES = 12, 20
COMPILED = jax.jit(mean_label)


@pytest.fixture(autouse=True)
def _float64() -> object:
    with jax.enable_x64(True):
        yield


def draw(seed: int, size: int, spread: float, gain: float) -> tuple[list[np.ndarray], np.ndarray]:
    """W, dL/dW, b, dL/db of soft labels, in float32, and their mean; `gain` makes the network sure of itself."""
    rng = np.random.default_rng(seed)
    weight, bias = gain * rng.normal(size=(CLASSES, FEATURES)), rng.normal(size=CLASSES)
    features = rng.uniform(0.5, 1.0, FEATURES) * (1 + spread * rng.normal(size=(size, FEATURES)))
    labels = 0.9 * np.eye(CLASSES)[rng.integers(CLASSES, size=size)] + 0.1 / CLASSES
    powers = np.exp(features @ weight.T + bias)
    error = (powers / powers.sum(axis=1, keepdims=True) - labels) / size
    arrays = [weight, error.T @ features, bias, error.sum(axis=0)]
    return [array.astype(np.float32).astype(np.float64) for array in arrays], labels.mean(axis=0)


@pytest.mark.parametrize("size", [3, 10, 60])
@pytest.mark.parametrize(("spread", "gain"), [(0.01, 0.1), (0.1, 0.3), (0.3, 0.3)])
def test_the_mean_label_is_within_six_deviations(size: int, spread: float, gain: float) -> None:
    for seed in range(10):
        arrays, true = draw(seed, size, spread, gain)
        found = COMPILED(*map(jnp.asarray, arrays), 1.0 * size)
        assert np.all(np.abs(found.label - true) <= 6 * found.deviation), seed


def test_deviations_are_useful_where_features_are_alike() -> None:
    for size in (3, 10, 60):
        arrays, _ = draw(0, size, 0.01, 0.1)
        assert np.max(COMPILED(*map(jnp.asarray, arrays), 1.0 * size).deviation) < 0.03 / size


def test_few_examples_are_solved_for_beyond_the_second_order() -> None:
    # Predictions differ by more than their mean: no expansion about the mean feature gets near.
    arrays, true = draw(1, 4, 0.3, 0.3)
    weight, gradient, bias, bias_gradient = arrays
    found = COMPILED(*map(jnp.asarray, arrays), 4.0)
    feature = gradient.T @ bias_gradient / (bias_gradient @ bias_gradient)
    powers = np.exp(weight @ feature + bias)
    first = powers / powers.sum() - bias_gradient
    assert np.max(np.abs(found.label - true)) < 0.2 * np.max(np.abs(first - true))


def test_under_vmap_as_one_by_one() -> None:
    drawn = [draw(seed, 10, 0.1, 0.3)[0] for seed in range(2)]
    stacked = [jnp.stack(part) for part in zip(*map(lambda one: list(map(jnp.asarray, one)), drawn), strict=True)]
    together = jax.vmap(mean_label, in_axes=(0, 0, 0, 0, None))(*stacked, 10.0)
    for index, arrays in enumerate(drawn):
        alone = COMPILED(*map(jnp.asarray, arrays), 10.0)
        np.testing.assert_allclose(together.label[index], alone.label, atol=1e-10)
        np.testing.assert_allclose(together.deviation[index], alone.deviation, rtol=1e-6)


def test_of_no_gradient_nothing_is_claimed_to_be_known_without_an_error() -> None:
    nothing = COMPILED(jnp.ones((3, 4)), jnp.zeros((3, 4)), jnp.zeros(3), jnp.zeros(3), 5.0)
    assert np.all(nothing.deviation > 0)
