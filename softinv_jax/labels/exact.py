"""Format-free recovery: explanations of one gradient, found by consensus and, under noise, by likelihood."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmax, argmin, argsort
from softinv_jax.labels.consensus import (
    Consensus,
    hypothesis_drift,
    polish_consensus,
    score_hypotheses,
)
from softinv_jax.labels.hypotheses import plan_triples, solve_hypotheses
from softinv_jax.labels.likelihood import fit_likelihood, trimmed_starts
from softinv_jax.labels.scalar_equation import TOLERANCE, ScalarEquation, Unknowns

__all__ = ["Explanations", "explain_by_consensus", "explain_by_likelihood"]

FAST_TRIPLES = 24
THOROUGH_TRIPLES = 256
LIKELIHOOD_STARTS = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Explanations:
    """Distinct explanations of one gradient, the best first.

    Attributes:
      found: `Consensus` with a leading axis (K,).
      exhaustive: () bool, every triple of classes was tried, so that no other explanation exists.
      feature_pull: (C,) correction of the feature under noise, see `LikelihoodFit`; zero without.
    """

    found: Consensus
    exhaustive: jax.Array
    feature_pull: jax.Array


def explain_by_consensus(equation: ScalarEquation, unknowns: Unknowns, *, thorough: bool) -> Explanations:
    """Solve the triples of the plan, and polish the scalars that the most classes support.

    Args:
      equation: the scalar equation. unknowns: static.
      thorough: static; ten times the triples, and up to three distinct explanations instead of one.
    """
    number_of_classes = equation.direction.size
    plan = plan_triples(number_of_classes, THOROUGH_TRIPLES if thorough else FAST_TRIPLES)
    hypotheses = solve_hypotheses(equation, plan, unknowns)
    score = score_hypotheses(equation, hypotheses, unknowns)
    drift = hypothesis_drift(equation, hypotheses, unknowns)
    found = []
    for _ in range(3 if thorough else 1):
        best = argmax(score)
        consensus = polish_consensus(
            equation,
            hypotheses.scalar[best],
            hypotheses.factor[best],
            hypotheses.level[best],
            drift[best],
            unknowns,
        )
        # What lies within its own errors of this explanation is the same one.
        same = jnp.abs(hypotheses.scalar - consensus.scalar) <= TOLERANCE * (
            hypotheses.scalar_deviation + consensus.scalar_deviation
        )
        same = same & (
            jnp.abs(hypotheses.factor - consensus.factor)
            <= TOLERANCE * (hypotheses.factor_deviation + consensus.factor_deviation)
            + 1e-3 * jnp.abs(consensus.factor)
        )
        same = same | (jnp.arange(score.size, dtype=jnp.int32) == best)
        # Without nats beyond its own triple a hypothesis explains nothing.
        consensus = replace(
            consensus, surprise=jnp.where(score[best] > 0, consensus.surprise, jnp.minimum(consensus.surprise, 0.0))
        )
        found.append(consensus)
        score = jnp.where(same, -1.0, score)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    # Exhaustive, and no more significant explanation left over than are listed.
    exhaustive = jnp.asarray(plan.exhaustive) & (jnp.max(score) <= 0)
    return Explanations(stacked, exhaustive, jnp.zeros((number_of_classes,)))


def explain_by_likelihood(
    equation: ScalarEquation, direction_covariance: jax.Array, unknowns: Unknowns
) -> Explanations:
    """Under noise: maximum likelihood from the best hypotheses and from the weighted variance loss.

    Args:
      equation: with `left_deviation` and `direction_deviation` measured. unknowns: static.
      direction_covariance: (C, C), covariance of the errors of z.
    """
    plan = plan_triples(equation.direction.size, THOROUGH_TRIPLES)
    hypotheses = solve_hypotheses(equation, plan, unknowns)
    order = argsort(-score_hypotheses(equation, hypotheses, unknowns))[:LIKELIHOOD_STARTS]
    drift = hypothesis_drift(equation, hypotheses, unknowns)

    def start(index: jax.Array) -> Consensus:
        return polish_consensus(
            equation,
            hypotheses.scalar[index],
            hypotheses.factor[index],
            hypotheses.level[index],
            drift[index],
            unknowns,
        )

    consensus = jax.vmap(start)(order)
    trimmed = trimmed_starts(equation, unknowns, LIKELIHOOD_STARTS)
    starts = [
        jnp.concatenate(pair)
        for pair in zip((consensus.scalar, consensus.factor, consensus.agreeing), trimmed, strict=True)
    ]
    fits = jax.vmap(lambda *at: fit_likelihood(equation, direction_covariance, *at, unknowns))(*starts)
    best = argmin(fits.cost)
    fit = jax.tree.map(lambda leaf: leaf[best], fits)
    level = jnp.sum(jnp.where(fit.agreeing, fit.label, 0.0)) / jnp.maximum(jnp.sum(fit.agreeing), 1)
    described = polish_consensus(
        equation,
        fit.scalar,
        fit.factor,
        level,
        jnp.where(fit.agreeing, jnp.inf, -jnp.inf),  # The fit has chosen the classes.
        unknowns,
        steps=0,
    )
    described = replace(
        described,
        level=level,
        level_deviation=fit.level_deviation,
        label=fit.label,
        label_deviation=fit.label_deviation,
        scalar_deviation=fit.scalar_deviation,
        misfit=fit.misfit,
    )
    none = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.dtype == jnp.float64 else leaf, described)
    none = replace(none, surprise=jnp.full_like(described.surprise, -jnp.inf))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), described, none, none)
    return Explanations(stacked, jnp.asarray(False), fit.feature_pull)
