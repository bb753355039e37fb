"""The gradient of one sample's last layer is an outer product: its two factors, and the proof that it is one.

dL/dW = g x^T is known from one row and one column. The certificate that nothing else is in the matrix needs every
entry once: a handful of fixed random sign vectors q is multiplied in a single pass, and G q must equal u (v . q).
A matrix that is not u v^T fails for almost every q (the argument of Freivalds' matrix-product check).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmax

__all__ = [
    "RankOneFactors",
    "average_rows",
    "dominant_factors",
    "leading_singular_factors",
    "roundings",
    "significant_rounding",
    "unit_roundoff",
    "with_known_noise",
]

PROBES = 4
COLUMNS = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RankOneFactors:
    """G ~ left right^T.

    Attributes:
      left: (C,) float64, u; carries the magnitude of G.
      right: (d,) v, in the gradient's dtype, of any length (see `right_norm`).
      coefficients: (C,) float64, with right = coefficients^T G.
      right_norm: float64, |v|. `left` belongs to the unit vector v / |v|.
      row_noise: (C,) float64, standard deviation of whatever is not u v^T, per entry of each row. Zero where it
        does not exceed the rounding of the gradient's dtype.
      residual: float64, root mean square of the part that is not u v^T over that of the whole.
      is_rounding: bool, no row's residual exceeds what rounding explains.
      entry_rounding: float64, largest relative error that the entries of G were rounded with.
      client_rounding: float64, the same of what the client computed G from: larger for float64 products of float32.
    """

    left: jax.Array
    right: jax.Array
    coefficients: jax.Array
    right_norm: jax.Array
    row_noise: jax.Array
    residual: jax.Array
    is_rounding: jax.Array
    entry_rounding: jax.Array
    client_rounding: jax.Array


def unit_roundoff(dtype: jnp.dtype) -> float:
    """Largest relative error of rounding one number to `dtype`."""
    return float(jnp.finfo(dtype).eps) / 2


def roundings(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """() largest relative error of rounding the entries of G, and () that of the numbers which the client multiplied.

    An array can be wider than the numbers in it: float64 that holds float32 (somebody converted it), or exact products
    of two float32 numbers, which have no more than 48 binary digits.

    Args:
      values: some entries of G, any shape.
    """
    own = unit_roundoff(values.dtype)
    if values.dtype != jnp.float64:
        return jnp.asarray(own, jnp.float64), jnp.asarray(own, jnp.float64)
    single = unit_roundoff(jnp.dtype(jnp.float32))
    holds_single = jnp.all(jax.lax.reduce_precision(values, 11, 23) == values)
    holds_products = jnp.all(jax.lax.reduce_precision(values, 11, 47) == values)
    entry = jnp.where(holds_single, single, own)
    return entry, jnp.where(holds_single | holds_products, single, own)


def significant_rounding(values: jax.Array) -> jax.Array:
    """() largest relative error of rounding to the few binary digits that the entries have: bfloat16, float16, or more.

    Args:
      values: some entries of G, float32 or float64.
    """
    own, _ = roundings(values)
    exponent = jnp.finfo(values.dtype).nexp
    for digits in (10, 7):
        fits = jnp.all(jax.lax.reduce_precision(values, exponent, digits) == values)
        own = jnp.where(fits, 2.0 ** -(digits + 1), own)
    return own


def _sign_probes(features: int) -> np.ndarray:
    # Fixed by the shape alone, so that the same gradient always gets the same certificate.
    return np.random.default_rng(features).choice(np.array([-1.0, 1.0]), (features, PROBES))


def dominant_factors(gradient: jax.Array) -> RankOneFactors:
    """Factors of a noiseless rank-1 gradient from its strongest row and column; one pass over its bytes.

    Args:
      gradient: (C, d), floating.

    Returns:
      `RankOneFactors`. A zero gradient gives zero factors with `is_rounding` true.
    """
    features = gradient.shape[1]
    probes = jnp.asarray(_sign_probes(features), gradient.dtype)
    # HIGHEST: accelerators otherwise multiply float32 in reduced precision.
    products = jnp.matmul(gradient, probes, precision=jax.lax.Precision.HIGHEST).astype(jnp.float64)
    row = argmax(jnp.sum(products**2, axis=1))
    right = gradient[row]
    column = argmax(jnp.abs(right))
    pivot = right[column].astype(jnp.float64)
    right64 = right.astype(jnp.float64)
    # Scaled by the pivot first: the squares of very small gradients underflow.
    relative_norm = jnp.sqrt(jnp.sum(jnp.where(pivot == 0, 0.0, right64 / pivot) ** 2))
    right_norm = relative_norm * jnp.abs(pivot)
    # Not the strongest column alone but its neighbours too, which share its cache lines: their roundings average.
    width = min(COLUMNS, features)
    first = jnp.minimum(column // width * width, features - width)
    block = jax.lax.dynamic_slice_in_dim(gradient, first, width, axis=1).astype(jnp.float64)
    direction = jnp.where(pivot == 0, 0.0, jax.lax.dynamic_slice_in_dim(right64, first, width) / pivot)
    square = jnp.sum(direction**2)
    left = block @ direction / jnp.where(square == 0, 1.0, square) * relative_norm * jnp.sign(pivot)
    expected = jnp.where(pivot == 0, 0.0, right64 / pivot) @ probes.astype(jnp.float64) / relative_norm
    expected = jnp.where(pivot == 0, 0.0, expected * jnp.sign(pivot))
    difference = products - left[:, None] * expected[None, :]
    row_deviation = jnp.sqrt(jnp.mean(difference**2, axis=1))

    # Rounding of a length-d float32 dot product: each partial sum grows like a random walk, which adds up to
    # 0.41 sqrt(d) unit roundoffs of |G_r| (one standard deviation, the worst order of summation). Four probes
    # a row and C rows: six deviations are never reached by chance.
    entry_rounding, client_rounding = roundings(jnp.append(block.ravel(), right64).astype(gradient.dtype))
    floor = 6 * entry_rounding * (1 + 0.41 * np.sqrt(features)) * jnp.abs(left)
    # Weaker rows of a gradient near the smallest normal number have lost their digits to underflow.
    smallest = float(jnp.finfo(gradient.dtype).tiny) / unit_roundoff(gradient.dtype)
    is_rounding = jnp.all(row_deviation <= floor) & ((pivot == 0) | (jnp.abs(pivot) > smallest))
    row_noise = jnp.where(is_rounding, 0.0, row_deviation / np.sqrt(features))
    total = jnp.sqrt(jnp.sum(left**2))
    residual = jnp.sqrt(jnp.sum(row_deviation**2)) / jnp.where(total == 0, 1.0, total)
    return RankOneFactors(
        left=left,
        right=right,
        coefficients=(jnp.arange(left.size, dtype=jnp.int32) == row).astype(jnp.float64),
        right_norm=right_norm,
        row_noise=row_noise,
        residual=residual,
        is_rounding=is_rounding,
        entry_rounding=entry_rounding,
        client_rounding=client_rounding,
    )


def average_rows(gradient: jax.Array, factors: RankOneFactors) -> RankOneFactors:
    """The right factor from all rows, G^T u / |u|^2, in place of the strongest row's; one more pass."""
    square = jnp.sum(factors.left**2)
    weights = factors.left / jnp.where(square == 0, 1.0, jnp.sqrt(square))
    right = jnp.matmul(weights.astype(gradient.dtype), gradient, precision=jax.lax.Precision.HIGHEST)
    right = right.astype(jnp.float64)
    norm = jnp.sqrt(jnp.sum(right**2))
    return replace(factors, right=right, coefficients=weights, right_norm=norm)


