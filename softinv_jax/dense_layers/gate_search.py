"""Examples behind a layer whose activation has two slopes, as ReLU: from many starts, all of them at once.

Each unit passes the loss's derivative on, or does not: delta_j is t_j times one of two known slopes, with t = W g,
where W is the next layer's kernel and g its own derivative. So a pair (delta, t) lies in two sets: delta in the
column space of the layer's gradient and t in that of W, which are linear; and, unit by unit, in the wedge between the
two slopes, of which only the two edges count. The alternating direction method of multipliers (Boyd et al. 2011) goes
between them, with over-relaxation. At first anything in the wedge will do, which is convex up to signs, and an
objective draws each start to another corner; then what is between the edges is pushed apart. No label format is
assumed, and none is needed.
"""

from functools import partial

import jax
import jax.numpy as jnp

__all__ = ["STEPS", "search_gates"]

STEPS = 300
OVER_RELAXATION = 1.6
# Share of the steps after which the edges begin to draw, and how strongly in the end.
CONVEX_SHARE = 0.3
SHARPNESS = 0.5


@partial(jax.jit, static_argnames=("slopes",))
def search_gates(
    deltas: jax.Array,
    outputs: jax.Array,
    objectives: jax.Array,
    starts: jax.Array,
    beginnings: jax.Array,
    rigidity: jax.Array,
    slopes: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """Search from every start; float32 is enough, since what is found is solved for exactly afterwards.

    Args:
      deltas: (m, B) orthonormal columns, or zeros, that hold the deltas. outputs: (m, n) orthonormal, that hold W g.
      objectives: (S, B): where each start is drawn to, and how strongly. starts: (S, m) of t, of length one.
      beginnings: (S, m) of delta.
      rigidity: (S,) how much t resists, in units of delta.
      slopes: lower and upper.

    Returns:
      delta and t, (S, m) each, as far as they agree.
    """
    low, high = slopes
    units = starts
    stiff = rigidity[:, None]

    def step(number: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        delta, target, delta_dual, target_dual, _, _ = state
        share = number.astype(jnp.float32) / STEPS
        sharp = SHARPNESS * jnp.maximum(0.0, (share - CONVEX_SHARE) / (1 - CONVEX_SHARE))
        first = ((delta - delta_dual) @ deltas + objectives * (1 - share)) @ deltas.T
        second = ((target - target_dual) @ outputs) @ outputs.T
        # The length of t along its start stays 1: without that, zero would solve everything.
        second = second + (1 - jnp.sum(second * units, axis=1, keepdims=True)) * units
        ahead = OVER_RELAXATION * first + (1 - OVER_RELAXATION) * delta + delta_dual
        aside = OVER_RELAXATION * second + (1 - OVER_RELAXATION) * target + target_dual
        middle = (low + high) / 2 * aside
        pushed = middle + (ahead - middle) / (1 - sharp)
        # In the orientation in which t is positive.
        sign = jnp.where(aside < 0, -1.0, 1.0)
        value, size = pushed * sign, aside * sign
        below, above = value < low * size, value > high * size
        edge = jnp.where(below, low, high)
        onto = (edge * value + stiff * size) / (edge**2 + stiff)
        new_target = sign * jnp.where(below | above, onto, size)
        new_delta = sign * jnp.where(below | above, edge * onto, value)
        return new_delta, new_target, ahead - new_delta, aside - new_target, first, second

    zeros = jnp.zeros_like(starts)
    state = (beginnings, starts, zeros, zeros, beginnings, starts)
    return jax.lax.fori_loop(0, STEPS, step, state)[4:]
