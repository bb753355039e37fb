"""Format-free recovery: explanations of one gradient, found by consensus and, under noise, by likelihood."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmax, argsort
from softinv_jax.labels.consensus import Consensus, hypothesis_drift, score_hypotheses
from softinv_jax.labels.explanations import Explanations, distinct
from softinv_jax.labels.hypotheses import Hypotheses, plan_triples, solve_hypotheses
from softinv_jax.labels.noisy import explain_by_likelihood
from softinv_jax.labels.polishing import polish_consensus
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import TOLERANCE, ScalarEquation, Unknowns, either, probabilities

__all__ = ["FAST_TRIPLES", "explain_by_consensus", "explain_thoroughly"]

FAST_TRIPLES = 24
THOROUGH_TRIPLES = 256
# Hypotheses times classes, and hypotheses, that are looked at together.
NUMBERS_AT_ONCE, AT_ONCE = 2**21, 16
POLISHED = 6
SUPPORTED = 4
LISTED = 3


def explain_by_consensus(equation: ScalarEquation, unknowns: Unknowns) -> Explanations:
    """The fast search: solve a few triples, and polish the scalar that the most classes support, and its rival.

    Args:
      equation: the scalar equation. unknowns: static.
    """
    polished, exhaustive = _polish_best(equation, unknowns, FAST_TRIPLES, listed=2)
    return Explanations(distinct(polished, 2), exhaustive, None, jnp.asarray(jnp.inf))


def explain_thoroughly(reading: Reading, unknowns: Unknowns, *, noisy: bool | None = None) -> Explanations:
    """The thorough search: ten times the triples and up to three explanations; maximum likelihood under noise.

    Args:
      reading: of one gradient, thorough. unknowns: static or traced.
      noisy: static; what `reading.is_rounding` denies, where that is known before, so that the program holds only the
        one branch that is needed. None: both.
    """
    equation = reading.equation
    # Likelihood starts from two alone: the best, and the best of those that contradict it.
    polished, exhaustive = _polish_best(equation, unknowns, THOROUGH_TRIPLES, listed=2 if noisy else LISTED)
    free = jnp.asarray(unknowns.scalar) | jnp.asarray(unknowns.scale)
    factor_variance = jnp.where(free, 0.0, reading.factor_variance)

    def by_consensus() -> Explanations:
        no_pull = jnp.zeros(equation.direction.shape)
        return Explanations(distinct(polished, LISTED), exhaustive, no_pull, jnp.asarray(jnp.inf))

    def by_likelihood() -> Explanations:
        two = polished if noisy else jax.tree.map(lambda leaf: leaf[::POLISHED][:2], polished)
        return explain_by_likelihood(equation, reading.direction_noise, factor_variance, two, unknowns)

    if noisy is None:
        return jax.lax.cond(reading.is_rounding, by_consensus, by_likelihood)
    return by_likelihood() if noisy else by_consensus()


def _polish_best(
    equation: ScalarEquation, unknowns: Unknowns, triples: int, *, listed: int
) -> tuple[Consensus, jax.Array]:
    """Solve the triples of the plan, and polish the scalars that the most classes support.

    Args:
      listed: static; 2 for the best and the best of those that contradict it, more for several of each.

    Returns:
      `Consensus` with a leading axis, the best score first, then the best of those that contradict it; and () bool,
      whether no other explanation can exist.
    """
    plan = plan_triples(equation.direction.size, triples)
    hypotheses, score = _assess(equation, plan.triples, unknowns)

    def polish(index: jax.Array) -> Consensus:
        chosen = jax.tree.map(lambda leaf: leaf[index][None], hypotheses)
        chosen = replace(chosen, prediction=probabilities(equation, chosen.scalar))
        drift = hypothesis_drift(equation, chosen, unknowns)[0] + chosen.level_deviation
        return polish_consensus(equation, chosen.scalar[0], chosen.factor[0], chosen.level[0], drift, unknowns)

    first = argmax(score)
    # Without lambda as an unknown kappa is one; else it follows from lambda.
    values = either(unknowns.scalar, hypotheses.scalar, hypotheses.factor)
    deviations = either(unknowns.scalar, hypotheses.scalar_deviation, hypotheses.factor_deviation)
    elsewhere = _apart(values, deviations, first)
    # The best few, and the best few of those that contradict the very best.
    contradicting = jnp.where(elsewhere, score, -jnp.inf)
    if listed > 2:
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
    seen = jnp.sum(elsewhere & (score > 0)) <= (POLISHED if listed > 2 else 1)
    exhaustive = jnp.asarray(plan.exhaustive) & seen
    return polished, exhaustive


def _assess(equation: ScalarEquation, triples: np.ndarray, unknowns: Unknowns) -> tuple[Hypotheses, jax.Array]:
    """The hypotheses, without what they say of single classes, and (H,) their scores.

    Of many classes only a few hypotheses at once: all of them would be many times the gradient.
    """

    def assess(some: np.ndarray | jax.Array) -> tuple[Hypotheses, jax.Array]:
        hypotheses = solve_hypotheses(equation, some, unknowns)
        score = score_hypotheses(equation, hypotheses, unknowns)
        nothing = jnp.zeros((len(some), 0))
        return replace(hypotheses, prediction=nothing, label=nothing, deviation=nothing), score

    number = len(triples)
    if number * equation.direction.size <= NUMBERS_AT_ONCE:
        return assess(triples)
    padded = np.concatenate([triples, np.repeat(triples[-1:], -number % AT_ONCE, axis=0)])
    found = jax.lax.map(assess, jnp.asarray(padded.reshape(-1, AT_ONCE, 3)))
    return jax.tree.map(lambda leaf: leaf.reshape(len(padded), *leaf.shape[2:])[:number], found)


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
