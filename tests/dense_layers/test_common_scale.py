"""The factor that all examples share, from labels with one level on several classes."""

import numpy as np
import pytest

from softinv_jax.dense_layers.common_scale import common_scale

ERROR = 1e-7


def _examples(labels: np.ndarray, factor: float, seed: int) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    prediction = generator.dirichlet(np.ones(labels.shape[1]), len(labels))
    gradient = factor * (prediction - labels)
    noise = generator.standard_normal((2, *labels.shape)) * ERROR
    errors = np.full(labels.shape, ERROR)
    return prediction + noise[0], gradient + factor * noise[1], errors, factor * errors


@pytest.mark.parametrize("factor", [1e-3, 0.5, 1.0, 40.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_factor_of_hard_and_smoothed_labels(factor, smoothing) -> None:
    labels = (1 - smoothing) * np.eye(10)[np.arange(12) % 10] + smoothing / 10
    scale = common_scale(*_examples(labels, factor, 0))
    assert scale is not None
    assert abs(scale.value / factor - 1) < 6 * scale.deviation / factor + 1e-9
    assert scale.deviation < 1e-4 * factor


def test_no_factor_is_read_off_dense_labels() -> None:
    for seed in range(20):
        labels = np.random.default_rng(100 + seed).dirichlet(np.ones(10), 12)
        assert common_scale(*_examples(labels, 1.0, seed)) is None


def test_too_few_classes_tell_nothing() -> None:
    assert common_scale(*_examples(np.eye(2)[[0, 1, 0]], 1.0, 0)) is None
