"""The feasible interval: every scalar that gives a valid label, when none can be singled out."""

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmax, sort, take_rows
from softinv_jax.labels.scalar_equation import (
    TOLERANCE,
    ScalarEquation,
    Unknowns,
    label_deviation,
    probabilities,
)

__all__ = ["feasible_interval"]

GRID = 96
BISECTIONS = 30
CLIMBS = 60


def feasible_interval(equation: ScalarEquation, unknowns: Unknowns) -> jax.Array:
    """(2,) hull of the lambda for which y = softmax(lambda z + b) - u / lambda lies in [0, 1].

    Searched over logit ranges from 0.001 to 1000 of both signs; an end beyond is infinite. With an unknown scale
    every lambda is feasible (kappa can be small); with a bias lambda is known.
    """
    if not unknowns.scalar:
        return jnp.stack([equation.known_scalar, equation.known_scalar])
    if unknowns.scale:
        return jnp.array([-jnp.inf, jnp.inf])
    spread = jnp.max(equation.direction) - jnp.min(equation.direction)
    positive = jnp.geomspace(1e-3, 1e3, GRID) / jnp.where(spread > 0, spread, 1.0)

    def slack(scalars: jax.Array) -> jax.Array:
        """How far the worst entry is inside [0, 1], its error allowed for; not negative where lambda is feasible."""
        prediction = probabilities(equation, scalars)
        label = prediction - (1 / scalars)[..., None] * jnp.broadcast_to(equation.left, prediction.shape)
        margin = TOLERANCE * label_deviation(equation, scalars, 1 / scalars, prediction, label)
        return jnp.min(jnp.minimum(label, 1 - label) + margin, axis=-1)

    # Both sides of zero together, and both ends: what is written once is compiled once.
    grid = jnp.concatenate([-positive[::-1], positive])
    lows, highs = grid.reshape(2, GRID)[:, :-2].ravel(), grid.reshape(2, GRID)[:, 2:].ravel()

    def climb(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Ternary search for a peak of the slack: stretches narrower than the grid, a single point even."""
        low, high = bounds
        inner = jnp.stack([2 * low + high, low + 2 * high]) / 3
        slacks = slack(inner)
        rising = slacks[0] < slacks[1]
        return jnp.where(rising, inner[0], low), jnp.where(rising, high, inner[1])

    low, high = jax.lax.fori_loop(0, CLIMBS, climb, (lows, highs))
    scalars = sort(jnp.concatenate([grid, (low + high) / 2]))
    allowed = slack(scalars) >= 0
    # From either end, the first feasible lambda met, and the one before it.
    orders, flags = jnp.stack([scalars, scalars[::-1]]), jnp.stack([allowed, allowed[::-1]])
    first = argmax(flags.astype(jnp.float64))[:, None]
    met = take_rows(orders, jnp.concatenate([first, jnp.maximum(first - 1, 0)], axis=1))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inner, outer = bounds
        # Across zero there is nothing feasible: stay on one side.
        middle = jnp.where(inner * outer > 0, jnp.sign(inner) * jnp.sqrt(jnp.abs(inner * outer)), inner)
        feasible = slack(middle) >= 0
        return jnp.where(feasible, middle, inner), jnp.where(feasible, outer, middle)

    inner, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (met[:, 0], met[:, 1]))
    edges = jnp.where(first[:, 0] == 0, jnp.sign(orders[:, 0]) * jnp.inf, inner)
    return jnp.where(jnp.any(allowed), edges, jnp.nan)
