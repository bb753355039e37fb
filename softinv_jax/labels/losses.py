"""The loss is not told either: which ones are tried, and which of them explains the gradient.

Every softmax loss here is the one scalar equation with other unknowns. A factor on the gradient frees kappa. A
temperature T divides logits and gradient alike, so that lambda becomes lambda / T: with a bias, which tells the true
lambda, freeing lambda is freeing T; without a bias T cannot be seen, and changes no label.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.labels.assumptions import Loss
from softinv_jax.labels.consensus import Consensus
from softinv_jax.labels.exact import explain_thoroughly
from softinv_jax.labels.explanations import UNIQUE_SURPRISE, Explanations, certainty, refuse_unless, rows_cancel
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import (
    ScalarEquation,
    Unknowns,
    label_deviation,
    probabilities,
    with_client_error,
)

__all__ = [
    "Attempts",
    "Kept",
    "LossName",
    "Outcome",
    "Trial",
    "attempt",
    "attempts_for",
    "is_settled",
    "judge",
    "keep_better",
    "search_losses",
    "trials_for",
]

LossName = Literal["auto", "cross_entropy", "weighted_cross_entropy", "tempered_cross_entropy", "binary_cross_entropy"]

# Of the strongest row: half precision reaches further down.
UNDERFLOW = 1e-6
AS_LIKELY = 2.0  # In twice the logarithm of the evidence.
# Standard deviations of logits, from a tenth of what TF32 does to logits of size 1 to what bfloat16 does to large ones.
CLIENT_ERRORS = tuple(2.0 ** -np.arange(14, 3, -1))


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
      logit_error: what the client's arithmetic is assumed to add to its logits.
    """

    explanations: Explanations
    listed: jax.Array
    scalar: jax.Array
    scale: jax.Array
    loss: jax.Array
    unique: jax.Array
    logit_error: jax.Array

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
        return rows_cancel(equation, found, own) & upright & ~_lacks_rows(equation, found, label)

    count = explanations.found.scalar.shape[0]
    explanations = refuse_unless(explanations, jnp.stack([holds(index) for index in range(count)]))
    listed, unique = certainty(explanations, unknowns, reading.is_rounding)
    flags = jnp.asarray(unknowns.scalar), jnp.asarray(unknowns.scale)
    return Outcome(explanations, listed, *flags, jnp.asarray(loss, jnp.int32), unique, equation.logit_error)


def _lacks_rows(equation: ScalarEquation, found: Consensus, label: jax.Array) -> jax.Array:
    """() bool: a row is zero to the last digit where the explanation has it far above what any format loses.

    Where logits are taken to err, the sum over the rows no longer tells.
    """
    expected = jnp.abs(label - found.level) * jnp.abs(1 / found.factor)
    missing = (equation.left == 0) & (expected > UNDERFLOW * jnp.max(jnp.abs(equation.left)))
    return (equation.logit_error > 0) & jnp.any(missing)


class Attempts(NamedTuple):
    """What is tried in turn, (rows,) each: the losses, then the first one again for coarse arithmetic of the client.

    Attributes:
      scalar, scale, loss: see `Trial`. error: of the client's logits. losses: () int32, how many rows are losses.
    """

    scalar: np.ndarray | jax.Array
    scale: np.ndarray | jax.Array
    loss: np.ndarray | jax.Array
    error: np.ndarray | jax.Array
    losses: np.ndarray | jax.Array


def attempts_for(trials: tuple[Trial, ...]) -> Attempts:
    """Every attempt that `search_losses` may make; trials: static, at least one."""
    rows = [(*trial, 0.0) for trial in trials] + [(*trials[0], size) for size in CLIENT_ERRORS]
    scalar, scale, loss, error = (np.array(column) for column in zip(*rows, strict=True))
    return Attempts(scalar, scale, loss.astype(np.int32), error, np.asarray(len(trials), np.int32))


class Kept(NamedTuple):
    """The best outcome so far, and () the lowest cost of those that were kept."""

    outcome: Outcome
    lowest: jax.Array


