"""`recover_batches`: many gradients of batches at once; what the first rounds leave open is searched for one by one."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

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
    BatchGradient,
    BatchOutcome,
    BatchSpaces,
    balanced,
    search_all,
    usual_divisor,
)
from softinv_jax.batches.candidates import split
from softinv_jax.batches.component import Divisor
from softinv_jax.batches.explanation import explains, is_fitted
from softinv_jax.batches.lockstep import Found, fit_all, nothing_found, search_round
from softinv_jax.batches.search import is_confined
from softinv_jax.float64 import in_float64
from softinv_jax.observation.head import Observation, observe

__all__ = ["recover_batches"]

ROUNDS = 3
GROUP_ON_CPU = 8  # Gradients at a time,
GROUP = 64  # and on an accelerator, which does all of them in the time of one.
REST = 4  # One so much smaller for those that are left after a round.


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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        spaces = list(pool.map(lambda gradient: gradient.decompose(None), gradients))
    recoveries: dict[int, BatchRecovery] = {}
    alone: list[int] = []

    def conclude(index: int, outcome: BatchOutcome) -> None:
        recoveries[index] = conclude_batch(gradients[index], outcome)
        progress(len(recoveries), len(gradients))

    for indices in _groups(gradients, spaces, asked):
        outcomes = _search_group([spaces[index] for index in indices], asked) if len(indices) > 1 else [None]
        for index, outcome in zip(indices, outcomes, strict=True):
            if outcome is None:
                alone.append(index)
            else:
                conclude(index, balanced(outcome, gradients[index]))
    for index in alone:
        conclude(index, search_all(gradients[index], asked, lambda found, total: None, spaces[index]))
    return [recoveries[index] for index in range(len(gradients))]


def _groups(gradients: list[BatchGradient], spaces: list[BatchSpaces], asked: BatchAsked) -> Iterator[list[int]]:
    """Gradients that are searched together: of one rank, and as many examples as were told; others by themselves."""
    size = GROUP_ON_CPU if jax.default_backend() == "cpu" else GROUP
    by_rank: dict[int, list[int]] = {}
    for index, space in enumerate(spaces):
        as_told = asked.told_scale and asked.loss != "weighted_cross_entropy" and asked.batch_size in (None, space.rank)
        together = as_told and space.rank > 0 and is_confined(space.subspace) and is_fitted(space.rank)
        if together:
            by_rank.setdefault(space.rank, []).append(index)
        else:
            yield [index]
    for indices in by_rank.values():
        yield from (indices[first : first + size] for first in range(0, len(indices), size))


def _search_group(spaces: list[BatchSpaces], asked: BatchAsked) -> list[BatchOutcome | None]:
    """Those that the first rounds explain as a whole; None for the others."""
    rank = spaces[0].rank
    usual = usual_divisor(rank, asked)
    divisor = Divisor(usual)
    group = GROUP_ON_CPU if jax.default_backend() == "cpu" else GROUP
    subspaces = jax.tree.map(lambda *leaves: np.stack(leaves), *[one.subspace for one in spaces])
    found = nothing_found(subspaces, divisor)
    for round_ in range(ROUNDS):
        left = np.flatnonzero(~found.is_filled.all(axis=1))
        if not len(left):
            break
        missing = rank - found.is_sure[left].sum(axis=1).min()
        # Twice the starts, or as many as choices of classes are compared afterwards.
        rows = rank if 2 * missing + 4 <= rank else 2 * rank + 4
        size = group if round_ == 0 or jax.default_backend() == "cpu" else group // REST
        new = _in_places(size, left, (subspaces, found), lambda *each: search_round(*each, divisor, rows))
        found = _put(found, left, new)
    whole = np.flatnonzero(found.is_filled.all(axis=1))
    examples, joint, is_whole = _in_places(group, whole, (subspaces, found), lambda *each: fit_all(*each, divisor))
    outcomes: list[BatchOutcome | None] = [None] * len(spaces)
    for place, index in enumerate(whole):
        own = jax.tree.map(lambda leaf, place=place: leaf[place], joint)
        if is_whole[place] and explains(own):
            each = split(jax.tree.map(lambda leaf, place=place: leaf[place], examples))
            outcomes[index] = BatchOutcome(spaces[index], each, own, divisor, rank, usual)
    return outcomes


def _in_places(size: int, indices: np.ndarray, inputs: object, function: Callable) -> object:
    """A function of `size` gradients for some of them: one compiled program for any number."""
    if not len(indices):
        indices = np.zeros((1,), np.int64)
    results = []
    for first in range(0, len(indices), size):
        chosen = indices[first : first + size]
        places = np.concatenate([chosen, np.repeat(chosen[-1:], size - len(chosen))])
        piece = jax.tree.map(lambda leaf, places=places: leaf[places], inputs)
        results.append(jax.device_get(function(*piece, np.arange(size) < len(chosen))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(indices)], *results)


def _put(found: Found, indices: np.ndarray, new: Found) -> Found:
    def put(old: np.ndarray, values: np.ndarray) -> np.ndarray:
        old[indices] = values[: len(indices)]
        return old

    return jax.tree.map(put, found, new)