def leading_singular_factors(gradient: jax.Array, start: RankOneFactors) -> RankOneFactors:
    """Leading singular pair of a noisy gradient: every row and column is used, in float64.

    Args:
      gradient: (C, d), floating.
      start: what `dominant_factors` returned for it.

    Returns:
      `RankOneFactors` with `row_noise` measured over all d entries of each row.
    """
    matrix = gradient.astype(jnp.float64)
    number_of_classes, features = gradient.shape

    def iterate(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left = matrix @ state[0]
        right = left @ matrix
        norm = jnp.maximum(jnp.sqrt(jnp.sum(right**2)), jnp.finfo(jnp.float64).tiny)
        return right / norm, left / norm

    # Each step shrinks the error by (second / first singular value)^2: below 1e-3 for every gradient in which
    # the sample is worth looking for.
    right = start.right.astype(jnp.float64) / jnp.where(start.right_norm == 0, 1.0, start.right_norm)
    right, coefficients = jax.lax.fori_loop(0, 6, iterate, (right, jnp.zeros_like(start.left)))
    left = matrix @ right
    residual = matrix - left[:, None] * right[None, :]
    # The right factor follows each row's own noise by that row's share of |u|^2; what it took away comes back as
    # the noise found in all rows. (The strongest row alone may have nearly no residual left.)
    row_square = jnp.sum(residual**2, axis=1) / max(features - 1, 1)
    pooled = jnp.sum(row_square) / max(number_of_classes - 1, 1)
    square = jnp.sum(left**2)
    row_deviation = jnp.sqrt(row_square + pooled * left**2 / jnp.where(square == 0, 1.0, square))
    entry_rounding = start.entry_rounding / np.sqrt(3 * features) * jnp.abs(left)
    own_rounding = 4 * unit_roundoff(jnp.dtype(jnp.float64)) * jnp.abs(left)
    is_rounding = jnp.all(row_deviation <= 2 * entry_rounding + own_rounding)
    row_noise = jnp.sqrt(jnp.maximum(row_deviation**2 - entry_rounding**2, 0.0))
    total = jnp.sqrt(jnp.sum(left**2))
    relative = jnp.sqrt(jnp.sum(residual**2)) / jnp.where(total == 0, 1.0, total)
    return replace(
        start,
        left=left,
        right=right,
        coefficients=coefficients,
        right_norm=jnp.ones(()),
        row_noise=row_noise,
        residual=relative,
        is_rounding=is_rounding,
    )


def with_known_noise(factors: RankOneFactors, noise: jax.Array) -> RankOneFactors:
    """The same factors where each row's entries are known to carry noise of deviation `noise` (C,).

    The noise measured is an average over columns; a column that carries more (a bias) does not show in it.
    """
    noise = noise.astype(jnp.float64)
    rounding = factors.entry_rounding / np.sqrt(3 * factors.right.size) * jnp.abs(factors.left)
    return replace(
        factors,
        row_noise=jnp.maximum(factors.row_noise, noise),
        is_rounding=factors.is_rounding & jnp.all(noise <= rounding),
    )
