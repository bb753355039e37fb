"""What many steps leave in the first dense layer: each example's deltas, summed over the steps, are a sparse vector.

Every step of gradient descent adds delta_b x_b^T of the examples it is on. Momentum, rates and minibatches weigh the
steps. So what comes back is sum_b c_b x_b^T, with c_b the weighed sum of the deltas: as many terms as examples, however
many the steps were. With ReLU c_b is zero in every unit that the example never opened. In the column space of the
update, of B dimensions, a vector with far more than B - 1 zeros is no accident: it is an example's.

The search goes on from a guess of the units that stay closed, by reweighted least squares (Chartrand and Yin, ICASSP
2008): the vector that is smallest there; then there where it is small already. Rows are first brought to equal lengths
and the columns made orthonormal, in turn (Tyler, Annals of Statistics 1987): else units that hardly an example opens
count for zeros of any vector. Nothing is asked of the loss, the labels, the layers behind, the rate or the order of the
steps.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.dense_layers.gate_fit import CREDIBLE_MISFIT, SEPARATION
from softinv_jax.dense_layers.space import LayerSpace
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.linear_algebra import inverse_and_log_determinant

__all__ = ["BalancedRows", "SummedDelta", "balance", "certify", "refine"]

BALANCING_STEPS = 30
# Of a row in units of its noise: less tells nothing of zeros.
LEAST_ROW = 200.0
# Equations beyond an example's unknowns; nats beyond the choice of the zeros.
SURPLUS, CREDIBLE_SURPRISE = 20, 40.0
# Of a zero that nothing but itself holds in place, as of a mixture of two examples made to vanish in one unit more.
MOST_LEVERAGE = 0.75
STEPS, GUARDED_STEPS = 60, 20  # In the latter the units taken for open stay so.
WIDTH, NARROWING, NARROWEST = 0.5, 0.8, 1e-4  # Of what counts as zero, of the root mean square.
POWER_STEPS = 4
RIDGE = 1e-6  # Of the mean eigenvalue, in float32.
SETTLING, SETTLING_STEPS = 0.6, 60  # The width's factor in each step, and steps at most.


@dataclass(frozen=True)
class BalancedRows:
    """rows: (m, B) diag(r) U turn, of equal lengths and with orthonormal columns up to a factor; zeros where not live.

    turn: (B, B). live: (m,) bool, units whose row stands out of noise.
    """

    rows: np.ndarray
    turn: np.ndarray
    live: np.ndarray


@dataclass(frozen=True)
class SummedDelta:
    """One example's deltas, summed over the steps, of unknown scale: R U coordinates.

    Attributes:
      coordinates: (B,) of length one. closed: (m,) bool, the zeros, of units whose row stands out of noise.
      errors: (B, B - 1) errors of the coordinates are errors @ standard normal numbers.
      freedom: zeros beyond those that fix any vector. misfit: root mean square of the zeros, in deviations.
      surprise: nats by which an accident falls short of it.
    """

    coordinates: np.ndarray
    closed: np.ndarray
    errors: np.ndarray
    freedom: int
    misfit: float
    surprise: float


def balance(space: LayerSpace) -> BalancedRows:
    """See `BalancedRows`."""
    size = np.linalg.norm(space.left * space.singular_values, axis=1)
    live = size > LEAST_ROW * space.common
    rows, turn = space.left[live], np.eye(space.rank)
    if np.linalg.matrix_rank(rows) < space.rank:
        return BalancedRows(np.zeros_like(space.left), turn, np.zeros_like(live))
    for _ in range(BALANCING_STEPS):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        step = np.linalg.inv(np.linalg.qr(rows)[1])
        rows, turn = rows @ step, turn @ step
    balanced = np.zeros_like(space.left)
    balanced[live] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return BalancedRows(balanced, turn, live)


@jax.jit
def refine(rows: jax.Array, closed: jax.Array, starts: jax.Array) -> jax.Array:
    """Sparse vectors near guesses of their zeros; float32 is enough, `certify` goes on from there.

    Args:
      rows: (m, B) balanced. closed: (S, m), 1 where a unit is guessed to stay closed, else 0. starts: (S, B) random.

    Returns:
      (S, B) rows @ them are sparse, or as sparse as could be found.
    """

    def smallest(weights: jax.Array, direction: jax.Array) -> jax.Array:
        matrix = (rows * weights[:, None]).T @ rows
        shift = RIDGE * jnp.trace(matrix) / len(matrix) + jnp.finfo(matrix.dtype).tiny
        inverse, _ = inverse_and_log_determinant(matrix + shift * jnp.eye(len(matrix), dtype=matrix.dtype))
        for _ in range(POWER_STEPS):
            direction = inverse @ direction
            direction = direction / jnp.linalg.norm(direction)
        return direction

    def one(guess: jax.Array, start: jax.Array) -> jax.Array:
        def step(index: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            weights, direction = state
            direction = smallest(weights, direction)
            values = rows @ direction
            width = jnp.maximum(WIDTH * NARROWING**index, NARROWEST)
            square = width**2 * jnp.mean(values**2)
            weights = square / (values**2 + square)
            return jnp.where(index < GUARDED_STEPS, weights * guess, weights), direction

        return jax.lax.fori_loop(0, STEPS, step, (guess, start))[1]

    return jax.vmap(one)(closed, starts)


def certify(space: LayerSpace, balanced: BalancedRows, direction: np.ndarray) -> SummedDelta | None:
    """The example's deltas behind one vector that `refine` found; None where there is none.

    direction: (B,). Its zeros must be more than fix any vector, and each must follow from the others.
    """
    rank = space.rank
    if rank == 1:
        # The update is one outer product, which no other client's is.
        return SummedDelta(np.ones(1), ~balanced.live, np.zeros((1, 0)), len(space.noise), 0.0, np.inf)
    closed = _settled_zeros(space, balanced, balanced.turn @ direction)
    if np.count_nonzero(closed) < rank - 1 + SURPLUS:
        return None
    _, sizes, turned = np.linalg.svd(space.left[closed], full_matrices=False)
    if not _is_alone(space, balanced, closed, sizes[-2], turned[-2]):
        return None
    coordinates = turned[-1]
    values = np.abs(space.left @ coordinates)
    noise = _noise(space, coordinates)
    misfit = float(np.sqrt(np.mean(values[closed] ** 2))) / noise
    freedom = int(np.count_nonzero(closed)) - rank + 1
    spread = float(np.sqrt(np.mean(values[balanced.live] ** 2))) / noise
    surprise = freedom * float(np.log(max(spread / TOLERANCE, 1.0))) - np.count_nonzero(balanced.live) * np.log(2)
    # Where the zeros are worse than their noise, some are none.
    if not (misfit < CREDIBLE_MISFIT and surprise > CREDIBLE_SURPRISE):
        return None
    errors = noise * turned[:-1].T / sizes[:-1]
    return SummedDelta(coordinates, closed, errors, freedom, misfit, float(surprise))


def _noise(space: LayerSpace, coordinates: np.ndarray) -> float:
    """Deviation of an entry of U coordinates."""
    return space.common * float(np.linalg.norm(coordinates / space.singular_values))


def _settled_zeros(space: LayerSpace, balanced: BalancedRows, coordinates: np.ndarray) -> np.ndarray:
    """(m,) bool the zeros of R U coordinates, once these are as exact as the noise lets them be.

    What counts as zero narrows from what float32 leaves to the noise: zeros that are none must not push out others.
    """
    needed, width = space.rank - 1 + SURPLUS, NARROWEST
    closed = np.zeros(len(space.noise), bool)
    left = space.left[balanced.live]
    for _ in range(SETTLING_STEPS):
        coordinates = coordinates / np.linalg.norm(coordinates)
        values = left @ coordinates
        noise = _noise(space, coordinates)
        size = max(width * float(np.sqrt(np.mean(values**2))), noise)
        closed[balanced.live] = np.abs(values) < max(TOLERANCE * noise, 3 * size)
        if np.count_nonzero(closed) < needed:
            break
        if size == noise:
            before, closed[balanced.live] = closed.copy(), np.abs(values) < TOLERANCE * noise
            if np.array_equal(before, closed):
                break
        weights = size**2 / (values**2 + size**2)
        coordinates = np.linalg.eigh((left * weights[:, None]).T @ left)[1][:, 0]
        width *= SETTLING
    return closed


def _is_alone(
    space: LayerSpace, balanced: BalancedRows, closed: np.ndarray, next_size: float, following: np.ndarray
) -> bool:
    """Whether each zero follows from the others, and no other vector has them all.

    next_size: length, in these units, of the vector with the coordinates `following`, which is the next smallest there.
    """
    if not next_size > SEPARATION * _noise(space, following) * np.sqrt(np.count_nonzero(closed)):
        return False
    left, _, _ = np.linalg.svd(balanced.rows[closed], full_matrices=False)
    return bool(np.max(np.sum(left[:, :-1] ** 2, axis=1)) < MOST_LEVERAGE)
