"""The gradient of one dense layer as a sum of outer products: rank, noise, and the two spaces.

For B examples G = (1/D) sum_b delta_b h_b^T, transposed to (outputs, inputs): delta_b is the loss's derivative by the
layer's output, h_b its input, with the constant 1 as one input more where there is a bias. Rounding errs in proportion
to what is rounded: with R and K the deviations of rows and columns, R^-1 G K^-1 = U S V^T has rank B up to noise of
deviation 1 (as in `batches.subspace`). Then delta_b = R U beta_b and h_b = K V a_b, and the two sets of coordinates are
dual: beta_c^T S^-1 a_b = D if b = c, else 0.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.subspace import CORRELATED, WIDEST_RANGE, rounding_rank
from softinv_jax.observation.rank_one import unit_roundoff

__all__ = ["LayerSpace", "layer_space"]

SKETCH = 128
BEYOND = 24
FLAT = 0.9
POWER_STEPS = 8
# The decomposition and `gate_fit` err themselves, in double precision, by more than one rounding of a float64 gradient.
OWN_ROUNDOFF = 2.0**-47
# Of the largest: inputs that are nearly always zero.
NARROWEST_COLUMN = 1e-4


@dataclass(frozen=True)
class LayerSpace:
    """NumPy float64. m outputs, d inputs (and the constant 1 last, with a bias), rank B.

    Attributes:
      left: (m, B) U, orthonormal; R U holds the deltas. singular_values: (B,) S. right: (d, B) K V.
      noise: (m,) R, per entry of each row. columns: (d,) K, with root mean square 1.
      directions: (m, B) W^T K V: the layer's outputs are directions @ a.
      constant: (B,) last row of K V, so that constant . a = 1 with a bias; zeros without.
      common: largest singular value of what is beyond the rank, over sqrt(d): what noise that rows have in common can
        do to a sum over rows, in units of what independent noise does. At least 1.
      roundoff: unit roundoff of the gradient's dtype, at least `OWN_ROUNDOFF`.
    """

    left: np.ndarray
    singular_values: np.ndarray
    right: np.ndarray
    noise: np.ndarray
    columns: np.ndarray
    directions: np.ndarray
    constant: np.ndarray
    common: float
    roundoff: float

    @property
    def rank(self) -> int:
        return len(self.singular_values)

    @property
    def has_bias(self) -> bool:
        return bool(np.any(self.constant != 0))


def layer_space(
    kernel: np.ndarray,
    bias: np.ndarray | None,
    kernel_gradient: np.ndarray,
    bias_gradient: np.ndarray | None,
    dtype: np.dtype,
    largest: int | None,
    rank: int | None = None,
) -> LayerSpace:
    """Decompose; kernel and its gradient: (inputs, outputs).

    largest: B, where it is told and noise hides it. rank: if given, what is beyond is taken for noise.
    """
    matrix, weight = kernel_gradient.T, kernel.T
    if bias is not None and bias_gradient is not None:
        matrix = np.concatenate([matrix, bias_gradient[:, None]], axis=1)
        weight = np.concatenate([weight, bias[:, None]], axis=1)
    columns = matrix.shape[1]
    # Units that are never open, and inputs that are always zero, hold neither signal nor noise.
    live = int(np.any(matrix, axis=1).sum()), int(np.any(matrix, axis=0).sum())
    seen, right, noise, profile = _leading(matrix, dtype, live, largest)
    rank = min(seen, rank or seen)
    matrix = matrix / profile
    # What is left beyond the rank is the noise: more than one rounding, where sums were rounded on the way.
    rest = matrix - (matrix @ right[:rank].T) @ right[:rank]
    measured = np.sqrt(np.sum(rest**2, axis=1) / max(columns - rank, 1))
    noise = np.maximum(noise, measured)
    # In the rank's own row space, with the rows weighed anew.
    left, values, turn = np.linalg.svd((matrix @ right[:rank].T) / noise[:, None], full_matrices=False)
    basis = profile[:, None] * (turn @ right[:rank]).T
    return LayerSpace(
        left=left,
        singular_values=values,
        right=basis,
        noise=noise,
        columns=profile,
        directions=weight @ basis,
        constant=basis[-1] if bias is not None else np.zeros(rank),
        common=max(_largest(rest / noise[:, None]) / np.sqrt(columns), 1.0),
        roundoff=_roundoff(dtype),
    )


def _leading(
    matrix: np.ndarray, dtype: np.dtype, live: tuple[int, int], largest: int | None
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The rank that stands out of rounding, or of other noise; the leading V^T; R and K."""
    edge = np.sqrt(live[0]) + np.sqrt(live[1])
    noise, profile = _rounding(matrix, dtype)
    values, right = _decompose(matrix / profile / noise[:, None], CORRELATED * edge)
    rank = rounding_rank(values[: min(live)], edge)
    if rank is not None:
        return rank, right, noise, profile
    # No gap: other noise, the same on all entries as far as is known, or an example with next to no gradient.
    few = int(np.count_nonzero(values[: min(live)] > CORRELATED * edge))
    values, rows = _decompose(matrix, 0.0)
    rank = _noisy_rank(values[: min(live)], np.sum(matrix**2), live)
    rank = min(rank, largest or rank)
    if 0 < few <= rank:
        return few, right, noise, profile
    return rank, rows, noise, np.ones(matrix.shape[1])


