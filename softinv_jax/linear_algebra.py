"""Inverse and determinant of small positive definite matrices, and orthonormal columns, from matrix products alone.

Not `jnp.linalg`: XLA's CPU runtime runs batched LAPACK calls on its own worker threads and waits for them there, so
that two such calls at once can hang a two-core machine for good (seen with jaxlib 0.10.1). A hang is worse than a
few lines; these also run where no LAPACK is.
"""

import jax
import jax.numpy as jnp

__all__ = ["inverse_and_log_determinant", "orthonormal_columns", "root_of_semidefinite"]

DIRECT_SIZE = 36
# Of the largest diagonal entry: what rounding leaves of a pivot that is zero.
VANISHING_PIVOT = 1e-13


def inverse_and_log_determinant(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse and log-determinant of a symmetric positive definite matrix.

    Scaled to a unit diagonal, then split in two halves by the Schur complement down to `DIRECT_SIZE`, where
    Gauss-Jordan elimination needs no pivoting.

    Args:
      matrix: (n, n), floating.

    Returns:
      (n, n) inverse and () log-determinant; NaN where the matrix is not positive definite.
    """
    scale = jax.lax.rsqrt(jnp.diag(matrix))
    inverse, log_determinant = _split(matrix * scale[:, None] * scale[None, :])
    return inverse * scale[:, None] * scale[None, :], log_determinant - 2 * jnp.sum(jnp.log(scale))


def _split(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = matrix.shape[0]
    if size <= DIRECT_SIZE:
        return _gauss_jordan(matrix)
    half = size // 2
    corner, log_first = _split(matrix[:half, :half])
    side = corner @ matrix[:half, half:]
    complement = matrix[half:, half:] - matrix[half:, :half] @ side
    rest, log_second = _split((complement + complement.T) / 2)
    cross = -side @ rest
    inverse = jnp.block([[corner - cross @ side.T, cross], [cross.T, rest]])
    return (inverse + inverse.T) / 2, log_first + log_second


def _gauss_jordan(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In place, each step one outer product; no pivot of a matrix with unit diagonal is larger than 1."""
    size = matrix.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)

    def eliminate(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        work, log_determinant = state
        row = jax.lax.dynamic_index_in_dim(work, step, 0, keepdims=False)
        column = jax.lax.dynamic_index_in_dim(work, step, 1, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(row, step, 0, keepdims=False)
        chosen = index == step
        # Such that row and column become row / pivot and -column / pivot, and the pivot its inverse.
        column = jnp.where(chosen, pivot - 1, column)
        row = jnp.where(chosen, 1 + 1 / pivot, row / pivot)
        return work - column[:, None] * row[None, :], log_determinant + jnp.log(pivot)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(size), eliminate, (matrix, jnp.zeros((), matrix.dtype)))


def root_of_semidefinite(matrix: jax.Array) -> jax.Array:
    """L with L L^T equal to a symmetric positive semi-definite matrix: Cholesky's, zeros where it has no rank.

    Args:
      matrix: (n, n), floating.

    Returns:
      (n, n) lower triangular.
    """
    size = matrix.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    least = VANISHING_PIVOT * jnp.max(jnp.abs(jnp.diag(matrix)))

    def eliminate(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, root = state
        chosen = index == step
        column = jnp.sum(jnp.where(chosen[None, :], rest, 0.0), axis=1)
        pivot = jnp.sum(jnp.where(chosen, column, 0.0))
        scale = jnp.where(pivot > least, jax.lax.rsqrt(jnp.where(pivot > least, pivot, 1.0)), 0.0)
        column = jnp.where(index >= step, column * scale, 0.0)
        return rest - column[:, None] * column[None, :], jnp.where(chosen[None, :], column[:, None], root)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(size), eliminate, (matrix, jnp.zeros_like(matrix)))[1]


def orthonormal_columns(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormal columns that span those of a matrix: Gram-Schmidt, each column twice (Giraud et al. 2005).

    Args:
      matrix: (m, n), floating, n <= m, of full rank but for columns of zeros.

    Returns:
      (m, n) columns Q and (n, n) upper triangular T with Q = matrix T; columns of zeros stay so.
    """
    size = matrix.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)
    norms = _or_one(jnp.sqrt(jnp.sum(matrix**2, axis=0)))

    def step(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        columns, mixing = state
        own = jax.lax.dynamic_index_in_dim(columns, number, 1, keepdims=False)
        mixed = jax.lax.dynamic_index_in_dim(mixing, number, 1, keepdims=False)
        for _ in range(2):
            share = jnp.where(index < number, own @ columns, 0.0)
            own, mixed = own - columns @ share, mixed - mixing @ share
        norm = _or_one(jnp.sqrt(jnp.sum(own**2)))
        columns = jax.lax.dynamic_update_index_in_dim(columns, own / norm, number, 1)
        return columns, jax.lax.dynamic_update_index_in_dim(mixing, mixed / norm, number, 1)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(size), step, (matrix / norms[None, :], jnp.diag(1 / norms)))


def _or_one(norm: jax.Array) -> jax.Array:
    return jnp.where(norm == 0, 1.0, norm)
