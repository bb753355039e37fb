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

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmax, argsort
from softinv_jax.labels.noise_model import Choice, Problem, State, Step, advance, label_of, solve
from softinv_jax.labels.scalar_equation import ScalarEquation, Unknowns, either, label_deviation

__all__ = ["LikelihoodFit", "fit_likelihood", "trimmed_starts"]

TARGET_SLOTS = 8
GRID = 64
ROUNDS = 8
STEPS = 3
RARITY = 10.0  # One label in as many singles out a further class, as far as the prior is concerned.


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
    problem = Problem(own, direction_covariance, factor_variance, unknowns)
    order = argsort(agreeing.astype(jnp.float64))[: min(TARGET_SLOTS, max(agreeing.size - 4, 1))]
    choice = Choice(order, ~agreeing[order], jnp.zeros(()))
    raw = jax.nn.softmax(scalar * equation.direction + equation.offset) - factor * equation.left
    level = (1 - jnp.sum(jnp.where(agreeing, 0.0, raw))) / jnp.maximum(jnp.sum(agreeing), 1)
    state = State(scalar, factor, jnp.where(choice.active, raw[order] - level, 0.0), jnp.zeros_like(raw))

    def round_of_steps(index: jax.Array, carry: tuple[State, Choice]) -> tuple[State, Choice]:
        state, choice = carry
        state = jax.lax.fori_loop(0, STEPS, lambda _, state: advance(problem, state, choice), state)
        # The last round only settles what the others chose. (One loop compiles in less time than a loop and its tail.)
        chosen = _reconsider(problem, state, choice)
        choice = jax.tree.map(lambda new, old: jnp.where(index < ROUNDS, new, old), chosen, choice)
        return state._replace(weights=jnp.where(choice.active, state.weights, 0.0)), choice

    state, choice = jax.lax.fori_loop(0, ROUNDS + 1, round_of_steps, (state, choice))
    return _describe(problem, state, choice)


def _reconsider(problem: Problem, state: State, choice: Choice) -> Choice:
    """Decide whether there is any smoothing; then single one more class out, or let the weakest go."""
    slots, active, _ = choice
    choice = choice._replace(sum_precision=_tie(problem, state, choice))
    tied = solve(problem, state, choice)
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


def _tie(problem: Problem, state: State, choice: Choice) -> jax.Array:
    """() precision that ties the sum of the weights to 1, where the label is likely not to be smoothed; else 0."""
    free = solve(problem, state, choice._replace(sum_precision=jnp.zeros(())))
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


def _describe(problem: Problem, state: State, choice: Choice) -> LikelihoodFit:
    scalar, factor, weights, _ = state
    active = choice.active
    number_of_classes = problem.own.left.size
    final = solve(problem, state, choice)
    inverse = final.parameter_covariance
    chosen = jnp.where(active[:, None], choice.columns(number_of_classes), 0.0)
    deviation = jnp.sqrt(jnp.sum(chosen * (inverse[2:, 2:] @ chosen), axis=0))
    total_variance = jnp.sum(inverse[2:, 2:] * (active[:, None] & active[None, :])) / number_of_classes**2
    label = label_of(weights, choice, number_of_classes)
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
    problem: Problem, state: State, choice: Choice, final: Step, label: jax.Array, deviation: jax.Array
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
