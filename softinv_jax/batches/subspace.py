"""The gradient of a batch as a sum of outer products: its rank, its two spaces, and the noise on it.

The last layer's gradient of B examples is G = (1/B) sum_b g_b x_b^T. Rounding errs in proportion to what is rounded, so
that the rows of classes which the network thinks unlikely are known far better, absolutely, than the others: with R
the standard deviation of each row's entries, it is R^-1 G = U S V^T that has rank B up to noise of deviation 1. While
B < C and B <= d, every g_b lies in the column space of R U, and every feature is x_b = V a_b with a_b in R^B: the
attack works with a_b alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softinv_jax.observation.rank_one import unit_roundoff

__all__ = ["BatchSubspace", "batch_subspace", "numerical_rank", "rounding_rank"]

# A tail of singular values this far above what independent noise of deviation 1 shows is still rounding (whose errors
# are alike in rows that are alike), provided that the signal stands out as far from it again.
CORRELATED = 30.0
WIDEST_RANGE = 1e-7
COMMON = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchSubspace:
    """All arrays float64. A head with a bias is one with the constant feature 1 in the last place.

    Attributes:
      left: (C, B) R U. singular_values: (B,) S, in units of the noise.
      directions: (C, B) W V, so that the logits of x = V a are `directions @ a`. V itself is not among them: the search
        is one compiled program for features of any size.
      coupling: (B, B) S^-1: x^T G^+ g is a @ coupling @ beta.
      weight_norm: (C,) |W_j|.
      summation: (C,) standard deviation of a logit from the rounding of its partial sums, in unit roundoffs of |x|.
      constant: (B,) last row of V: constant . a = 1 for a head with a bias. Zeros without one.
      noise: (C,) R: standard deviation of whatever is not of rank B, per entry of each row of G.
      common: (C, COMMON) how much of it rows have in common: its covariance over rows has the off-diagonal part of
        common common^T. Rows that are alike are rounded alike.
      roundoff: () unit roundoff of the gradient's dtype.
    """

    left: jax.Array
    singular_values: jax.Array
    directions: jax.Array
    coupling: jax.Array
    weight_norm: jax.Array
    summation: jax.Array
    constant: jax.Array
    noise: jax.Array
    common: jax.Array
    roundoff: jax.Array

    def confined(self, basis: jax.Array) -> "BatchSubspace":
        """The same with features V basis c in place of V a; basis: (B, B) orthonormal columns, or zeros."""
        return replace(
            self,
            directions=self.directions @ basis,
            coupling=basis.T @ self.coupling,
            constant=self.constant @ basis,
        )


def numerical_rank(singular_values: np.ndarray, shape: tuple[int, int]) -> int:
    """How many singular values stand out of noise of about equal size on all entries, where it leaves a clear gap.

    Args:
      singular_values: (min(C, d),) falling.
      shape: (C, d).

    Returns:
      The rank, at least 1 for a gradient that is not zero; min(C, d) where nothing but noise is left.
    """
    rows, columns = shape
    values = np.asarray(singular_values, np.float64)
    if values.size == 0 or values[0] == 0:
        return 0
    for rank in range(1, values.size):
        tail = values[rank:]
        sigma = np.sqrt(np.sum(tail**2) / max((rows - rank) * (columns - rank), 1))
        edge = sigma * (np.sqrt(rows) + np.sqrt(columns))
        # The largest of the tail lies at the edge of what noise alone shows, the smallest of the head well above it.
        if tail[0] <= 1.2 * edge and values[rank - 1] > 2 * edge:
            return rank
    return values.size


def rounding_rank(values: np.ndarray, edge: float) -> int | None:
    """The rank if what is beyond it is no more than rounding, of about deviation 1; None if there is other noise."""
    small = np.flatnonzero(values <= CORRELATED * edge)
    rank = int(small[0]) if small.size else values.size
    if rank in (0, values.size) or values[rank - 1] < CORRELATED * values[rank]:
        return None
    return rank


def batch_subspace(
    weight: ArrayLike,
    gradient: ArrayLike,
    largest: int | None,
    dtype: np.dtype,
    *,
    has_bias: bool,
    known_noise: np.ndarray | None = None,
) -> tuple[BatchSubspace, np.ndarray, np.ndarray]:
    """Decompose a gradient.

    Args:
      weight, gradient: (C, d) float64, NumPy or jax, with the bias as last column where there is one.
      largest: B, where it is known: a higher rank is noise that has no clear edge.
      dtype: the gradient's own dtype.
      has_bias: whether the last column is a bias.
      known_noise: (C,) standard deviation of noise on each row's entries, where it is known.

    Returns:
      The subspace (of NumPy arrays), V (d, B), and all singular values, in units of the noise.
    """
    matrix = np.asarray(gradient)
    rows, columns = matrix.shape
    limit = min(rows, columns) if largest is None else largest
    # Each entry is rounded in proportion to its size, and no finer than the smallest number of its dtype.
    size = np.sqrt(np.mean(matrix**2, axis=1))
    smallest = max(float(jnp.finfo(dtype).smallest_subnormal), float(np.finfo(np.float64).tiny))
    noise = np.hypot(unit_roundoff(dtype) / np.sqrt(3) * size, smallest)
    # Beyond this range, least squares in float64 would see the best known rows only.
    if known_noise is not None:
        noise = np.hypot(noise, known_noise)
    noise = np.maximum(noise, WIDEST_RANGE * np.max(noise))
    triangle, rotation = _triangle(matrix)
    _, values, right = _whitened(triangle, rotation, noise)
    rank = rounding_rank(values, np.sqrt(rows) + np.sqrt(columns))
    if rank is None:
        _, values, right = _whitened(triangle, rotation, np.ones(rows))
        rank = min(max(numerical_rank(values, matrix.shape), 1), limit)
        sigma = np.sqrt(np.sum(values[rank:] ** 2) / max((rows - rank) * (columns - rank), 1))
        noise = np.hypot(noise, sigma)
    else:
        # Sums over the batch that cancel are rounded more than what is left of them shows.
        rank = min(rank, limit)
        beyond = matrix - (matrix @ right[:rank].T) @ right[:rank]
        noise = np.maximum(noise, np.sqrt(np.sum(beyond**2, axis=1) / max(columns - rank, 1)))
    left, values, right = _whitened(triangle, rotation, noise)
    excess = np.zeros(COMMON)
    beyond = values[rank : rank + COMMON]
    excess[: beyond.size] = np.maximum(beyond**2 - (np.sqrt(rows) + np.sqrt(columns)) ** 2, 0) / max(columns - rank, 1)
    common = np.zeros((rows, COMMON))
    common[:, : beyond.size] = left[:, rank : rank + COMMON]
    basis, weight = right[:rank].T, np.asarray(weight)
    arrays: dict[str, Any] = {
        "left": noise[:, None] * left[:, :rank],
        "singular_values": values[:rank],
        "directions": weight @ basis,
        "coupling": np.diag(1 / np.maximum(values[:rank], 1e-300)),
        "weight_norm": np.sqrt(np.sum(weight**2, axis=1)),
        "summation": _summation(weight, right[0]),
        "constant": basis[-1] if has_bias else np.zeros((rank,)),
        "noise": noise,
        "common": noise[:, None] * common * np.sqrt(excess),
        "roundoff": np.asarray(unit_roundoff(dtype)),
    }
    return BatchSubspace(**arrays), right[:rank].T, values


def _summation(weight: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """(C,) deviation of W_j . x from rounding every partial sum once, in unit roundoffs of |x|.

    In the worst order, one by one. Features resemble each other, so that their main direction stands for all of them.
    With weights and features of random signs this comes to 0.41 |W_j|; a trained head's partial sums can be far larger
    than its logits.
    """
    partial_sums = np.cumsum(weight * direction, axis=1)
    return np.sqrt(np.sum(partial_sums**2, axis=1) / 3)


def _triangle(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L (C, r) and Q (r, d) with G = L Q: each row exact to its own size, so that it can be weighted afterwards."""
    rotation, triangle = np.linalg.qr(matrix.T)
    return triangle.T, rotation.T


def _whitened(
    triangle: np.ndarray, rotation: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(triangle / noise[:, None], full_matrices=False)
    return left, values, right @ rotation
