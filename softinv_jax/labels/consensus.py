"""The scalar on which most classes agree, polished on all of them: recovery without knowing the label's format."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argsort, take_rows
from softinv_jax.labels.hypotheses import Hypotheses
from softinv_jax.labels.scalar_equation import (
    TOLERANCE,
    ScalarEquation,
    Unknowns,
    label_deviation,
    probabilities,
)

__all__ = ["Consensus", "hypothesis_drift", "polish_consensus", "score_hypotheses"]

# Gauss-Newton from a triple's root is quadratic; the rounds let classes join or leave.
POLISH_STEPS = 6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Consensus:
    """One explanation of the gradient: a scalar, and the classes whose soft label is one common level.

    Attributes:
      scalar: () lambda. factor: () kappa. level: () the common value c.
      scalar_deviation, factor_deviation, level_deviation: () their standard deviations.
      agreeing: (C,) bool.
      label: (C,) y = softmax(lambda z + b) - kappa u, unstructured.
      label_deviation: (C,) standard deviations of its entries.
      deviation_without_one: (C,) the same, had the agreeing class that matters most not agreed.
      surprise: () nats (not positive where the fit did not converge or misses the expected errors): minus the
        logarithm of how many sets of as many classes a dense label would be expected
        to show in agreement by accident.
      informative: () int32, how many distinguishable softmax entries the agreeing classes have: classes that share
        one agree at every lambda alike. levels: () int32, the same among all classes.
      fits: () bool, converged, with residuals as small as expected, to a valid label that is known to some extent.
      misfit: () mean over the agreeing classes of ((y - c) / deviation)^2 per degree of freedom.
      all float64.
    """

    scalar: jax.Array
    factor: jax.Array
    level: jax.Array
    scalar_deviation: jax.Array
    factor_deviation: jax.Array
    level_deviation: jax.Array
    agreeing: jax.Array
    label: jax.Array
    label_deviation: jax.Array
    deviation_without_one: jax.Array
    surprise: jax.Array
    informative: jax.Array
    levels: jax.Array
    fits: jax.Array
    misfit: jax.Array


def _scalar_derivative(
    equation: ScalarEquation, scalar: jax.Array, prediction: jax.Array, unknowns: Unknowns
) -> jax.Array:
    """dy / dlambda at fixed kappa, or along kappa = 1 / lambda where the scale is known: (..., C)."""
    direction = jnp.broadcast_to(equation.direction, prediction.shape)
    mean = jnp.sum(prediction * direction, axis=-1, keepdims=True)
    derivative = prediction * (direction - mean)
    if unknowns.scale:
        return derivative
    return derivative + jnp.broadcast_to(equation.left, prediction.shape) / scalar[..., None] ** 2


def _surprise(margin: jax.Array, gradient: jax.Array) -> jax.Array:
    """Nats by which one class's agreement to within +-margin would surprise if the label were dense.

    Entries of a dense label are of the order 1 / C, and y = p - kappa u cannot be told from p where kappa u drowns
    in the margin: the chance is 2 margin / min(1 / C, |kappa u|). The second bound keeps out the two limits in
    which everything agrees with everything: kappa -> 0 with lambda -> 0 (uniform) or infinity (one-hot).
    """
    room = jnp.minimum(1.0 / margin.shape[-1], jnp.abs(gradient))
    return jnp.log(jnp.maximum(room / (2 * margin), 1.0))


def score_hypotheses(equation: ScalarEquation, hypotheses: Hypotheses, unknowns: Unknowns) -> jax.Array:
    """(H,) nats of agreement with each hypothesis, beyond what its own triple agrees on by construction.

    Minus one where the hypothesis is no valid label at all (an entry below 0 or above 1).
    """
    label = hypotheses.label
    gradient = hypotheses.prediction - label
    drift = hypothesis_drift(equation, hypotheses, unknowns)
    margin = TOLERANCE * (hypotheses.deviation + drift)
    level_margin = margin + TOLERANCE * hypotheses.level_deviation[:, None]
    agreeing = jnp.abs(label - hypotheses.level[:, None]) <= level_margin
    possible = jnp.all((label >= -margin) & (label <= 1 + margin), axis=1)
    nats = jnp.where(agreeing, _surprise(level_margin, gradient), 0.0)
    own = take_rows(nats, hypotheses.classes)
    total = jnp.sum(nats, axis=1) - jnp.sum(own, axis=1)
    if fitted_parameters(unknowns) == 2:  # The weakest of the three classes was not needed to fit them.
        total = total + jnp.min(own, axis=1)
    return jnp.where(possible & ~jnp.isnan(hypotheses.scalar), total, -1.0)


def _finite(step: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(step), step, 0.0)


def fitted_parameters(unknowns: Unknowns) -> int:
    """Number of unknowns in y_j = c: the level, and lambda and kappa where they are free."""
    return 1 + unknowns.scalar + unknowns.scale


def _independent(prediction: jax.Array, margin: jax.Array, agreeing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(C,) bool one agreeing class for each distinguishable softmax entry, and () how many entries there are at all.

    Classes with one logit, or with entries too small to tell from zero, agree at every lambda if they do at one.
    """
    order = argsort(prediction.astype(jnp.float32))
    entries, margins, agrees = prediction[order], margin[order], agreeing[order]
    starts = jnp.concatenate([jnp.ones((1,), bool), jnp.diff(entries) > margins[1:]])
    level = jnp.cumsum(starts, dtype=jnp.int32)
    taken = jax.lax.cummax(jnp.where(agrees, level, 0))
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), taken[:-1]])
    first = agrees & (level > before)
    chosen = jnp.zeros(agreeing.shape, bool).at[order].set(first, mode="promise_in_bounds", unique_indices=True)
    return chosen, level[-1]


