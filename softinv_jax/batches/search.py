"""The search for the examples of a batch: rounds of starts, until all are found and explain the gradient together."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from softinv_jax.batches.candidates import (
    accepted,
    cliques,
    cost,
    distinct,
    in_pieces,
    is_nontrivial,
    is_plausible,
    is_same,
    overlaps,
    solve,
    split,
)
from softinv_jax.batches.component import Component, Divisor, strongest_residual
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.growth import Together, explains, fit_found
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.proposals import propose, propose_along_rays
from softinv_jax.batches.remainder import complete_last, gather, without
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["NEARLY_DUAL", "search_batch"]

# Rounds of search, each from what the examples found so far leave of the gradient: first, where an equation has more
# classes than unknowns to tell sizes by, along single rows (None); then with a factor on the starts, and whether pairs
# of classes start from either row (see `propose`).
RAY_ROUNDS = (None, None)
ROUNDS = ((1.0, False), (2.0, True), (1.0, True), (1.5, False), (4.0, True), (0.6, False))
LONG = 200  # Steps for those few that are worth it.
POLISHING = 30  # Steps for what is nearly there already.
LARGEST_ASSEMBLY = 6  # Examples put together from several solutions each,
LARGEST_POOL = 60  # out of at most so many solutions,
NEARLY_DUAL = 1e-3  # which are dual to each other but for their errors;
ASSEMBLIES_TRIED = 20  # so many sets of them are fitted.


def search_batch(
    subspace: BatchSubspace, divisor: Divisor, progress: Callable[[int, int], None], total: int
) -> tuple[list[Component], JointFit | None]:
    """Find the examples of a batch.

    Args:
      subspace: of the batch.
      divisor: D.
      progress: called with (examples found, total).
      total: the batch size.

    Returns:
      What was found, and the joint fit that is consistent with all of it; None where examples are missing, or the fit
      would be too large.
    """
    observed = np.asarray(subspace.left) * np.asarray(subspace.singular_values)
    rank = subspace.singular_values.size
    found: list[Component] = []
    known: Together | None = None  # The first of those found, where they explain the gradient but for what is missing.
    rejected: list[Component] = []
    pool: list[Component] = []
    joint, gathered = None, 0
    number_of_classes = observed.shape[0]
    tells_size = number_of_classes - 1 - rank > rank + TARGETS
    for round_ in (RAY_ROUNDS if tells_size else ()) + ROUNDS:
        remainder = without(observed, found, np.asarray(subspace.singular_values))
        before = len(found)
        missing = rank - len(found)
        solved = solve(subspace, *_starts(subspace, remainder, missing, divisor, round_), divisor)
        found += accepted(subspace, solved, found, rejected)
        progress(len(found), total)
        # The most promising of the rest: further steps; and one class more, where that explains what is left (one
        # shared with another example, or one of small weight).
        pool += [one for one in split(solved) if is_plausible(one)]
        starts, targets, weights = _continued(subspace, solved, found)
        if len(found) < rank and len(starts):
            solved = solve(subspace, starts, targets, divisor, weights, LONG)
            found += accepted(subspace, solved, found, rejected)
            pool += [one for one in split(solved) if is_plausible(one)]
        sharp = [] if known is None else known.examples
        found = _polish(subspace, sharp, found[len(sharp) :], divisor)
        progress(len(found), total)
        if len(found) == rank - 1:
            completed = complete_last(subspace, found, divisor)
            if completed is not None:
                found, joint = completed
                break
        if len(found) == rank:
            joint = fit_found(subspace, found, divisor)
            if joint is None or explains(joint):
                break
            joint = None
        # Nothing new, or not all of them right: those that go together are sharper for it, and tell what they leave.
        if tells_size and (len(found) <= before or len(found) == rank) and len(found) != gathered:
            gathered = len(found)
            known, found = gather(subspace, known, found, divisor)
            progress(len(found), total)
            if known is not None and len(known.examples) == rank:
                if explains(known.fit):
                    found, joint = known.examples, known.fit
                    break
                known = None
        if len(found) == rank:
            # One of them explains its own equation, but not the gradient with the others: the one that fits worst.
            sure = 0 if known is None else len(known.examples)
            worst = max(range(sure, rank), key=lambda index: found[index].misfit)
            rejected.append(found.pop(worst))
    if len(found) < rank <= LARGEST_ASSEMBLY:
        assembled = _assemble(subspace, pool, divisor)
        if assembled is not None:
            return assembled
    return found, joint


def _starts(
    subspace: BatchSubspace, remainder: np.ndarray, missing: int, divisor: Divisor, round_: tuple[float, bool] | None
) -> tuple[np.ndarray, np.ndarray]:
    if round_ is None:
        return propose_along_rays(subspace, remainder, missing, divisor.value)
    stretch, separately = round_
    return propose(remainder, missing, divisor.value, stretch, separately=separately)


def _assemble(
    subspace: BatchSubspace, pool: list[Component], divisor: Divisor
) -> tuple[list[Component], JointFit] | None:
    """Where one example's equation has several solutions: a set of solutions that are dual to each other.

    With few classes the equation of one example may be no more than determined, and wrong solutions explain it as
    well as right ones; but only the right ones are dual to each other.
    """
    values = np.asarray(subspace.singular_values)
    rank = values.size
    solutions = distinct(pool, values, LARGEST_POOL)
    if len(solutions) < max(rank - 1, 1):
        return None
    overlap = np.abs(overlaps(solutions, values) / divisor.value)
    dual = np.maximum(overlap, overlap.T) < NEARLY_DUAL
    for size in (rank, rank - 1):
        tried = 0
        for chosen in cliques(dual, size):
            tried += 1
            if tried > ASSEMBLIES_TRIED:
                break
            members = [solutions[index] for index in chosen]
            if size < rank:
                completed = complete_last(subspace, members, divisor) if members else None
                if completed is not None:
                    return completed
                continue
            joint = fit_found(subspace, members, divisor)
            if joint is not None and explains(joint):
                return members, joint
    return None


def _polish(
    subspace: BatchSubspace, known: list[Component], found: list[Component], divisor: Divisor
) -> list[Component]:
    """Further steps, with the deviations that weigh the equations known; without a second class if it can go.

    Those known are sharper than their own equations can make them: they stay, and come first.
    """
    if not found:
        return known
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    fewer = np.stack([stacked.targets[:, 0], np.full(len(found), -1, np.int32)], axis=1)
    twice = [np.concatenate([leaf, leaf]) for leaf in (stacked.coordinates, 1 / stacked.deviation)]
    solved = solve(subspace, twice[0], np.concatenate([stacked.targets, fewer]), divisor, twice[1], POLISHING)
    every = split(solved)
    values = np.asarray(subspace.singular_values)
    polished = list(known)
    for old, new, bare in zip(found, every[: len(found)], every[len(found) :], strict=True):
        best = min([old] + [one for one in (new, bare) if is_plausible(one)], key=cost)
        # Two can turn out to be on their way to one and the same: the other is searched for again.
        if not any(is_same(best, other, values) for other in polished):
            polished.append(best)
    return polished


def _continued(
    subspace: BatchSubspace, solved: Component, found: list[Component]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the search got to from the best starts, with the same classes and with one more or another one."""
    values = np.asarray(subspace.singular_values)
    extra = in_pieces(partial(strongest_residual, subspace), solved)
    every = split(solved)
    starts: list[np.ndarray] = []
    targets: list[tuple[int, int]] = []
    weights: list[np.ndarray] = []
    for index in np.argsort(np.where(np.isfinite(solved.misfit), solved.misfit, np.inf)):
        if len(starts) >= 6 * (values.size - len(found)):
            break
        one = every[index]
        if not is_nontrivial(one) or any(is_same(one, other, values) for other in found):
            continue
        first, second = one.targets
        for last in (second, *extra[index]):
            starts.append(np.asarray(one.coordinates))
            targets.append((first, last))
            weights.append(1 / np.asarray(one.deviation))
    return np.array(starts), np.array(targets, np.int32), np.array(weights)
