"""The feasible interval: every scalar that gives a valid label, when none can be singled out."""

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmax
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

    def slack(scalar: jax.Array) -> jax.Array:
        """How far the worst entry is inside [0, 1], its error allowed for; not negative where lambda is feasible."""
        prediction = probabilities(equation, scalar)
        label = prediction - equation.left / scalar
        margin = TOLERANCE * label_deviation(equation, scalar, 1 / scalar, prediction, label)
        return jnp.min(jnp.minimum(label, 1 - label) + margin)

    def feasible(scalar: jax.Array) -> jax.Array:
        return slack(scalar) >= 0

    def climb(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Ternary search for a peak of the slack: stretches narrower than the grid, a single point even."""
        low, high = bounds
        first, second = (2 * low + high) / 3, (low + 2 * high) / 3
        rising = slack(first) < slack(second)
        return jnp.where(rising, first, low), jnp.where(rising, high, second)

    def peak(low: jax.Array, high: jax.Array) -> jax.Array:
        low, high = jax.lax.fori_loop(0, CLIMBS, climb, (low, high))
        return (low + high) / 2

    sides = [-positive[::-1], positive]
    peaks = [jax.vmap(peak)(side[:-2], side[2:]) for side in sides]
    scalars = jnp.sort(jnp.concatenate([*sides, *peaks]))
    allowed = jax.vmap(feasible)(scalars)

    def end(order: jax.Array, flags: jax.Array) -> jax.Array:
        """The outer boundary of the first feasible stretch met along `order`."""
        first = argmax(flags.astype(jnp.float64))
        inside, outside = order[first], order[jnp.maximum(first - 1, 0)]

        def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            inner, outer = bounds
            # Across zero there is nothing feasible: stay on one side.
            middle = jnp.where(inner * outer > 0, jnp.sign(inner) * jnp.sqrt(jnp.abs(inner * outer)), inner)
            ok = feasible(middle)
            return jnp.where(ok, middle, inner), jnp.where(ok, outer, middle)

        inner, _ = jax.lax.fori_loop(0, BISECTIONS, halve, (inside, outside))
        edge = jnp.where(first == 0, jnp.sign(order[0]) * jnp.inf, inner)
        return jnp.where(jnp.any(flags), edge, jnp.nan)

    return jnp.stack([end(scalars, allowed), end(scalars[::-1], allowed[::-1])])