def _roundoff(dtype: np.dtype) -> float:
    return max(float(unit_roundoff(dtype)), OWN_ROUNDOFF)


def _rounding(matrix: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(m,) R and (d,) K of a matrix whose entries were rounded in proportion to themselves."""
    size = np.sqrt(np.mean(matrix**2, axis=1))
    # Autocast scales its loss up, so that float16's smallest numbers are smaller than they look.
    least = float(np.min(np.abs(matrix), where=matrix != 0, initial=np.inf)) / 2
    smallest = max(min(float(jnp.finfo(dtype).smallest_subnormal), least), float(np.finfo(np.float64).tiny))
    noise = np.hypot(_roundoff(dtype) / np.sqrt(3) * size, smallest)
    noise = np.maximum(noise, WIDEST_RANGE * np.max(noise))
    profile = np.sqrt(np.mean((matrix / noise[:, None]) ** 2, axis=0))
    profile = np.maximum(profile, NARROWEST_COLUMN * np.max(profile))
    return noise, profile / np.sqrt(np.mean(profile**2))


def _decompose(matrix: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """The leading S and V^T: all where the matrix is small, else by a sketch that grows until S is below `floor`.

    Halko, Martinsson and Tropp (2011), with one power iteration. Where S stops falling, what is left is noise as well.
    """
    rows, columns = matrix.shape
    limit = min(rows, columns)
    width = SKETCH
    generator = np.random.default_rng(0)
    while width < limit / 2:
        sample = matrix @ generator.standard_normal((columns, width))
        outputs, _ = np.linalg.qr(matrix @ (matrix.T @ np.linalg.qr(sample)[0]))
        _, values, right = np.linalg.svd(outputs.T @ matrix, full_matrices=False)
        if values[-BEYOND] <= max(floor, 0.0) or (floor == 0 and values[-1] > FLAT * values[-BEYOND]):
            return values, right
        width *= 2
    _, values, right = np.linalg.svd(matrix, full_matrices=False)
    return values, right


def _noisy_rank(values: np.ndarray, total: float, shape: tuple[int, int]) -> int:
    """How many singular values stand out of noise of equal size on all entries, of which only the leading are known.

    values: falling. total: of the squares of all entries.
    """
    rows, columns = shape
    rest = total - np.cumsum(values**2)
    for rank in range(1, len(values)):
        sigma = np.sqrt(max(rest[rank - 1], 0.0) / max((rows - rank) * (columns - rank), 1))
        edge = sigma * (np.sqrt(rows) + np.sqrt(columns))
        if values[rank] <= 1.2 * edge and values[rank - 1] > 1.5 * edge:
            return rank
    return len(values)


def _largest(matrix: np.ndarray) -> float:
    """The largest singular value, by power iteration: a little less than it."""
    direction = np.asarray(np.random.default_rng(0).standard_normal(matrix.shape[1]))
    size = 0.0
    for _ in range(POWER_STEPS):
        direction = matrix.T @ (matrix @ direction)
        size = float(np.linalg.norm(direction))
        if size == 0:
            return 0.0
        direction = direction / size
    return float(np.sqrt(size))
