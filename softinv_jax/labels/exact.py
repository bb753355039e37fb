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

__all__ = ["Explanations", "explain_by_consensus", "explain_thoroughly"]

FAST_TRIPLES = 24
THOROUGH_TRIPLES = 256
LIKELIHOOD_STARTS = 4
POLISHED = 6
SUPPORTED = 4
LISTED = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Explanations:
    """Distinct explanations of one gradient, the best first.

    Attributes:
      found: `Consensus` with a leading axis (K,).
      exhaustive: () bool, every triple of classes was tried, so that no other explanation exists.
      feature_pull: (C,) correction of the feature under noise, see `LikelihoodFit`; None or zero without.
    """

    found: Consensus
    exhaustive: jax.Array
    feature_pull: jax.Array | None


def explain_by_consensus(equation: ScalarEquation, unknowns: Unknowns) -> Explanations:
    """The fast search: solve a few triples, and polish the scalar that the most classes support, and its rival.

    Args:
      equation: the scalar equation. unknowns: static.
    """
    polished, exhaustive = _polish_best(equation, unknowns, thorough=False)
    return Explanations(_distinct(polished, 2), exhaustive, None)


def explain_thoroughly(
    equation: ScalarEquation,
    direction_covariance: jax.Array,
    factor_variance: jax.Array,
    is_rounding: jax.Array,
    unknowns: Unknowns,
) -> Explanations:
    """The thorough search: ten times the triples and up to three explanations; maximum likelihood under noise.

    Args:
      equation: the scalar equation, with `left_deviation` and `direction_deviation` measured. unknowns: static.
      direction_covariance: (C, C), covariance of the errors of z. factor_variance: () of the error of kappa.
      is_rounding: () bool, the gradient carries no noise but its rounding.
    """
    polished, exhaustive = _polish_best(equation, unknowns, thorough=True)
    no_pull = jnp.zeros(equation.direction.shape)
    return jax.lax.cond(
        is_rounding,
        lambda: Explanations(_distinct(polished, LISTED), exhaustive, no_pull),
        lambda: _explain_by_likelihood(equation, direction_covariance, factor_variance, polished, unknowns),
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
    values, deviations = hypotheses.scalar, hypotheses.scalar_deviation
    if not unknowns.scalar:
        values, deviations = hypotheses.factor, hypotheses.factor_deviation
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


def _distinct(polished: Consensus, listed: int) -> Consensus:
    """The `listed` best consensuses with different classes in agreement; surprise -inf where there are fewer."""
    surprise = jnp.where(jnp.isnan(polished.surprise), -jnp.inf, polished.surprise)
    picks, left = [], surprise
    for _ in range(listed):
        best = argmax(left)
        picks.append((best, left[best]))
        same = jnp.all(polished.agreeing == polished.agreeing[best][None, :], axis=1)
        left = jnp.where(same, -jnp.inf, left)
    order = jnp.stack([index for index, _ in picks])
    found = jax.tree.map(lambda leaf: leaf[order], polished)
    return replace(found, surprise=jnp.stack([value for _, value in picks]))


def _explain_by_likelihood(
    equation: ScalarEquation,
    direction_covariance: jax.Array,
    factor_variance: jax.Array,
    polished: Consensus,
    unknowns: Unknowns,
) -> Explanations:
    """Maximum likelihood from the best hypotheses and from the weighted variance loss."""
    trimmed = trimmed_starts(equation, unknowns, LIKELIHOOD_STARTS)
    starts = [
        jnp.concatenate([best[:LIKELIHOOD_STARTS], other])
        for best, other in zip((polished.scalar, polished.factor, polished.agreeing), trimmed, strict=True)
    ]
    fits = jax.vmap(
        lambda scalar, factor, agreeing: fit_likelihood(
            equation, direction_covariance, factor_variance, scalar, factor, agreeing, unknowns
        )
    )(*starts)
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
    reach = TOLERANCE * fit.label_deviation
    valid = (fit.label >= -2 * reach) & (fit.label <= 1 + 2 * reach) & (reach <= 0.5)
    fits = jnp.all(valid) & (fit.misfit <= (TOLERANCE / 2) ** 2)
    described = replace(
        described,
        fits=fits,
        surprise=jnp.where(fits, described.surprise, jnp.minimum(described.surprise, 0.0)),
        level=level,
        level_deviation=fit.level_deviation,
        label=fit.label,
        label_deviation=fit.label_deviation,
        deviation_without_one=jnp.hypot(fit.label_deviation, described.deviation_without_one),
        scalar_deviation=fit.scalar_deviation,
        misfit=fit.misfit,
    )
    none = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.dtype == jnp.float64 else leaf, described)
    none = replace(none, fits=jnp.zeros_like(described.fits), surprise=jnp.full_like(described.surprise, -jnp.inf))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), described, none, none)
    return Explanations(stacked, jnp.asarray(False), fit.feature_pull)
