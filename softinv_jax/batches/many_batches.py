"""`recover_batches`: many gradients of batches at once; what the first rounds leave open is searched for one by one."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from softinv_jax.batches.batch_recovery import (
    BatchLoss,
    BatchRecovery,
    Reduction,
    batch_asked,
    batch_gradients,
    conclude_batch,
)
from softinv_jax.batches.batch_search import (
    BatchAsked,
    BatchOutcome,
    BatchSpaces,
    balanced,
    search_all,
    usual_divisor,
)
from softinv_jax.batches.candidates import split, without
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.explanation import explains, is_fitted
from softinv_jax.batches.lanes import group_sizes, workers
from softinv_jax.batches.last_example import MOST_STARTS, last_starts
from softinv_jax.batches.lockstep import Found, are_unrivalled, fit_all, nothing_found, search_last, search_round
from softinv_jax.batches.proposals import propose
from softinv_jax.batches.search import is_confined
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.float64 import in_float64
from softinv_jax.observation.head import Observation, observe

__all__ = ["recover_batches"]

ROUNDS = 3
LAST_STARTS = MOST_STARTS + 32  # For the last example of a batch.

# Two LAPACK calls at once can hang XLA's CPU runtime; the rounds of the search make none.
ONE_FIT = threading.Lock()


def recover_batches(
    observation: Observation,
    batch_size: int | Literal["auto"],
    *,
    reduction: Reduction = "mean",
    unknown_scale: bool = False,
    loss: BatchLoss = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[BatchRecovery]:
    """Recover every example behind each of N gradients, as `recover_batch` does one by one.

    Args:
      observation: `weight_gradient` (N, C, d).
      batch_size, reduction, unknown_scale, loss: of each of them; see `recover_batch`.
      progress: called with (gradients done, N).

    Returns:
      N `BatchRecovery`, in order.

    Raises:
      ValueError: as `recover_batch`.
    """
    observation = observe(**vars(observation))
    shape = observation.weight_gradient.shape
    if len(shape) != 3:
        raise ValueError(f"recover_batches takes weight_gradient (N, C, d), not {shape}; use recover_batch for one")
    asked = batch_asked(observation.weight.shape, batch_size, reduction, unknown_scale, loss)
    return _recover_batches(observation, asked, progress or (lambda done, total: None))


@in_float64
def _recover_batches(
    observation: Observation, asked: BatchAsked, progress: Callable[[int, int], None]
) -> list[BatchRecovery]:
    gradients = list(batch_gradients(observation))
    recoveries: dict[int, BatchRecovery] = {}

    def conclude(index: int, outcome: BatchOutcome) -> None:
        recoveries[index] = conclude_batch(gradients[index], outcome)
        progress(len(recoveries), len(gradients))

    with ThreadPoolExecutor(workers()) as pool:
        spaces = list(pool.map(lambda gradient: gradient.decompose(None), gradients))
        groups, alone = _groups(spaces, asked)
        found = [partial(_search_group, [spaces[index] for index in group], asked) for group in groups]
        # The first by itself: the others find its programs compiled.
        first = [_call(search) for search in found[:1]]
        outcomes = itertools.chain(first, pool.map(_call, found[1:]))
        for group, outcomes_of_group in zip(groups, outcomes, strict=True):
            for index, outcome in zip(group, outcomes_of_group, strict=True):
                if outcome is None:
                    alone.append(index)
                else:
                    conclude(index, balanced(outcome, gradients[index]))
    for index in alone:
        conclude(index, search_all(gradients[index], asked, lambda found, total: None, spaces[index]))
    return [recoveries[index] for index in range(len(gradients))]


@in_float64
def _call(function: Callable[[], Any]) -> Any:
    return function()


def _groups(spaces: list[BatchSpaces], asked: BatchAsked) -> tuple[list[list[int]], list[int]]:
    """Gradients that are searched together, of one rank and as many examples as were told; and all others."""
    alone: list[int] = []
    by_rank: dict[int, list[int]] = {}
    for index, space in enumerate(spaces):
        as_told = asked.told_scale and asked.loss != "weighted_cross_entropy" and asked.batch_size in (None, space.rank)
        together = as_told and space.rank > 1 and is_confined(space.subspace) and is_fitted(space.rank)
        (by_rank.setdefault(space.rank, []) if together else alone).append(index)
    groups: list[list[int]] = []
    for rank, own in by_rank.items():
        size = group_sizes(len(spaces[own[0]].subspace.left), rank)[0]
        groups += [own[first : first + size] for first in range(0, len(own), size)]
    return groups, alone


def _search_group(spaces: list[BatchSpaces], asked: BatchAsked) -> list[BatchOutcome | None]:
    """Those that the first rounds explain as a whole; None for the others."""
    usual = usual_divisor(spaces[0].rank, asked)
    divisor = Divisor(usual)
    subspaces = jax.tree.map(lambda *leaves: np.stack(leaves), *[one.subspace for one in spaces])
    sizes = group_sizes(*spaces[0].subspace.left.shape)
    found = _rounds(subspaces, divisor, sizes)
    whole = np.flatnonzero(found.is_filled.all(axis=1))
    with ONE_FIT:
        fit = _in_places(sizes[0], whole, (subspaces, found), partial(fit_all, divisor=divisor))
    outcomes: list[BatchOutcome | None] = [None] * len(spaces)
    clear = _in_places(sizes[0], whole, (subspaces, found), partial(are_unrivalled, divisor=divisor))
    for place, index in enumerate(whole):
        examples, joint = _at(fit, place)
        if clear[place] and explains(joint):
            outcomes[index] = BatchOutcome(spaces[index], split(examples), joint, divisor, spaces[index].rank, usual)
    return outcomes


def _rounds(subspaces: BatchSubspace, divisor: Divisor, sizes: tuple[int, int]) -> Found:
    """What `search_confined` finds in as many rounds, and the last example where one is missing."""
    found = nothing_found(subspaces, divisor)
    rank = found.is_filled.shape[1]
    for round_ in range(ROUNDS):
        missing = rank - found.is_filled.sum(axis=1)
        left = np.flatnonzero(missing > (round_ == ROUNDS - 1))
        if not len(left):
            break
        # Rows enough for what is missing; as many starts as there are choices of classes to compare afterwards.
        rows = rank if 2 * missing.max() + 4 <= rank else 2 * rank + 4
        search = partial(search_round, divisor=divisor, rows=rows, brief=round_ == 0)
        found = _put(found, left, _in_places(sizes[round_ > 0], left, (subspaces, found), search))
    left = np.flatnonzero(found.is_filled.sum(axis=1) == rank - 1)
    starts = np.zeros((len(found.is_filled), LAST_STARTS, rank))
    targets = np.full((*starts.shape[:2], TARGETS), -1, np.int32)
    for index in left:
        own = _at(subspaces, index)
        points, classes = _last_starts(own, split(_at(found.examples, index))[: rank - 1], divisor)
        starts[index, : len(points)], targets[index, : len(points)] = points, classes
    search = partial(search_last, divisor=divisor)
    return _put(found, left, _in_places(sizes[1], left, (subspaces, found, starts, targets), search))


def _last_starts(subspace: BatchSubspace, found: list[Component], divisor: Divisor) -> tuple[np.ndarray, np.ndarray]:
    """Those of the scan over one scalar, and of the next round."""
    values = np.asarray(subspace.singular_values)
    remainder = without(np.asarray(subspace.left) * values, found, values)
    scanned = last_starts(subspace, found, divisor)
    proposed = propose(remainder, 1, divisor.value, 1.0, separately=False)
    return tuple(np.concatenate(both)[:LAST_STARTS] for both in zip(scanned, proposed, strict=True))  # type: ignore[return-value]


def _at(stacked: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _in_places(size: int, indices: np.ndarray, inputs: tuple, function: Callable[..., Any]) -> Any:
    """A function of `size` gradients for some of them, in NumPy: one compiled program for any number."""
    results = []
    for first in range(0, len(indices), size):
        chosen = indices[first : first + size]
        is_wanted = np.arange(size) < len(chosen)
        piece = jax.device_put(_at(inputs, np.concatenate([chosen, np.repeat(chosen[-1:], size - len(chosen))])))
        results.append(_at(jax.device_get(function(*piece, is_wanted=is_wanted)), is_wanted))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *results) if results else None


def _put(found: Found, indices: np.ndarray, new: Found | None) -> Found:
    if new is None:
        return found

    def put(old: np.ndarray, values: np.ndarray) -> np.ndarray:
        old = old.copy()
        old[indices] = values
        return old

    return jax.tree.map(put, found, new)
