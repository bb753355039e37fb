"""All examples of a batch together: one least-squares fit of the whole gradient, and whether it explains it.

G V = sum_b (1/D_b) (softmax(W V a_b) - y_b) a_b^T, with y_b = 1/C + sum_t w_bt (e_t - 1/C): C B equations for B^2
coordinates, a few weights, and D where it is not known: one D for all, or one for each example. What one example's own
equation cannot see, that the examples are dual to each other, is in here: the residual says whether the whole
explanation is consistent.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.batches.component import Divisor, prediction_error
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.least_squares import NormalEquations, minimise
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.linear_algebra import orthonormal_columns

__all__ = ["JointFit", "fit_jointly"]

STEPS = 60
# Fits to the residuals of the fit before, until no row is fitted any better: as the logarithm of its mean square.
PASSES = 12
SETTLED = 0.1
SQUARINGS = 24


class JointFit(NamedTuple):
    """Leading axis B: one entry an example.

    coordinates: (B, r). label: (B, C), structured.
    coordinates_deviation: (B, r) and label_deviation: (B, C), standard deviations.
    misfit: () root mean square residual in standard deviations, with the degrees of freedom left. freedom: () those.
    decrement: () what one more step would take off the sum of squares: below 1, it has converged.
    divisors: (B,) D of each example, as the fit found it. divisors_deviation: (B,) relative, 0 if it was known.
    """

    coordinates: jax.Array
    label: jax.Array
    coordinates_deviation: jax.Array
    label_deviation: jax.Array
    misfit: jax.Array
    freedom: jax.Array
    decrement: jax.Array
    divisors: jax.Array
    divisors_deviation: jax.Array


class _Point(NamedTuple):
    """Coordinates (n, r), weights (n, TARGETS) and D of each example (n,)."""

    coordinates: jax.Array
    weights: jax.Array
    divisors: jax.Array


class _Whitening(NamedTuple):
    """Noise over the rows of G V: deviations (C,) of their own, and directions (C, k) that they share, less (k, k)."""

    own: jax.Array
    directions: jax.Array
    shrinkage: jax.Array


class _Problem(NamedTuple):
    """What the fit is of. Unknowns in a row: all coordinates, all weights, logarithms of D relative to the start.

    Attributes:
      subspace: of the batch. used: (n, TARGETS) bool and singled: (n, TARGETS, C), e_t - 1/C of the classes used.
      start: (n,) D to start from. is_free: () bool. own: static, whether each example has its own D.
      along, across: (r, r) projectors on the features' main direction and off it.
    """

    subspace: BatchSubspace
    used: jax.Array
    singled: jax.Array
    start: jax.Array
    is_free: jax.Array
    own: bool
    along: jax.Array
    across: jax.Array


def _solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)


@partial(jax.jit, static_argnames="own_divisors")
def fit_jointly(
    subspace: BatchSubspace,
    coordinates: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    divisor: Divisor,
    divisors: jax.Array | None = None,
    *,
    own_divisors: bool = False,
    skipped: jax.Array | bool = False,
) -> JointFit:
    """Levenberg-Marquardt on all unknowns at once, until it gains nothing more.

    Args:
      subspace: of the batch.
      coordinates: (n, r) start, one row an example. weights: (n, TARGETS) start. targets: (n, TARGETS), -1 for none.
      divisor: D; free unless its deviation is 0.
      divisors: (n,) D of each example to start from, where they have their own.
      own_divisors: each example has its own D (class weights, one image twice): n more unknowns.
      skipped: () bool, to take no step: where many are fitted at once, and some are not worth it.
    """
    problem = _problem(subspace, coordinates, targets, divisor, divisors, own_divisors)
    tail = jnp.zeros((len(coordinates) if own_divisors else 1,))
    used = problem.used
    flat = jnp.concatenate([coordinates.ravel(), jnp.where(used, weights, 0.0).ravel(), tail])
    fit = partial(_fit_once, problem)
    # The best known rows count only as far as the fit has got to, so that they do not hide all others.
    equations = jax.tree.map(jnp.zeros_like, jax.eval_shape(fit, (0, flat, None, 0.0, False))[2])
    state = (jnp.int32(0), flat, equations, jnp.asarray(jnp.inf), jnp.asarray(skipped))
    _, flat, equations, _, _ = jax.lax.while_loop(lambda state: ~state[-1], fit, state)
    return _describe(problem, flat, equations)


def _problem(
    subspace: BatchSubspace,
    coordinates: jax.Array,
    targets: jax.Array,
    divisor: Divisor,
    divisors: jax.Array | None,
    own: bool,
) -> _Problem:
    count, rank = coordinates.shape
    number_of_classes = subspace.left.shape[0]
    used = targets >= 0
    singled = jax.nn.one_hot(targets, number_of_classes, dtype=jnp.float64) - used[..., None] / number_of_classes
    # Features resemble each other, so that errors of a softmax entry, which come times the feature, lie in one
    # direction of the row space more than in all others.
    along = _main_projector(coordinates)
    return _Problem(
        subspace=subspace,
        used=used,
        singled=singled,
        start=jnp.broadcast_to(divisor.value, (count,)) if divisors is None else divisors,
        is_free=jnp.asarray(own) | (divisor.deviation > 0),
        own=own,
        along=along,
        across=jnp.eye(rank) - along,
    )


def _main_projector(coordinates: jax.Array) -> jax.Array:
    """(r, r) on the main direction of (n, r): a high power of their scatter, which needs no LAPACK."""
    power = coordinates.T @ coordinates
    for _ in range(SQUARINGS):
        power = power / jnp.maximum(jnp.linalg.norm(power), 1e-300)
        power = power @ power
    return power / jnp.maximum(jnp.trace(power), 1e-300)


def _labels(problem: _Problem, weights: jax.Array) -> jax.Array:
    weights = jnp.where(problem.used, weights, 0.0)
    return 1 / problem.singled.shape[-1] + jnp.einsum("bt,btc->bc", weights, problem.singled)


def _predictions(problem: _Problem, coordinates: jax.Array) -> jax.Array:
    return jax.nn.softmax(coordinates @ problem.subspace.directions.T, axis=1)


def _unflatten(problem: _Problem, flat: jax.Array) -> _Point:
    count, rank = problem.used.shape[0], problem.along.shape[0]
    first, second = count * rank, count * (rank + TARGETS)
    divisors = problem.start * jnp.exp(jnp.where(problem.is_free, flat[second:], 0.0))
    return _Point(flat[:first].reshape(count, rank), flat[first:second].reshape(count, TARGETS), divisors)


def _row_deviation(problem: _Problem, point: _Point, projector: jax.Array, directions: int) -> jax.Array:
    """(C,) of the entries of a row of G V in some directions: its noise, and that of p - y in it, rounded too."""
    subspace = problem.subspace
    prediction = _predictions(problem, point.coordinates)
    error = jax.vmap(partial(prediction_error, subspace))(point.coordinates, prediction)
    error = jnp.hypot(error, subspace.roundoff * _labels(problem, point.weights))
    square = jnp.sum((point.coordinates @ projector) ** 2, axis=1) / point.divisors**2
    carried = jnp.sum(error**2 * square[:, None], axis=0) / max(directions, 1)
    return jnp.sqrt(subspace.noise**2 + carried)


def _whitening(problem: _Problem, deviation: jax.Array) -> _Whitening:
    common = problem.subspace.common
    shared = jnp.sum(common**2, axis=1)
    own = jnp.sqrt(jnp.maximum(deviation**2 - shared, 0.01 * deviation**2))
    shared = common / own[:, None]
    directions = orthonormal_columns(shared)[0]
    # With Q those directions and Q R what is shared, T^T (1 + R R^T) T = 1 for the triangle T of [1, R]^T.
    unit = jnp.eye(common.shape[1])
    triangle = orthonormal_columns(jnp.concatenate([unit, (directions.T @ shared).T]))[1]
    return _Whitening(own, directions, unit - triangle)


def _whitened(values: jax.Array, noise: _Whitening) -> jax.Array:
    """(..., C) in standard deviations, made independent over rows of G V where their noise is not."""
    scaled = values / noise.own.reshape((1,) * (values.ndim - 1) + (-1,))
    return scaled - (scaled @ noise.directions @ noise.shrinkage) @ noise.directions.T


def _residuals(problem: _Problem, noises: tuple[_Whitening, ...], flat: jax.Array) -> tuple[jax.Array, ...]:
    """(C, r) of G V along the features' main direction and across, and (n,) of their constants."""
    subspace = problem.subspace
    coordinates, weights, divisors = _unflatten(problem, flat)
    observed = subspace.left * subspace.singular_values[None, :]
    gradient = _predictions(problem, coordinates) - _labels(problem, weights)
    scaled = coordinates / divisors[:, None]
    along_and_across = (
        (_whitened(gradient, noise).T @ scaled - _whitened(observed.T, noise).T) @ projector
        for projector, noise in zip((problem.along, problem.across), noises, strict=True)
    )
    has_constant = jnp.any(subspace.constant != 0)
    constants = jnp.where(has_constant, coordinates @ subspace.constant - 1, 0.0)
    return *along_and_across, constants / subspace.roundoff


