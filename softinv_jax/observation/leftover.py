"""What a gradient holds beyond one outer product: noise, a second example, or entries that were taken out.

Noise of one size in each row has singular values up to sqrt(C) + sqrt(d) once each row is divided by that size; a
second example puts all of it into one, which is up to sqrt(C d). Deleted entries leave zeros where the outer product
has none, and an error there alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import sort
from softinv_jax.linear_algebra import orthonormal_columns

__all__ = ["Leftover", "count_examples", "describe_leftover", "is_one_size"]

POWER_STEPS = 16
GRAM_ROWS = 256
SEEN_ENTRIES = 1024
BEYOND_SPREAD = 6.0
NEARLY_WHOLE = 1e-3
LEVELS_SEEN = 12
MOST_LEVELS = 2.0**13  # Beyond, all that float32 keeps looks whole.
SUM_LEFT = 0.5  # Of the noise's sum: with less, as of sigmoids, it says too little.
BY_ACCIDENT = 16.0  # Nats: one in ten million.
FEW_DIGITS = 2.0**-13
# Gaussian matrices exceed their edge by t with probability exp(-t^2 / 2): one in a hundred thousand.
BEYOND_EDGE = 4.8
# Root mean square error of the entries that are zero, over that of all others. Noise does not care which is which, and
# rounding to a grid errs by half a step at most at its zeros, by 1 / sqrt(12) of one elsewhere: 1.7.
TELLTALE_ZEROS = 2.0
# Squared mean of the sizes over their mean square: 1 where all are equal, 0.64 for Gaussian entries.
ONE_SIZE = 0.98
COUNTED = 32
SUBSPACE_STEPS = 12


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Leftover:
    """All ().

    Attributes:
      stands_out: bool, one singular value of it is more than noise of one size a row has.
      rows_alike: bool, its rows resemble or cancel each other more than those of noise: examples, none of which need
        stand out.
      deleted: bool, entries are zero that the outer product has elsewhere than at zero.
      few_digits: bool, it is the rounding of half precision, in proportion to each entry.
      on_grid: bool, every entry is a multiple of the smallest: quantised to few levels, with errors that are no noise.
      bias_excess: float64, root mean square of the bias's column of it, over that of all columns, at least 1.
    """

    stands_out: jax.Array
    rows_alike: jax.Array
    deleted: jax.Array
    few_digits: jax.Array
    on_grid: jax.Array
    bias_excess: jax.Array


def describe_leftover(
    gradient: jax.Array,
    left: jax.Array,
    right: jax.Array,
    relative_rounding: jax.Array,
    noise: jax.Array | None,
    *,
    has_bias: bool,
) -> Leftover:
    """What is left of G beyond u v^T.

    Args:
      gradient: (C, d). left, right: u (C,) and v (d,), |v| = 1, float64.
      relative_rounding: () largest relative error that each entry was rounded with.
      noise: (C,) deviation per entry that noise on each row is known to have, or None.
      has_bias: static; the last column is the gradient of a bias.
    """
    expected = left[:, None] * right[None, :]
    error = gradient - expected
    rows, columns = gradient.shape
    whitened, axis = _whitened(error, left)
    edge = np.sqrt(rows) + np.sqrt(columns) + BEYOND_EDGE
    few_digits = _is_rounding_to_digits(gradient, expected, error, relative_rounding)
    beyond_digits = ~few_digits
    gram = _gram(whitened) if rows <= GRAM_ROWS else None
    stands_out = (_largest_singular_value(whitened, gram) > edge) & beyond_digits
    cancels = _adds_up_to_zero(error, left)
    alike = (_rows_alike(whitened, axis, gram) | cancels) & beyond_digits
    if noise is not None:  # What is known to be there is no example.
        told = jnp.where(noise[:, None] > 0, error / jnp.where(noise > 0, noise, 1.0)[:, None], jnp.inf)
        told = told.astype(jnp.float32)
        beyond = _largest_singular_value(told, _gram(told) if rows <= GRAM_ROWS else None) > edge
        stands_out, alike = stands_out & beyond, alike & (beyond | cancels)
    column_square = jnp.mean(whitened**2, axis=0)
    usual = jnp.mean(column_square)
    bias_excess = jnp.sqrt(column_square[-1] / jnp.where(usual > 0, usual, 1.0)) if has_bias else jnp.ones(())
    return Leftover(
        stands_out=stands_out,
        rows_alike=alike,
        deleted=_deleted(gradient, expected, error, noise) & beyond_digits,
        few_digits=few_digits,
        on_grid=_is_on_grid(gradient) & beyond_digits,
        bias_excess=jnp.maximum(bias_excess, 1.0).astype(jnp.float64),
    )


def _gram(whitened: jax.Array) -> jax.Array:
    """Inner products of the rows. HIGHEST: accelerators otherwise multiply float32 in reduced precision."""
    return jnp.matmul(whitened, whitened.T, precision=jax.lax.Precision.HIGHEST)


def _is_on_grid(gradient: jax.Array) -> jax.Array:
    """() bool: all entries are whole multiples of one step, and not very large ones.

    The step is the smallest entry or, where no entry is that small, the least by which the next larger ones differ. A
    part of the entries shows it, if it is there; all of them must agree.
    """
    some = jnp.abs(gradient.ravel()[:: max(gradient.size // SEEN_ENTRIES, 1)]).astype(jnp.float64)
    smallest = jnp.min(jnp.where(some > 0, some, jnp.inf))

    def climb(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        level, step = state
        following = jnp.min(jnp.where(some > (1 + NEARLY_WHOLE) * level, some, jnp.inf))
        return following, jnp.minimum(step, following - level)

    _, step = jax.lax.fori_loop(0, LEVELS_SEEN, climb, (smallest, smallest))
    inverse = 1 / jnp.where((step > 0) & jnp.isfinite(step), step, 1e-300)
    multiple = jnp.abs(gradient).astype(jnp.float64) * inverse
    off = jnp.max(jnp.abs(multiple - jnp.floor(multiple + 0.5)))
    most = jnp.max(jnp.abs(gradient)).astype(jnp.float64) * inverse
    return (off < NEARLY_WHOLE) & (most < MOST_LEVELS) & (_count(gradient != 0) >= 32)


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.int32)


def _is_rounding_to_digits(
    gradient: jax.Array, expected: jax.Array, error: jax.Array, relative_rounding: jax.Array
) -> jax.Array:
    """() bool: the entries have the few binary digits of half precision, and err by no more than such rounding.

    These errors go with the entry: they have no one size in a row. Entries below the format's normal numbers err by
    half of the smallest step, which is no larger than the smallest entry.
    """
    size = jnp.abs(gradient)
    step = jnp.min(jnp.where(size > 0, size, jnp.inf)).astype(jnp.float64)
    rounding = relative_rounding * jnp.abs(expected) + jnp.where(jnp.isfinite(step), step, 0.0) / 2
    row = jnp.sqrt(jnp.mean(error**2, axis=1))
    own = jnp.sqrt(jnp.mean(rounding**2, axis=1))
    return (relative_rounding > FEW_DIGITS) & jnp.all(row <= 2 * own)


def _whitened(error: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is left, each row divided by the size of its noise and all of them freed of what u took away; and that axis.

    E = N - u (u^T N) / |u|^2 of noise N: divided by its sizes s, E lacks the part of N / s along u and has another one
    along u / s instead. Projected off u / s it is noise of deviation 1, projected off one axis. s is adjusted until it
    is. Entries of the size 1, of which only the statistics count: float32.
    """
    columns = error.shape[1]
    row = jnp.sum(error**2, axis=1) / max(columns - 1, 1)
    pooled = jnp.sum(row) / max(left.size - 1, 1)
    square = jnp.sum(left**2)
    start = jnp.sqrt(row + pooled * left**2 / jnp.where(square > 0, square, 1.0))
    safe = jnp.where(start > 0, start, 1.0)
    unit = jnp.where((start > 0)[:, None], error / safe[:, None], 0.0).astype(jnp.float32)

    square_of_row = jnp.sum(unit**2, axis=1)

    def axis_of(size: jax.Array) -> jax.Array:
        """With `size` in units of the start."""
        axis = jnp.where(start > 0, left / (safe * size), 0.0)
        return (axis / jnp.maximum(jnp.sqrt(jnp.sum(axis**2)), 1e-300)).astype(jnp.float32)

    def adjust(_: int, size: jax.Array) -> jax.Array:
        # Squares of the projected rows, without making the rows.
        axis, inverse = axis_of(size), (1 / size).astype(jnp.float32)
        shared = jnp.matmul(axis * inverse, unit, precision=jax.lax.Precision.HIGHEST)
        crossed = jnp.matmul(unit, shared, precision=jax.lax.Precision.HIGHEST) * inverse
        square = square_of_row * inverse**2 - 2 * axis * crossed + axis**2 * jnp.sum(shared**2)
        square = jnp.maximum(square, 0.0) / max(columns - 1, 1)
        change = jnp.clip(jnp.sqrt(square / jnp.maximum(1 - axis**2, 0.05)), 0.25, 4.0)
        return size * jnp.where(start > 0, change, 1.0)

    size = jax.lax.fori_loop(0, 8, adjust, jnp.ones_like(start))
    axis, divided = axis_of(size), unit / size.astype(jnp.float32)[:, None]
    shared = jnp.matmul(axis, divided, precision=jax.lax.Precision.HIGHEST)
    return divided - axis[:, None] * shared[None, :], axis


