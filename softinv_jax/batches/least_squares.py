"""Levenberg-Marquardt on normal equations."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["NormalEquations", "minimise"]

NO_GAIN = 1e-4  # Of the loss, by one step: it has converged.
STUCK = 1e10  # Damping at which no step helps.


class NormalEquations(NamedTuple):
    """J^T J (n, n), J^T residual (n,) and the sum of the residuals' squares () at some point."""

    normal: jax.Array
    toward: jax.Array
    loss: jax.Array


def minimise(
    equations: Callable[[jax.Array], NormalEquations],
    start: jax.Array,
    steps: int | jax.Array,
    damping: float,
    solve: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, NormalEquations]:
    """Levenberg-Marquardt (Marquardt 1963) until a step gains nothing more, at most `steps` of them.

    Args:
      equations: of a point (n,). start: (n,). damping: to start with, relative to the diagonal.
      solve: (n, n) positive definite, (n,) -> (n,); NaN where it cannot.

    Returns:
      The best point and its equations.
    """
    unit = jnp.eye(start.size)

    def step(state: tuple) -> tuple:
        count, _, point, damping, current = state
        diagonal = jnp.diag(current.normal)
        scale = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
        damped = current.normal / scale[:, None] / scale[None, :] + (damping + 1e-15) * unit
        # An unknown that nothing depends on stays where it is.
        damped = damped + jnp.diag(jnp.where(diagonal > 0, 0.0, 1.0))
        trial = point - solve(damped, current.toward / scale) / scale
        new = equations(trial)
        better = new.loss < current.loss
        kept = jax.tree.map(lambda fresh, old: jnp.where(better, fresh, old), (trial, new), (point, current))
        next_damping = jnp.clip(jnp.where(better, damping / 5, damping * 5), 1e-12, 2 * STUCK)
        done = (better & (new.loss > (1 - NO_GAIN) * current.loss)) | (next_damping >= STUCK)
        return count + 1, done, kept[0], next_damping, kept[1]

    # The first step evaluates the start, so that the equations are compiled once: nothing pulls, and all is better.
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(equations, start))
    state = (
        jnp.int32(-1),
        jnp.asarray(False),
        start,
        jnp.asarray(5 * damping),
        nothing._replace(loss=nothing.loss + jnp.inf),
    )
    state = jax.lax.while_loop(lambda state: (state[0] < steps) & ~state[1], step, state)
    return state[2], state[4]