def _normal(problem: _Problem, noises: tuple[_Whitening, ...], flat: jax.Array) -> jax.Array:
    """J^T J from blocks: with g_b and its slope S_b, row j of G V moves by (g_bj e_s + S_bjs a_b) / D_b for a_bs."""
    subspace = problem.subspace
    coordinates, weights, divisors = _unflatten(problem, flat)
    count, rank = coordinates.shape
    prediction = _predictions(problem, coordinates)
    mean = prediction @ subspace.directions
    slope = prediction[:, :, None] * (subspace.directions[None] - mean[:, None, :])
    weight_slope = -jnp.where(problem.used[..., None], problem.singled, 0.0)
    # Everything that moves g_b, its coordinates and its weights, moves row j by a multiple of a_b.
    moves = jnp.concatenate([slope.transpose(0, 2, 1), weight_slope], axis=1) / divisors[:, None, None]
    pull = subspace.constant / subspace.roundoff
    blocks = jnp.zeros((count, rank + TARGETS) * 2)
    each = jnp.arange(count)
    blocks = blocks.at[each, :rank, each, :rank].add((pull[:, None] * pull[None, :])[None])
    for projector, noise in zip((problem.along, problem.across), noises, strict=True):
        projected = coordinates @ projector
        gradient = _whitened(prediction - _labels(problem, weights), noise) / divisors[:, None]
        stacked = _whitened(moves, noise).reshape(count * (rank + TARGETS), -1)
        products = (stacked @ stacked.T).reshape(count, rank + TARGETS, count, rank + TARGETS)
        blocks = blocks + products * (projected @ projected.T)[:, None, :, None]
        cross = (stacked @ gradient.T).reshape(count, rank + TARGETS, count)
        mixed = jnp.einsum("bkc,bs->bkcs", cross, projected)
        blocks = blocks.at[:, :, :, :rank].add(mixed)
        blocks = blocks.at[:, :rank, :, :].add(mixed.transpose(2, 3, 0, 1))
        blocks = blocks.at[:, :rank, :, :rank].add(jnp.einsum("bj,cj,rs->brcs", gradient, gradient, projector))
    matrix = _ordered(_ordered(blocks, rank).transpose(1, 2, 0), rank).T
    return _bordered(problem, noises, flat, matrix)


