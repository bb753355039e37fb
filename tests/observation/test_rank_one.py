"""Factors of a rank-1 gradient and the certificate that it is one, against NumPy's SVD."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.observation.rank_one import (
    RankOneFactors,
    average_rows,
    dominant_factors,
    leading_singular_factors,
    unit_roundoff,
)

CLASSES, FEATURES = 10, 48


@jax.jit
def _every_factorisation(gradient: jax.Array) -> dict[str, RankOneFactors]:
    dominant = dominant_factors(gradient)
    averaged = average_rows(gradient, dominant)
    return {
        "dominant": dominant,
        "averaged": averaged,
        "leading": leading_singular_factors(gradient, dominant),
    }


def factorise(gradient: np.ndarray) -> dict[str, RankOneFactors]:
    with jax.enable_x64(True):
        return jax.device_get(_every_factorisation(jnp.asarray(gradient)))


def outer_product(seed: int = 0, scale: float = 1.0, zeros: float = 0.0) -> np.ndarray:
    """u x^T in float64 with u of sum zero, x signed, a share of its entries zero."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=CLASSES), rng.normal(size=FEATURES)
    right[1:] *= rng.uniform(size=FEATURES - 1) >= zeros
    return scale * np.outer(left - left.mean(), right)


def assert_factors(found: RankOneFactors, gradient: np.ndarray, tolerance: float) -> None:
    """u v^T / |v| is the gradient, and u v / |v| has the leading singular value."""
    unit = found.right.astype(np.float64) / found.right_norm
    wide = gradient.astype(np.float64)
    strongest = np.linalg.norm(wide / np.abs(wide).max(), 2) * np.abs(wide).max()
    np.testing.assert_allclose(np.linalg.norm(unit), 1, rtol=tolerance)
    np.testing.assert_allclose(np.outer(found.left, unit) / strongest, wide / strongest, atol=tolerance)


@pytest.mark.parametrize("name", ["dominant", "averaged", "leading"])
@pytest.mark.parametrize("zeros", [0.0, 0.95])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_factors_of_a_float32_outer_product(name: str, zeros: float, scale: float) -> None:
    gradient = outer_product(scale=scale, zeros=zeros).astype(np.float32)
    assert_factors(factorise(gradient)[name], gradient, 3e-7)


@pytest.mark.parametrize("name", ["dominant", "averaged", "leading"])
def test_factors_of_a_float64_outer_product(name: str) -> None:
    gradient = outer_product()
    assert_factors(factorise(gradient)[name], gradient, 1e-15)


@pytest.mark.parametrize("name", ["dominant", "leading"])
@pytest.mark.parametrize("zeros", [0.0, 0.95])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_an_outer_product_is_certified_up_to_its_rounding(name: str, zeros: float, dtype: type) -> None:
    for seed in range(20):
        found = factorise(outer_product(seed, zeros=zeros).astype(dtype))[name]
        assert found.is_rounding, seed
        if name == "dominant":
            assert not found.row_noise.any()


@pytest.mark.parametrize("name", ["dominant", "leading"])
@pytest.mark.parametrize("features", [np.asarray, np.abs])
def test_a_float64_outer_product_is_certified(name: str, features: Callable) -> None:
    for seed in range(20):
        signs = np.sign(outer_product(seed)[:1])
        gradient = outer_product(seed) * (signs if features is np.abs else 1)
        assert factorise(gradient)[name].is_rounding, seed


@pytest.mark.parametrize("name", ["dominant", "leading"])
def test_a_factor_applied_after_rounding_keeps_the_certificate(name: str) -> None:
    gradient = outer_product().astype(np.float32) * np.float32(-0.1)
    assert factorise(gradient)[name].is_rounding


@pytest.mark.parametrize("name", ["dominant", "leading"])
def test_rank_two_is_not_certified(name: str) -> None:
    for seed in range(20):
        gradient = (outer_product(seed) + outer_product(seed + 100)).astype(np.float32)
        found = factorise(gradient)[name]
        assert not found.is_rounding
        assert found.row_noise.max() > 0.01


@pytest.mark.parametrize("name", ["dominant", "leading"])
def test_noise_of_one_in_a_hundred_thousand_is_not_certified(name: str) -> None:
    for seed in range(20):
        gradient = outer_product(seed)
        noise = np.random.default_rng(seed).normal(size=gradient.shape)
        gradient = gradient + 1e-5 * np.abs(gradient).max() * noise
        assert not factorise(gradient.astype(np.float32))[name].is_rounding


@pytest.mark.parametrize("name", ["dominant", "leading"])
def test_one_altered_row_is_not_certified(name: str) -> None:
    gradient = outer_product().astype(np.float32)
    gradient[3] = np.roll(gradient[3], 1)
    assert not factorise(gradient)[name].is_rounding


@pytest.mark.parametrize("name", ["dominant", "averaged", "leading"])
def test_a_zero_gradient_gives_zero_factors(name: str) -> None:
    found = factorise(np.zeros((CLASSES, FEATURES), np.float32))[name]
    assert found.is_rounding
    assert not found.left.any()
    assert not found.row_noise.any()
    assert np.isfinite(found.residual)


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.1])
def test_leading_factors_of_a_noisy_gradient_are_the_singular_pair(noise: float) -> None:
    gradient = outer_product()
    gradient = gradient + noise * np.random.default_rng(1).normal(size=gradient.shape)
    found = factorise(gradient.astype(np.float32))["leading"]
    left, values, right = np.linalg.svd(gradient.astype(np.float32).astype(np.float64))
    sign = np.sign(found.right @ right[0])
    assert np.abs(sign * found.right - right[0]).max() < 1e-6
    assert np.abs(sign * found.left - values[0] * left[:, 0]).max() < 1e-6 * values[0]


@pytest.mark.parametrize("deviations", [np.full(CLASSES, 1e-3), np.repeat([1e-3, 2e-3], CLASSES // 2)])
def test_the_noise_of_each_row_is_measured(deviations: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    measured = []
    for seed in range(40):
        gradient = outer_product(seed) + deviations[:, None] * rng.normal(size=(CLASSES, FEATURES))
        measured.append(factorise(gradient.astype(np.float32))["leading"].row_noise ** 2)
    # A strong row takes part of its own noise into the common direction: rows are right within a fifth.
    np.testing.assert_allclose(np.sqrt(np.mean(measured, axis=0)), deviations, rtol=0.2)


def test_residual_is_the_share_that_is_no_outer_product() -> None:
    gradient = outer_product()
    noisy = gradient + 1e-3 * np.random.default_rng(3).normal(size=gradient.shape)
    values = np.linalg.svd(noisy, compute_uv=False)
    expected = np.sqrt((values[1:] ** 2).sum()) / values[0]
    found = factorise(noisy.astype(np.float32))
    np.testing.assert_allclose(found["leading"].residual, expected, rtol=1e-3)
    # Four probes estimate it only roughly.
    assert expected / 2 < found["dominant"].residual < 3 * expected


def test_unit_roundoff_is_half_the_spacing_at_one() -> None:
    assert unit_roundoff(np.dtype(np.float32)) == 2.0**-24
    assert unit_roundoff(np.dtype(np.float64)) == 2.0**-53
