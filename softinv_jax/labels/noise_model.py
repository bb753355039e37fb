"""The label equation under noise, and one step of generalised least squares in all of its unknowns.

See `likelihood` for the model. The noise on v is integrated out: it stands in the covariance of the equation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmin
from softinv_jax.labels.scalar_equation import ScalarEquation, Unknowns, either, label_deviation
from softinv_jax.linear_algebra import inverse_and_log_determinant

__all__ = ["Choice", "Problem", "State", "Step", "advance", "label_of", "solve"]

STEP_SHARES = (1.0, 0.5, 0.25, 0.0625, 0.0)


class State(NamedTuple):
    """Where the iteration stands: lambda (), kappa (), the weights (slots,), and q (C,), which stands for zeta."""

    scalar: jax.Array
    factor: jax.Array
    weights: jax.Array
    dual: jax.Array


class Step(NamedTuple):
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


class Problem(NamedTuple):
    """What the fit is of; see `fit_likelihood`. `own` has no errors of z: they are in the covariance."""

    own: ScalarEquation
    direction_covariance: jax.Array
    factor_variance: jax.Array
    unknowns: Unknowns


class Choice(NamedTuple):
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


def _evaluate(
    problem: Problem, scalar: jax.Array, factor: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(C,) softmax, label and the label's deviations, with the logits moved by `shift`."""
    equation = problem.own
    prediction = jax.nn.softmax(scalar * equation.direction + equation.offset + shift)
    raw = prediction - factor * equation.left
    return prediction, raw, label_deviation(equation, scalar, factor, prediction, raw)


def _model(
    problem: Problem, scalar: jax.Array, factor: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(C,) label, (C, C) dp / dlogits, and (C, C) covariance of the label's entries."""
    prediction, raw, deviation = _evaluate(problem, scalar, factor, shift)
    softmax_slope = jnp.diag(prediction) - prediction[:, None] * prediction[None, :]
    spread = softmax_slope @ problem.direction_covariance @ softmax_slope * scalar**2
    # Taken as independent of the error of z, of the same origin: at worst a factor of sqrt(2) is lost.
    left = problem.own.left
    spread = spread + problem.factor_variance * left[:, None] * left[None, :]
    return raw, softmax_slope, jnp.diag(deviation**2) + spread


def _columns(problem: Problem, state: State, slope: jax.Array, logit_gradient: jax.Array, choice: Choice) -> jax.Array:
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


def label_of(weights: jax.Array, choice: Choice, number_of_classes: int) -> jax.Array:
    """(C,) y(w)."""
    return 1 / number_of_classes + jnp.where(choice.active, weights, 0.0) @ choice.columns(number_of_classes)


def _shift_of(problem: Problem, scalar: jax.Array, dual: jax.Array) -> jax.Array:
    """zeta, which generalised least squares gives as -lambda^2 tau^2 W P W^T q."""
    return -(scalar**2) * problem.direction_covariance @ dual


def _objective(problem: Problem, state: State, choice: Choice) -> jax.Array:
    """Chi^2 of the errors of u and of v that the state stands for, and of the priors."""
    scalar, factor, weights, dual = state
    shift = _shift_of(problem, scalar, dual)
    _, raw, deviation = _evaluate(problem, scalar, factor, shift)
    used = jnp.where(choice.active, weights, 0.0)
    residual = (raw - label_of(weights, choice, raw.size)) / deviation
    tie = jnp.where(choice.sum_precision > 0, choice.sum_precision * (jnp.sum(used) - 1) ** 2, 0.0)
    # The error of kappa that explains most of the residual, at its price.
    by_factor, variance = problem.own.left / deviation, problem.factor_variance
    explained = variance * jnp.sum(by_factor * residual) ** 2 / (1 + variance * jnp.sum(by_factor**2))
    return jnp.sum(residual**2) - explained - jnp.sum(dual * shift) + jnp.sum(used**2) + tie


def solve(problem: Problem, state: State, choice: Choice) -> Step:
    """Generalised least squares around a state."""
    scalar, factor, weights, dual = state
    active, sum_precision = choice.active, choice.sum_precision
    shift = _shift_of(problem, scalar, dual)
    raw, slope, covariance = _model(problem, scalar, factor, shift)
    mismatch = raw - label_of(weights, choice, raw.size)
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
    return Step(
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


def advance(problem: Problem, state: State, choice: Choice) -> State:
    """The largest part of a Gauss-Newton step that lowers the objective most; none if nothing lowers it."""
    step = solve(problem, state, choice)
    new_dual = step.slope @ step.whitened_residual
    # Neither through zero nor beyond a doubling at once: lambda keeps its sign.
    limit = jnp.where(step.change[0] * jnp.sign(state.scalar) < 0, 0.5, 1.0) * jnp.abs(state.scalar)
    longest = jnp.minimum(1.0, limit / jnp.maximum(jnp.abs(step.change[0]), jnp.finfo(jnp.float64).tiny))

    def part(share: jax.Array) -> State:
        share = share * longest
        scalar = either(problem.unknowns.scalar, state.scalar + share * step.change[0], state.scalar)
        factor = either(problem.unknowns.scale, state.factor + share * step.change[1], 1 / scalar)
        weights = state.weights + share * step.change[2:]
        return State(scalar, factor, weights, state.dual + share * (new_dual - state.dual))

    parts = jax.vmap(part)(jnp.asarray(STEP_SHARES))
    values = jax.vmap(lambda state: _objective(problem, state, choice))(parts)
    best = argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
    return jax.tree.map(lambda leaf: leaf[best], parts)
