"""The search for the examples of a batch whose gradient carries an unknown factor.

Every example tells D by itself, D = x^T G^+ g, and all of one batch must tell the same one. So single examples are
searched for without the equation that needs D, from starts of many sizes; where some that are dual to each other agree
about D, the whole batch is searched for with it.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from softinv_jax.batches.assembly import NEARLY_DUAL
from softinv_jax.batches.candidates import cost, distinct, is_plausible, overlaps, solve, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.evidence import example_surprise, joint_surprise
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.proposals import propose
from softinv_jax.batches.search import search_batch
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.explanations import UNIQUE_SURPRISE
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = ["search_any_scale", "solutions_of_any_size"]

RATIO = 1.5  # Between one size of the starts and the next,
SMALLEST, LARGEST = 0.2, 300.0  # in ranges of the logits,
USUAL = 5.0  # beginning here.
LARGEST_POOL = 100
# Factor on the starts, and whether pairs of classes start from either row, and from all of them.
ROUNDS = ((1.0, False), (2.0, True))
HYPOTHESES = 2  # Values of D tried after each size,
LAST_HYPOTHESES = 10  # and in the end, of those that a single solution tells.
FINEST = 1e-12  # Relative deviation of D.

Found = tuple[Divisor, list[Component], JointFit | None]


def search_any_scale(subspace: BatchSubspace, progress: Callable[[int, int], None], total: int) -> Found:
    """Find D and the examples of a batch.

    Args:
      subspace: of the batch.
      progress: called with (examples found, total).
      total: the batch size.

    Returns:
      D, NaN where nothing was found, with a deviation that is never 0; and what `search_batch` returns.
    """
    best: Found = (Divisor(np.nan, np.nan), [], None)
    for hypothesis in _hypotheses(subspace):
        found, joint = search_batch(subspace, hypothesis, progress, total)
        divisor = hypothesis if joint is None else _fine(joint.divisors[0], joint.divisors_deviation[0])
        if _is_certain(subspace, found, joint):
            return divisor, found, joint
        if len(found) > len(best[1]) or (joint is not None and best[2] is None):
            best = divisor, found, joint
    return best


def _hypotheses(subspace: BatchSubspace) -> Iterator[Divisor]:
    """What D may be, each value once: as soon as some solutions agree about it; in the end, what single ones tell."""
    values = np.asarray(subspace.singular_values)
    pool: list[Component] = []
    tried: list[Divisor] = []

    def untried(hypotheses: list[Divisor]) -> Iterator[Divisor]:
        for hypothesis in hypotheses:
            if not any(_agree(hypothesis, other) for other in tried):
                tried.append(hypothesis)
                yield hypothesis

    for solved in solutions_of_any_size(subspace):
        pool = distinct([*pool, *(one for one in solved if is_plausible(one))], values, LARGEST_POOL)
        yield from untried(_agreed(subspace, pool, alone=False)[:HYPOTHESES])
    yield from untried(_agreed(subspace, pool, alone=True)[:LAST_HYPOTHESES])


def solutions_of_any_size(subspace: BatchSubspace) -> Iterator[list[Component]]:
    """Solutions of single equations without duality, from starts of one size after the other."""
    observed = np.asarray(subspace.left) * np.asarray(subspace.singular_values)
    sizes = np.geomspace(SMALLEST, LARGEST, 1 + round(np.log(LARGEST / SMALLEST) / np.log(RATIO)))
    for stretch, thorough in ROUNDS:
        # Starts are in proportion to D.
        starts, targets = propose(observed, len(observed[0]), 1.0, stretch, separately=thorough, thorough=thorough)
        logits = starts[targets[:, 1] < 0] @ np.asarray(subspace.directions).T
        spread = max(float(np.median(np.ptp(logits, axis=1))) / stretch, 1e-300)
        for sign in (1.0, -1.0):
            for size in sorted(sizes, key=lambda size: abs(np.log(size / USUAL))):
                divisor = Divisor(sign * size / spread, np.inf)
                yield split(solve(subspace, divisor.value * starts, targets, divisor))


def _agreed(subspace: BatchSubspace, pool: list[Component], *, alone: bool) -> list[Divisor]:
    """What D may be: first where most solutions that are dual to each other agree about it.

    A single solution counts if it is no accident, or `alone`.
    """
    sharp = [one for one in sorted(pool, key=cost) if TOLERANCE * one.divisor_deviation <= 0.5]
    if not sharp:
        return []
    told = [_fine(one.divisor, one.divisor_deviation) for one in sharp]
    size = np.sqrt(np.abs([one.value for one in told]))
    overlap = np.abs(overlaps(sharp, np.asarray(subspace.singular_values))) / size[:, None] / size
    dual = np.maximum(overlap, overlap.T) < NEARLY_DUAL
    groups: list[list[int]] = []
    for first in range(len(sharp)):
        group = [first]
        for other in range(len(sharp)):
            if all(dual[other, one] and _agree(told[other], told[one]) for one in group):
                group.append(other)
        enough = alone or len(group) >= min(subspace.singular_values.size, 2)
        if enough or example_surprise(subspace, sharp[first], known_divisor=False) >= UNIQUE_SURPRISE:
            groups.append(group)
    groups.sort(key=len, reverse=True)
    hypotheses: list[Divisor] = []
    for group in groups:
        hypothesis = _mean([told[index] for index in group])
        if not any(_agree(hypothesis, other) for other in hypotheses):
            hypotheses.append(hypothesis)
    return hypotheses


def _agree(first: Divisor, second: Divisor) -> bool:
    ratio = first.value / second.value
    return ratio > 0 and abs(np.log(ratio)) <= TOLERANCE * np.hypot(first.deviation, second.deviation)


def _mean(told: list[Divisor]) -> Divisor:
    """The likeliest D; not sharper than those who tell it agree."""
    values = np.array([one.value for one in told])
    weights = np.array([one.deviation for one in told]) ** -2.0
    value = np.average(values, weights=weights)
    spread = np.sqrt(np.average((values / value - 1) ** 2, weights=weights))
    return _fine(value, np.hypot(np.sum(weights) ** -0.5, spread))


def _fine(value: float | jax.Array, deviation: float | jax.Array) -> Divisor:
    return Divisor(float(value), max(float(deviation), FINEST))


def _is_certain(subspace: BatchSubspace, found: list[Component], joint: JointFit | None) -> bool:
    if joint is not None and joint_surprise(subspace, found, known_divisor=False) >= UNIQUE_SURPRISE:
        return True
    certain = [example_surprise(subspace, one, known_divisor=False) >= UNIQUE_SURPRISE for one in found]
    return sum(certain) >= min(subspace.singular_values.size, 2)
