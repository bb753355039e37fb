"""The monotone function of one triple: the theorem sampled, and its root against scipy's bracketing search."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from softinv_jax.labels.monotone_triple import (
    log_ratio,
    log_ratio_slope,
    solve_log_ratio,
    tilted_mean,
    uniform_cumulant,
)

RNG = np.random.default_rng(0)
GAPS = np.exp(RNG.uniform(-6, 6, (200, 2)))


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def log_expm1(exponent: float) -> float:
    """log |e^t - 1| of Python floats, for t of either sign and any size."""
    return max(exponent, 0.0) + np.log(-np.expm1(-abs(exponent)))


def naive_log_ratio(scalar: float, upper_gap: float, lower_gap: float) -> float:
    """log of (e^(lambda a) - 1) / (1 - e^(-lambda b)), straight from the classes' exponentials."""
    if scalar == 0:
        return np.log(upper_gap / lower_gap)
    return log_expm1(scalar * upper_gap) - log_expm1(-scalar * lower_gap)


@pytest.mark.parametrize("reach", [1.0, 30.0, 700.0])
def test_the_function_rises_strictly_for_every_pair_of_gaps(reach: float) -> None:
    # Spaced so that the rise between neighbours exceeds float64 rounding everywhere.
    scaled = np.linspace(-reach, reach, 2001)
    for upper_gap, lower_gap in GAPS:
        scalar = scaled / max(upper_gap, lower_gap)
        values = np.asarray(log_ratio(scalar, np.full(2001, upper_gap), np.full(2001, lower_gap)))
        assert np.all(np.diff(values) > 0), (upper_gap, lower_gap)


def test_the_function_is_the_log_of_the_ratio_of_exponentials() -> None:
    scalar = RNG.uniform(-20, 20, 200) / GAPS.max(axis=1)
    top, middle, bottom = GAPS.sum(axis=1), GAPS[:, 1], np.zeros(200)
    powers = [np.exp(scalar * direction) for direction in (top, middle, bottom)]
    ratio = (powers[0] - powers[1]) / (powers[1] - powers[2])
    # The differences of the naive side cancel where two exponentials are near each other.
    lost = np.finfo(float).eps * np.maximum(powers[0], powers[1]) / np.abs(powers[0] - powers[1])
    lost += np.finfo(float).eps * np.maximum(powers[1], powers[2]) / np.abs(powers[1] - powers[2])
    error = np.abs(log_ratio(scalar, GAPS[:, 0], GAPS[:, 1]) - np.log(ratio))
    # and every exponential carries its argument's rounding, up to 40 roundoffs.
    assert np.all(error <= 1e-13 + 40 * lost)


def test_neither_overflow_nor_cancellation_anywhere() -> None:
    for scaled in (-1e5, -800.0, -1.0, -1e-3, -1e-9, -1e-300, 0.0, 1e-300, 1e-9, 1e-3, 1.0, 800.0, 1e5):
        scalar = scaled / GAPS.max(axis=1)
        expected = [naive_log_ratio(*at) for at in zip(scalar, *GAPS.T, strict=True)]
        np.testing.assert_allclose(log_ratio(scalar, *GAPS.T), expected, rtol=1e-12, atol=1e-12)


def test_cumulant_is_the_log_mean_of_the_exponential() -> None:
    arguments = np.concatenate([np.linspace(-30, 30, 401), [-0.01, 0.01, -0.0099999, 0.0099999, 0.0]])
    nodes, weights = np.polynomial.legendre.leggauss(60)
    by_quadrature = np.log(np.exp(arguments[:, None] * (nodes + 1) / 2) @ (weights / 2))
    np.testing.assert_allclose(uniform_cumulant(jnp.asarray(arguments)), by_quadrature, rtol=1e-12, atol=1e-14)


def test_tilted_mean_is_the_derivative_of_the_cumulant() -> None:
    arguments = np.concatenate([np.linspace(-40, 40, 401), [-0.01, 0.01, 0.0]])
    step = 1e-4
    ahead, behind = (uniform_cumulant(jnp.asarray(arguments + sign * step)) for sign in (1, -1))
    np.testing.assert_allclose(tilted_mean(jnp.asarray(arguments)), (ahead - behind) / (2 * step), atol=1e-8)


def test_tilted_mean_lies_in_the_unit_interval_and_rises() -> None:
    values = np.asarray(tilted_mean(jnp.linspace(-500, 500, 4001)))
    assert np.all((values > 0) & (values < 1))
    assert np.all(np.diff(values) > 0)


def test_slope_is_the_derivative_of_the_function() -> None:
    scalar = RNG.uniform(-10, 10, 200) / GAPS.max(axis=1)
    step = 1e-5 / GAPS.max(axis=1)
    ahead, behind = (log_ratio(scalar + sign * step, *GAPS.T) for sign in (1, -1))
    np.testing.assert_allclose(log_ratio_slope(scalar, *GAPS.T), (ahead - behind) / (2 * step), rtol=1e-7)


def bracketed_root(target: float, upper_gap: float, lower_gap: float) -> float:
    def excess(scalar: float) -> float:
        return naive_log_ratio(scalar, upper_gap, lower_gap) - target

    end = 1 / max(upper_gap, lower_gap)
    while excess(-end) > 0 or excess(end) < 0:
        end *= 2
    return brentq(excess, -end, end, xtol=1e-300, rtol=1e-14, maxiter=500)


@pytest.mark.parametrize("reach", [0.1, 5.0, 40.0, 500.0])
def test_root_is_that_of_a_bracketing_search(reach: float) -> None:
    targets = RNG.uniform(-reach, reach, 200)
    found = np.asarray(jax.jit(solve_log_ratio)(targets, *GAPS.T))
    expected = np.array([bracketed_root(*at) for at in zip(targets, *GAPS.T, strict=True)])
    # Next to zero the target minus log(a / b) has lost its leading digits.
    noise = 1e-15 * (1 + np.abs(targets)) / np.asarray(log_ratio_slope(expected, *GAPS.T))
    moderate = np.abs(np.log(GAPS[:, 0] / GAPS[:, 1])) < 8
    allowed = np.where(moderate, 1e-12, 1e-10) * np.abs(expected) + 10 * noise
    assert np.all(np.abs(found - expected) <= allowed)


def test_root_inverts_the_function() -> None:
    scalar = RNG.uniform(-50, 50, 200) / GAPS.max(axis=1)
    found = solve_log_ratio(log_ratio(scalar, *GAPS.T), *GAPS.T)
    error = np.abs(found - scalar) * np.asarray(log_ratio_slope(scalar, *GAPS.T))
    assert error.max() < 1e-12 * 100


def test_root_of_nan_is_nan() -> None:
    assert np.isnan(solve_log_ratio(jnp.nan, jnp.float64(1.0), jnp.float64(2.0)))
