"""Inverse and log-determinant against NumPy's LAPACK."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.linear_algebra import DIRECT_SIZE, inverse_and_log_determinant, orthonormal_columns


def positive_definite(size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(size, 2 * size))
    return factor @ factor.T / size + 0.1 * np.eye(size)


def invert(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    with jax.enable_x64(True):
        inverse, log_determinant = jax.jit(inverse_and_log_determinant)(jnp.asarray(matrix))
        return np.asarray(inverse), float(log_determinant)


# Both sides of every split: one block, two, three levels of halving.
SIZES = [1, 2, 3, 7, DIRECT_SIZE, DIRECT_SIZE + 1, 2 * DIRECT_SIZE + 1, 100]


@pytest.mark.parametrize("size", SIZES)
def test_inverse_and_log_determinant_are_those_of_numpy(size: int) -> None:
    matrix = positive_definite(size)
    inverse, log_determinant = invert(matrix)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(log_determinant, np.linalg.slogdet(matrix)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [7, DIRECT_SIZE + 1])
def test_units_of_the_unknowns_do_not_matter(size: int) -> None:
    scale = np.logspace(-60, 60, size)
    inverse, log_determinant = invert(positive_definite(size) * np.outer(scale, scale))
    plain, plain_log = invert(positive_definite(size))
    np.testing.assert_allclose(inverse * np.outer(scale, scale), plain, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(log_determinant, plain_log + 2 * np.log(scale).sum(), rtol=1e-11, atol=1e-9)


def test_an_ill_conditioned_matrix_is_inverted_to_its_condition_number() -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    eigenvalues = np.logspace(0, -8, 40)
    inverse, log_determinant = invert((basis * eigenvalues) @ basis.T)
    exact = (basis / eigenvalues) @ basis.T
    assert np.abs(inverse - exact).max() < 1e-6 * np.abs(exact).max()
    np.testing.assert_allclose(log_determinant, np.log(eigenvalues).sum(), rtol=1e-8)


def test_the_inverse_is_symmetric() -> None:
    inverse, _ = invert(positive_definite(2 * DIRECT_SIZE + 1))
    np.testing.assert_allclose(inverse, inverse.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [2, DIRECT_SIZE + 1])
def test_a_matrix_that_is_not_positive_definite_gives_nan(size: int) -> None:
    matrix = positive_definite(size)
    matrix[0, 0] = -1.0
    inverse, log_determinant = invert(matrix)
    assert np.isnan(log_determinant)
    assert np.isnan(inverse).any()


def test_vmap_is_the_loop() -> None:
    matrices = np.stack([positive_definite(7, seed) for seed in range(4)])
    with jax.enable_x64(True):
        together, _ = jax.jit(jax.vmap(inverse_and_log_determinant))(jnp.asarray(matrices))
    apart = np.stack([invert(matrix)[0] for matrix in matrices])
    np.testing.assert_allclose(together, apart, rtol=1e-11, atol=1e-13)


def test_columns_are_orthonormal_and_zeros_stay() -> None:
    matrix = np.random.default_rng(3).normal(size=(9, 5)) * np.logspace(-30, 30, 5)
    matrix[:, 2] = 0
    with jax.enable_x64(True):
        columns, mixing = jax.tree.map(np.asarray, jax.jit(orthonormal_columns)(jnp.asarray(matrix)))
    kept = [0, 1, 3, 4]
    np.testing.assert_allclose(columns[:, kept].T @ columns[:, kept], np.eye(4), atol=1e-14)
    np.testing.assert_allclose(matrix @ mixing, columns, atol=1e-12)
    assert not columns[:, 2].any()
    np.testing.assert_array_equal(mixing, np.triu(mixing))
