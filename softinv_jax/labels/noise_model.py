"""The label equation under noise, and one step of generalised least squares in all of its unknowns.

See `likelihood` for the model. The noise on v is integrated out: it stands in the covariance of the equation,
Sigma = D + U U^T with a diagonal D and few columns U, so that everything here grows as C. (Woodbury's identity.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmin
from softinv_jax.labels.scalar_equation import DirectionNoise, ScalarEquation, Unknowns, either, label_deviation
from softinv_jax.linear_algebra import inverse_and_log_determinant

__all__ = ["Choice", "Problem", "State", "Step", "advance", "label_of", "softmax_slope", "solve"]

STEP_SHARES = (1.0, 0.5, 0.25, 0.0625, 0.0)


class State(NamedTuple):
    """Where the iteration stands: lambda (), kappa (), the weights (slots,), and q (C,), which stands for zeta."""

    scalar: jax.Array
    factor: jax.Array
    weights: jax.Array
    dual: jax.Array


class Step(NamedTuple):
    """One generalised least-squares solution around a state.

    Sigma^-1 is diag(`own_precision`) - shared inner shared^T.
    """

    change: jax.Array  # (2 + slots,) of lambda, kappa and the weights
    parameter_covariance: jax.Array
    parameter_log_determinant: jax.Array  # of the inverse of that covariance
    prediction: jax.Array  # (C,) p
    chi_squared: jax.Array  # before the change
    log_determinant: jax.Array  # of the residual's covariance
    whitened_residual: jax.Array  # (C,) Sigma^-1 r after the change
    whitened_design: jax.Array  # (C, 2 + slots)
    own_precision: jax.Array  # (C,)
    shared: jax.Array  # (C, columns)
    inner: jax.Array  # (columns, columns)


class Problem(NamedTuple):
    """What the fit is of; see `fit_likelihood`. `own` has no errors of z: they are in `noise`."""

    own: ScalarEquation
    noise: DirectionNoise
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


def softmax_slope(prediction: jax.Array, change: jax.Array) -> jax.Array:
    """(C,) what softmax p changes by with its logits: (diag(p) - p p^T) times (C,)."""
    return prediction * (change - jnp.sum(prediction * change))


def _evaluate(
    problem: Problem, scalar: jax.Array, factor: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(C,) softmax, label and the label's deviations, with the logits moved by `shift`."""
    equation = problem.own
    prediction = jax.nn.softmax(scalar * equation.direction + equation.offset + shift)
    raw = prediction - factor * equation.left
    return prediction, raw, label_deviation(equation, scalar, factor, prediction, raw)


