"""The loss is not told either: which ones are tried, and which of them explains the gradient.

Every softmax loss here is the one scalar equation with other unknowns. A factor on the gradient frees kappa. A
temperature T divides logits and gradient alike, so that lambda becomes lambda / T: with a bias, which tells the true
lambda, freeing lambda is freeing T; without a bias T cannot be seen, and changes no label.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.labels.assumptions import Loss
from softinv_jax.labels.exact import explain_thoroughly
from softinv_jax.labels.explanations import UNIQUE_SURPRISE, Explanations, certainty, refuse_unless, rows_cancel
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import Unknowns, label_deviation, probabilities

__all__ = ["LossName", "Outcome", "Trial", "judge", "search_losses", "trials_for"]

LossName = Literal[
    "auto", "cross_entropy", "weighted_cross_entropy", "tempered_cross_entropy", "binary_cross_entropy"
]


class Trial(NamedTuple):
    """What is free if the loss is this one; static."""

    scalar: bool
    scale: bool
    loss: Loss


class Outcome(NamedTuple):
    """The explanations of one trial; all but them ().

    Attributes:
      explanations: what was found. listed: (K,) bool, see `Certainty`.
      scalar, scale: bool, what was free. loss: int32, a `Loss`. unique: bool.
    """

    explanations: Explanations
    listed: jax.Array
    scalar: jax.Array
    scale: jax.Array
    loss: jax.Array
    unique: jax.Array

    @property
    def unknowns(self) -> Unknowns:
        return Unknowns(self.scalar, self.scale)


def trials_for(loss: LossName, *, has_bias: bool, told_scale: bool) -> tuple[Trial, ...]:
    """The softmax losses to try, the one that was told first; none for independent sigmoids."""
    free_scale = not told_scale
    told = Trial(not has_bias, free_scale, Loss.CROSS_ENTROPY)
    weighted = Trial(not has_bias, True, Loss.WEIGHTED_CROSS_ENTROPY)
    tempered = Trial(True, free_scale, Loss.TEMPERED_CROSS_ENTROPY)
    both = Trial(True, True, Loss.WEIGHTED_TEMPERED_CROSS_ENTROPY)
    wanted = {
        "auto": (told, weighted, tempered, both),
        "cross_entropy": (told,),
        "weighted_cross_entropy": (weighted,),
        "tempered_cross_entropy": (tempered,),
        "binary_cross_entropy": (),
    }[loss]
    # Trials that free the same are one trial; its first name is the one with fewest assumptions.
    return tuple({(trial.scalar, trial.scale): trial for trial in reversed(wanted)}.values())[::-1]


def judge(reading: Reading, explanations: Explanations, unknowns: Unknowns, loss: int | jax.Array) -> Outcome:
    """An outcome from explanations, none of which counts where what it takes for granted does not hold."""
    equation = reading.equation

    def holds(index: int) -> jax.Array:
        found = jax.tree.map(lambda leaf: leaf[index], explanations.found)
        prediction = probabilities(equation, found.scalar)
        label = prediction - found.factor * equation.left
        own = label_deviation(equation, found.scalar, found.factor, prediction, label)
        # With a bias lambda is known, and has the sign that a temperature cannot turn.
        upright = jnp.isnan(equation.known_scalar) | (found.scalar * equation.known_scalar > 0)
        return rows_cancel(equation, found, own) & upright

    count = explanations.found.scalar.shape[0]
    explanations = refuse_unless(explanations, jnp.stack([holds(index) for index in range(count)]))
    listed, unique = certainty(explanations, unknowns, reading.is_rounding)
    flags = jnp.asarray(unknowns.scalar), jnp.asarray(unknowns.scale)
    return Outcome(explanations, listed, *flags, jnp.asarray(loss, jnp.int32), unique)


def search_losses(reading: Reading, trials: tuple[Trial, ...]) -> Outcome:
    """The first loss under which the gradient has one explanation; where there is none, what the first one gives.

    One compiled program serves every trial; later ones run only where they are needed.

    Args:
      reading: of one gradient, thorough. trials: static, at least one.
    """
    if len(trials) == 1:
        scalar, scale, loss = trials[0]
        return judge(reading, explain_thoroughly(reading, Unknowns(scalar, scale)), Unknowns(scalar, scale), loss)
    scalars, scales, losses = (jnp.asarray(column) for column in zip(*trials, strict=True))

    @jax.jit
    def attempt(index: jax.Array) -> Outcome:
        unknowns = Unknowns(scalars[index], scales[index])
        return judge(reading, explain_thoroughly(reading, unknowns), unknowns, losses[index])

    def unsettled(state: tuple[jax.Array, Outcome]) -> jax.Array:
        index, kept = state
        return (index < len(trials)) & ~kept.unique

    def proceed(state: tuple[jax.Array, Outcome]) -> tuple[jax.Array, Outcome]:
        index, kept = state
        new = attempt(index)
        told, other = kept.explanations.found.surprise[0], new.explanations.found.surprise[0]
        # One of several tried, and by as much as sets it apart from the one that was told.
        bound = UNIQUE_SURPRISE + jnp.log(1.0 * len(trials)) + jnp.maximum(told, 0.0)
        better = (index == 0) | (new.unique & (other >= bound))
        return index + 1, jax.tree.map(lambda a, b: jnp.where(better, a, b), new, kept)

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(attempt, jnp.int32(0)))
    return jax.lax.while_loop(unsettled, proceed, (jnp.int32(0), nothing))[1]
