"""Maximum likelihood under additive noise: label, scalar and feature at the Cramer-Rao bound.

Independent Gaussian noise on every entry of G = g x^T leaves the leading singular pair as the sufficient statistic
to first order: u = lambda g + e with the rows' noise e, and v off by a component orthogonal to it, which moves the
logits by zeta with covariance lambda^2 tau^2 W P W^T (P projects off v). The label equation then reads

    softmax(lambda z + b + zeta) - kappa u - y(w) = 0,      y(w) = 1/C + sum_t w_t (e_t - 1/C),

t over the classes that are singled out. Generalised least squares in (lambda, kappa, w) with zeta integrated out is
its Gauss-Newton iteration; the sum constraint of the label is built into y(w). Where a bias fixes lambda and kappa,
the error of v moves kappa too.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmax, argmin, argsort
from softinv_jax.labels.noise_model import Choice, Problem, State, Step, advance, label_of, softmax_slope, solve
from softinv_jax.labels.scalar_equation import (
    TOLERANCE,
    DirectionNoise,
    ScalarEquation,
    Unknowns,
    either,
    label_deviation,
)

__all__ = ["LikelihoodFit", "fit_likelihood", "trimmed_starts"]

TARGET_SLOTS = 8
GRID = 64
# Points of the grid times classes, and points, that are looked at together.
NUMBERS_AT_ONCE, AT_ONCE = 2**21, 16
ROUNDS = 8
FEWEST_ROUNDS = 2
STEPS = 3
FAR_BEHIND = 30.0  # Twice the nats; what singling out another class or two can still gain is counted in the misfit.
STILL = 0.01  # Standard deviations of a step that no longer matters.
RARITY = 10.0  # One label in as many singles out a further class, as far as the prior is concerned.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LikelihoodFit:
    """Attributes, all float64:

    scalar: () lambda. factor: () kappa. label: (C,) y(w). label_deviation: (C,), with what is too small to be singled
      out; fitted_deviation: (C,) without. scalar_deviation: ().
    agreeing: (C,) bool, classes not singled out. level_deviation: () of their common level.
    feature_pull: (C,) q; the feature is lambda v - lambda^2 tau^2 P W^T q.
    cost: () minus twice the logarithm of the evidence; the lower, the likelier the explanation.
    misfit: () chi^2 per degree of freedom.
    """

    scalar: jax.Array
    factor: jax.Array
    label: jax.Array
    label_deviation: jax.Array
    fitted_deviation: jax.Array
    scalar_deviation: jax.Array
    agreeing: jax.Array
    level_deviation: jax.Array
    feature_pull: jax.Array
    cost: jax.Array
    misfit: jax.Array


def trimmed_starts(equation: ScalarEquation, unknowns: Unknowns, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Starts for noise in which single triples drown: the paper's variance loss, weighed by the errors, on a grid.

    For each lambda the label's weighted variance is taken over all but the two entries that deviate most.

    Returns:
      lambda (count,), kappa (count,) and the agreeing classes (count, C) at the lowest local minima.
    """
    spread = jnp.maximum(jnp.max(equation.direction) - jnp.min(equation.direction), 1e-300)
    magnitudes = jnp.geomspace(0.02, 500.0, GRID) / spread
    scalars = jnp.concatenate([-magnitudes[::-1], magnitudes])
    scalars = either(unknowns.scalar, scalars, jnp.broadcast_to(equation.known_scalar, scalars.shape))

    def loss(scalar: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        prediction = jax.nn.softmax(scalar * equation.direction + equation.offset)

        def trim(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            _, factor, agreeing = state
            deviation = label_deviation(equation, scalar, factor, prediction, prediction - factor * equation.left)
            weights = jnp.where(agreeing, 1 / deviation**2, 0.0)
            weights = weights / jnp.sum(weights)
            centred_p = prediction - jnp.sum(weights * prediction)
            centred_u = equation.left - jnp.sum(weights * equation.left)
            slope = jnp.sum(weights * centred_p * centred_u) / jnp.sum(weights * centred_u**2)
            factor = either(unknowns.scale, slope, factor)
            residual = (centred_p - factor * centred_u) / deviation
            worst = argmax(jnp.where(agreeing, jnp.abs(residual), -1.0))
            # Two are trimmed; the third pass is for the loss.
            agreeing = agreeing & ((jnp.arange(agreeing.size, dtype=jnp.int32) != worst) | (index == 2))
            return jnp.sum(jnp.where(agreeing, residual**2, 0.0)), factor, agreeing

        start = (jnp.zeros(()), 1 / scalar, jnp.ones(prediction.shape, bool))
        return jax.lax.fori_loop(0, 3, trim, start)

    # Of many classes a few at once: all would be many times the gradient.
    at_once = None if scalars.size * equation.left.size <= NUMBERS_AT_ONCE else AT_ONCE
    losses, factors, agreeing = (
        jax.vmap(loss)(scalars) if at_once is None else jax.lax.map(loss, scalars, batch_size=at_once)
    )
    padded = jnp.concatenate([jnp.full((1,), jnp.inf), losses, jnp.full((1,), jnp.inf)])
    lowest = (losses <= padded[:-2]) & (losses <= padded[2:])
    order = argsort(jnp.where(lowest, losses, jnp.inf))[:count]
    return scalars[order], factors[order], agreeing[order]


def fit_likelihood(
    equation: ScalarEquation,
    noise: DirectionNoise,
    factor_variance: jax.Array,
    starts: tuple[jax.Array, jax.Array, jax.Array],
    unknowns: Unknowns,
) -> LikelihoodFit:
    """The likeliest explanation that the starts lead to.

    Rounds go on until none of the starts that may still win moves any more.

    Args:
      equation: the scalar equation, with `left_deviation` measured.
      noise: of z, from the noise on v.
      factor_variance: () float64, variance of the error of kappa where that is no unknown but measured: the head has a
        bias and the scale is known. Zero elsewhere.
      starts: lambda (S,), kappa (S,) and the agreeing classes (S, C).
      unknowns: static or traced.
    """
    # Only rounding and the noise on u: the noise on v is in `noise`.
    own = replace(equation, direction_deviation=jnp.zeros_like(equation.direction_deviation))
    problem = Problem(own, noise, factor_variance, unknowns)
    tracks = jax.vmap(partial(_begin, problem))(*starts)

    def unsettled(carry: tuple[jax.Array, _Track]) -> jax.Array:
        index, tracks = carry
        return (index <= ROUNDS) & ((index < FEWEST_ROUNDS) | jnp.any(_may_win(tracks)))

    def proceed(carry: tuple[jax.Array, _Track]) -> tuple[jax.Array, _Track]:
        index, tracks = carry
        return index + 1, _round(problem, tracks, index < ROUNDS)

    _, tracks = jax.lax.while_loop(unsettled, proceed, (jnp.int32(0), tracks))
    best = argmin(tracks.cost)
    track = jax.tree.map(lambda leaf: leaf[best], tracks)
    return _describe(problem, track.state, track.choice)


class _Track(NamedTuple):
    """One start on its way; all but the first two ().

    Attributes:
      cost: of where it stood before the last choice. misfit: likewise. settled: bool, the last round changed nothing.
    """

    state: State
    choice: Choice
    cost: jax.Array
    misfit: jax.Array
    settled: jax.Array


def _begin(problem: Problem, scalar: jax.Array, factor: jax.Array, agreeing: jax.Array) -> _Track:
    equation = problem.own
    order = argsort(agreeing.astype(jnp.float64))[: min(TARGET_SLOTS, max(agreeing.size - 4, 1))]
    choice = Choice(order, ~agreeing[order], jnp.zeros(()))
    raw = jax.nn.softmax(scalar * equation.direction + equation.offset) - factor * equation.left
    level = (1 - jnp.sum(jnp.where(agreeing, 0.0, raw))) / jnp.maximum(jnp.sum(agreeing), 1)
    state = State(scalar, factor, jnp.where(choice.active, raw[order] - level, 0.0), jnp.zeros_like(raw))
    return _Track(state, choice, jnp.asarray(jnp.inf), jnp.asarray(jnp.inf), jnp.zeros((), bool))


def _may_win(tracks: _Track) -> jax.Array:
    """(S,) bool: not settled, and not far behind one that is, and fits."""
    done = tracks.settled & (tracks.misfit <= (TOLERANCE / 2) ** 2)
    bar = jnp.min(jnp.where(done, tracks.cost, jnp.inf))
    return ~tracks.settled & ~(tracks.cost > bar + FAR_BEHIND)


def _round(problem: Problem, tracks: _Track, may_choose: jax.Array) -> _Track:
    """Gauss-Newton steps; then whether there is any smoothing; then which classes are singled out.

    Each of these takes one solution of the least squares, which is written, and compiled, once.
    """

    def move(one: _Track, step: Step) -> _Track:
        return one._replace(state=advance(problem, one.state, one.choice, step))

    def tie(one: _Track, step: Step) -> _Track:
        precision = _tie(step, one.state, one.choice)
        return one._replace(choice=one.choice._replace(sum_precision=precision))

    def choose(one: _Track, step: Step) -> _Track:
        chosen = _reconsider(problem, one.state, one.choice, step)
        # The last round only settles what the others chose.
        chosen = jax.tree.map(partial(jnp.where, may_choose), chosen, one.choice)
        same = jnp.all((chosen.active == one.choice.active) & (~chosen.active | (chosen.slots == one.choice.slots)))
        left = step.change**2 <= STILL**2 * jnp.diag(step.parameter_covariance)
        cost, misfit = _cost(problem, one.state, one.choice, step), _misfit(problem, one.choice, step)
        state = one.state._replace(weights=jnp.where(chosen.active, one.state.weights, 0.0))
        return _Track(state, chosen, cost, misfit, same & jnp.all(left))

    def next_step(index: jax.Array, tracks: _Track) -> _Track:
        kind = jnp.clip(index - (STEPS - 1), 0, 2)
        # Smoothing is asked for with the sum of the weights left free.
        free = tracks.choice._replace(sum_precision=jnp.where(kind == 1, 0.0, tracks.choice.sum_precision))
        steps = jax.vmap(partial(solve, problem))(tracks.state, free)
        return jax.lax.switch(kind, [jax.vmap(move), jax.vmap(tie), jax.vmap(choose)], tracks, steps)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(STEPS + 2), next_step, tracks)


def _reconsider(problem: Problem, state: State, choice: Choice, tied: Step) -> Choice:
    """Single one more class out, or let the weakest go."""
    slots, active, _ = choice
    gain = _gains(problem, state, choice, tied)
    best = argmax(gain)
    empty = argmax((~active).astype(jnp.float64))
    adds = (gain[best] > 0) & ~active[empty]
    deviation = jnp.sqrt(jnp.diag(tied.parameter_covariance)[2:])
    price = _singling_price(deviation, gain.size)
    strength = jnp.where(active, (state.weights / deviation) ** 2 - price, jnp.inf)
    weakest = argmax(-strength)
    drops = ~adds & (strength[weakest] < 0)
    position = jnp.arange(active.size, dtype=jnp.int32)
    slots = jnp.where(adds & (position == empty), best, slots)
    active = jnp.where(adds & (position == empty), True, active)
    active = jnp.where(drops & (position == weakest), False, active)
    return Choice(slots, active, choice.sum_precision)


def _tie(free: Step, state: State, choice: Choice) -> jax.Array:
    """() precision that ties the sum of the weights to 1, where the label is likely not to be smoothed; else 0."""
    counted = choice.active.astype(jnp.float64)
    share = counted @ (state.weights + free.change[2:])
    share_variance = counted @ free.parameter_covariance[2:, 2:] @ counted
    # What chi^2 must rise by before a label counts as smoothed: strength 0, or anything in (0, 1).
    price = jnp.maximum(-jnp.log(2 * jnp.pi * share_variance), 0.0)
    without = ((1 - share) ** 2 < share_variance * price) | (share > 1)
    # Tied a thousand times more tightly than the data ties it: as good as fixed, and well conditioned.
    tie = 1e6 / jnp.where(share_variance > 0, share_variance, 1.0)
    return jnp.where(without & jnp.any(choice.active), tie, 0.0)


def _gains(problem: Problem, state: State, choice: Choice, tied: Step) -> jax.Array:
    """(C,) what chi^2 would fall by if one more class was singled out, less the price of that."""
    number_of_classes = problem.own.left.size
    score, information = _of_one_more(tied, choice)
    taken = choice.singled(number_of_classes)
    safe = jnp.where(information > 0, information, 1.0)
    gain = jnp.where(taken | (information <= 0), 0.0, score**2 / safe)
    level = (1 - choice.active.astype(jnp.float64) @ state.weights) / number_of_classes
    # Its entry would have to be negative: not a label.
    gain = jnp.where(score < -level * information, 0.0, gain)
    return gain - _singling_price(jax.lax.rsqrt(safe), number_of_classes)


def _of_one_more(step: Step, choice: Choice) -> tuple[jax.Array, jax.Array]:
    """(C,) derivative of chi^2 / -2 by the weight of each class, were it one parameter more, and the information on it.

    A weight w of class t adds w (e_t - 1/C) to the label. Where the weights are tied to a sum of 1, it is taken from
    another one that is there, a, and adds w (e_t - e_a); how the others share it, they decide.
    """
    classes, residual = step.own_precision.size, step.whitened_residual
    # Q = Sigma^-1 less what the parameters explain: its diagonal, its row sums, and its row of a.
    by_noise, by_parameters = step.shared @ step.inner, step.whitened_design @ step.parameter_covariance

    def product(vector: jax.Array) -> jax.Array:
        explained = by_noise @ (vector @ step.shared) + by_parameters @ (vector @ step.whitened_design)
        return step.own_precision * vector - explained

    diagonal = step.own_precision - jnp.sum(by_noise * step.shared, axis=1)
    diagonal = diagonal - jnp.sum(by_parameters * step.whitened_design, axis=1)
    first = choice.slots[argmax(choice.active.astype(jnp.float64))]
    one = (jnp.arange(classes, dtype=jnp.int32) == first).astype(jnp.float64)
    origin = jnp.where(choice.sum_precision > 0, one, 1 / classes)
    rows = product(origin)
    return residual - jnp.sum(origin * residual), diagonal - 2 * rows + jnp.sum(origin * rows)


def _unseen_deviation(choice: Choice, step: Step) -> jax.Array:
    """(C,) deviation of the weights that are taken to be zero; zero of those that are singled out.

    What did not pay its price is not told, but may be there: as far as six deviations above its estimate.
    """
    classes = step.own_precision.size
    score, information = _of_one_more(step, choice)
    safe = jnp.where(information > 0, information, 1.0)
    deviation = jax.lax.rsqrt(safe) + jnp.maximum(score / safe, 0.0) / TOLERANCE
    return jnp.where(choice.singled(classes) | (information <= 0), 0.0, jnp.minimum(deviation, 1.0))


def _singling_price(deviation: jax.Array, number_of_classes: int) -> jax.Array:
    """What chi^2 must fall by for one more class: twice minus the logarithm of the Bayesian evidence ratio.

    Its weight is equally likely to be anything in (0, 1), of which the data leaves sqrt(2 pi) deviations,
    it may be any of the C classes, and it is there at all in one label of RARITY.
    """
    share = jnp.minimum(jnp.sqrt(2 * jnp.pi) * deviation, 1.0)
    return -2 * jnp.log(share) + 2 * np.log(RARITY * number_of_classes)


def _describe(problem: Problem, state: State, choice: Choice) -> LikelihoodFit:
    scalar, factor, weights, _ = state
    active = choice.active
    number_of_classes = problem.own.left.size
    final = solve(problem, state, choice)
    inverse = final.parameter_covariance
    # What is too small to be singled out is not seen, in its own entry and in those that it is taken from.
    fitted, unseen = _label_deviation(choice, final, number_of_classes), _unseen_deviation(choice, final)
    unseen = jnp.where(choice.singled(number_of_classes), jnp.max(unseen), unseen)
    total_variance = jnp.sum(inverse[2:, 2:] * (active[:, None] & active[None, :])) / number_of_classes**2
    return LikelihoodFit(
        scalar=scalar,
        factor=factor,
        label=label_of(weights, choice, number_of_classes),
        label_deviation=jnp.maximum(fitted, unseen),
        fitted_deviation=fitted,
        scalar_deviation=either(problem.unknowns.scalar, jnp.sqrt(inverse[0, 0]), jnp.zeros(())),
        agreeing=~choice.singled(number_of_classes),
        level_deviation=jnp.sqrt(total_variance),
        feature_pull=softmax_slope(final.prediction, final.whitened_residual),
        cost=_cost(problem, state, choice, final),
        misfit=_misfit(problem, choice, final),
    )


def _label_deviation(choice: Choice, step: Step, number_of_classes: int) -> jax.Array:
    """(C,) standard deviation of the entries of y(w)."""
    chosen = jnp.where(choice.active[:, None], choice.columns(number_of_classes), 0.0)
    return jnp.sqrt(jnp.sum(chosen * (step.parameter_covariance[2:, 2:] @ chosen), axis=0))


def _misfit(problem: Problem, choice: Choice, step: Step) -> jax.Array:
    """() chi^2 per degree of freedom."""
    scalar_free, scale_free = (jnp.asarray(flag, jnp.float64) for flag in problem.unknowns)
    freedom = problem.own.left.size - scalar_free - scale_free - jnp.sum(choice.active)
    return step.chi_squared / jnp.maximum(freedom, 1)


def _cost(problem: Problem, state: State, choice: Choice, final: Step) -> jax.Array:
    """() twice minus the logarithm of the evidence, by Laplace's method; infinite where it is not a number.

    Likelihood (in terms of the observed u, whose errors do not depend on kappa), the volume the data leaves to the
    parameters, and their priors.
    """
    number_of_classes, tied = problem.own.left.size, choice.sum_precision
    label = label_of(state.weights, choice, number_of_classes)
    deviation = _label_deviation(choice, final, number_of_classes)
    scalar_free, scale_free = (jnp.asarray(flag, jnp.float64) for flag in problem.unknowns)
    singled = jnp.sum(choice.active)
    log_likelihood = final.chi_squared + final.log_determinant - 2 * number_of_classes * jnp.log(jnp.abs(state.factor))
    free = singled + scalar_free + scale_free - (tied > 0)
    volume = final.parameter_log_determinant - free * jnp.log(2 * jnp.pi)
    volume = volume - jnp.where(tied > 0, jnp.log(jnp.where(tied > 0, tied, 1.0)), 0.0)
    # lambda and kappa may be of any order of magnitude alike.
    prior = 2 * scalar_free * jnp.log(jnp.abs(state.scalar)) + 2 * scale_free * jnp.log(jnp.abs(state.factor))
    prior = prior + 2 * singled * np.log(RARITY * number_of_classes)
    # The share of that volume in which the label has no negative entry.
    uncertain = deviation > 0
    margin = jnp.where(uncertain, label / jnp.where(uncertain, deviation, 1.0), jnp.inf)
    validity = -2 * jax.scipy.special.log_ndtr(jnp.clip(jnp.min(margin), -1e3, 1e3))
    cost = log_likelihood + volume + prior + validity
    return jnp.where(jnp.isfinite(cost), cost, jnp.inf)
