"""All examples of a batch together: one least-squares fit of the whole gradient, and whether it explains it.

G V = (1/B) sum_b (softmax(W V a_b) - y_b) a_b^T, with y_b = 1/C + sum_t w_bt (e_t - 1/C): C B equations for B^2
coordinates and a few weights. What one example's own equation cannot see, that the examples are dual to each other, is
in here: the residual says whether the whole explanation is consistent.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.batches.component import TARGETS, logit_error
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["JointFit", "fit_jointly"]

STEPS = 25


class JointFit(NamedTuple):
    """Leading axis B: one entry an example.

    coordinates: (B, r). label: (B, C), structured.
    coordinates_deviation: (B, r) and label_deviation: (B, C), standard deviations.
    misfit: () root mean square residual in standard deviations, with the degrees of freedom left.
    """

    coordinates: jax.Array
    label: jax.Array
    coordinates_deviation: jax.Array
    label_deviation: jax.Array
    misfit: jax.Array


@partial(jax.jit, static_argnames=("steps",))
def fit_jointly(
    subspace: BatchSubspace,
    coordinates: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    batch_size: float,
    steps: int = STEPS,
) -> JointFit:
    """Levenberg-Marquardt on all unknowns at once, until it gains nothing more.

    Args:
      subspace: of the batch.
      coordinates: (n, r) start, one row an example. weights: (n, TARGETS) start. targets: (n, TARGETS), -1 for none.
      batch_size: B.
      steps: static, at most.
    """
    count, rank = coordinates.shape
    number_of_classes = subspace.left.shape[0]
    observed = subspace.left * subspace.singular_values[None, :]
    used = targets >= 0
    singled = jax.nn.one_hot(targets, number_of_classes, dtype=jnp.float64) - used[..., None] / number_of_classes
    has_constant = jnp.any(subspace.constant != 0)

    def labels(weights: jax.Array) -> jax.Array:
        return 1 / number_of_classes + jnp.einsum("bt,btc->bc", jnp.where(used, weights, 0.0), singled)

    def model(coordinates: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        prediction = jax.nn.softmax(coordinates @ subspace.directions.T, axis=1)
        return prediction, prediction - labels(weights)

    def row_deviation(coordinates: jax.Array, prediction: jax.Array) -> jax.Array:
        """(C,) of the entries of a row of G V: its noise, and that of the logits (see `logit_error`)."""
        size = jnp.sqrt(jnp.sum(coordinates**2, axis=1))
        logit = jax.vmap(partial(logit_error, subspace))(coordinates)
        carried = jnp.sum((logit * prediction * size[:, None]) ** 2, axis=0) / (batch_size**2 * rank)
        return jnp.sqrt(subspace.noise**2 + carried)

    deviation = row_deviation(coordinates, model(coordinates, weights)[0])

    def residual(coordinates: jax.Array, weights: jax.Array) -> jax.Array:
        _, gradient = model(coordinates, weights)
        difference = observed - gradient.T @ coordinates / batch_size
        constant = jnp.where(has_constant, coordinates @ subspace.constant - 1, 0.0)
        return jnp.concatenate([(difference / deviation[:, None]).ravel(), constant / subspace.roundoff])

    size = count * (rank + TARGETS)

    def unflatten(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
        return flat[: count * rank].reshape(count, rank), flat[count * rank :].reshape(count, TARGETS)

    def normal_equations(flat: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        errors = residual(*unflatten(flat))
        slope = jax.jacfwd(lambda values: residual(*unflatten(values)))(flat)
        return slope.T @ slope, slope.T @ errors, jnp.sum(errors**2)

    def step(state: tuple) -> tuple:
        count, _, flat, damping, normal, gradient, loss = state
        scale = jnp.sqrt(jnp.where(jnp.diag(normal) > 0, jnp.diag(normal), 1.0))
        damped = normal / scale[:, None] / scale[None, :] + damping * jnp.eye(size)
        move = -jnp.linalg.solve(damped, gradient / scale) / scale
        trial = flat + move
        new = normal_equations(trial)
        better = new[2] < loss

        def keep(fresh: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(better, fresh, old)

        damping = jnp.clip(jnp.where(better, damping / 10, damping * 10), 1e-14, 1e8)
        # A gain of less than a thousandth of the loss is none.
        done = (better & (new[2] > 0.999 * loss)) | (damping >= 1e4)
        kept = keep(trial, flat), damping, keep(new[0], normal), keep(new[1], gradient), keep(new[2], loss)
        return (count + 1, done, *kept)

    flat = jnp.concatenate([coordinates.ravel(), jnp.where(used, weights, 0.0).ravel()])
    state = (jnp.int32(0), jnp.asarray(False), flat, jnp.asarray(1e-8), *normal_equations(flat))
    state = jax.lax.while_loop(lambda state: (state[0] < steps) & ~state[1], step, state)
    _, _, flat, _, normal, _, loss = state
    scale = jnp.sqrt(jnp.where(jnp.diag(normal) > 0, jnp.diag(normal), 1.0))
    scaled = normal / scale[:, None] / scale[None, :]
    scaled = scaled + jnp.diag(jnp.where(jnp.diag(normal) > 0, 0.0, 1.0))  # An unused weight stays by itself.
    covariance = jnp.linalg.inv(scaled) / scale[:, None] / scale[None, :]
    variance = jnp.maximum(jnp.diag(covariance), 0.0)
    coordinates, weights = unflatten(flat)
    coordinate_deviation, _ = unflatten(jnp.sqrt(variance))
    block = covariance[count * rank :, count * rank :].reshape(count, TARGETS, count, TARGETS)
    own = block[jnp.arange(count), :, jnp.arange(count), :]
    own = jnp.where(used[:, :, None] & used[:, None, :], own, 0.0)
    label_variance = jnp.einsum("btc,bts,bsc->bc", singled, own, singled)
    unknowns = count * rank + jnp.sum(used)
    # The columns of G V sum to zero over classes, whatever the unknowns.
    freedom = (number_of_classes - 1) * rank + jnp.where(has_constant, count, 0) - unknowns
    return JointFit(
        coordinates=coordinates,
        label=labels(weights),
        coordinates_deviation=coordinate_deviation,
        label_deviation=jnp.sqrt(jnp.maximum(label_variance, 0.0)),
        misfit=jnp.sqrt(loss / jnp.maximum(freedom, 1)),
    )
