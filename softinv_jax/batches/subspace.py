"""The gradient of a batch as a sum of outer products: its rank, its two spaces, and the noise on it.

The last layer's gradient of B examples is G = (1/B) sum_b g_b x_b^T = U S V^T. While B < C and B <= d, every g_b lies
in the column space of U, and every feature is x_b = V a_b with a_b in R^B: the attack works with a_b alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.observation.rank_one import unit_roundoff

__all__ = ["BatchSubspace", "batch_subspace", "numerical_rank"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchSubspace:
    """All arrays float64. A head with a bias is one with the constant feature 1 in the last place.

    Attributes:
      left: (C, B) U. singular_values: (B,) S. right: (d, B) V.
      directions: (C, B) W V, so that the logits of x = V a are `directions @ a`.
      weight_norm: (C,) |W_j|.
      constant: (B,) last row of V: constant . a = 1 for a head with a bias. Zeros without one.
      noise: () standard deviation of whatever is not of rank B, per entry of G.
      roundoff: () unit roundoff of the gradient's dtype.
    """

    left: jax.Array
    singular_values: jax.Array
    right: jax.Array
    directions: jax.Array
    weight_norm: jax.Array
    constant: jax.Array
    noise: jax.Array
    roundoff: jax.Array


def numerical_rank(singular_values: np.ndarray, shape: tuple[int, int], dtype: np.dtype) -> int:
    """How many singular values stand out of rounding (and of noise, where it leaves a clear gap).

    Noise of deviation sigma on every entry has singular values up to sigma (sqrt(C) + sqrt(d)); whether the smallest
    ones are such noise shows in their fall being slow. The rounding of one gradient, |G| times the unit roundoff, is
    the least there can be.

    Args:
      singular_values: (min(C, d),) falling.
      shape: (C, d).
      dtype: of the gradient.

    Returns:
      The rank, at least 1 for a gradient that is not zero; min(C, d) where nothing but noise is left.
    """
    rows, columns = shape
    values = np.asarray(singular_values, np.float64)
    if values.size == 0 or values[0] == 0:
        return 0
    # One coordinate is lost to the gradient's columns, which sum to zero: its singular value is rounding alone.
    floor = values[0] * unit_roundoff(dtype)
    count = values.size
    for rank in range(1, count):
        tail = values[rank:]
        sigma = np.sqrt(np.sum(tail**2) / max((rows - rank) * (columns - rank), 1))
        edge = sigma * (np.sqrt(rows) + np.sqrt(columns))
        # The largest of the tail lies at the edge of what noise alone shows, the smallest of the head well above it.
        if tail[0] <= max(1.2 * edge, 3 * floor) and values[rank - 1] > 2 * max(edge, floor):
            return rank
    return count


def batch_subspace(
    weight: jax.Array, gradient: jax.Array, largest: int | None, dtype: np.dtype, *, has_bias: bool
) -> tuple[BatchSubspace, np.ndarray]:
    """Decompose a gradient.

    Args:
      weight, gradient: (C, d) float64, with the bias as last column where there is one.
      largest: B, where it is known: a higher rank is noise that has no clear edge.
      dtype: the gradient's own dtype.
      has_bias: whether the last column is a bias.

    Returns:
      The subspace, and all singular values.
    """
    left, singular_values, right = jnp.linalg.svd(gradient, full_matrices=False)
    values = np.asarray(singular_values)
    rows, columns = gradient.shape
    rank = max(numerical_rank(values, (rows, columns), dtype), 1)
    if largest is not None:
        rank = min(rank, largest)
    tail = values[rank:]
    sigma = np.sqrt(np.sum(tail**2) / max((rows - rank) * (columns - rank), 1))
    # Entries are rounded in proportion to their size; where no tail is left to measure it, this is what is known.
    rounding = unit_roundoff(dtype) * np.sqrt(np.sum(values**2) / (3 * rows * columns))
    basis = right[:rank].T
    subspace = BatchSubspace(
        left=left[:, :rank],
        singular_values=singular_values[:rank],
        right=basis,
        directions=weight @ basis,
        weight_norm=jnp.sqrt(jnp.sum(weight**2, axis=1)),
        constant=basis[-1] if has_bias else jnp.zeros((rank,)),
        noise=jnp.asarray(max(sigma, rounding)),
        roundoff=jnp.asarray(unit_roundoff(dtype)),
    )
    return subspace, values
