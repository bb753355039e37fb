"""Under noise: the likeliest of what consensus and the weighted variance loss suggest."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from softinv_jax.labels.consensus import Consensus
from softinv_jax.labels.explanations import Explanations
from softinv_jax.labels.likelihood import fit_likelihood, trimmed_starts
from softinv_jax.labels.polishing import polish_consensus
from softinv_jax.labels.scalar_equation import TOLERANCE, DirectionNoise, ScalarEquation, Unknowns

__all__ = ["explain_by_likelihood"]

LIKELIHOOD_STARTS = 4


def explain_by_likelihood(
    equation: ScalarEquation,
    noise: DirectionNoise,
    factor_variance: jax.Array,
    suggested: Consensus,
    unknowns: Unknowns,
) -> Explanations:
    """Maximum likelihood from a few hypotheses (a leading axis of `suggested`) and from the weighted variance loss."""
    trimmed = trimmed_starts(equation, unknowns, LIKELIHOOD_STARTS)
    starts = [
        jnp.concatenate([best, other])
        for best, other in zip((suggested.scalar, suggested.factor, suggested.agreeing), trimmed, strict=True)
    ]
    fit = fit_likelihood(equation, noise, factor_variance, (starts[0], starts[1], starts[2]), unknowns)
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
    # A scale taken on trust errs too, as far as the label confirms it.
    by_scale = jnp.abs(equation.left) * described.factor_deviation
    free = jnp.asarray(unknowns.scalar) | jnp.asarray(unknowns.scale)
    label_deviation = jnp.where(free, fit.label_deviation, jnp.hypot(fit.label_deviation, by_scale))
    # Whether there is a label is asked of what was fitted; what is not seen makes it less sharp, not less there.
    reach = TOLERANCE * jnp.where(free, fit.fitted_deviation, jnp.hypot(fit.fitted_deviation, by_scale))
    valid = (fit.label >= -2 * reach) & (fit.label <= 1 + 2 * reach) & (reach <= 0.5)
    fits = jnp.all(valid) & (fit.misfit <= (TOLERANCE / 2) ** 2)
    described = replace(
        described,
        fits=fits,
        surprise=jnp.where(fits, described.surprise, jnp.minimum(described.surprise, 0.0)),
        level=level,
        level_deviation=fit.level_deviation,
        label=fit.label,
        label_deviation=label_deviation,
        deviation_without_one=jnp.hypot(label_deviation, described.deviation_without_one),
        scalar_deviation=fit.scalar_deviation,
        misfit=fit.misfit,
    )
    none = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.dtype == jnp.float64 else leaf, described)
    none = replace(none, fits=jnp.zeros_like(described.fits), surprise=jnp.full_like(described.surprise, -jnp.inf))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), described, none, none)
    return Explanations(stacked, jnp.asarray(False), fit.feature_pull, fit.cost)
