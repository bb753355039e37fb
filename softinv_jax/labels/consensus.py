"""The scalar on which most classes agree: recovery without knowing the label's format."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argsort, take_rows
from softinv_jax.labels.hypotheses import Hypotheses
from softinv_jax.labels.scalar_equation import TOLERANCE, ScalarEquation, Unknowns, either

__all__ = [
    "Consensus",
    "fitted_parameters",
    "hypothesis_drift",
    "independent_classes",
    "scalar_derivative",
    "score_hypotheses",
    "surprise_of",
]


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


def scalar_derivative(
    equation: ScalarEquation, scalar: jax.Array, prediction: jax.Array, unknowns: Unknowns
) -> jax.Array:
    """dy / dlambda at fixed kappa, or along kappa = 1 / lambda where the scale is known: (..., C)."""
    direction = jnp.broadcast_to(equation.direction, prediction.shape)
    mean = jnp.sum(prediction * direction, axis=-1, keepdims=True)
    derivative = prediction * (direction - mean)
    along = derivative + jnp.broadcast_to(equation.left, prediction.shape) / scalar[..., None] ** 2
    return either(unknowns.scale, derivative, along)


def surprise_of(margin: jax.Array, gradient: jax.Array) -> jax.Array:
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
    nats = jnp.where(agreeing, surprise_of(level_margin, gradient), 0.0)
    own = take_rows(nats, hypotheses.classes)
    total = jnp.sum(nats, axis=1) - jnp.sum(own, axis=1)
    # Where two parameters are fitted, the weakest of the three classes was not needed for them.
    two = fitted_parameters(unknowns) == 2
    total = total + either(two, jnp.min(own, axis=1), jnp.zeros_like(total))
    return jnp.where(possible & ~jnp.isnan(hypotheses.scalar), total, -1.0)


def fitted_parameters(unknowns: Unknowns) -> int | jax.Array:
    """Number of unknowns in y_j = c: the level, and lambda and kappa where they are free."""
    if isinstance(unknowns.scalar, bool) and isinstance(unknowns.scale, bool):
        return 1 + unknowns.scalar + unknowns.scale
    return 1 + jnp.asarray(unknowns.scalar, jnp.int32) + jnp.asarray(unknowns.scale, jnp.int32)


def independent_classes(prediction: jax.Array, margin: jax.Array, agreeing: jax.Array) -> tuple[jax.Array, jax.Array]:
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
    derivative = scalar_derivative(equation, hypotheses.scalar, hypotheses.prediction, unknowns)
    along = jnp.abs(derivative) * hypotheses.scalar_deviation[:, None]
    return drift + either(unknowns.scalar, along, jnp.zeros_like(along))
