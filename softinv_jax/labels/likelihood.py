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
      unknowns: static.
    """
    number_of_classes = agreeing.size
    order = argsort(agreeing.astype(jnp.float64))[: min(TARGET_SLOTS, max(number_of_classes - 4, 1))]
    active = ~agreeing[order]

    # Only rounding and the noise on u: the noise on v is in direction_covariance.
    own = replace(equation, direction_deviation=jnp.zeros_like(equation.direction_deviation))

    def evaluate(scalar: jax.Array, factor: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        prediction = jax.nn.softmax(scalar * equation.direction + equation.offset + shift)
        raw = prediction - factor * equation.left
        return prediction, raw, label_deviation(own, scalar, factor, prediction, raw)

    def model(scalar: jax.Array, factor: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        prediction, raw, deviation = evaluate(scalar, factor, shift)
        softmax_slope = jnp.diag(prediction) - prediction[:, None] * prediction[None, :]
        spread = softmax_slope @ direction_covariance @ softmax_slope * scalar**2
        # Taken as independent of the error of z, of the same origin: at worst a factor of sqrt(2) is lost.
        spread = spread + factor_variance * equation.left[:, None] * equation.left[None, :]
        return raw, softmax_slope, jnp.diag(deviation**2) + spread

    def columns(
        state: _State, slope: jax.Array, logit_gradient: jax.Array, slots: jax.Array, active: jax.Array
    ) -> jax.Array:
        """(C, 2 + slots) derivatives of the label equation; unused columns are zero.

        With g = p - y for kappa u: the errors of u grow with kappa, and so the likelihood is not least squares in
        it with u as regressor, which its noise would bias.
        """
        zero = jnp.zeros((number_of_classes,))
        by_scalar = slope @ equation.direction
        by_scalar = either(unknowns.scale, by_scalar, by_scalar + logit_gradient / state.scalar)
        by_scalar = either(unknowns.scalar, by_scalar, zero)
        by_factor = either(unknowns.scale, -logit_gradient / state.factor, zero)
        chosen = jax.nn.one_hot(slots, number_of_classes, dtype=jnp.float64).T - 1 / number_of_classes
        return jnp.concatenate([by_scalar[:, None], by_factor[:, None], -chosen * active[None, :]], axis=1)

    def weights_to_label(weights: jax.Array, slots: jax.Array, active: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(slots, number_of_classes, dtype=jnp.float64) - 1 / number_of_classes
        return 1 / number_of_classes + jnp.where(active, weights, 0.0) @ chosen

    def shift_of(scalar: jax.Array, dual: jax.Array) -> jax.Array:
        """zeta, which generalised least squares gives as -lambda^2 tau^2 W P W^T q."""
        return -(scalar**2) * direction_covariance @ dual

    def objective(state: _State, slots: jax.Array, active: jax.Array, sum_precision: jax.Array) -> jax.Array:
        """Chi^2 of the errors of u and of v that the state stands for, and of the priors."""
        scalar, factor, weights, dual = state
        shift = shift_of(scalar, dual)
        _, raw, deviation = evaluate(scalar, factor, shift)
        used = jnp.where(active, weights, 0.0)
        residual = (raw - weights_to_label(weights, slots, active)) / deviation
        tie = jnp.where(sum_precision > 0, sum_precision * (jnp.sum(used) - 1) ** 2, 0.0)
        # The error of kappa that explains most of the residual, at its price.
        by_factor = equation.left / deviation
        explained = factor_variance * jnp.sum(by_factor * residual) ** 2 / (1 + factor_variance * jnp.sum(by_factor**2))
        return jnp.sum(residual**2) - explained - jnp.sum(dual * shift) + jnp.sum(used**2) + tie

    def solve(state: _State, slots: jax.Array, active: jax.Array, sum_precision: jax.Array) -> _Step:
        scalar, factor, weights, dual = state
        shift = shift_of(scalar, dual)
        raw, slope, covariance = model(scalar, factor, shift)
        mismatch = raw - weights_to_label(weights, slots, active)
        residual = mismatch - slope @ shift
        design = columns(state, slope, mismatch + factor * equation.left, slots, active)
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

    def advance(state: _State, slots: jax.Array, active: jax.Array, sum_precision: jax.Array) -> _State:
        """The largest part of a Gauss-Newton step that lowers the objective most; none if nothing lowers it."""
        step = solve(state, slots, active, sum_precision)
        new_dual = step.slope @ step.whitened_residual
        # Neither through zero nor beyond a doubling at once: lambda keeps its sign.
        limit = jnp.where(step.change[0] * jnp.sign(state.scalar) < 0, 0.5, 1.0) * jnp.abs(state.scalar)
        longest = jnp.minimum(1.0, limit / jnp.maximum(jnp.abs(step.change[0]), jnp.finfo(jnp.float64).tiny))

        def part(share: jax.Array) -> _State:
            share = share * longest
            scalar = either(unknowns.scalar, state.scalar + share * step.change[0], state.scalar)
            factor = either(unknowns.scale, state.factor + share * step.change[1], 1 / scalar)
            weights = state.weights + share * step.change[2:]
            return _State(scalar, factor, weights, state.dual + share * (new_dual - state.dual))

        parts = jax.vmap(part)(jnp.asarray(STEP_SHARES))
        values = jax.vmap(lambda state: objective(state, slots, active, sum_precision))(parts)
        best = argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
        return jax.tree.map(lambda leaf: leaf[best], parts)

    def reconsider(state: _State, slots: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Decide whether there is any smoothing; then single one more class out, or let the weakest go."""
        free = solve(state, slots, active, jnp.zeros(()))
        counted = active.astype(jnp.float64)
        share = counted @ (state[2] + free.change[2:])
        share_variance = counted @ free.parameter_covariance[2:, 2:] @ counted
        without = ((1 - share) ** 2 < share_variance * smoothing_price(share_variance)) | (share > 1)
        # Tied a thousand times more tightly than the data ties it: as good as fixed, and well conditioned.
        tie = 1e6 / jnp.where(share_variance > 0, share_variance, 1.0)
        sum_precision = jnp.where(without & jnp.any(active), tie, 0.0)
        tied = solve(state, slots, active, sum_precision)
        explained = tied.whitened_design @ tied.parameter_covariance @ tied.whitened_design.T
        precision = tied.precision - explained
        centre = jnp.eye(number_of_classes) - 1 / number_of_classes
        score = centre @ tied.whitened_residual
        information = jnp.sum(centre * (precision @ centre), axis=0)
        taken = jnp.any(jax.nn.one_hot(slots, number_of_classes) * active[:, None] > 0, axis=0)
        gain = jnp.where(taken | (information <= 0), 0.0, score**2 / jnp.where(information > 0, information, 1.0))
        level = (1 - counted @ state[2]) / number_of_classes
        # Its entry would have to be negative: not a label.
        gain = jnp.where(score < -level * information, 0.0, gain)
        gain = gain - singling_price(jax.lax.rsqrt(jnp.where(information > 0, information, 1.0)))
        best = argmax(gain)
        empty = argmax((~active).astype(jnp.float64))
        adds = (gain[best] > 0) & ~active[empty]
        deviation = jnp.sqrt(jnp.diag(tied.parameter_covariance)[2:])
        strength = jnp.where(active, (state[2] / deviation) ** 2 - singling_price(deviation), jnp.inf)
        weakest = argmax(-strength)
        drops = ~adds & (strength[weakest] < 0)
        position = jnp.arange(active.size, dtype=jnp.int32)
        slots = jnp.where(adds & (position == empty), best, slots)
        active = jnp.where(adds & (position == empty), True, active)
        active = jnp.where(drops & (position == weakest), False, active)
        return slots, active, sum_precision

    def smoothing_price(share_variance: jax.Array) -> jax.Array:
        """What chi^2 must rise by before a label counts as smoothed: strength 0, or anything in (0, 1)."""
        return jnp.maximum(-jnp.log(2 * jnp.pi * share_variance), 0.0)

    def singling_price(deviation: jax.Array) -> jax.Array:
        """What chi^2 must fall by for one more class: twice minus the logarithm of the Bayesian evidence ratio.

        Its weight is equally likely to be anything in (0, 1), of which the data leaves sqrt(2 pi) deviations,
        it may be any of the C classes, and it is there at all in one label of RARITY.
        """
        share = jnp.minimum(jnp.sqrt(2 * jnp.pi) * deviation, 1.0)
        return -2 * jnp.log(share) + 2 * np.log(RARITY * number_of_classes)

    def round_of_steps(index: jax.Array, carry: tuple) -> tuple:
        state, slots, active, sum_precision = carry
        state = jax.lax.fori_loop(0, STEPS, lambda _, s: advance(s, slots, active, sum_precision), state)
        # The last round only settles what the others chose. (One loop compiles in less time than a loop and its tail.)
        chosen = reconsider(state, slots, active)
        slots, active, sum_precision = (
            jnp.where(index < ROUNDS, new, old) for new, old in zip(chosen, (slots, active, sum_precision), strict=True)
        )
        state = state._replace(weights=jnp.where(active, state.weights, 0.0))
        return state, slots, active, sum_precision

    raw = jax.nn.softmax(scalar * equation.direction + equation.offset) - factor * equation.left
    level = (1 - jnp.sum(jnp.where(agreeing, 0.0, raw))) / jnp.maximum(jnp.sum(agreeing), 1)
    start = _State(scalar, factor, jnp.where(active, raw[order] - level, 0.0), jnp.zeros_like(raw))
    carry = (start, order, active, jnp.zeros(()))
    state, slots, active, sum_precision = jax.lax.fori_loop(0, ROUNDS + 1, round_of_steps, carry)
    scalar, factor, weights, _ = state
    final = solve(state, slots, active, sum_precision)
    inverse = final.parameter_covariance
    chosen = jax.nn.one_hot(slots, number_of_classes, dtype=jnp.float64) - 1 / number_of_classes
    chosen = jnp.where(active[:, None], chosen, 0.0)
    label_variance = jnp.sum(chosen * (inverse[2:, 2:] @ chosen), axis=0)
    total_variance = jnp.sum(inverse[2:, 2:] * (active[:, None] & active[None, :])) / number_of_classes**2
    singled = jnp.any(jax.nn.one_hot(slots, number_of_classes) * active[:, None] > 0, axis=0)
    label = weights_to_label(weights, slots, active)
    label_deviation_ = jnp.sqrt(label_variance)
    # Twice minus the logarithm of the evidence, by Laplace's method: likelihood (in terms of the observed u, whose
    # errors do not depend on kappa), the volume the data leaves to the parameters, and their priors.
    log_likelihood = final.chi_squared + final.log_determinant - 2 * number_of_classes * jnp.log(jnp.abs(factor))
    fitted = jnp.asarray(unknowns.scalar, jnp.float64), jnp.asarray(unknowns.scale, jnp.float64)
    free = jnp.sum(active) + fitted[0] + fitted[1] - (sum_precision > 0)
    volume = final.parameter_log_determinant - free * jnp.log(2 * jnp.pi)
    volume = volume - jnp.where(sum_precision > 0, jnp.log(jnp.where(sum_precision > 0, sum_precision, 1.0)), 0.0)
    # lambda and kappa may be of any order of magnitude alike.
    prior = 2 * fitted[0] * jnp.log(jnp.abs(scalar)) + 2 * fitted[1] * jnp.log(jnp.abs(factor))
    prior = prior + 2 * jnp.sum(active) * np.log(RARITY * number_of_classes)
    # The share of that volume in which the label has no negative entry.
    uncertain = label_deviation_ > 0
    margin = jnp.where(uncertain, label / jnp.where(uncertain, label_deviation_, 1.0), jnp.inf)
    validity = -2 * jax.scipy.special.log_ndtr(jnp.clip(jnp.min(margin), -1e3, 1e3))
    cost = log_likelihood + volume + prior + validity
    freedom = number_of_classes - fitted[0] - fitted[1] - jnp.sum(active)
    return LikelihoodFit(
        scalar=scalar,
        factor=factor,
        label=label,
        label_deviation=label_deviation_,
        scalar_deviation=either(unknowns.scalar, jnp.sqrt(inverse[0, 0]), jnp.zeros(())),
        agreeing=~singled,
        level_deviation=jnp.sqrt(total_variance),
        feature_pull=final.slope @ final.whitened_residual,
        cost=jnp.where(jnp.isfinite(cost), cost, jnp.inf),
        misfit=final.chi_squared / jnp.maximum(freedom, 1),
    )