def _rows_alike(whitened: jax.Array, axis: jax.Array, gram: jax.Array | None) -> jax.Array:
    """() bool: the squared inner products of the rows add up to more than those of independent noise.

    Noise projected off one axis has rows of covariance S = 1 - axis axis^T, and its Gram matrix K has
    E tr K^2 = d (d + 1) tr S^2 + d (tr S)^2 (second moment of the Wishart distribution). d is the number of columns
    that share the noise: fewer where some have most of it.

    Args:
      gram: of the rows, or None where there are so many that sums of them, with signs, stand for them.
    """
    share = jnp.sum(whitened**2, axis=0)
    square, total = jnp.sum(share**2), jnp.sum(share)
    columns = total**2 / jnp.where(square > 0, square, 1.0)
    if gram is None:
        whitened = _signed_sums(whitened)
        gram = _gram(whitened)
        total = jnp.sum(whitened**2)
    rows = gram.shape[0]
    # As much in all as so many columns of deviation 1 hold.
    unit = columns * max(rows - 1, 1) / jnp.where(total > 0, total, 1.0)
    expected = columns * (columns + 1) * (rows - 1) + columns * (rows - 1) ** 2
    spread = 2 * columns * np.sqrt(rows * max(rows - 1, 1))
    return jnp.sum((gram * unit) ** 2) - expected > BEYOND_SPREAD * spread


