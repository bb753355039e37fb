"""Levenberg-Marquardt."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["NormalEquations", "minimise"]

NO_GAIN = 1e-4  # Of the loss, by one step: it has converged.
STUCK = 1e10  # Damping at which no step helps.
UNDAMPED = 1e-12  # The least damping.
LARGEST_BEND = 0.4  # Of a step's length: beyond, second order says no more than first.


class NormalEquations(NamedTuple):
    """J^T J (n, n), J^T residual (n,) and the sum of the residuals' squares () at some point."""

    normal: jax.Array
    toward: jax.Array
    loss: jax.Array


def minimise(
    residuals: Callable[[jax.Array], Any],
    normal: Callable[[jax.Array], jax.Array] | None,
    start: jax.Array,
    steps: int | jax.Array,
    damping: float,
    solve: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    thorough: bool,
) -> tuple[jax.Array, NormalEquations]:
    """Levenberg-Marquardt (Marquardt 1963) until a step gains nothing more, at most `steps` of them.

    Args:
      residuals: of a point (n,), any tree of arrays. normal: (n, n) J^T J at a point; from the Jacobian if None.
      start: (n,). damping: to start with, relative to the diagonal.
      solve: (n, n) positive definite, (n,) -> (n,); NaN where it cannot.
      thorough: for valleys that are narrow and curved, where straight steps crawl. Each step bends with the residuals'
        second derivative along it (geodesic acceleration, Transtrum and Sethna 2012), and it ends only where no
        damping keeps steps short.

    Returns:
      The best point and its equations.
    """
    unit = jnp.eye(start.size)

    def equations(point: jax.Array) -> NormalEquations:
        values, pull = jax.vjp(residuals, point)
        if normal is None:
            jacobian = jnp.concatenate(
                [leaf.reshape(-1, start.size) for leaf in jax.tree.leaves(jax.jacfwd(residuals)(point))]
            )
            matrix = jacobian.T @ jacobian
        else:
            matrix = normal(point)
        return NormalEquations(
            matrix, pull(values)[0], jnp.asarray(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(values)))
        )

    def bend(point: jax.Array, velocity: jax.Array) -> jax.Array:
        """(n,) J^T of the residuals' second derivative along the velocity."""
        _, second = jax.jvp(lambda at: jax.jvp(residuals, (at,), (velocity,))[1], (point,), (velocity,))
        return jax.vjp(residuals, point)[1](second)[0]

    def step(state: tuple) -> tuple:
        count, _, settled, point, damping, current = state
        diagonal = jnp.diag(current.normal)
        scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
        damped = current.normal / scale[:, None] / scale[None, :] + (damping + 1e-15) * unit
        # An unknown that nothing depends on stays where it is.
        damped = damped + jnp.diag(jnp.where(diagonal > 0, 0.0, 1.0))
        velocity = -solve(damped, current.toward / scale) / scale
        trial = point + velocity
        if thorough:
            acceleration = -solve(damped, bend(point, velocity) / scale) / scale / 2
            bent = jnp.linalg.norm(acceleration * scale) > LARGEST_BEND * jnp.linalg.norm(velocity * scale)
            trial = trial + jnp.where(bent, 0.0, acceleration)
        new = equations(trial)
        better = new.loss < current.loss
        kept = jax.tree.map(lambda fresh, old: jnp.where(better, fresh, old), (trial, new), (point, current))
        settles = better & (new.loss > (1 - NO_GAIN) * current.loss)
        factor = jnp.where(better, 0.2, 5.0)
        done = settles
        if thorough:
            factor = jnp.where(settles, 1e-3, factor)
            done = (settles & (damping <= UNDAMPED)) | (settled & ~better)
        next_damping = jnp.clip(damping * factor, UNDAMPED, 2 * STUCK)
        done = done | (next_damping >= STUCK)
        return count + 1, done, settles, kept[0], next_damping, kept[1]

    # The first step evaluates the start, so that the equations are compiled once: nothing pulls, and all is better.
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(equations, start))
    state = (
        jnp.int32(-1),
        jnp.asarray(False),
        jnp.asarray(False),
        start,
        jnp.asarray(5 * damping),
        nothing._replace(loss=nothing.loss + jnp.inf),
    )
    state = jax.lax.while_loop(lambda state: (state[0] < steps) & ~state[1], step, state)
    return state[3], state[5]
