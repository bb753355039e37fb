"""Examples behind one dense layer whose activation's derivative is smooth: one equation from many starts.

An example's input is h = K V a, so a alone gives z = W h, and delta = act'(z) * (W' g) with g the loss's derivative by
the next layer's output. delta must lie in the column space of R U:

    P R^-1 diag(act'(z)) W' g = 0,        P = 1 - U U^T

m - B equations for B + n - 1 unknowns. No label is asked for: g is free, but for a softmax's sum of zero, or for the
column space of the next layer's own gradient where that has rank B; there the next layer's input act(z) lies in its row
space as well. Residuals count in their own noise: what G's leaves of P delta, |S^-1 beta| an entry, and the client's
rounding of delta. g is the smallest generalised eigenvector, so the steps are Levenberg-Marquardt's in both, with g
found anew after each.

What is found confines the rest by duality: beta_c^T S^-1 a = 0 = beta^T S^-1 a_c. The rest is then a batch smaller by
one, in unknowns and equations, and no start can lead to the same example again.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.batches.lanes import over_lanes
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.space import LayerSpace, layer_space
from softinv_jax.linear_algebra import inverse_and_log_determinant

__all__ = ["SmoothSolution", "is_credible_smooth", "search_smooth"]

STARTS = 32
STEPS = 60
POLISH = 15
PROMISING = 1e3  # Deviations, of what is polished.
FRUITLESS = 16  # Rounds in a row, before it gives up.
NO_GAIN = 1e-2
STUCK = 1e8
INVERSE_ITERATIONS = 8
ROUNDED_OPERATIONS = 3
CREDIBLE_MISFIT = 30.0
# Nats by which an accident must fall short; and the largest error of a, of its length, that noise may leave.
CREDIBLE_SURPRISE = 40.0
CREDIBLE_DEVIATION = 0.1
# Relative to their lengths, how near two coordinates are that are one example.
SAME = 1e-3
LEAST_SHARE = 0.05
# Root mean square of the layer's outputs at the starts, where no bias tells the scale.
LEAST_SPREAD, LARGEST_SPREAD = 0.2, 3.0


class SmoothSolution(NamedTuple):
    """One example, in the coordinates of a `LayerSpace`.

    Attributes:
      coordinates: (B,) a, so that h = K V a. Without a bias in the layer, an activation with an even
        derivative (sigmoid, tanh, softplus's is not) leaves the sign of a and g open: the forward pass has it.
      logit_gradient: (n,) g of the next layer's outputs, of unknown length; its sign makes the divisor positive.
      misfit: root mean square of all residuals in units of their noise. freedom: equations less unknowns.
      spread: of what is projected, in the same units: what the misfit would be of a delta in no relation to U.
      divisor: beta^T S^-1 a with that g: g D / divisor is that of a loss divided by D.
      deviation: standard deviation of a, relative to its length, that the noise leaves; or what is left, where that is
        more than noise.
    """

    coordinates: np.ndarray
    logit_gradient: np.ndarray
    misfit: float
    freedom: int
    spread: float
    divisor: float
    deviation: float


class _Equations(NamedTuple):
    """float64. Spaces confined to what is left have columns of zeros in the last places, so that shapes stay.

    Attributes:
      left: (m, B) U. kept: (B, B) projector on what beta may be. inverse_values: (B,) of S.
      directions: (m, B) of a. moves: (B, B) orthonormal columns, what a may change by. steps: (m, B) of these moves.
      weight: (m, n) R^-1 W' Q, what g's coordinates are multiplied by.
      next_right: (m or m + 1, k) V of the next layer's gradient, confined; its last row is that of the constant 1.
      next_scales: likewise with S^-1, not confined; k is 0 where the row space says nothing. next_columns: its K.
      rounding: () relative, of every entry.
    """

    left: jax.Array
    kept: jax.Array
    inverse_values: jax.Array
    directions: jax.Array
    moves: jax.Array
    steps: jax.Array
    weight: jax.Array
    next_right: jax.Array
    next_scales: jax.Array
    next_columns: jax.Array
    rounding: jax.Array


class _Point(NamedTuple):
    """a (B,), g (n,) in coordinates, and the normal equations (B + n,) there; the loss is a sum of squares."""

    coordinates: jax.Array
    combination: jax.Array
    normal: jax.Array
    toward: jax.Array
    loss: jax.Array


def _inverse(matrix: jax.Array) -> jax.Array:
    """Of a positive semi-definite matrix; rows of zeros stay out of it."""
    diagonal = jnp.diag(matrix)
    some = diagonal > 0
    scale = jnp.where(some, jax.lax.rsqrt(jnp.where(some, diagonal, 1.0)), 0.0)
    scaled = matrix * scale[:, None] * scale[None, :] + jnp.diag(jnp.where(some, 1e-14, 1.0))
    return inverse_and_log_determinant(scaled)[0] * scale[:, None] * scale[None, :]


def _in_noise(
    residual: jax.Array, jacobian: jax.Array, terms: Sequence[tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """Residual and Jacobian of residual / noise, noise^2 the sum of the terms' squares; terms: values, Jacobians."""
    square = jnp.maximum(sum(jnp.sum(values**2) for values, _ in terms), 1e-300)
    slope = sum(values @ own for values, own in terms) / square
    noise = jnp.sqrt(square)
    return residual / noise, (jacobian - residual[:, None] * slope[None, :]) / noise


def _point(equations: _Equations, activation: str, coordinates: jax.Array, start: jax.Array, rounds: int) -> _Point:
    """The equations at some a, with the best g from a start of it by inverse iteration."""
    own = ACTIVATIONS[activation].apply
    slope = jax.grad(own)
    before = equations.directions @ coordinates
    slopes, bends = jax.vmap(slope)(before), jax.vmap(jax.grad(slope))(before)
    masked = slopes[:, None] * equations.weight
    inside = equations.left.T @ masked
    outside = masked - equations.left @ (equations.kept @ inside)
    held = equations.inverse_values[:, None] * inside
    rounding = equations.rounding / np.sqrt(before.size)
    gram = held.T @ held + rounding**2 * (masked.T @ masked)
    inverse = _inverse(outside.T @ outside)
    combination = start
    for _ in range(rounds):
        combination = inverse @ (gram @ combination)
        combination = combination * jax.lax.rsqrt(jnp.maximum(combination @ gram @ combination, 1e-300))

    delta = masked @ combination
    bent = (bends * (equations.weight @ combination))[:, None] * equations.steps
    bent_inside = equations.left.T @ bent
    bent_outside = bent - equations.left @ (equations.kept @ bent_inside)
    whole = jnp.concatenate([bent, masked], axis=1)
    whole_held = jnp.concatenate([equations.inverse_values[:, None] * bent_inside, held], axis=1)
    residual, jacobian = _in_noise(
        outside @ combination,
        jnp.concatenate([bent_outside, outside], axis=1),
        [(held @ combination, whole_held), (rounding * delta, rounding * whole)],
    )
    normal, toward, loss = jacobian.T @ jacobian, jacobian.T @ residual, residual @ residual
    if equations.next_right.shape[1]:
        row_residual, row_jacobian = _next_input(equations, own(before), slopes[:, None] * equations.steps)
        size = coordinates.size
        normal = normal.at[:size, :size].add(row_jacobian.T @ row_jacobian)
        toward = toward.at[:size].add(row_jacobian.T @ row_residual)
        loss = loss + row_residual @ row_residual
    return _Point(coordinates, combination, normal, toward, loss)


def _next_input(equations: _Equations, inputs: jax.Array, jacobian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Residual and Jacobian of the next layer's input outside the row space of its gradient."""
    right, scales = equations.next_right, equations.next_scales
    more = right.shape[0] - inputs.size
    inputs = jnp.concatenate([inputs, jnp.ones((more,))]) / equations.next_columns
    jacobian = jnp.concatenate([jacobian, jnp.zeros((more, jacobian.shape[1]))]) / equations.next_columns[:, None]
    rounding = equations.rounding / np.sqrt(inputs.size)
    return _in_noise(
        inputs - right @ (right.T @ inputs),
        jacobian - right @ (right.T @ jacobian),
        [(scales.T @ inputs, scales.T @ jacobian), (rounding * inputs, rounding * jacobian)],
    )


@partial(jax.jit, static_argnames="activation")
def _solve(equations: _Equations, activation: str, starts: jax.Array, steps: jax.Array) -> tuple[_Point, jax.Array]:
    """From every start (N, B), at most so many steps (N,): where it ends, and the variance (N,) of a there."""
    size = starts.shape[1]

    def step(state: tuple) -> tuple:
        count, _, damping, current = state
        diagonal = jnp.diag(current.normal)
        move = -_inverse(current.normal + jnp.diag(damping * diagonal)) @ current.toward
        trial = current.coordinates + equations.moves @ move[:size]
        new = _point(equations, activation, trial, current.combination + move[size:], 1)
        better = new.loss < current.loss
        kept = jax.tree.map(lambda fresh, old: jnp.where(better, fresh, old), new, current)
        done = (better & (new.loss > (1 - NO_GAIN) * current.loss)) | (damping > STUCK)
        return count + 1, done, jnp.maximum(damping * jnp.where(better, 0.2, 5.0), 1e-12), kept

    def one(each: tuple[jax.Array, jax.Array]) -> tuple[_Point, jax.Array]:
        start, most = each
        first = _point(equations, activation, start, jnp.ones((equations.weight.shape[1],)), INVERSE_ITERATIONS)
        state = (jnp.int32(0), jnp.asarray(False), jnp.asarray(1e-2), first)
        point = jax.lax.while_loop(lambda state: (state[0] < most) & ~state[1], step, state)[3]
        # Nothing fixes the length of g: it is held.
        held = jnp.concatenate([jnp.zeros((size,)), point.combination])
        held = held * jnp.sqrt(jnp.trace(point.normal)) / jnp.maximum(jnp.linalg.norm(held), 1e-300)
        inverse = _inverse(point.normal + held[:, None] * held[None, :])
        return point, jnp.trace(inverse[:size, :size])

    return over_lanes(one, (starts, steps))


class _Layer(NamedTuple):
    """One layer and the next, as NumPy arrays; see `_Equations`. basis: (outputs, n) Q, so that g = Q combination."""

    space: LayerSpace
    following: LayerSpace | None
    weight: np.ndarray
    basis: np.ndarray
    activation: str
    roundoff: float


def _layer(layers: DenseLayers, index: int, space: LayerSpace) -> _Layer:
    kernel = layers.kernels[index + 1]
    following: LayerSpace | None = layer_space(
        kernel,
        layers.biases[index + 1],
        layers.kernel_gradients[index + 1],
        layers.bias_gradients[index + 1],
        layers.dtype,
        None,
    )
    assert following is not None
    if following.rank == space.rank:
        basis = following.noise[:, None] * following.left
    else:
        following = None
        basis = np.eye(kernel.shape[1])
        if index + 2 == len(layers.kernels):
            basis = np.linalg.qr(basis - 1 / len(basis))[0][:, :-1]
    weight = kernel @ basis / space.noise[:, None]
    roundoff = ROUNDED_OPERATIONS * space.roundoff / np.sqrt(3)
    return _Layer(space, following, weight, basis, layers.activations[index], roundoff)


def _complement(vectors: np.ndarray) -> np.ndarray:
    """(B, B) orthonormal columns across the vectors (k, B), then k of zeros."""
    size = vectors.shape[1]
    basis = np.zeros((size, size))
    if len(vectors) < size:
        basis[:, : size - len(vectors)] = np.linalg.qr(vectors.T, mode="complete")[0][:, len(vectors) :]
    return basis


class _Found(NamedTuple):
    """What confines the rest: S^-1 beta and a of every example found, (k, B), in this layer and the next."""

    duals: np.ndarray
    coordinates: np.ndarray
    next_duals: np.ndarray
    next_coordinates: np.ndarray


def _found(layer: _Layer, solutions: Sequence[SmoothSolution]) -> _Found:
    space, following = layer.space, layer.following
    coordinates = np.array([one.coordinates for one in solutions]).reshape(len(solutions), space.rank)
    duals, next_duals, next_coordinates = [], [], []
    for one in solutions:
        delta, after = _delta(layer, one)
        duals.append(space.left.T @ delta / space.singular_values)
        if following is not None:
            inputs = np.concatenate([after, np.ones(len(following.right) - len(after))])
            combination = following.left.T @ (one.logit_gradient / following.noise)
            next_duals.append(combination / following.singular_values)
            right = following.right / following.columns[:, None]
            next_coordinates.append(right.T @ (inputs / following.columns) / following.singular_values)
    shape = len(solutions), space.rank
    empty = np.zeros((0, space.rank))
    return _Found(
        np.reshape(duals, shape),
        coordinates,
        np.reshape(next_duals, shape) if following is not None else empty,
        np.reshape(next_coordinates, shape) if following is not None else empty,
    )


def _delta(layer: _Layer, one: SmoothSolution) -> tuple[np.ndarray, np.ndarray]:
    """R^-1 delta (m,), and what enters the next layer (m,)."""
    before = layer.space.directions @ one.coordinates
    own = ACTIVATIONS[layer.activation].apply
    with jax.enable_x64(True):
        after, slopes = (np.asarray(values) for values in jax.jvp(own, (before,), (np.ones_like(before),)))
    combination = np.linalg.lstsq(layer.basis, one.logit_gradient, rcond=None)[0]
    return slopes * (layer.weight @ combination), after


def _equations(layer: _Layer, found: _Found) -> _Equations:
    """Confined to what is left once some are found."""
    space, following = layer.space, layer.following
    fixed = np.concatenate([found.duals, space.constant[None, :]]) if space.has_bias else found.duals
    weight = layer.weight
    next_right = next_scales = np.zeros((len(weight), 0))
    next_columns = np.ones(len(weight))
    if following is not None:
        weight = weight @ _complement(found.next_coordinates)
        right = following.right / following.columns[:, None]
        next_right = right @ _complement(found.next_duals)
        next_scales = right / following.singular_values
        next_columns = following.columns
    kept = _complement(found.coordinates / space.singular_values)
    moves = _complement(fixed)
    arrays = (
        space.left,
        kept @ kept.T,
        1 / space.singular_values,
        space.directions,
        moves,
        space.directions @ moves,
        weight,
        next_right,
        next_scales,
        next_columns,
        np.float64(layer.roundoff),
    )
    return _Equations(*map(jnp.asarray, arrays))


def _starts(layer: _Layer, found: _Found, generator: np.random.Generator) -> np.ndarray:
    """(STARTS, B): combinations of the gradient's rows, without what is found.

    Half of them weigh the rows as some g would, which favours a few examples; half are rows of their own.
    """
    space = layer.space
    rows = space.left * space.singular_values
    units = generator.integers(0, len(rows), 4 * STARTS)
    weights = layer.weight * space.noise[:, None] ** 2 @ generator.standard_normal((layer.weight.shape[1], 4 * STARTS))
    starts = np.concatenate([rows[units], weights.T @ rows])
    lengths = np.linalg.norm(starts, axis=1, keepdims=True)
    # A unit that is never open has no row.
    starts = (starts / np.where(lengths > 0, lengths, 1.0))[lengths[:, 0] > 0]
    if len(found.duals):
        starts = starts - (starts @ found.duals.T) @ np.linalg.solve(
            found.coordinates @ found.duals.T, found.coordinates
        )
    if space.has_bias:
        share = starts @ space.constant
        chosen = np.abs(share) > LEAST_SHARE * np.median(np.abs(share))
        starts = starts[chosen] / share[chosen, None]
    else:
        spread = np.sqrt(np.mean((starts @ space.directions.T) ** 2, axis=1))
        wanted = np.exp(generator.uniform(math.log(LEAST_SPREAD), math.log(LARGEST_SPREAD), len(starts)))
        starts = starts * (wanted * generator.choice([-1, 1], len(starts)) / np.maximum(spread, 1e-300))[:, None]
    return starts[generator.choice(len(starts), STARTS, replace=len(starts) < STARTS)]


def _describe(layer: _Layer, equations: _Equations, points: _Point, variances: np.ndarray) -> list[SmoothSolution]:
    """What the points are, of equations that nothing found confines."""
    space = layer.space
    rows = equations.next_right.shape[0] if layer.following is not None else 0
    count = len(layer.weight) - space.rank + rows - (space.rank if rows else 0)
    freedom = max(count - (space.rank - int(space.has_bias)) - layer.weight.shape[1] + 1, 1)
    solutions = []
    for coordinates, combination, loss, variance in zip(
        points.coordinates, points.combination, points.loss, variances, strict=True
    ):
        one = SmoothSolution(coordinates, layer.basis @ combination, 0.0, freedom, 0.0, 0.0, 0.0)
        delta, _ = _delta(layer, one)
        dual = space.left.T @ delta / space.singular_values
        noise = np.hypot(np.linalg.norm(dual), layer.roundoff * np.sqrt(np.mean(delta**2)))
        divisor = float(dual @ coordinates)
        size = math.copysign(float(np.linalg.norm(one.logit_gradient)), divisor)
        if size == 0 or not np.any(coordinates):
            continue  # No example: nothing goes in or out.
        misfit = float(np.sqrt(loss / freedom))
        solutions.append(
            one._replace(
                logit_gradient=one.logit_gradient / size,
                misfit=misfit,
                spread=float(np.sqrt(np.mean(delta**2)) / noise),
                divisor=divisor / size,
                deviation=max(misfit, 1.0) * float(np.sqrt(max(variance, 0.0)) / np.linalg.norm(coordinates)),
            )
        )
    return solutions


def is_credible_smooth(solution: SmoothSolution) -> bool:
    """Whether it explains its equations to noise, no accident would, and noise leaves it where it is."""
    chance = np.log(max(solution.spread, 1.0) / max(solution.misfit, 1.0))
    return bool(
        solution.misfit < CREDIBLE_MISFIT
        and solution.freedom * chance > CREDIBLE_SURPRISE
        and solution.deviation < CREDIBLE_DEVIATION
    )


def search_smooth(
    layers: DenseLayers,
    index: int,
    space: LayerSpace,
    count: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[SmoothSolution]:
    """Examples behind layer `index` of several, as many as are credible.

    Args:
      layers: of which the one at `index` is not the last. space: `layer_space` of that layer.
      count: at most so many; B where it is known. seed: of the starts.
      progress: told how many are found, after each round.
    """
    layer = _layer(layers, index, space)
    generator = np.random.default_rng(seed)
    solutions: list[SmoothSolution] = []
    fruitless = 0
    with jax.enable_x64(True):
        whole = _equations(layer, _found(layer, []))
        while len(solutions) < min(count, space.rank) and fruitless < FRUITLESS:
            found = _found(layer, solutions)
            starts = _starts(layer, found, generator)
            most = np.full(len(starts), STEPS, np.int32)
            points, _ = jax.device_get(_solve(_equations(layer, found), layer.activation, starts, most))
            loss = np.where(np.isfinite(points.loss), points.loss, np.inf)
            order = np.argsort(loss)
            # Without what confines them, whose own errors they would bear.
            most = np.where(loss[order] < PROMISING**2 * len(layer.weight), POLISH, 0).astype(np.int32)
            points, variances = jax.device_get(_solve(whole, layer.activation, points.coordinates[order], most))
            before = len(solutions)
            for one in _describe(layer, whole, points, variances):
                if len(solutions) < count and is_credible_smooth(one) and not _is_among(one, solutions):
                    solutions.append(one)
            fruitless = 0 if len(solutions) > before else fruitless + 1
            if progress is not None:
                progress(len(solutions))
    return solutions


def _is_among(one: SmoothSolution, others: Sequence[SmoothSolution]) -> bool:
    """Whether one of the others is the same example, or what an even derivative takes for it without a bias."""
    size = np.linalg.norm(one.coordinates)
    return any(
        np.linalg.norm(one.coordinates - sign * other.coordinates) < SAME * size for other in others for sign in (1, -1)
    )