def _signed_sums(whitened: jax.Array) -> jax.Array:
    """(GRAM_ROWS, d) sums of as many disjoint sets of rows, each row with a sign: noise stays noise, of the same size.

    Their squared inner products are far fewer; a second example is in them, weaker by the root of the sets' size.
    """
    rows = whitened.shape[0]
    each = -(-rows // GRAM_ROWS)
    signs = np.random.default_rng(rows).choice(np.array([-1.0, 1.0], np.float32), rows)
    padded = jnp.pad(whitened * signs[:, None], ((0, each * GRAM_ROWS - rows), (0, 0)))
    # The last sets are smaller, or empty.
    members = np.clip(rows - np.arange(GRAM_ROWS), 0, None)
    members = np.maximum(-(-members // GRAM_ROWS), 1)
    return jnp.sum(padded.reshape(each, GRAM_ROWS, -1), axis=0) / np.sqrt(members).astype(np.float32)[:, None]


def _adds_up_to_zero(error: jax.Array, left: jax.Array) -> jax.Array:
    """() bool: the rows cancel far better than those of noise ever would, as dL/dz of every softmax example does.

    Where u adds up to zero itself, taking its part out leaves the sum of the noise as it was; else a share of it. Its
    square, over all squares, is chi-square of d degrees of freedom over d; r or less has (d / 2) (r - 1 - log r) nats
    (Chernoff).
    """
    total = jnp.sum(error**2)
    share = jnp.sum(error**2, axis=0)
    square = jnp.sum(share**2)
    columns = jnp.sum(share) ** 2 / jnp.where(square > 0, square, 1.0)
    ratio = jnp.sum(jnp.sum(error, axis=0) ** 2) / jnp.where(total > 0, total, 1.0)
    square = jnp.sum(left**2)
    kept = 1 - jnp.sum(left) ** 2 / jnp.where(square > 0, left.size * square, 1.0)
    safe = jnp.clip(ratio / jnp.maximum(kept, SUM_LEFT), 1e-300, 1.0)
    return (total > 0) & (kept > SUM_LEFT) & (columns / 2 * (safe - 1 - jnp.log(safe)) > BY_ACCIDENT)


def _largest_singular_value(matrix: jax.Array, gram: jax.Array | None) -> jax.Array:
    """() by power iteration from the strongest row: never too large.

    Args:
      matrix: (C, d). gram: of its rows, where that is the smaller matrix; or None.
    """
    strongest = jnp.sum(matrix**2, axis=1)
    first = strongest == jnp.max(strongest)

    def normal(vector: jax.Array) -> jax.Array:
        return vector / jnp.maximum(jnp.sqrt(jnp.sum(vector**2)), 1e-30)

    if gram is not None:
        left = jax.lax.fori_loop(0, POWER_STEPS, lambda _, left: normal(gram @ left), normal(first.astype(gram.dtype)))
        return jnp.sqrt(jnp.maximum(jnp.sum(left * (gram @ left)), 0.0))
    start = normal(jnp.sum(jnp.where(first[:, None], matrix, 0.0), axis=0))
    right = jax.lax.fori_loop(0, POWER_STEPS, lambda _, right: normal((matrix @ right) @ matrix), start)
    return jnp.sqrt(jnp.sum((matrix @ right) ** 2))


def _deleted(gradient: jax.Array, expected: jax.Array, error: jax.Array, noise: jax.Array | None) -> jax.Array:
    """() bool: the entries that are zero, in rows and columns that are not, err far more than the others.

    And than noise that is known to be there: parameters of different sizes are rounded in different steps.
    """
    is_zero = gradient == 0
    rows, columns = jnp.sum(is_zero, axis=1, dtype=jnp.int32), jnp.sum(is_zero, axis=0, dtype=jnp.int32)
    full_rows, full_columns = rows < is_zero.shape[1], columns < is_zero.shape[0]
    zeros = is_zero & full_rows[:, None] & full_columns[None, :]
    count = _count(zeros)
    at_zeros = jnp.sum(jnp.where(zeros, expected**2, 0.0)) / jnp.maximum(count, 1)
    elsewhere = jnp.sum(jnp.where(is_zero, 0.0, error**2)) / jnp.maximum(is_zero.size - jnp.sum(rows), 1)
    if noise is not None:
        own = jnp.sum(jnp.where(zeros, noise[:, None] ** 2, 0.0)) / jnp.maximum(count, 1)
        elsewhere = jnp.maximum(elsewhere, own)
    return (count >= 3) & (at_zeros > TELLTALE_ZEROS**2 * elsewhere)


def is_one_size(gradient: jax.Array) -> jax.Array:
    """() bool: nearly all entries that are not zero have one size, as Adam's first step and sign descent leave them.

    Args:
      gradient: (C, d).
    """
    size = jnp.abs(gradient).astype(jnp.float64)
    count = _count(size > 0)
    largest = jnp.maximum(jnp.max(size), 1e-300)
    relative = size * (1 / largest)
    total, square = jnp.sum(relative), jnp.sum(relative**2)
    return (count >= 32) & (total**2 > ONE_SIZE * square * count)


def count_examples(gradient: jax.Array, relative_rounding: jax.Array) -> jax.Array:
    """() int32 numerical rank of a gradient, at most `COUNTED`: how many examples stand out of the noise.

    By subspace iteration; two readings of what is noise, as `batches.subspace` has them: rounding in proportion to each
    row, with a clear gap, or else noise of one size on all entries.

    Args:
      gradient: (C, d) float64. relative_rounding: () of its entries.
    """
    rows, columns = gradient.shape
    size = jnp.sqrt(jnp.mean(gradient**2, axis=1, keepdims=True))
    whitened = jnp.where(size > 0, gradient / jnp.where(size > 0, size, 1.0), 0.0)
    edge = np.sqrt(rows) + np.sqrt(columns)
    values = _leading_singular_values(whitened)
    floor = 30 * edge * relative_rounding / np.sqrt(3)
    above = jnp.sum(values > floor, dtype=jnp.int32)
    below = jnp.max(jnp.where(values <= floor, values, 0.0))
    last = jnp.min(jnp.where(values > floor, values, jnp.inf))
    clear = (above < values.size) & (last >= 30 * below)

    plain = _leading_singular_values(gradient)
    tail = jnp.maximum(jnp.sum(gradient**2) - jnp.cumsum(plain**2), 0.0)
    ranks = np.arange(1, plain.size + 1)
    sigma = jnp.sqrt(tail / np.maximum((rows - ranks) * (columns - ranks), 1))
    following = jnp.append(plain[1:], 0.0)
    noise_edge = sigma * edge
    is_rank = (following <= 1.2 * noise_edge) & (plain > 2 * noise_edge)
    positions = jnp.arange(1, plain.size + 1, dtype=jnp.int32)
    noisy = jnp.min(jnp.where(is_rank, positions, jnp.int32(plain.size)))
    return jnp.where(clear, above, noisy)


def _leading_singular_values(matrix: jax.Array) -> jax.Array:
    """The largest singular values, falling: at most COUNTED. Powers of a start that is fixed by the shape."""
    rows, columns = matrix.shape
    count = min(rows, columns, COUNTED)
    start = np.random.default_rng(columns).choice(np.array([-1.0, 1.0]), (columns, count))
    right = orthonormal_columns(jnp.asarray(start))[0]
    right = jax.lax.fori_loop(
        0, SUBSPACE_STEPS, lambda _, basis: orthonormal_columns(matrix.T @ (matrix @ basis))[0], right
    )
    values = jnp.sqrt(jnp.sum((matrix @ right) ** 2, axis=0))
    return sort(values)[::-1]
