"""Format-free recovery: explanations of one gradient, found by consensus and, under noise, by likelihood."""

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmax, argsort
from softinv_jax.labels.consensus import Consensus, hypothesis_drift, score_hypotheses
from softinv_jax.labels.explanations import Explanations, distinct
from softinv_jax.labels.hypotheses import plan_triples, solve_hypotheses
from softinv_jax.labels.noisy import explain_by_likelihood
from softinv_jax.labels.polishing import polish_consensus
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import TOLERANCE, ScalarEquation, Unknowns, either

__all__ = ["FAST_TRIPLES", "explain_by_consensus", "explain_thoroughly"]

FAST_TRIPLES = 24
THOROUGH_TRIPLES = 256
POLISHED = 6
SUPPORTED = 4
LISTED = 3


def explain_by_consensus(equation: ScalarEquation, unknowns: Unknowns) -> Explanations:
    """The fast search: solve a few triples, and polish the scalar that the most classes support, and its rival.

    Args:
      equation: the scalar equation. unknowns: static.
    """
    polished, exhaustive = _polish_best(equation, unknowns, thorough=False)
    return Explanations(distinct(polished, 2), exhaustive, None, jnp.asarray(jnp.inf))


def explain_thoroughly(reading: Reading, unknowns: Unknowns) -> Explanations:
    """The thorough search: ten times the triples and up to three explanations; maximum likelihood under noise.

    Args:
      reading: of one gradient, thorough. unknowns: static or traced.
    """
    equation = reading.equation
    polished, exhaustive = _polish_best(equation, unknowns, thorough=True)
    no_pull = jnp.zeros(equation.direction.shape)
    free = jnp.asarray(unknowns.scalar) | jnp.asarray(unknowns.scale)
    factor_variance = jnp.where(free, 0.0, reading.factor_variance)
    return jax.lax.cond(
        reading.is_rounding,
        lambda: Explanations(distinct(polished, LISTED), exhaustive, no_pull, jnp.asarray(jnp.inf)),
        lambda: explain_by_likelihood(equation, reading.direction_covariance, factor_variance, polished, unknowns),
    )


def _polish_best(equation: ScalarEquation, unknowns: Unknowns, *, thorough: bool) -> tuple[Consensus, jax.Array]:
    """Solve the triples of the plan, and polish the scalars that the most classes support.

    Returns:
      `Consensus` with a leading axis, the best score first, then the best of those that contradict it; and () bool,
      whether no other explanation can exist.
    """
    plan = plan_triples(equation.direction.size, THOROUGH_TRIPLES if thorough else FAST_TRIPLES)
    hypotheses = solve_hypotheses(equation, plan, unknowns)
    score = score_hypotheses(equation, hypotheses, unknowns)
    drift = hypothesis_drift(equation, hypotheses, unknowns)
    drift = drift + hypotheses.level_deviation[:, None]

    def polish(index: jax.Array) -> Consensus:
        return polish_consensus(
            equation,
            hypotheses.scalar[index],
            hypotheses.factor[index],
            hypotheses.level[index],
            drift[index],
            unknowns,
        )

    first = argmax(score)
    # Without lambda as an unknown kappa is one; else it follows from lambda.
    values = either(unknowns.scalar, hypotheses.scalar, hypotheses.factor)
    deviations = either(unknowns.scalar, hypotheses.scalar_deviation, hypotheses.factor_deviation)
    elsewhere = _apart(values, deviations, first)
    # The best few, and the best few of those that contradict the very best.
    contradicting = jnp.where(elsewhere, score, -jnp.inf)
    if thorough:
        # Where nearly all of the softmax is one class, a triple with that class in it can score best, each such at a
        # lambda of its own; those that other triples confirm are tried too.
        support = _support(values, deviations, score)
        chosen = jnp.concatenate(
            [argsort(-score)[:POLISHED], argsort(-contradicting)[:POLISHED], argsort(-support)[:SUPPORTED]]
        )
    else:
        chosen = jnp.stack([first, argmax(contradicting)])
    polished = jax.vmap(polish)(chosen)
    # Contradicting hypotheses beyond those polished would go unseen.
    seen = jnp.sum(elsewhere & (score > 0)) <= (POLISHED if thorough else 1)
    exhaustive = jnp.asarray(plan.exhaustive) & seen
    return polished, exhaustive


def _apart(values: jax.Array, deviations: jax.Array, chosen: jax.Array) -> jax.Array:
    """Which values differ from the chosen one by more than their errors."""
    return jnp.abs(values - values[chosen]) > TOLERANCE * (deviations + deviations[chosen])


def _support(values: jax.Array, deviations: jax.Array, score: jax.Array) -> jax.Array:
    """(H,) nats by which it would surprise to find as many other hypotheses at the same value by accident."""
    reach = TOLERANCE * (deviations[:, None] + deviations[None, :])
    near = jnp.abs(values[:, None] - values[None, :]) <= reach
    others = ~jnp.eye(values.size, dtype=bool) & (score > 0)[None, :]
    nats = jnp.log(jnp.maximum(jnp.abs(values)[:, None] / jnp.maximum(reach, 1e-300), 1.0))
    return jnp.where(score > 0, jnp.sum(jnp.where(near & others, nats, 0.0), axis=1), -jnp.inf)
