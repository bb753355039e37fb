"""The mean label of many examples, against the labels themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.labels.mean_label import mean_label


def batch(seed: int, classes: int, size: int, spread: float) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    rng = np.random.default_rng(seed)
    weight, bias = rng.uniform(-0.2, 0.2, (classes, 40)), rng.uniform(-0.2, 0.2, classes)
    features = np.maximum(rng.uniform(0, 1, 40) + spread * rng.normal(size=(size, 40)), 0)
    labels = np.eye(classes)[rng.integers(classes, size=size)]
    powers = np.exp(features @ weight.T + bias)
    error = powers / powers.sum(axis=1, keepdims=True) - labels
    return (weight, error.T @ features / size, bias, error.mean(axis=0)), labels.mean(axis=0)


@pytest.mark.parametrize(("classes", "size"), [(4, 6), (10, 32), (30, 200)])
@pytest.mark.parametrize("spread", [0.01, 0.1, 0.5])
def test_it_is_within_its_deviations(classes: int, size: int, spread: float) -> None:
    with jax.enable_x64(True):
        compiled = jax.jit(mean_label)
        for seed in range(40):
            arrays, truth = batch(seed, classes, size, spread)
            found = compiled(*(jnp.asarray(array) for array in arrays), float(size))
            off = np.abs(np.asarray(found.label) - truth)
            assert np.all(off <= 6 * np.asarray(found.deviation) + 1e-12), seed
            np.testing.assert_allclose(np.sum(found.label), 1, atol=1e-9)


def test_nearly_parallel_features_tell_it_sharply() -> None:
    with jax.enable_x64(True):
        arrays, _ = batch(0, 30, 200, 0.01)
        found = mean_label(*(jnp.asarray(array) for array in arrays), 200.0)
        assert np.max(found.deviation) < 0.05 / 200
