"""Least squares under noise against dense matrices in NumPy, and shares too small to be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softinv_jax
from softinv_jax.float64 import in_float64
from softinv_jax.labels.noise_model import Choice, Problem, State, solve
from softinv_jax.labels.scalar_equation import DirectionNoise, ScalarEquation, Unknowns, label_deviation
from softinv_jax.linear_algebra import root_of_semidefinite


def problem(classes: int, correlated: int, rng: np.random.Generator) -> tuple[Problem, np.ndarray]:
    """A problem, and the dense covariance of z that it stands for."""
    left = rng.normal(size=classes) * 0.3
    equation = ScalarEquation(
        direction=jnp.asarray(rng.normal(size=classes)),
        offset=jnp.zeros(classes),
        left=jnp.asarray(left - left.mean()),
        left_deviation=jnp.asarray(rng.uniform(1e-3, 2e-3, classes)),
        direction_deviation=jnp.zeros(classes),
        weight_norm=jnp.ones(classes),
        roundoff=jnp.asarray(6e-8),
        logit_error=jnp.zeros(()),
        known_scalar=jnp.asarray(np.nan),
    )
    rows = rng.normal(size=(correlated, 50))
    own = 1e-6 * rows @ rows.T
    root = np.zeros((classes, correlated))
    root[:correlated] = root_of_semidefinite(jnp.asarray(own))
    rest = np.where(np.arange(classes) < correlated, 0.0, rng.uniform(1e-5, 2e-5, classes))
    dense = np.diag(rest)
    dense[:correlated, :correlated] += own
    noise = DirectionNoise(jnp.asarray(root), None if correlated == classes else jnp.asarray(rest))
    return Problem(equation, noise, jnp.asarray(1e-7), Unknowns(scalar=True, scale=False)), dense


@pytest.mark.parametrize(("classes", "correlated"), [(6, 6), (40, 40), (40, 12)])
@in_float64
def test_a_step_is_that_of_dense_matrices(classes: int, correlated: int) -> None:
    rng = np.random.default_rng(classes + correlated)
    given, dense = problem(classes, correlated, rng)
    choice = Choice(jnp.asarray([1, 3], jnp.int32), jnp.asarray([True, False]), jnp.zeros(()))
    scalar = 3.0
    state = State(jnp.asarray(scalar), jnp.asarray(1 / scalar), jnp.asarray([0.4, 0.0]), jnp.zeros(classes))
    step = solve(given, state, choice)

    z, u = np.asarray(given.own.direction), np.asarray(given.own.left)
    p = np.exp(scalar * z) / np.exp(scalar * z).sum()
    raw = p - u / scalar
    slope = np.diag(p) - np.outer(p, p)
    deviation = np.asarray(label_deviation(given.own, state.scalar, state.factor, jnp.asarray(p), jnp.asarray(raw)))
    if correlated < classes:  # The others: each its own error, and one in common, by the sum of the softmax.
        rest = np.where(np.arange(classes) < correlated, 0.0, np.diag(dense)) * scalar**2
        inner = dense.copy()
        inner[correlated:, correlated:] = 0
        covariance = slope @ inner @ slope * scalar**2 + np.diag(p**2 * rest) + np.sum(p**2 * rest) * np.outer(p, p)
    else:
        covariance = slope @ dense @ slope * scalar**2
    covariance += np.diag(deviation**2) + 1e-7 * np.outer(u, u)
    column = np.eye(classes)[1] - 1 / classes
    residual = raw - 1 / classes - 0.4 * column
    by_scalar = slope @ z + (residual + u / scalar) / scalar
    design = np.stack([by_scalar, -column], axis=1)
    precision = np.linalg.inv(covariance)
    normal = design.T @ precision @ design + np.diag([0.0, 1.0])
    change = -np.linalg.solve(normal, design.T @ precision @ residual + [0.0, 0.4])
    np.testing.assert_allclose(np.asarray(step.change)[[0, 2]], change, rtol=1e-6)
    np.testing.assert_allclose(step.chi_squared, residual @ precision @ residual + 0.4**2, rtol=1e-6)
    np.testing.assert_allclose(step.log_determinant, np.linalg.slogdet(covariance)[1], rtol=1e-9)


@in_float64
def test_a_root_of_a_matrix_without_full_rank() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3))
    root = np.asarray(jax.jit(root_of_semidefinite)(jnp.asarray(rows @ rows.T)))
    np.testing.assert_allclose(root @ root.T, rows @ rows.T, atol=1e-9)


def test_a_share_too_small_to_be_seen_is_in_the_deviation() -> None:
    """Nearly hard labels: the small share trades with lambda, far beyond what noise does to either."""
    rng = np.random.default_rng(3)
    classes, features, examples = 10, 64, 1024
    weight = rng.uniform(-0.5, 0.5, (classes, features)).astype(np.float32)
    feature = 2 / (1 + np.exp(-rng.normal(size=(examples, features))))
    first = rng.integers(0, classes, examples)
    second = (first + rng.integers(1, classes, examples)) % classes
    share = 10.0 ** rng.uniform(-4.5, -2.5, examples)
    label = np.zeros((examples, classes))
    label[np.arange(examples), first], label[np.arange(examples), second] = 1 - share, share
    logits = feature @ weight.T.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradient = (powers / powers.sum(axis=1, keepdims=True) - label)[:, :, None] * feature[:, None, :]
    size = np.sqrt(np.mean(gradient**2, axis=(1, 2), keepdims=True))
    gradient += 1e-4 * size * rng.normal(size=gradient.shape)
    found = softinv_jax.recover_many(softinv_jax.observe(weight, gradient.astype(np.float32)), thorough=True)
    unique = found.verdict == softinv_jax.Verdict.UNIQUE
    beyond = np.abs(found.label - label) > 1e-6 + 6 * found.evidence.label_deviation
    assert unique.sum() >= 20
    assert not np.any(beyond[unique])
