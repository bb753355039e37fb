"""Which of the examples found can be relied on: no other choice of classes does as well, none contradicts the others.

Examples are dual to each other. A wrong one confines all others to where they are not, and their equations no longer
agree; without it they do.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from softinv_jax.batches.candidates import complement, cost, in_pieces, is_plausible, is_same, solve, split
from softinv_jax.batches.component import Component, Divisor, strongest_residual
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = ["unrivalled", "without_contradictions"]

STEPS = 10  # What is right is near already.
LARGEST_SHARE = 1 / 3  # Of a set in which more are wrong, nothing is known.
LARGEST_MISFIT = 1e3  # One equation that is far off must not hide what the others say.


def unrivalled(
    subspace: BatchSubspace, candidates: list[Component], bases: np.ndarray, divisor: Divisor
) -> tuple[list[Component], list[Component]]:
    """Those whose label no other choice of classes explains about as well, and the others; each the best choice."""
    if not candidates:
        return [], []
    values = np.asarray(subspace.singular_values)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *candidates)
    first, second = stacked.targets.T
    second = np.where(second < 0, first, second)
    alone = np.concatenate([first, second])
    single = np.stack([alone, np.full_like(alone, -1)], axis=1)
    twice = np.concatenate([stacked.coordinates] * 2)
    bare = solve(subspace, twice, single, divisor, None, 0, np.concatenate([bases] * 2))
    extra = in_pieces(partial(strongest_residual, subspace), bare)
    choices = np.concatenate([single, *(np.stack([alone, other], axis=1) for other in extra.T)])
    starts = np.concatenate([stacked.coordinates] * (len(choices) // len(candidates)))
    every = split(solve(subspace, starts, choices, divisor, bases=np.resize(bases, (len(starts), *bases.shape[1:]))))
    sure: list[Component] = []
    doubtful: list[Component] = []
    for index, candidate in enumerate(candidates):
        rivals = [one for one in every[index :: len(candidates)] if is_plausible(one)]
        best = min([candidate, *rivals], key=cost)
        close = [one for one in [candidate, *rivals] if cost(one) <= cost(best) + TOLERANCE**2]
        reach = [TOLERANCE * np.max(one.label_deviation + best.label_deviation) for one in close]
        apart = [np.max(np.abs(one.label - best.label)) > limit for one, limit in zip(close, reach, strict=True)]
        if any(apart):
            doubtful.append(best)
        elif not any(is_same(best, other, values) for other in sure):
            sure.append(best)
    return sure, doubtful


def without_contradictions(
    subspace: BatchSubspace, found: list[Component], divisor: Divisor
) -> tuple[list[Component], list[Component]]:
    """Those found that agree with each other, and those left out for it; all of them where that takes too many."""
    kept, dropped = list(found), list[Component]()
    for _ in range(1 + int(LARGEST_SHARE * len(found))):
        if _are_plausible(subspace, kept, divisor):
            return kept, dropped
        dropped.append(kept.pop(_most_contradictory(subspace, kept, divisor)))
    return found, []


def _confined(
    subspace: BatchSubspace, found: list[Component], divisor: Divisor, pairs: Sequence[tuple[int, int | None]]
) -> Component:
    """The first of each pair, confined to what is dual to all others but the second."""
    values = np.asarray(subspace.singular_values)
    bases = [complement([found[k] for k in range(len(found)) if k not in pair], values) for pair in pairs]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[found[one] for one, _ in pairs])
    return solve(subspace, stacked.coordinates, stacked.targets, divisor, None, STEPS, np.array(bases))


def _are_plausible(subspace: BatchSubspace, found: list[Component], divisor: Divisor) -> bool:
    if len(found) <= 1:
        return True
    solved = _confined(subspace, found, divisor, [(index, None) for index in range(len(found))])
    return all(map(is_plausible, split(solved)))


def _most_contradictory(subspace: BatchSubspace, found: list[Component], divisor: Divisor) -> int:
    """Without which the others fit best."""
    pairs = [(one, left) for left, one in itertools.product(range(len(found)), repeat=2) if one != left]
    solved = _confined(subspace, found, divisor, pairs)
    misfit = np.where(np.isfinite(solved.misfit), np.clip(solved.misfit, 1.0, LARGEST_MISFIT), LARGEST_MISFIT)
    scores = np.zeros(len(found))
    np.add.at(scores, [left for _, left in pairs], np.log(misfit))
    return int(np.argmin(scores))