def _ordered(values: jax.Array, rank: int) -> jax.Array:
    """(n, r + T, ...) to all coordinates, then all weights."""
    parts = values[:, :rank], values[:, rank:]
    return jnp.concatenate([part.reshape(-1, *values.shape[2:]) for part in parts])


def _bordered(problem: _Problem, noises: tuple[_Whitening, ...], flat: jax.Array, matrix: jax.Array) -> jax.Array:
    """J^T J with the rows and columns of the logarithms of D."""
    function, size = partial(_residuals, problem, noises), len(matrix)

    def column(unit: jax.Array) -> jax.Array:
        return jax.vjp(function, flat)[1](jax.jvp(function, (flat,), (unit,))[1])[0]

    units = jnp.eye(flat.size)[size:]
    border = jax.vmap(column)(units) if problem.own else column(units[0])[None]
    return jnp.block([[matrix, border[:, :size].T], [border]])


def _fit_once(problem: _Problem, state: tuple) -> tuple:
    """To the noise and, but for the last time, to what the residuals of each row are now."""
    number, flat, _, previous, _ = state
    subspace, start = problem.subspace, _unflatten(problem, flat)
    rank = start.coordinates.shape[1]
    observed = subspace.left * subspace.singular_values[None, :]
    gradient = _predictions(problem, start.coordinates) - _labels(problem, start.weights)
    difference = gradient.T @ (start.coordinates / start.divisors[:, None]) - observed
    square = jnp.mean(difference**2, axis=1)
    level = jnp.mean(jnp.log(square + subspace.noise**2))
    last = (level > previous - SETTLED) | (number == PASSES)
    misfit = jnp.where(last, 0.0, jnp.sqrt(square))
    noises = (
        _whitening(problem, jnp.hypot(_row_deviation(problem, start, problem.along, 1), misfit)),
        _whitening(problem, jnp.hypot(_row_deviation(problem, start, problem.across, rank - 1), misfit)),
    )
    residuals, normal = partial(_residuals, problem, noises), partial(_normal, problem, noises)
    flat, equations = minimise(residuals, normal, flat, STEPS, 1e-6, _solve, thorough=True)
    return number + 1, flat, equations, level, last