def hypothesis_drift(equation: ScalarEquation, hypotheses: Hypotheses, unknowns: Unknowns) -> jax.Array:
    """(H, C) how far the errors of a hypothesis's own lambda and kappa move each label entry."""
    drift = jnp.abs(equation.left)[None, :] * hypotheses.factor_deviation[:, None]
    if unknowns.scalar:
        derivative = _scalar_derivative(equation, hypotheses.scalar, hypotheses.prediction, unknowns)
        drift = drift + jnp.abs(derivative) * hypotheses.scalar_deviation[:, None]
    return drift


class _Point(NamedTuple):
    """lambda and kappa, () float64, and what follows from them, (C,) float64."""

    scalar: jax.Array
    factor: jax.Array
    prediction: jax.Array
    label: jax.Array
    deviation: jax.Array


class _PolishStep(NamedTuple):
    """One Gauss-Newton step, all () float64; `inflation` is of the variances when the weightiest class is left out."""

    scalar_step: jax.Array
    factor_step: jax.Array
    level: jax.Array
    scalar_variance: jax.Array
    factor_variance: jax.Array
    level_variance: jax.Array
    inflation: jax.Array


def polish_consensus(
    equation: ScalarEquation,
    scalar: jax.Array,
    factor: jax.Array,
    level: jax.Array,
    drift: jax.Array,
    unknowns: Unknowns,
    *,
    steps: int = POLISH_STEPS,
) -> Consensus:
    """Weighted least squares in (lambda, kappa, c) on the classes that agree, re-chosen at every step.

    Args:
      equation: the scalar equation.
      scalar, factor, level: () the hypothesis to start from.
      drift: (C,) how far its errors can move each label entry from its level; allowed for when classes are first
        chosen.
      unknowns: static.
      steps: static; 0 only describes the given point.
    """

    def evaluate(scalar: jax.Array, factor: jax.Array) -> _Point:
        prediction = probabilities(equation, scalar)
        label = prediction - factor * equation.left
        return _Point(scalar, factor, prediction, label, label_deviation(equation, scalar, factor, prediction, label))

    def solve(point: _Point, agreeing: jax.Array) -> _PolishStep:
        """One Gauss-Newton step and the standard deviations, by successive weighted projection."""
        scalar, _, prediction, label, deviation = point
        weights = jnp.where(agreeing, 1 / deviation**2, 0.0)
        total = jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float64).tiny)

        def centred(values: jax.Array) -> jax.Array:
            return values - jnp.sum(weights * values) / total

        def project(values: jax.Array, onto: jax.Array) -> jax.Array:
            square = jnp.sum(weights * onto**2)
            return values - onto * jnp.sum(weights * values * onto) / jnp.where(square == 0, 1.0, square)

        residual = centred(label)
        leverage = weights / total
        own_scalar, own_factor = jnp.zeros_like(weights), jnp.zeros_like(weights)
        left = centred(equation.left)
        slope = centred(_scalar_derivative(equation, scalar, prediction, unknowns))
        scalar_step, scalar_variance = jnp.zeros(()), jnp.zeros(())
        if unknowns.scalar:
            free = project(slope, left) if unknowns.scale else slope
            information = jnp.sum(weights * free**2)
            scalar_variance = 1 / information
            step = -jnp.sum(weights * free * residual) / information
            scalar_step = jnp.where(information > 0, step, 0.0)
            own_scalar = weights * free**2 / information
        factor_step, factor_variance = jnp.zeros(()), jnp.zeros(())
        if unknowns.scale:
            remaining = residual + slope * scalar_step if unknowns.scalar else residual
            information = jnp.sum(weights * left**2)
            factor_step = jnp.where(information > 0, jnp.sum(weights * left * remaining) / information, 0.0)
            factor_variance = 1 / information
            own_factor = weights * left**2 / information
            if unknowns.scalar:
                correlation = jnp.sum(weights * left * slope) / information
                factor_variance = factor_variance + correlation**2 * scalar_variance
        # Leverage: how much larger the variances were, had the one class that matters most not been there.
        left_out = jnp.maximum(1 - leverage - own_scalar - own_factor, 1e-12)
        return _PolishStep(
            scalar_step=scalar_step,
            factor_step=factor_step,
            level=jnp.sum(weights * label) / total,
            scalar_variance=scalar_variance,
            factor_variance=factor_variance,
            level_variance=1 / total,
            inflation=1 + jnp.max((own_scalar + own_factor) / left_out),
        )

    def advance(point: _Point, step: _PolishStep) -> _Point:
        scalar, factor = point.scalar, point.factor
        if unknowns.scalar:
            # Never through zero or beyond a doubling in one step: lambda keeps its sign.
            scalar = scalar + jnp.clip(_finite(step.scalar_step), -jnp.abs(scalar) / 2, jnp.abs(scalar))
        factor = factor + _finite(step.factor_step) if unknowns.scale else 1 / scalar
        return evaluate(scalar, factor)

    def choose(point: _Point, level: jax.Array, allowance: jax.Array) -> jax.Array:
        return jnp.abs(point.label - level) <= TOLERANCE * point.deviation + allowance

    def step(index: int, state: tuple[_Point, jax.Array]) -> tuple[_Point, jax.Array]:
        point, agreeing = state
        point = advance(point, solve(point, agreeing))
        weights = jnp.where(agreeing, 1 / point.deviation**2, 0.0)
        total = jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float64).tiny)
        level = jnp.sum(weights * point.label) / total
        # A class sharper than all that set the level so far may disagree with it by the level's own error.
        allowance = TOLERANCE * jnp.where(jnp.any(agreeing), jax.lax.rsqrt(total), 0.0)
        # What the start's own errors still allow shrinks with every step; in the last ones it is nothing.
        remaining = jnp.where(jnp.isfinite(drift), 2 * drift * 0.1 ** (index + 1.0), 0.0)
        kept = choose(point, level, allowance + remaining)
        # A step that loses the classes it was fitted to went astray: hold on to them.
        kept = jnp.where((index == 0) | (jnp.sum(kept) < fitted_parameters(unknowns)), agreeing, kept)
        return point, kept

    # Two deviations of the hypothesis: enough to start from most of the classes, few enough to keep others out.
    point = evaluate(scalar, factor)
    point, agreeing = jax.lax.fori_loop(0, steps, step, (point, choose(point, level, 2 * drift)))
    scalar, factor, prediction, label, deviation = point
    solution = solve(point, agreeing)
    level, level_variance = solution.level, solution.level_variance
    scalar_variance, factor_variance = solution.scalar_variance, solution.factor_variance
    # The last class to join or leave may still move them a little.
    slack = TOLERANCE / 2
    converged = (jnp.abs(solution.scalar_step) <= slack * jnp.sqrt(scalar_variance) + 1e-9 * jnp.abs(scalar)) & (
        jnp.abs(solution.factor_step) <= slack * jnp.sqrt(factor_variance) + 1e-9 * jnp.abs(factor)
    )
    spread = deviation**2 + (equation.left**2) * factor_variance
    if unknowns.scalar:
        derivative = _scalar_derivative(equation, scalar, prediction, unknowns)
        spread = spread + derivative**2 * scalar_variance
        level_derivative = jnp.sum(jnp.where(agreeing, derivative, 0.0)) / jnp.maximum(jnp.sum(agreeing), 1)
        level_variance = level_variance + level_derivative**2 * scalar_variance
    fitted = fitted_parameters(unknowns)
    freedom = jnp.maximum(jnp.sum(agreeing) - fitted, 1)
    misfit = jnp.sum(jnp.where(agreeing, ((label - level) / deviation) ** 2, 0.0)) / freedom
    count = jnp.sum(agreeing)
    gradient = factor * equation.left
    margin = TOLERANCE * deviation
    independent, levels = _independent(prediction, margin, agreeing & (jnp.abs(gradient) > margin))
    nats = jnp.where(independent, _surprise(margin, gradient), 0.0)
    number_of_classes = agreeing.size
    choices = (
        jax.lax.lgamma(jnp.asarray(number_of_classes + 1.0))
        - jax.lax.lgamma(count + 1.0)
        - jax.lax.lgamma(number_of_classes - count + 1.0)
    )
    # The fitted parameters make as many classes agree for free; the sharpest ones, to be safe.
    surprise = jnp.sum(nats) - fitted * jnp.max(nats) - choices
    # Root mean square of the residuals at most half of what a single one may be.
    fits = misfit <= (TOLERANCE / 2) ** 2
    if steps > 0:
        fits = fits & converged
    label_spread = jnp.sqrt(spread)
    hinging = jnp.sqrt(deviation**2 + (spread - deviation**2) * solution.inflation)
    # Where six deviations span half of all possible values, the label is not known; and outside [0, 1] it is none.
    reach = TOLERANCE * label_spread
    # (The bounds get twice the room: a sum of 1 moves the errors of all others onto one entry.)
    valid = (label >= -2 * reach) & (label <= 1 + 2 * reach) & (reach <= 0.5)
    fits = fits & jnp.all(valid)
    surprise = jnp.where(fits, surprise, jnp.minimum(surprise, 0.0))
    informative = jnp.sum(independent, dtype=jnp.int32)
    return Consensus(
        scalar,
        factor,
        level,
        jnp.sqrt(scalar_variance),
        jnp.sqrt(factor_variance),
        jnp.sqrt(level_variance),
        agreeing,
        label,
        label_spread,
        hinging,
        surprise,
        informative,
        levels,
        fits,
        misfit,
    )
