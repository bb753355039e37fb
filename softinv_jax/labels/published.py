"""The published baselines as explanations: the paper's variance loss and iDLG's odd sign."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from softinv_jax.float64 import sort
from softinv_jax.labels.explanations import Explanations, single
from softinv_jax.labels.hard_label import odd_class
from softinv_jax.labels.polishing import polish_consensus
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import Unknowns
from softinv_jax.labels.variance import minimise_variance

__all__ = ["explain_by_sign", "explain_by_variance"]


def explain_by_variance(reading: Reading, excluded: int, unknowns: Unknowns) -> Explanations:
    """The paper's minimum, with the certificate of the consensus around it.

    Args:
      reading: of a bias-free head. excluded: static, see `minimise_variance`. unknowns: static.
    """
    equation = reading.equation
    scalar, _ = minimise_variance(equation, excluded)
    label = jax.nn.softmax(scalar * equation.direction) - equation.left / scalar
    kept = sort(label)[: label.size - excluded]
    # The certificate is the consensus around the minimum; the label stays that of the minimum itself.
    deviation = jnp.std(kept) + 1e-6 * (jnp.abs(label) + jnp.abs(equation.left / scalar))
    found = polish_consensus(equation, scalar, 1 / scalar, jnp.mean(kept), deviation, unknowns)
    same = jnp.abs(found.scalar - scalar) <= 1e-3 * jnp.abs(scalar)
    found = replace(
        found,
        scalar=scalar,
        factor=1 / scalar,
        label=label,
        surprise=jnp.where(same, found.surprise, -jnp.inf),
        fits=found.fits & same,
    )
    return single(found)


def explain_by_sign(reading: Reading, unknowns: Unknowns) -> Explanations:
    """The hard label of the row of the odd sign; assumed, not shown.

    Args:
      reading: of one gradient. unknowns: static.
    """
    equation = reading.equation
    chosen = odd_class(equation.left, reading.total)
    label = jax.nn.one_hot(chosen, equation.left.size, dtype=jnp.float64)
    one = jnp.ones(())
    scalar = equation.known_scalar if not unknowns.scalar else jnp.full((), jnp.nan)
    found = polish_consensus(equation, one, one, jnp.zeros(()), jnp.full_like(label, jnp.inf), unknowns, steps=0)
    found = replace(
        found,
        scalar=scalar,
        factor=1 / scalar,
        label=label,
        label_deviation=jnp.full_like(label, jnp.nan),
        scalar_deviation=jnp.full((), jnp.nan),
        level=jnp.zeros(()),
        agreeing=label == 0,
        # Assumed, not shown.
        surprise=jnp.zeros(()),
        informative=jnp.zeros((), jnp.int32),
        misfit=jnp.full((), jnp.nan),
    )
    return single(found)