def _describe(problem: _Problem, flat: jax.Array, equations: NormalEquations) -> JointFit:
    """What was found, with its deviations."""
    used, (count, rank) = problem.used, (problem.used.shape[0], problem.along.shape[0])
    covariance = _covariance(equations.normal)
    deviation = jnp.sqrt(jnp.maximum(jnp.diag(covariance), 0.0))
    coordinates, weights, divisors = _unflatten(problem, flat)
    first, second = count * rank, count * (rank + TARGETS)
    block = covariance[first:second, first:second].reshape(count, TARGETS, count, TARGETS)
    own = block[jnp.arange(count), :, jnp.arange(count), :]
    own = jnp.where(used[:, :, None] & used[:, None, :], own, 0.0)
    label_variance = jnp.einsum("btc,bts,bsc->bc", problem.singled, own, problem.singled)
    unknowns = first + jnp.sum(used) + jnp.where(problem.is_free, flat.size - second, 0)
    has_constant = jnp.any(problem.subspace.constant != 0)
    # The columns of G V sum to zero over classes, whatever the unknowns.
    freedom = (problem.singled.shape[-1] - 1) * rank + jnp.where(has_constant, count, 0) - unknowns
    freedom = jnp.maximum(freedom, 1)
    misfit = jnp.sqrt(equations.loss / freedom)
    # Residuals larger than expected mean more noise than expected.
    excess = jnp.maximum(misfit, 1.0)
    relative = jnp.where(problem.is_free, excess * deviation[second:], 0.0)
    return JointFit(
        coordinates=coordinates,
        label=_labels(problem, weights),
        coordinates_deviation=excess * deviation[:first].reshape(count, rank),
        label_deviation=excess * jnp.sqrt(jnp.maximum(label_variance, 0.0)),
        misfit=misfit,
        freedom=freedom,
        decrement=equations.toward @ covariance @ equations.toward,
        divisors=divisors,
        divisors_deviation=jnp.broadcast_to(relative, (count,)),
    )


def _covariance(matrix: jax.Array) -> jax.Array:
    """The inverse of J^T J, in which an unknown that nothing depends on stays by itself."""
    scale = jnp.sqrt(jnp.where(jnp.diag(matrix) > 0, jnp.diag(matrix), 1.0))
    scaled = matrix / scale[:, None] / scale[None, :]
    scaled = scaled + jnp.diag(jnp.where(jnp.diag(matrix) > 0, 0.0, 1.0))
    return jnp.linalg.inv(scaled) / scale[:, None] / scale[None, :]
