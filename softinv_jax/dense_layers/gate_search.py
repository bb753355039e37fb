"""Examples behind a layer whose activation has two slopes, as ReLU: from random starts, all of them at once.

Which units an example opens is told twice. By its delta: delta_j is t_j times one of two known slopes, with t = W g,
where W is the next layer's kernel and g the loss's derivative by that layer's output. And by its input: a unit is open
where D a > 0, if D a is what the layer makes of the input. Neither delta nor input is known; but given the gates, both
are a matter of linear algebra. g is the direction in which delta = gates * (W g) lies most nearly in the column space
of the layer's gradient, and a the regression of the gates on D. So the search alternates: gates, then g, delta and a
from them, then new gates from both. The gates are soft at first (as in deterministic annealing, Rose 1998) and grow
sharp; in the end the delta alone decides. No label format is assumed, and none is needed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

__all__ = ["search_gates"]

# At last, in which the delta alone decides.
HARD_STEPS = 10
# How sharp the gates are in the end: the logistic function's slope, in root mean squares of D a.
SHARPEST = 20.0
# Of inverse iteration for g, and of gradient descent for a, in each step: the next goes on from there.
INVERSE_ITERATIONS = 2
DESCENTS = 3
# Keeps what no open unit determines finite, in float32.
RIDGE = 1e-5


@partial(jax.jit, static_argnames=("slopes",))
def search_gates(
    deltas: jax.Array,
    weight: jax.Array,
    outputs: jax.Array,
    gates: jax.Array,
    combinations: jax.Array,
    sharpness: jax.Array,
    trust: jax.Array,
    forward: jax.Array,
    steps: jax.Array,
    slopes: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """Search from every start; float32 is enough, since what is found is solved for exactly afterwards.

    Args:
      deltas: (m, B) orthonormal columns, or zeros, that hold the deltas. weight: (m, n) the next layer's kernel. Both
        with rows in units of the noise.
      outputs: (m, k) D, orthonormal columns or zeros.
      gates: (S, m) of every start, between 0 and 1. combinations: (S, n) of g.
      sharpness: (S,) of the gates at first. trust: (S,) in what the delta says, against what the input says.
      forward: () 1, or 0 where open units are no half-space: then the delta alone decides.
      steps: () int32, in which the gates grow sharp: the more, the surer, where there are many examples.
      slopes: lower and upper.

    Returns:
      gates: (S, m) bool. misfit: (S,) share of delta's square outside of the column space.
    """
    low, high = slopes
    number = weight.shape[0]
    outputs = outputs * jnp.sqrt(number).astype(outputs.dtype)

    def fit(gate: jax.Array, combination: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        masked = (low + (high - low) * gate)[:, None] * weight
        gram, held = masked.T @ masked, deltas.T @ masked
        outside = gram - held.T @ held
        shift = RIDGE * jnp.trace(gram) / gram.shape[0] + jnp.finfo(gram.dtype).tiny
        factor = cho_factor(outside + shift * jnp.eye(gram.shape[0], dtype=gram.dtype))
        for _ in range(INVERSE_ITERATIONS):
            combination = cho_solve(factor, gram @ combination)
            combination = combination / jnp.linalg.norm(combination)
        share = (combination @ outside @ combination) / (combination @ gram @ combination)
        return weight @ combination, deltas @ (held @ combination), share, combination

    def open_by_delta(delta: jax.Array, target: jax.Array) -> jax.Array:
        """From -1, surely closed, to 1, surely open."""
        square = target**2
        slope = delta * target / (square + 1e-12 * jnp.mean(square))
        return jnp.clip(2 * (slope - low) / (high - low) - 1, -1, 1)

    def open_by_input(vote: jax.Array, target: jax.Array) -> jax.Array:
        size = jnp.abs(target)
        confidence = jnp.minimum(size, jnp.sqrt(jnp.mean(size**2)))
        confidence = confidence / jnp.mean(confidence)
        coordinates = outputs.T @ (confidence * vote)
        for _ in range(DESCENTS - 1):
            coordinates += outputs.T @ (confidence * (vote - outputs @ coordinates / number))
        value = outputs @ coordinates
        return value / jnp.sqrt(jnp.mean(value**2))

    def one(gate: jax.Array, combination: jax.Array, sharp: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        def soft(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            target, delta, share, combination = fit(state[0], state[2])
            vote = open_by_delta(delta, target)
            slope = sharp * (SHARPEST / sharp) ** (step / steps)
            field = forward * open_by_input(vote, target) + own * vote
            return jax.nn.sigmoid(slope * field), share, combination

        def hard(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            target, delta, share, combination = fit(state[0], state[2])
            return (open_by_delta(delta, target) > 0).astype(gate.dtype), share, combination

        state = gate, jnp.ones((), gate.dtype), combination
        state = jax.lax.fori_loop(0, steps, soft, state)
        state = (state[0] > 0.5).astype(gate.dtype), *state[1:]
        gate, share, _ = jax.lax.fori_loop(0, HARD_STEPS, hard, state)
        return gate > 0.5, share

    return jax.vmap(one)(gates, combinations, sharpness, trust)