def _covariance(
    problem: Problem, scalar: jax.Array, prediction: jax.Array, deviation: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(C,) D and (C, columns) U of the covariance of the label's entries, D + U U^T."""
    root, rest = problem.noise
    spread = jnp.abs(scalar) * prediction[:, None] * (root - (prediction @ root)[None, :])
    # Taken as independent of the error of z, of the same origin: at worst a factor of sqrt(2) is lost.
    columns = [spread, jnp.sqrt(problem.factor_variance) * problem.own.left[:, None]]
    own = deviation**2
    if rest is not None:
        # Errors of logits that are independent of each other: their own, and the one of the softmax's sum.
        apart = (scalar * prediction) ** 2 * rest
        own = own + apart
        columns.append(jnp.sqrt(jnp.sum(apart)) * prediction[:, None])
    return own, jnp.concatenate(columns, axis=1)


def _columns(
    problem: Problem, state: State, prediction: jax.Array, logit_gradient: jax.Array, choice: Choice
) -> jax.Array:
    """(C, 2 + slots) derivatives of the label equation; unused columns are zero.

    With g = p - y for kappa u: the errors of u grow with kappa, and so the likelihood is not least squares in
    it with u as regressor, which its noise would bias.
    """
    unknowns = problem.unknowns
    zero = jnp.zeros_like(logit_gradient)
    by_scalar = softmax_slope(prediction, problem.own.direction)
    by_scalar = either(unknowns.scale, by_scalar, by_scalar + logit_gradient / state.scalar)
    by_scalar = either(unknowns.scalar, by_scalar, zero)
    by_factor = either(unknowns.scale, -logit_gradient / state.factor, zero)
    chosen = choice.columns(zero.size).T
    return jnp.concatenate([by_scalar[:, None], by_factor[:, None], -chosen * choice.active[None, :]], axis=1)


def label_of(weights: jax.Array, choice: Choice, number_of_classes: int) -> jax.Array:
    """(C,) y(w)."""
    return 1 / number_of_classes + jnp.where(choice.active, weights, 0.0) @ choice.columns(number_of_classes)


def _pulled(problem: Problem, dual: jax.Array) -> jax.Array:
    """(C,) tau^2 W P W^T q; zeta is -lambda^2 of that, as generalised least squares gives it."""
    root, rest = problem.noise
    pulled = root @ (dual @ root)
    return pulled if rest is None else pulled + rest * dual


def _objective(problem: Problem, state: State, pulled: jax.Array, choice: Choice) -> jax.Array:
    """Chi^2 of the errors of u and of v that the state stands for, and of the priors."""
    scalar, factor, weights, dual = state
    shift = -(scalar**2) * pulled
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
    shift = -(scalar**2) * _pulled(problem, dual)
    prediction, raw, deviation = _evaluate(problem, scalar, factor, shift)
    mismatch = raw - label_of(weights, choice, raw.size)
    residual = mismatch - softmax_slope(prediction, shift)
    design = _columns(problem, state, prediction, mismatch + factor * problem.own.left, choice)
    own, columns = _covariance(problem, scalar, prediction, deviation)
    root = jax.lax.rsqrt(own)[:, None]
    scaled = columns * root
    inner, log_determinant = inverse_and_log_determinant(jnp.eye(columns.shape[1]) + scaled.T @ scaled)
    both = jnp.concatenate([design, residual[:, None]], axis=1) * root
    both = (both - scaled @ (inner @ (scaled.T @ both))) * root
    weighted, weighted_residual = both[:, :-1], both[:, -1]
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
        prediction=prediction,
        chi_squared=jnp.sum(residual * weighted_residual) + jnp.sum(used_weights**2),
        log_determinant=log_determinant + jnp.sum(jnp.log(own)),
        whitened_residual=weighted_residual + weighted @ change,
        whitened_design=weighted,
        own_precision=1 / own,
        shared=scaled * root,
        inner=inner,
    )


def advance(problem: Problem, state: State, choice: Choice, step: Step) -> State:
    """The largest part of a Gauss-Newton step that lowers the objective most; none if nothing lowers it."""
    new_dual = softmax_slope(step.prediction, step.whitened_residual)
    # Neither through zero nor beyond a doubling at once: lambda keeps its sign.
    limit = jnp.where(step.change[0] * jnp.sign(state.scalar) < 0, 0.5, 1.0) * jnp.abs(state.scalar)
    longest = jnp.minimum(1.0, limit / jnp.maximum(jnp.abs(step.change[0]), jnp.finfo(jnp.float64).tiny))

    pulled, new_pulled = (_pulled(problem, dual) for dual in (state.dual, new_dual))

    def part(share: jax.Array) -> tuple[State, jax.Array]:
        share = share * longest
        scalar = either(problem.unknowns.scalar, state.scalar + share * step.change[0], state.scalar)
        factor = either(problem.unknowns.scale, state.factor + share * step.change[1], 1 / scalar)
        weights = state.weights + share * step.change[2:]
        new = State(scalar, factor, weights, state.dual + share * (new_dual - state.dual))
        return new, _objective(problem, new, pulled + share * (new_pulled - pulled), choice)

    parts, values = jax.vmap(part)(jnp.asarray(STEP_SHARES))
    best = argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
    return jax.tree.map(lambda leaf: leaf[best], parts)
