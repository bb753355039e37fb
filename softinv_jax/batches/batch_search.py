"""How many examples, and whether each has a factor of its own: the searches that are tried, one after the other."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jax.typing import ArrayLike

from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.factor_search import search_own_factors, whole_multiples
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.scale_search import search_any_scale
from softinv_jax.batches.search import search_batch
from softinv_jax.batches.subspace import BatchSubspace, batch_subspace
from softinv_jax.labels.assumptions import Assumption, Loss
from softinv_jax.labels.explanations import UNBALANCED
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = [
    "BatchAsked",
    "BatchGradient",
    "BatchOutcome",
    "BatchSpaces",
    "balanced",
    "search_all",
    "usual_divisor",
]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BatchAsked:
    """What was told of a batch: its size or None, whether the loss is a mean, whether its scale is known, the loss."""

    batch_size: int | None
    is_mean: bool
    told_scale: bool
    loss: Literal["auto", "cross_entropy", "weighted_cross_entropy"]


@dataclass(frozen=True)
class BatchSpaces:
    """A gradient decomposed: its spaces, V (d, r), and all singular values."""

    subspace: BatchSubspace
    right: np.ndarray
    singular_values: np.ndarray

    @property
    def rank(self) -> int:
        return int(self.subspace.singular_values.size) if self.singular_values[0] > 0 else 0


@dataclass(frozen=True)
class BatchOutcome:
    """What was found of a batch.

    Attributes:
      spaces: of the gradient, of the rank that was searched. found: the examples. joint: their fit, or None.
      divisor: D of all; NaN where not found. total: how many examples there are rows for.
      usual: D at scale 1. refuted: `Assumption` flags. loss: a `Loss`.
      multiples: (n,) how many examples of the batch each one found stands for, or None for one each.
    """

    spaces: BatchSpaces
    found: list[Component]
    joint: JointFit | None
    divisor: Divisor
    total: int
    usual: float
    refuted: int = 0
    loss: Loss = Loss.CROSS_ENTROPY
    multiples: np.ndarray | None = None

    @property
    def is_whole(self) -> bool:
        return 0 < len(self.found) == self.spaces.rank


@dataclass(frozen=True)
class BatchGradient:
    """One gradient of a batch. weight, values: (C, d) float64, with the bias as last column, where `has_bias`.

    dtype: of the gradient as it came. known_noise: (C,) standard deviation of noise on each row's entries, or None.
    """

    weight: np.ndarray
    values: np.ndarray
    dtype: np.dtype
    known_noise: np.ndarray | None
    has_bias: bool

    def decompose(self, largest: int | None) -> BatchSpaces:
        """Of the rank that shows, `largest` at most."""
        return BatchSpaces(
            *batch_subspace(
                self.weight,
                self.values,
                largest,
                self.dtype,
                has_bias=self.has_bias,
                known_noise=self.known_noise,
            )
        )


def search_all(
    gradient: BatchGradient, asked: BatchAsked, progress: Progress, shown: BatchSpaces | None = None
) -> BatchOutcome:
    """Find the examples of a batch under what was told, and where that fails under what the gradient says instead.

    Args:
      gradient: of the batch. asked: what was told. progress: called with (found, batch size).
      shown: the gradient, decomposed, where it was before.
    """
    shown, told = shown or gradient.decompose(None), asked.batch_size
    if told is None or shown.rank in (0, told):
        first = _search(shown, told or shown.rank, asked, progress)
    elif shown.rank > told:
        first = _other_size(shown, gradient.decompose(told), asked, progress)
    else:
        first = _fewer(shown, told, asked, progress)
    return balanced(first, gradient)


def balanced(outcome: BatchOutcome, gradient: BatchGradient) -> BatchOutcome:
    """With the flags of a gradient whose rows do not add up to zero."""
    refuted = outcome.refuted | _unbalanced(gradient.values, outcome.spaces.subspace.noise)
    return replace(outcome, refuted=refuted)


def usual_divisor(size: int, asked: BatchAsked) -> float:
    """D at scale 1."""
    return float(size) if asked.is_mean else 1.0


def _search(spaces: BatchSpaces, size: int, asked: BatchAsked, progress: Progress) -> BatchOutcome:
    """As told; then with a factor on each example."""
    usual = usual_divisor(size, asked)
    outcome = BatchOutcome(spaces, [], None, Divisor(usual if asked.told_scale else math.nan), size, usual)
    if spaces.rank == 0:
        return outcome
    if asked.loss != "weighted_cross_entropy":
        outcome = _plain(spaces, size, asked, progress)
    if outcome.is_whole or asked.loss == "cross_entropy":
        return outcome
    return _with_factors(outcome, asked, progress) or outcome


def _plain(spaces: BatchSpaces, size: int, asked: BatchAsked, progress: Progress) -> BatchOutcome:
    """One factor for all: 1, or unknown."""
    usual = usual_divisor(size, asked)
    if asked.told_scale:
        divisor = Divisor(usual)
        found, joint = search_batch(spaces.subspace, divisor, progress, size)
    else:
        divisor, found, joint = search_any_scale(spaces.subspace, progress, size)
    return BatchOutcome(spaces, found, joint, divisor, size, usual)


def _with_factors(before: BatchOutcome, asked: BatchAsked, progress: Progress) -> BatchOutcome | None:
    """A factor for each example: whole ones are examples that are there more than once."""
    found, joint = search_own_factors(before.spaces.subspace, progress, before.total)
    if joint is None:
        return None
    told = asked.batch_size
    sizes = [told] if told is not None else range(len(found), 4 * len(found) + 1)
    for size in sizes if asked.is_mean and asked.told_scale else []:
        multiples = whole_multiples(np.asarray(joint.divisors), np.asarray(joint.divisors_deviation), size)
        if multiples is not None:
            flag = Assumption.DISTINCT_EXAMPLES if np.any(multiples > 1) else Assumption(0)
            divisor = Divisor(float(size))
            return BatchOutcome(
                before.spaces, found, joint, divisor, len(found), float(size), int(flag), multiples=multiples
            )
    loss, flag = Loss.WEIGHTED_CROSS_ENTROPY, Assumption.SCALE if asked.told_scale else Assumption(0)
    return BatchOutcome(before.spaces, found, joint, Divisor(before.usual), before.total, before.usual, int(flag), loss)


def _other_size(shown: BatchSpaces, told: BatchSpaces, asked: BatchAsked, progress: Progress) -> BatchOutcome:
    """More examples stand out than were told: all of them, if that explains the gradient."""
    # Ranks as high as can be are noise without an edge, and say nothing.
    clear = shown.rank < min(shown.subspace.left.shape[0], len(shown.right)) - 1
    assert asked.batch_size is not None
    if clear:
        whole = _plain(shown, shown.rank, asked, progress)
        if whole.is_whole:
            return BatchOutcome(**{**vars(whole), "refuted": int(Assumption.BATCH_SIZE)})
    outcome = _search(told, asked.batch_size, asked, progress)
    if clear and not outcome.is_whole:
        return BatchOutcome(**{**vars(outcome), "refuted": outcome.refuted | int(Assumption.BATCH_SIZE)})
    return outcome


def _fewer(shown: BatchSpaces, told: int, asked: BatchAsked, progress: Progress) -> BatchOutcome:
    """Fewer stand out: fewer there are, or some are there twice, or hardly differ from others."""
    whole = _plain(shown, shown.rank, asked, progress)
    if whole.is_whole:
        return BatchOutcome(**{**vars(whole), "refuted": int(Assumption.BATCH_SIZE)})
    plain = _plain(shown, told, asked, progress)
    twice = _with_factors(plain, asked, progress) if asked.loss != "cross_entropy" else None
    if twice is not None:
        return twice
    flags = Assumption.BATCH_SIZE | Assumption.DISTINCT_EXAMPLES
    return BatchOutcome(**{**vars(plain), "refuted": plain.refuted | int(flags)})


def _unbalanced(gradient: np.ndarray, noise: ArrayLike) -> int:
    """Flags where the rows do not add up to zero, as those of every softmax loss do."""
    sums = np.linalg.norm(gradient.sum(axis=0))
    expected = TOLERANCE * np.sqrt(gradient.shape[1] * np.sum(np.asarray(noise) ** 2))
    if sums <= expected + UNBALANCED * np.linalg.norm(gradient):
        return 0
    empty = np.any(np.all(gradient == 0, axis=1))
    return int(Assumption.ALL_ENTRIES if empty else Assumption.SOFTMAX)
