"""A scalar polished on all classes that agree on one level, and how sure that agreement is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.labels.consensus import (
    Consensus,
    fitted_parameters,
    independent_classes,
    scalar_derivative,
    surprise_of,
)
from softinv_jax.labels.scalar_equation import (
    TOLERANCE,
    ScalarEquation,
    Unknowns,
    either,
    label_deviation,
    probabilities,
)

__all__ = ["polish_consensus"]

# Gauss-Newton from a triple's root is quadratic; the rounds let classes join or leave.
POLISH_STEPS = 6
# A factor that somebody forgot is further off: rates, means for sums, clipping.
CONFIRMED_SCALE = 0.25


class _Point(NamedTuple):
    """lambda and kappa, () float64, and what follows from them, (C,) float64."""

    scalar: jax.Array
    factor: jax.Array
    prediction: jax.Array
    label: jax.Array
    deviation: jax.Array


class _Step(NamedTuple):
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
      unknowns: what is fitted.
      steps: static; 0 only describes the given point.
    """

    def step(index: int, state: tuple[_Point, jax.Array]) -> tuple[_Point, jax.Array]:
        point, agreeing = state
        point = _advance(equation, point, _solve(equation, point, agreeing, unknowns), unknowns)
        kept = _rechoose(point, agreeing, drift, index)
        # A step that loses the classes it was fitted to went astray: hold on to them.
        kept = jnp.where((index == 0) | (jnp.sum(kept) < fitted_parameters(unknowns)), agreeing, kept)
        return point, kept

    # Two deviations of the hypothesis: enough to start from most of the classes, few enough to keep others out.
    start = _evaluate(equation, scalar, factor)
    point, agreeing = jax.lax.fori_loop(0, steps, step, (start, _choose(start, level, 2 * drift)))
    return _describe(equation, point, agreeing, unknowns, must_converge=steps > 0)


def _evaluate(equation: ScalarEquation, scalar: jax.Array, factor: jax.Array) -> _Point:
    prediction = probabilities(equation, scalar)
    label = prediction - factor * equation.left
    return _Point(scalar, factor, prediction, label, label_deviation(equation, scalar, factor, prediction, label))


def _choose(point: _Point, level: jax.Array, allowance: jax.Array) -> jax.Array:
    return jnp.abs(point.label - level) <= TOLERANCE * point.deviation + allowance


