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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmax, argmin, argsort
from softinv_jax.labels.scalar_equation import ScalarEquation, Unknowns, either, label_deviation
from softinv_jax.linear_algebra import inverse_and_log_determinant

__all__ = ["LikelihoodFit", "fit_likelihood", "trimmed_starts"]

TARGET_SLOTS = 8
GRID = 64
ROUNDS = 8
STEPS = 3
RARITY = 10.0  # One label in as many singles out a further class, as far as the prior is concerned.
STEP_SHARES = (1.0, 0.5, 0.25, 0.0625, 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LikelihoodFit:
    """Attributes, all float64:

    scalar: () lambda. factor: () kappa. label: (C,) y(w). label_deviation: (C,). scalar_deviation: ().
    agreeing: (C,) bool, classes not singled out. level_deviation: () of their common level.
    feature_pull: (C,) q; the feature is lambda v - lambda^2 tau^2 P W^T q.
    cost: () minus twice the logarithm of the evidence; the lower, the likelier the explanation.
    misfit: () chi^2 per degree of freedom.
    """

    scalar: jax.Array
    factor: jax.Array
    label: jax.Array
    label_deviation: jax.Array
    scalar_deviation: jax.Array
    agreeing: jax.Array
    level_deviation: jax.Array
    feature_pull: jax.Array
    cost: jax.Array
    misfit: jax.Array


class _State(NamedTuple):
    """Where the iteration stands: lambda (), kappa (), the weights (slots,), and q (C,), which stands for zeta."""

    scalar: jax.Array
    factor: jax.Array
    weights: jax.Array
    dual: jax.Array


class _Step(NamedTuple):
    """One generalised least-squares solution around a state."""

    change: jax.Array  # (2 + slots,) of lambda, kappa and the weights
    parameter_covariance: jax.Array
    parameter_log_determinant: jax.Array  # of the inverse of that covariance
    slope: jax.Array  # (C, C) dp / dlogits
    chi_squared: jax.Array  # before the change
    log_determinant: jax.Array  # of the residual's covariance
    whitened_residual: jax.Array  # (C,) Sigma^-1 r after the change
    whitened_design: jax.Array  # (C, 2 + slots)
    precision: jax.Array  # (C, C) Sigma^-1


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

    losses, factors, agreeing = jax.vmap(loss)(scalars)
    padded = jnp.concatenate([jnp.full((1,), jnp.inf), losses, jnp.full((1,), jnp.inf)])
    lowest = (losses <= padded[:-2]) & (losses <= padded[2:])
    order = argsort(jnp.where(lowest, losses, jnp.inf))[:count]
    return scalars[order], factors[order], agreeing[order]


class _Problem(NamedTuple):
    """What the fit is of; see `fit_likelihood`. `own` has no errors of z: they are in the covariance."""

    own: ScalarEquation
    direction_covariance: jax.Array
    factor_variance: jax.Array
    unknowns: Unknowns


class _Choice(NamedTuple):
    """Classes singled out, (slots,) int32; which slots are used; and () precision of a sum of weights of 1."""

    slots: jax.Array
    active: jax.Array
    sum_precision: jax.Array

    def columns(self, number_of_classes: int) -> jax.Array:
        """(slots, C) e_t - 1/C of each slot."""
        return jax.nn.one_hot(self.slots, number_of_classes, dtype=jnp.float64) - 1 / number_of_classes

    def singled(self, number_of_classes: int) -> jax.Array:
        """(C,) bool."""
        return jnp.any(jax.nn.one_hot(self.slots, number_of_classes) * self.active[:, None] > 0, axis=0)


def fit_likelihood(
    equation: ScalarEquation,
    direction_covariance: jax.Array,
    factor_variance: jax.Array,
    scalar: jax.Array,
    factor: jax.Array,
    agreeing: jax.Array,
    unknowns: Unknowns,
) -> LikelihoodFit:
    """Refine a consensus.

    Args:
      equation: the scalar equation, with `left_deviation` measured.
      direction_covariance: (C, C) float64, covariance tau^2 W P W^T of the errors of z.
      factor_variance: () float64, variance of the error of kappa where that is no unknown but measured: the head has a
        bias and the scale is known. Zero elsewhere.
      scalar, factor: () start. agreeing: (C,) bool, start.
      unknowns: static or traced.
    """
    # Only rounding and the noise on u: the noise on v is in direction_covariance.
    own = replace(equation, direction_deviation=jnp.zeros_like(equation.direction_deviation))
    problem = _Problem(own, direction_covariance, factor_variance, unknowns)
    order = argsort(agreeing.astype(jnp.float64))[: min(TARGET_SLOTS, max(agreeing.size - 4, 1))]
    choice = _Choice(order, ~agreeing[order], jnp.zeros(()))
    raw = jax.nn.softmax(scalar * equation.direction + equation.offset) - factor * equation.left
    level = (1 - jnp.sum(jnp.where(agreeing, 0.0, raw))) / jnp.maximum(jnp.sum(agreeing), 1)
    state = _State(scalar, factor, jnp.where(choice.active, raw[order] - level, 0.0), jnp.zeros_like(raw))

    def round_of_steps(index: jax.Array, carry: tuple[_State, _Choice]) -> tuple[_State, _Choice]:
        state, choice = carry
        state = jax.lax.fori_loop(0, STEPS, lambda _, state: _advance(problem, state, choice), state)
        # The last round only settles what the others chose. (One loop compiles in less time than a loop and its tail.)
        chosen = _reconsider(problem, state, choice)
        choice = jax.tree.map(lambda new, old: jnp.where(index < ROUNDS, new, old), chosen, choice)
        return state._replace(weights=jnp.where(choice.active, state.weights, 0.0)), choice

    state, choice = jax.lax.fori_loop(0, ROUNDS + 1, round_of_steps, (state, choice))
    return _describe(problem, state, choice)


def _evaluate(
    problem: _Problem, scalar: jax.Array, factor: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(C,) softmax, label and the label's deviations, with the logits moved by `shift`."""
    equation = problem.own
    prediction = jax.nn.softmax(scalar * equation.direction + equation.offset + shift)
    raw = prediction - factor * equation.left
    return prediction, raw, label_deviation(equation, scalar, factor, prediction, raw)


def _model(
    problem: _Problem, scalar: jax.Array, factor: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(C,) label, (C, C) dp / dlogits, and (C, C) covariance of the label's entries."""
    prediction, raw, deviation = _evaluate(problem, scalar, factor, shift)
    softmax_slope = jnp.diag(prediction) - prediction[:, None] * prediction[None, :]
    spread = softmax_slope @ problem.direction_covariance @ softmax_slope * scalar**2
    # Taken as independent of the error of z, of the same origin: at worst a factor of sqrt(2) is lost.
    left = problem.own.left
    spread = spread + problem.factor_variance * left[:, None] * left[None, :]
    return raw, softmax_slope, jnp.diag(deviation**2) + spread


def _columns(
    problem: _Problem, state: _State, slope: jax.Array, logit_gradient: jax.Array, choice: _Choice
) -> jax.Array:
    """(C, 2 + slots) derivatives of the label equation; unused columns are zero.

    With g = p - y for kappa u: the errors of u grow with kappa, and so the likelihood is not least squares in
    it with u as regressor, which its noise would bias.
    """
    unknowns = problem.unknowns
    zero = jnp.zeros_like(logit_gradient)
    by_scalar = slope @ problem.own.direction
    by_scalar = either(unknowns.scale, by_scalar, by_scalar + logit_gradient / state.scalar)
    by_scalar = either(unknowns.scalar, by_scalar, zero)
    by_factor = either(unknowns.scale, -logit_gradient / state.factor, zero)
    chosen = choice.columns(zero.size).T
    return jnp.concatenate([by_scalar[:, None], by_factor[:, None], -chosen * choice.active[None, :]], axis=1)


def _label_of(weights: jax.Array, choice: _Choice, number_of_classes: int) -> jax.Array:
    """(C,) y(w)."""
    return 1 / number_of_classes + jnp.where(choice.active, weights, 0.0) @ choice.columns(number_of_classes)


def _shift_of(problem: _Problem, scalar: jax.Array, dual: jax.Array) -> jax.Array:
    """zeta, which generalised least squares gives as -lambda^2 tau^2 W P W^T q."""
    return -(scalar**2) * problem.direction_covariance @ dual


def _objective(problem: _Problem, state: _State, choice: _Choice) -> jax.Array:
    """Chi^2 of the errors of u and of v that the state stands for, and of the priors."""
    scalar, factor, weights, dual = state
    shift = _shift_of(problem, scalar, dual)
    _, raw, deviation = _evaluate(problem, scalar, factor, shift)
    used = jnp.where(choice.active, weights, 0.0)
    residual = (raw - _label_of(weights, choice, raw.size)) / deviation
    tie = jnp.where(choice.sum_precision > 0, choice.sum_precision * (jnp.sum(used) - 1) ** 2, 0.0)
    # The error of kappa that explains most of the residual, at its price.
    by_factor, variance = problem.own.left / deviation, problem.factor_variance
    explained = variance * jnp.sum(by_factor * residual) ** 2 / (1 + variance * jnp.sum(by_factor**2))
    return jnp.sum(residual**2) - explained - jnp.sum(dual * shift) + jnp.sum(used**2) + tie


def _solve(problem: _Problem, state: _State, choice: _Choice) -> _Step:
    """Generalised least squares around a state."""
    scalar, factor, weights, dual = state
    active, sum_precision = choice.active, choice.sum_precision
    shift = _shift_of(problem, scalar, dual)
    raw, slope, covariance = _model(problem, scalar, factor, shift)
    mismatch = raw - _label_of(weights, choice, raw.size)
    residual = mismatch - slope @ shift
    design = _columns(problem, state, slope, mismatch + factor * problem.own.left, choice)
    precision, log_determinant = inverse_and_log_determinant(covariance)
    weighted, weighted_residual = precision @ design, precision @ residual
    # A weight lies in (-1, 1): the prior N(0, 1) is nothing beside data that says anything about it.
    prior = jnp.concatenate([jnp.zeros((2,)), active.astype(jnp.float64)])
    normal = design.T @ weighted + jnp.diag(prior) + sum_precision * prior[:, None] * prior[None, :]
    used = jnp.diag(normal) > 0
    inverse, parameter_log_determinant = inverse_and_log_determinant(normal + jnp.diag(jnp.where(used, 0.0, 1.0)))
    used_weights = jnp.where(active, weights, 0.0)
    excess = sum_precision * (jnp.sum(used_weights) - 1)
    pull = jnp.concatenate([jnp.zeros((2,)), used_weights]) + prior * excess
    change = -inverse @ (design.T @ weighted_residual + pull)
    return _Step(
        change=change,
        parameter_covariance=inverse,
        parameter_log_determinant=parameter_log_determinant,
        slope=slope,
        chi_squared=jnp.sum(residual * weighted_residual) + jnp.sum(used_weights**2),
        log_determinant=log_determinant,
        whitened_residual=weighted_residual + weighted @ change,
        whitened_design=weighted,
        precision=precision,
    )


def _advance(problem: _Problem, state: _State, choice: _Choice) -> _State:
    """The largest part of a Gauss-Newton step that lowers the objective most; none if nothing lowers it."""
    step = _solve(problem, state, choice)
    new_dual = step.slope @ step.whitened_residual
    # Neither through zero nor beyond a doubling at once: lambda keeps its sign.
    limit = jnp.where(step.change[0] * jnp.sign(state.scalar) < 0, 0.5, 1.0) * jnp.abs(state.scalar)
    longest = jnp.minimum(1.0, limit / jnp.maximum(jnp.abs(step.change[0]), jnp.finfo(jnp.float64).tiny))

    def part(share: jax.Array) -> _State:
        share = share * longest
        scalar = either(problem.unknowns.scalar, state.scalar + share * step.change[0], state.scalar)
        factor = either(problem.unknowns.scale, state.factor + share * step.change[1], 1 / scalar)
        weights = state.weights + share * step.change[2:]
        return _State(scalar, factor, weights, state.dual + share * (new_dual - state.dual))

    parts = jax.vmap(part)(jnp.asarray(STEP_SHARES))
    values = jax.vmap(lambda state: _objective(problem, state, choice))(parts)
    best = argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
    return jax.tree.map(lambda leaf: leaf[best], parts)


def _reconsider(problem: _Problem, state: _State, choice: _Choice) -> _Choice:
    """Decide whether there is any smoothing; then single one more class out, or let the weakest go."""
    slots, active, _ = choice
    choice = choice._replace(sum_precision=_tie(problem, state, choice))
    tied = _solve(problem, state, choice)
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
    return _Choice(slots, active, choice.sum_precision)


def _tie(problem: _Problem, state: _State, choice: _Choice) -> jax.Array:
    """() precision that ties the sum of the weights to 1, where the label is likely not to be smoothed; else 0."""
    free = _solve(problem, state, choice._replace(sum_precision=jnp.zeros(())))
    counted = choice.active.astype(jnp.float64)
    share = counted @ (state.weights + free.change[2:])
    share_variance = counted @ free.parameter_covariance[2:, 2:] @ counted
    # What chi^2 must rise by before a label counts as smoothed: strength 0, or anything in (0, 1).
    price = jnp.maximum(-jnp.log(2 * jnp.pi * share_variance), 0.0)
    without = ((1 - share) ** 2 < share_variance * price) | (share > 1)
    # Tied a thousand times more tightly than the data ties it: as good as fixed, and well conditioned.
    tie = 1e6 / jnp.where(share_variance > 0, share_variance, 1.0)
    return jnp.where(without & jnp.any(choice.active), tie, 0.0)


def _gains(problem: _Problem, state: _State, choice: _Choice, tied: _Step) -> jax.Array:
    """(C,) what chi^2 would fall by if one more class was singled out, less the price of that."""
    number_of_classes = problem.own.left.size
    explained = tied.whitened_design @ tied.parameter_covariance @ tied.whitened_design.T
    precision = tied.precision - explained
    centre = jnp.eye(number_of_classes) - 1 / number_of_classes
    score = centre @ tied.whitened_residual
    information = jnp.sum(centre * (precision @ centre), axis=0)
    taken = choice.singled(number_of_classes)
    safe = jnp.where(information > 0, information, 1.0)
    gain = jnp.where(taken | (information <= 0), 0.0, score**2 / safe)
    level = (1 - choice.active.astype(jnp.float64) @ state.weights) / number_of_classes
    # Its entry would have to be negative: not a label.
    gain = jnp.where(score < -level * information, 0.0, gain)
    return gain - _singling_price(jax.lax.rsqrt(safe), number_of_classes)


def _singling_price(deviation: jax.Array, number_of_classes: int) -> jax.Array:
    """What chi^2 must fall by for one more class: twice minus the logarithm of the Bayesian evidence ratio.

    Its weight is equally likely to be anything in (0, 1), of which the data leaves sqrt(2 pi) deviations,
    it may be any of the C classes, and it is there at all in one label of RARITY.
    """
    share = jnp.minimum(jnp.sqrt(2 * jnp.pi) * deviation, 1.0)
    return -2 * jnp.log(share) + 2 * np.log(RARITY * number_of_classes)


def _describe(problem: _Problem, state: _State, choice: _Choice) -> LikelihoodFit:
    scalar, factor, weights, _ = state
    active = choice.active
    number_of_classes = problem.own.left.size
    final = _solve(problem, state, choice)
    inverse = final.parameter_covariance
    chosen = jnp.where(active[:, None], choice.columns(number_of_classes), 0.0)
    deviation = jnp.sqrt(jnp.sum(chosen * (inverse[2:, 2:] @ chosen), axis=0))
    total_variance = jnp.sum(inverse[2:, 2:] * (active[:, None] & active[None, :])) / number_of_classes**2
    label = _label_of(weights, choice, number_of_classes)
    cost = _cost(problem, state, choice, final, label, deviation)
    scalar_free, scale_free = (jnp.asarray(flag, jnp.float64) for flag in problem.unknowns)
    freedom = number_of_classes - scalar_free - scale_free - jnp.sum(active)
    return LikelihoodFit(
        scalar=scalar,
        factor=factor,
        label=label,
        label_deviation=deviation,
        scalar_deviation=either(problem.unknowns.scalar, jnp.sqrt(inverse[0, 0]), jnp.zeros(())),
        agreeing=~choice.singled(number_of_classes),
        level_deviation=jnp.sqrt(total_variance),
        feature_pull=final.slope @ final.whitened_residual,
        cost=jnp.where(jnp.isfinite(cost), cost, jnp.inf),
        misfit=final.chi_squared / jnp.maximum(freedom, 1),
    )


def _cost(
    problem: _Problem, state: _State, choice: _Choice, final: _Step, label: jax.Array, deviation: jax.Array
) -> jax.Array:
    """() twice minus the logarithm of the evidence, by Laplace's method.

    Likelihood (in terms of the observed u, whose errors do not depend on kappa), the volume the data leaves to the
    parameters, and their priors.
    """
    number_of_classes, tied = label.size, choice.sum_precision
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
    return log_likelihood + volume + prior + validity