def attempt(reading: Reading, attempts: Attempts, index: jax.Array, *, noisy: bool | None = None) -> Outcome:
    """One attempt. noisy: static, see `explain_thoroughly`; every attempt at coarse arithmetic is."""
    scalar, scale, loss, error = (jnp.asarray(column)[index] for column in attempts[:4])
    unknowns = Unknowns(scalar, scale)
    coarse = index >= attempts.losses
    seen = replace(
        reading,
        equation=with_client_error(reading.equation, error),
        is_rounding=reading.is_rounding & ~coarse,
    )
    found = explain_thoroughly(seen, unknowns, noisy=noisy)
    # An error that is assumed, not measured, lets much fit: it takes agreement to be worth telling.
    return judge(replace(seen, is_rounding=seen.is_rounding | coarse), found, unknowns, loss)


def is_settled(reading: Reading, kept: Outcome, attempts: Attempts, index: jax.Array) -> jax.Array:
    """() bool: the attempts from `index` on are not needed."""
    # Rounding to half precision is no noise of the channel: the client is likely to have computed that way.
    few_digits = reading.leftover.few_digits & ~reading.is_rounding
    noisy = ~reading.is_rounding & ~few_digits
    # What fits as it should under noise needs no other loss, and coarse arithmetic is lost in it.
    settled = jnp.where(noisy, kept.unique | kept.listed[0] | (index >= attempts.losses), kept.unique & ~few_digits)
    return (index > 0) & settled & (kept.logit_error == 0)


def keep_better(kept: Kept, new: Outcome, attempts: Attempts, index: jax.Array) -> Kept:
    """The outcome of the attempt at `index`, or the one before."""
    before, lowest = kept
    told, other = before.explanations.found.surprise[0], new.explanations.found.surprise[0]
    # One of several tried, and by as much as sets it apart from the one that was told.
    bound = UNIQUE_SURPRISE + jnp.log(1.0 * attempts.losses) + jnp.maximum(told, 0.0)
    another_loss = new.unique & (other >= bound)
    # Of errors that are about as likely the largest: what it states holds for the smaller ones too.
    likelier = (before.loss == attempts.loss[0]) & (new.explanations.cost < lowest + AS_LIKELY)
    coarser = new.listed[0] & (~before.listed[0] | likelier)
    better = (index == 0) | jnp.where(index < attempts.losses, another_loss, coarser)
    lowest = jnp.where(better, jnp.minimum(lowest, new.explanations.cost), lowest)
    return Kept(jax.tree.map(lambda a, b: jnp.where(better, a, b), new, before), lowest)


def _nothing_kept(reading: Reading, attempts: Attempts) -> Kept:
    """Before the first attempt."""
    shapes = jax.eval_shape(lambda one: attempt(one, attempts, jnp.int32(0)), reading)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Kept(empty, jnp.asarray(jnp.inf))


def search_losses(reading: Reading, trials: tuple[Trial, ...]) -> Outcome:
    """The first loss under which the gradient has one explanation; where there is none, what the first one gives.

    Then the one that was told again, for clients whose own arithmetic is coarse (or whose parameters are not quite
    those given): their logits err by more than rounding, by how much is told by the evidence. One compiled program
    serves every attempt; later ones run only where they are needed.

    Args:
      reading: of one gradient, thorough. trials: static, at least one.
    """
    attempts = attempts_for(trials)

    def unsettled(state: tuple[jax.Array, Kept]) -> jax.Array:
        index, kept = state
        return (index < attempts.error.size) & ~is_settled(reading, kept.outcome, attempts, index)

    def proceed(state: tuple[jax.Array, Kept]) -> tuple[jax.Array, Kept]:
        index, kept = state
        return index + 1, keep_better(kept, attempt(reading, attempts, index), attempts, index)

    return jax.lax.while_loop(unsettled, proceed, (jnp.int32(0), _nothing_kept(reading, attempts)))[1].outcome
