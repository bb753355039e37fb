"""The label in closed form, where a bias tells lambda and the scale is known; and an outcome that explains nothing."""

import jax
import jax.numpy as jnp

from softinv_jax.labels.assumptions import Loss
from softinv_jax.labels.consensus import Consensus
from softinv_jax.labels.explanations import Explanations, rows_cancel
from softinv_jax.labels.losses import Outcome
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import (
    TOLERANCE,
    ScalarEquation,
    Unknowns,
    label_deviation,
    with_client_error,
)

__all__ = ["closed_form", "unexplained_outcome"]


def closed_form(reading: Reading, outcome: Outcome, sigmoids: jax.Array) -> tuple[Consensus, jax.Array, jax.Array]:
    """y = p - kappa u as it is, and how exactly: lambda is known, and the label has no structure to lean on.

    Returns:
      The label; () bool, whether it means anything; and () bool, whether it cannot be a label: entries outside [0, 1],
      or a sum that is not 1.
    """
    equation = with_client_error(reading.equation, outcome.logit_error)
    scalar = equation.known_scalar
    logits = scalar * equation.direction + equation.offset
    prediction = jnp.where(sigmoids, jax.nn.sigmoid(logits), jax.nn.softmax(logits))
    factor = jnp.where(sigmoids, 1.0 * equation.left.size, 1.0) / scalar
    label = prediction - factor * equation.left
    own = label_deviation(equation, scalar, factor, prediction, label)
    # An error of v reaches the label through p, which `direction_deviation` holds, and through kappa.
    deviation = jnp.sqrt(own**2 + reading.factor_variance * (factor * scalar * equation.left) ** 2)
    plain = _unstructured(scalar, factor, label, deviation)
    reach = TOLERANCE * deviation
    contradicted = jnp.any((label < -reach) | (label > 1 + reach)) & ~outcome.listed[0]
    contradicted = contradicted | (~rows_cancel(equation, plain, own) & ~sigmoids)
    # Beyond that, lambda could be anything.
    vague = TOLERANCE * jnp.abs(scalar) * jnp.sqrt(reading.factor_variance) > 1
    return plain, ~vague & jnp.all(jnp.isfinite(label)), contradicted


def _unstructured(scalar: jax.Array, factor: jax.Array, label: jax.Array, deviation: jax.Array) -> Consensus:
    zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
    return Consensus(
        scalar=scalar,
        factor=factor,
        level=zero,
        scalar_deviation=zero,
        factor_deviation=zero,
        level_deviation=zero,
        agreeing=jnp.zeros(label.shape, bool),
        label=label,
        label_deviation=deviation,
        deviation_without_one=deviation,
        surprise=zero,
        informative=none,
        levels=none,
        fits=jnp.ones((), bool),
        misfit=jnp.full((), jnp.nan),
    )


def unexplained_outcome(equation: ScalarEquation, count: int, unknowns: Unknowns, loss: Loss) -> Outcome:
    """Nothing was found, or there are too few classes for anything to be."""
    classes = equation.left.size
    unknown, row = jnp.full((count,), jnp.nan), jnp.full((count, classes), jnp.nan)
    no, none = jnp.zeros((count,), bool), jnp.zeros((count,), jnp.int32)
    found = Consensus(
        scalar=unknown,
        factor=unknown,
        level=unknown,
        scalar_deviation=unknown,
        factor_deviation=unknown,
        level_deviation=unknown,
        agreeing=jnp.zeros((count, classes), bool),
        label=row,
        label_deviation=row,
        deviation_without_one=row,
        surprise=jnp.full((count,), -jnp.inf),
        informative=none,
        levels=none,
        fits=no,
        misfit=unknown,
    )
    explanations = Explanations(found, jnp.zeros((), bool), jnp.zeros((classes,)), jnp.asarray(jnp.inf))
    free = jnp.asarray(unknowns.scalar), jnp.asarray(unknowns.scale)
    return Outcome(explanations, no, *free, jnp.int32(loss), jnp.zeros((), bool), jnp.zeros(()))
