"""Explanations of one gradient, whatever found them: what they hold, and when one of them is the only one."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmax
from softinv_jax.labels.consensus import Consensus
from softinv_jax.labels.scalar_equation import TOLERANCE, ScalarEquation, Unknowns, either

__all__ = [
    "LISTED_SURPRISE",
    "SHARP_LABEL",
    "UNBALANCED",
    "UNIQUE_SURPRISE",
    "Certainty",
    "Explanations",
    "certainty",
    "distinct",
    "is_unbalanced",
    "refuse_unless",
    "rows_cancel",
    "single",
]

# An explanation counts as unique only if a dense label would show as much agreement in one case of a million, and
# is listed at all only from one in a hundred on.
UNIQUE_SURPRISE = 13.8
LISTED_SURPRISE = 4.6
# Six deviations of every label entry of a unique label: its first digit is certain, and does not hinge on one class.
SHARP_LABEL = 0.1
# Sums of rows beyond this share of the whole are no rounding of a client that is unsure to a hundredth.
UNBALANCED = 1e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Explanations:
    """Distinct explanations of one gradient, the best first.

    Attributes:
      found: `Consensus` with a leading axis (K,).
      exhaustive: () bool, every triple of classes was tried, so that no other explanation exists.
      feature_pull: (C,) correction of the feature under noise, see `LikelihoodFit`; None or zero without.
      cost: () minus twice the log evidence of the first one under noise, see `LikelihoodFit`; infinite without.
    """

    found: Consensus
    exhaustive: jax.Array
    feature_pull: jax.Array | None
    cost: jax.Array


class Certainty(NamedTuple):
    """listed: (K,) bool, which explanations are worth telling. unique: () bool, the first one is the only one."""

    listed: jax.Array
    unique: jax.Array


def certainty(explanations: Explanations, unknowns: Unknowns, is_rounding: jax.Array) -> Certainty:
    """Whether one of the explanations can be relied on, by the conditions of docs/uniqueness.md.

    Args:
      is_rounding: () bool, the gradient carries no noise but its rounding.
    """
    found = explanations.found
    best: Consensus = jax.tree.map(lambda leaf: leaf[0], found)
    # Noise can leave too little of the structure to tell it from an accident; the likeliest label is still listed.
    listed = (found.surprise >= LISTED_SURPRISE) | (found.fits & ~is_rounding)
    # Any other lambda on which as many classes agree would share three distinguishable ones with these (two where
    # lambda is known and only kappa is not), and three have one root. Where neither is free there is no other.
    shared = either(unknowns.scalar, jnp.int32(3), jnp.int32(2))
    by_theorem = best.informative - (best.agreeing.size - jnp.sum(best.agreeing)) >= shared
    nothing_free = ~jnp.asarray(unknowns.scalar) & ~jnp.asarray(unknowns.scale)
    # A rival that a dense label would show a million times more often is none.
    rivals = listed & _contradict(found, unknowns) & (found.surprise > best.surprise - UNIQUE_SURPRISE)
    sharp = jnp.all(TOLERANCE * best.deviation_without_one <= SHARP_LABEL)
    unique = listed[0] & (best.surprise >= UNIQUE_SURPRISE) & ~jnp.any(rivals) & sharp
    return Certainty(listed, unique & (by_theorem | explanations.exhaustive | nothing_free))


def _contradict(found: Consensus, unknowns: Unknowns) -> jax.Array:
    """(K,) bool: the explanation's lambda (kappa where lambda is known) lies beyond its errors from the first one's."""
    value = either(unknowns.scalar, found.scalar, found.factor)
    deviation = either(unknowns.scalar, found.scalar_deviation, found.factor_deviation)
    return jnp.abs(value - value[0]) > TOLERANCE * (deviation + deviation[0])


def rows_cancel(equation: ScalarEquation, found: Consensus, own_deviation: jax.Array) -> jax.Array:
    """() bool: dL/dz adds up to zero over the classes, as it does for every softmax whose labels add up to 1.

    Args:
      found: one explanation. own_deviation: (C,) of the label's entries at its lambda and kappa.
    """
    total = found.factor * jnp.sum(equation.left)
    return jnp.abs(total) <= TOLERANCE * jnp.sqrt(jnp.sum(own_deviation**2))


def is_unbalanced(equation: ScalarEquation) -> jax.Array:
    """() bool: whatever lambda and kappa are, dL/dz does not add up to zero: no softmax with labels of sum 1."""
    noise = TOLERANCE * jnp.sqrt(jnp.sum(equation.left_deviation**2))
    return jnp.abs(jnp.sum(equation.left)) > noise + UNBALANCED * jnp.sum(jnp.abs(equation.left))


def refuse_unless(explanations: Explanations, holds: jax.Array) -> Explanations:
    """The same explanations, none of them worth anything unless `holds`: () or (K,) bool."""
    found = explanations.found
    surprise = jnp.where(holds, found.surprise, -jnp.inf)
    return replace(explanations, found=replace(found, surprise=surprise, fits=found.fits & holds))


def distinct(polished: Consensus, listed: int) -> Consensus:
    """The `listed` best consensuses with different classes in agreement; surprise -inf where there are fewer."""
    surprise = jnp.where(jnp.isnan(polished.surprise), -jnp.inf, polished.surprise)
    picks, left = [], surprise
    for _ in range(listed):
        best = argmax(left)
        picks.append((best, left[best]))
        same = jnp.all(polished.agreeing == polished.agreeing[best][None, :], axis=1)
        left = jnp.where(same, -jnp.inf, left)
    order = jnp.stack([index for index, _ in picks])
    found = jax.tree.map(lambda leaf: leaf[order], polished)
    return replace(found, surprise=jnp.stack([value for _, value in picks]))


def single(found: Consensus) -> Explanations:
    """One explanation and no rivals."""
    stacked = jax.tree.map(lambda leaf: leaf[None], found)
    return Explanations(stacked, jnp.asarray(False), None, jnp.asarray(jnp.inf))
