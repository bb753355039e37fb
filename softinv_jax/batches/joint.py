"""All examples of a batch together: one least-squares fit of the whole gradient, and whether it explains it.

G V = (1/D) sum_b (softmax(W V a_b) - y_b) a_b^T, with y_b = 1/C + sum_t w_bt (e_t - 1/C): C B equations for B^2
coordinates, a few weights, and D where it is not known. What one example's own equation cannot see, that the examples
are dual to each other, is in here: the residual says whether the whole explanation is consistent.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.batches.component import Divisor, prediction_error
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.least_squares import minimise
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["JointFit", "fit_jointly"]

STEPS = 60
# Fits to the residuals of the fit before, until no row is fitted any better: as the logarithm of its mean square.
PASSES = 12
SETTLED = 0.1


class JointFit(NamedTuple):
    """Leading axis B: one entry an example.

    coordinates: (B, r). label: (B, C), structured.
    coordinates_deviation: (B, r) and label_deviation: (B, C), standard deviations.
    misfit: () root mean square residual in standard deviations, with the degrees of freedom left. freedom: () those.
    decrement: () what one more step would take off the sum of squares: below 1, it has converged.
    divisor: () D, as the fit found it. divisor_deviation: () relative, 0 if it was known.
    """

    coordinates: jax.Array
    label: jax.Array
    coordinates_deviation: jax.Array
    label_deviation: jax.Array
    misfit: jax.Array
    freedom: jax.Array
    decrement: jax.Array
    divisor: jax.Array
    divisor_deviation: jax.Array


class _Point(NamedTuple):
    """Coordinates (n, r), weights (n, TARGETS) and D."""

    coordinates: jax.Array
    weights: jax.Array
    divisor: jax.Array


def _solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)


@jax.jit
def fit_jointly(
    subspace: BatchSubspace,
    coordinates: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    divisor: Divisor,
) -> JointFit:
    """Levenberg-Marquardt on all unknowns at once, until it gains nothing more.

    Args:
      subspace: of the batch.
      coordinates: (n, r) start, one row an example. weights: (n, TARGETS) start. targets: (n, TARGETS), -1 for none.
      divisor: D; free unless its deviation is 0.
    """
    count, rank = coordinates.shape
    number_of_classes = subspace.left.shape[0]
    observed = subspace.left * subspace.singular_values[None, :]
    used = targets >= 0
    singled = jax.nn.one_hot(targets, number_of_classes, dtype=jnp.float64) - used[..., None] / number_of_classes
    has_constant = jnp.any(subspace.constant != 0)
    is_free = divisor.deviation > 0

    def labels(weights: jax.Array) -> jax.Array:
        return 1 / number_of_classes + jnp.einsum("bt,btc->bc", jnp.where(used, weights, 0.0), singled)

    # Features resemble each other, so that errors of a softmax entry, which come times the feature, lie in one
    # direction of the row space more than in all others.
    main = jnp.linalg.svd(coordinates, full_matrices=False)[2][0]
    along = main[:, None] * main[None, :]
    across = jnp.eye(rank) - along

    def row_deviation(point: _Point, projector: jax.Array, directions: int) -> jax.Array:
        """(C,) of the entries of a row of G V in some directions: its noise, and that of p - y in it, rounded too."""
        prediction = jax.nn.softmax(point.coordinates @ subspace.directions.T, axis=1)
        error = jax.vmap(partial(prediction_error, subspace))(point.coordinates, prediction)
        error = jnp.hypot(error, subspace.roundoff * labels(point.weights))
        square = jnp.sum((point.coordinates @ projector) ** 2, axis=1)
        carried = jnp.sum(error**2 * square[:, None], axis=0) / (point.divisor**2 * max(directions, 1))
        return jnp.sqrt(subspace.noise**2 + carried)

    def unflatten(flat: jax.Array) -> _Point:
        coordinates, weights = jnp.split(flat[:-1], [count * rank])
        # The last unknown is the logarithm of D, relative to what was given.
        value = divisor.value * jnp.exp(jnp.where(is_free, flat[-1], 0.0))
        return _Point(coordinates.reshape(count, rank), weights.reshape(count, TARGETS), value)

    def whitening(deviation: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        shared = jnp.sum(subspace.common**2, axis=1)
        own = jnp.sqrt(jnp.maximum(deviation**2 - shared, 0.01 * deviation**2))
        directions, size, _ = jnp.linalg.svd(subspace.common / own[:, None], full_matrices=False)
        return own, directions, 1 - 1 / jnp.sqrt(1 + size**2)

    def whitened(values: jax.Array, noise: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """(..., C) in standard deviations, made independent over rows of G V where their noise is not."""
        own, directions, shrinkage = noise
        scaled = values / own.reshape((1,) * (values.ndim - 1) + (-1,))
        return scaled - (scaled @ (directions * shrinkage[None, :])) @ directions.T

    def residuals(flat: jax.Array, noises: tuple) -> tuple[jax.Array, ...]:
        """(C, r) of G V along the features' main direction and across, and (n,) of their constants."""
        coordinates, weights, value = unflatten(flat)
        gradient = jax.nn.softmax(coordinates @ subspace.directions.T, axis=1) - labels(weights)
        along_and_across = (
            (whitened(gradient, noise).T @ coordinates / value - whitened(observed.T, noise).T) @ projector
            for projector, noise in zip((along, across), noises, strict=True)
        )
        return *along_and_across, jnp.where(has_constant, coordinates @ subspace.constant - 1, 0.0) / subspace.roundoff

    def normal(flat: jax.Array, noises: tuple) -> jax.Array:
        """J^T J from blocks: with g_b and its slope S_b, row j of G V moves by (g_bj e_s + S_bjs a_b) / D for a_bs."""
        coordinates, weights, value = unflatten(flat)
        prediction = jax.nn.softmax(coordinates @ subspace.directions.T, axis=1)
        mean = prediction @ subspace.directions
        slope = prediction[:, :, None] * (subspace.directions[None] - mean[:, None, :])
        weight_slope = -jnp.where(used[..., None], singled, 0.0)
        # Everything that moves g_b, its coordinates and its weights, moves row j by a multiple of a_b.
        moves = jnp.concatenate([slope.transpose(0, 2, 1), weight_slope], axis=1) / value  # (n, r + T, C)
        pull = subspace.constant / subspace.roundoff
        blocks = jnp.zeros((count, rank + TARGETS) * 2)
        each = jnp.arange(count)
        blocks = blocks.at[each, :rank, each, :rank].add((pull[:, None] * pull[None, :])[None])
        for projector, noise in zip((along, across), noises, strict=True):
            projected = coordinates @ projector
            gradient = whitened(prediction - labels(weights), noise) / value
            stacked = whitened(moves, noise).reshape(count * (rank + TARGETS), number_of_classes)
            products = (stacked @ stacked.T).reshape(count, rank + TARGETS, count, rank + TARGETS)
            blocks = blocks + products * (projected @ projected.T)[:, None, :, None]
            cross = (stacked @ gradient.T).reshape(count, rank + TARGETS, count)
            mixed = jnp.einsum("bkc,bs->bkcs", cross, projected)
            blocks = blocks.at[:, :, :, :rank].add(mixed)
            blocks = blocks.at[:, :rank, :, :].add(mixed.transpose(2, 3, 0, 1))
            blocks = blocks.at[:, :rank, :, :rank].add(jnp.einsum("bj,cj,rs->brcs", gradient, gradient, projector))

        def ordered(values: jax.Array) -> jax.Array:
            """(n, r + T, ...) to all coordinates, then all weights."""
            parts = values[:, :rank], values[:, rank:]
            return jnp.concatenate([part.reshape(-1, *values.shape[2:]) for part in parts])

        function, unit = partial(residuals, noises=noises), jnp.zeros_like(flat).at[-1].set(1.0)
        last = jax.vjp(function, flat)[1](jax.jvp(function, (flat,), (unit,))[1])[0]
        matrix = ordered(ordered(blocks).transpose(1, 2, 0)).T
        return jnp.block([[matrix, last[:-1, None]], [last[None, :]]])

    def fit(state: tuple) -> tuple:
        """To the noise and, but for the last time, to what the residuals of each row are now."""
        number, flat, _, previous, _ = state
        start = unflatten(flat)
        prediction = jax.nn.softmax(start.coordinates @ subspace.directions.T, axis=1)
        difference = (prediction - labels(start.weights)).T @ start.coordinates / start.divisor - observed
        square = jnp.mean(difference**2, axis=1)
        level = jnp.mean(jnp.log(square + subspace.noise**2))
        last = (level > previous - SETTLED) | (number == PASSES)
        misfit = jnp.where(last, 0.0, jnp.sqrt(square))
        noises = (
            whitening(jnp.hypot(row_deviation(start, along, 1), misfit)),
            whitening(jnp.hypot(row_deviation(start, across, rank - 1), misfit)),
        )
        flat, equations = minimise(
            partial(residuals, noises=noises), partial(normal, noises=noises), flat, STEPS, 1e-6, _solve, thorough=True
        )
        return number + 1, flat, equations, level, last

    flat = jnp.concatenate([coordinates.ravel(), jnp.where(used, weights, 0.0).ravel(), jnp.zeros((1,))])
    # The best known rows count only as far as the fit has got to, so that they do not hide all others.
    equations = jax.tree.map(jnp.zeros_like, jax.eval_shape(fit, (0, flat, None, 0.0, False))[2])
    state = (jnp.int32(0), flat, equations, jnp.asarray(jnp.inf), jnp.asarray(False))
    _, flat, equations, _, _ = jax.lax.while_loop(lambda state: ~state[-1], fit, state)
    matrix = equations.normal
    scale = jnp.sqrt(jnp.where(jnp.diag(matrix) > 0, jnp.diag(matrix), 1.0))
    scaled = matrix / scale[:, None] / scale[None, :]
    scaled = scaled + jnp.diag(jnp.where(jnp.diag(matrix) > 0, 0.0, 1.0))  # An unused weight stays by itself.
    covariance = jnp.linalg.inv(scaled) / scale[:, None] / scale[None, :]
    variance = jnp.maximum(jnp.diag(covariance), 0.0)
    coordinates, weights, value = unflatten(flat)
    coordinate_deviation = unflatten(jnp.sqrt(variance)).coordinates
    block = covariance[count * rank : -1, count * rank : -1].reshape(count, TARGETS, count, TARGETS)
    own = block[jnp.arange(count), :, jnp.arange(count), :]
    own = jnp.where(used[:, :, None] & used[:, None, :], own, 0.0)
    label_variance = jnp.einsum("btc,bts,bsc->bc", singled, own, singled)
    unknowns = count * rank + jnp.sum(used) + is_free
    # The columns of G V sum to zero over classes, whatever the unknowns.
    freedom = (number_of_classes - 1) * rank + jnp.where(has_constant, count, 0) - unknowns
    freedom = jnp.maximum(freedom, 1)
    misfit = jnp.sqrt(equations.loss / freedom)
    # Residuals larger than expected mean more noise than expected.
    excess = jnp.maximum(misfit, 1.0)
    return JointFit(
        coordinates=coordinates,
        label=labels(weights),
        coordinates_deviation=excess * coordinate_deviation,
        label_deviation=excess * jnp.sqrt(jnp.maximum(label_variance, 0.0)),
        misfit=misfit,
        freedom=freedom,
        decrement=equations.toward @ covariance @ equations.toward,
        divisor=value,
        divisor_deviation=jnp.where(is_free, excess * jnp.sqrt(variance[-1]), 0.0),
    )