def _weights(point: _Point, agreeing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(C,) inverse variances of the classes that agree, and () their sum."""
    weights = jnp.where(agreeing, 1 / point.deviation**2, 0.0)
    return weights, jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float64).tiny)


def _rechoose(point: _Point, agreeing: jax.Array, drift: jax.Array, index: int) -> jax.Array:
    """(C,) the classes that agree with the level of those that did."""
    weights, total = _weights(point, agreeing)
    level = jnp.sum(weights * point.label) / total
    # A class sharper than all that set the level so far may disagree with it by the level's own error.
    allowance = TOLERANCE * jnp.where(jnp.any(agreeing), jax.lax.rsqrt(total), 0.0)
    # What the start's own errors still allow shrinks with every step; in the last ones it is nothing.
    remaining = jnp.where(jnp.isfinite(drift), 2 * drift * 0.1 ** (index + 1.0), 0.0)
    return _choose(point, level, allowance + remaining)


def _solve(equation: ScalarEquation, point: _Point, agreeing: jax.Array, unknowns: Unknowns) -> _Step:
    """One Gauss-Newton step and the standard deviations, by successive weighted projection."""
    weights, total = _weights(point, agreeing)
    zero = jnp.zeros(())

    def centred(values: jax.Array) -> jax.Array:
        return values - jnp.sum(weights * values) / total

    residual, left = centred(point.label), centred(equation.left)
    slope = centred(scalar_derivative(equation, point.scalar, point.prediction, unknowns))
    left_square = jnp.sum(weights * left**2)
    along_left = jnp.sum(weights * slope * left) / jnp.where(left_square == 0, 1.0, left_square)
    free = either(unknowns.scale, slope - left * along_left, slope)
    information = jnp.sum(weights * free**2)
    step = jnp.where(information > 0, -jnp.sum(weights * free * residual) / information, 0.0)
    scalar_step = either(unknowns.scalar, step, zero)
    scalar_variance = either(unknowns.scalar, 1 / information, zero)
    own_scalar = either(unknowns.scalar, weights * free**2 / information, jnp.zeros_like(weights))

    remaining = residual + slope * scalar_step
    step = jnp.where(left_square > 0, jnp.sum(weights * left * remaining) / left_square, 0.0)
    correlation = either(unknowns.scalar, jnp.sum(weights * left * slope) / left_square, zero)
    crossed = jnp.where(correlation == 0, 0.0, correlation**2 * scalar_variance)
    own_factor = either(unknowns.scale, weights * left**2 / left_square, jnp.zeros_like(weights))
    # Leverage: how much larger the variances were, had the one class that matters most not been there.
    left_out = jnp.maximum(1 - weights / total - own_scalar - own_factor, 1e-12)
    return _Step(
        scalar_step=scalar_step,
        factor_step=either(unknowns.scale, step, zero),
        level=jnp.sum(weights * point.label) / total,
        scalar_variance=scalar_variance,
        factor_variance=either(unknowns.scale, 1 / left_square + crossed, zero),
        level_variance=1 / total,
        inflation=1 + jnp.max((own_scalar + own_factor) / left_out),
    )


def _advance(equation: ScalarEquation, point: _Point, step: _Step, unknowns: Unknowns) -> _Point:
    scalar = point.scalar
    # Never through zero or beyond a doubling in one step: lambda keeps its sign.
    moved = scalar + jnp.clip(_finite(step.scalar_step), -jnp.abs(scalar) / 2, jnp.abs(scalar))
    scalar = either(unknowns.scalar, moved, scalar)
    factor = either(unknowns.scale, point.factor + _finite(step.factor_step), 1 / scalar)
    return _evaluate(equation, scalar, factor)


def _finite(step: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(step), step, 0.0)


def _describe(
    equation: ScalarEquation, point: _Point, agreeing: jax.Array, unknowns: Unknowns, *, must_converge: bool
) -> Consensus:
    scalar, factor, _, label, deviation = point
    solution = _solve(equation, point, agreeing, unknowns)
    scale_variance = _scale_variance(equation, point, agreeing)
    # In closed form the scale is taken on trust: as far as the label itself confirms it, it can still err.
    confirmed = TOLERANCE * jnp.sqrt(scale_variance) <= CONFIRMED_SCALE * jnp.abs(factor)
    confirmed = confirmed & (equation.logit_error == 0)
    trusted = jnp.where(confirmed, scale_variance, 0.0)
    solution = solution._replace(factor_variance=either(_nothing_fitted(unknowns), trusted, solution.factor_variance))
    spread, level_variance = _spread(equation, point, agreeing, solution, unknowns)
    freedom = jnp.maximum(jnp.sum(agreeing) - fitted_parameters(unknowns), 1)
    misfit = jnp.sum(jnp.where(agreeing, ((label - solution.level) / deviation) ** 2, 0.0)) / freedom
    label_spread = jnp.sqrt(spread)
    fits = _fits(point, label_spread, misfit)
    if must_converge:
        fits = fits & _converged(point, solution)
    margin = TOLERANCE * deviation
    gradient = factor * equation.left
    independent, levels = independent_classes(point.prediction, margin, agreeing & (jnp.abs(gradient) > margin))
    nats = jnp.where(independent, surprise_of(margin, gradient), 0.0)
    # Where the scale is confirmed, every class agrees of its own accord, also where the softmax hardly moves it.
    counted, moved = jnp.where(confirmed, agreeing, independent), jnp.where(confirmed, jnp.inf, jnp.abs(gradient))
    closed = jnp.where(counted, _evidence_of(point, solution.level, moved), 0.0)
    surprise = _surprise(either(_nothing_fitted(unknowns), closed, nats), agreeing, unknowns)
    surprise = surprise - _unlikely_shares(label, solution.level, agreeing)
    of_level = _level_surprise(equation, point, agreeing, solution)
    surprise = surprise + either(_nothing_fitted(unknowns), of_level, jnp.zeros(()))
    return Consensus(
        scalar=scalar,
        factor=factor,
        level=solution.level,
        scalar_deviation=jnp.sqrt(solution.scalar_variance),
        factor_deviation=jnp.sqrt(solution.factor_variance),
        level_deviation=jnp.sqrt(level_variance),
        agreeing=agreeing,
        label=label,
        label_deviation=label_spread,
        deviation_without_one=jnp.sqrt(deviation**2 + (spread - deviation**2) * solution.inflation),
        surprise=jnp.where(fits, surprise, jnp.minimum(surprise, 0.0)),
        informative=jnp.sum(independent, dtype=jnp.int32),
        levels=levels,
        fits=fits,
        misfit=misfit,
    )


def _scale_variance(equation: ScalarEquation, point: _Point, agreeing: jax.Array) -> jax.Array:
    """() variance of kappa, were it fitted to the classes that agree; infinite where they say nothing of it."""
    weights, total = _weights(point, agreeing)
    left = equation.left - jnp.sum(weights * equation.left) / total
    return 1 / jnp.sum(weights * left**2)


def _nothing_fitted(unknowns: Unknowns) -> bool | jax.Array:
    if isinstance(unknowns.scalar, bool) and isinstance(unknowns.scale, bool):
        return not unknowns.scalar and not unknowns.scale
    return ~jnp.asarray(unknowns.scalar) & ~jnp.asarray(unknowns.scale)


def _spread(
    equation: ScalarEquation, point: _Point, agreeing: jax.Array, solution: _Step, unknowns: Unknowns
) -> tuple[jax.Array, jax.Array]:
    """(C,) variance of the label's entries with the errors of lambda and kappa, and () that of the level."""
    spread = point.deviation**2 + equation.left**2 * solution.factor_variance
    derivative = scalar_derivative(equation, point.scalar, point.prediction, unknowns)
    by_scalar = either(unknowns.scalar, derivative**2 * solution.scalar_variance, jnp.zeros_like(spread))
    mean = jnp.sum(jnp.where(agreeing, derivative, 0.0)) / jnp.maximum(jnp.sum(agreeing), 1)
    of_level = either(unknowns.scalar, mean**2 * solution.scalar_variance, jnp.zeros(()))
    return spread + by_scalar, solution.level_variance + of_level


def _converged(point: _Point, solution: _Step) -> jax.Array:
    # The last class to join or leave may still move them a little.
    slack = TOLERANCE / 2
    return (
        jnp.abs(solution.scalar_step) <= slack * jnp.sqrt(solution.scalar_variance) + 1e-9 * jnp.abs(point.scalar)
    ) & (jnp.abs(solution.factor_step) <= slack * jnp.sqrt(solution.factor_variance) + 1e-9 * jnp.abs(point.factor))


def _fits(point: _Point, label_spread: jax.Array, misfit: jax.Array) -> jax.Array:
    """() bool: residuals as small as expected, and a valid label that is known to some extent."""
    # Where six deviations span half of all possible values, the label is not known; and outside [0, 1] it is none.
    reach = TOLERANCE * label_spread
    # (The bounds get twice the room: a sum of 1 moves the errors of all others onto one entry.)
    valid = (point.label >= -2 * reach) & (point.label <= 1 + 2 * reach) & (reach <= 0.5)
    # Root mean square of the residuals at most half of what a single one may be.
    return jnp.all(valid) & (misfit <= (TOLERANCE / 2) ** 2)


def _evidence_of(point: _Point, level: jax.Array, gradient: jax.Array) -> jax.Array:
    """(C,) nats by which each entry speaks for the level, of labels in closed form.

    Nothing is fitted there that could make entries agree, so that the densities themselves are compared: that of the
    error, a Gaussian at the distance from the level, with that of an entry that could be anything in its room.
    """
    residual = (point.label - level) / point.deviation
    width = jnp.sqrt(jnp.pi / 2) * point.deviation  # Half of the interval over which a Gaussian is as high as its top.
    return surprise_of(width, gradient) - jnp.minimum(residual**2, TOLERANCE**2) / 2


def _surprise(nats: jax.Array, agreeing: jax.Array, unknowns: Unknowns) -> jax.Array:
    """() nats of the agreement, less what the fitted parameters and the choice of classes make for free."""
    count, number_of_classes = jnp.sum(agreeing), agreeing.size
    choices = (
        jax.lax.lgamma(jnp.asarray(number_of_classes + 1.0))
        - jax.lax.lgamma(count + 1.0)
        - jax.lax.lgamma(number_of_classes - count + 1.0)
    )
    # The fitted parameters make as many classes agree for free; the sharpest ones, to be safe.
    return jnp.sum(nats) - fitted_parameters(unknowns) * jnp.max(nats) - choices


def _unlikely_shares(label: jax.Array, level: jax.Array, agreeing: jax.Array) -> jax.Array:
    """() nats against classes that are singled out by next to nothing, as where another loss bends the equation.

    A share that may be anything up to 1 is below s with probability s; half of all cost nothing.
    """
    share = jnp.abs(label - level)
    cost = -jnp.log(jnp.clip(2 * share, 1e-9, 1.0))
    return jnp.sum(jnp.where(agreeing, 0.0, cost))


def _level_surprise(equation: ScalarEquation, point: _Point, agreeing: jax.Array, solution: _Step) -> jax.Array:
    """() nats by which it would surprise that the common level is zero by accident; for labels in closed form.

    It was one choice of two to look for that.
    """
    deviation = jnp.sqrt(solution.level_variance)
    gradient = jnp.max(jnp.where(agreeing, jnp.abs(point.factor * equation.left), 0.0))
    is_zero = jnp.abs(solution.level) <= TOLERANCE * deviation
    room = jnp.minimum(1.0 / agreeing.size, gradient)
    nats = jnp.log(jnp.maximum(room / (2 * TOLERANCE * jnp.maximum(deviation, 1e-300)), 1.0)) - jnp.log(2.0)
    return jnp.where(is_zero & jnp.any(agreeing), jnp.maximum(nats, 0.0), 0.0)
