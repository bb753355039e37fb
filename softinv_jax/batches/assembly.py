"""The search where one example's equation may have several solutions: with few classes.

Wrong solutions explain it as well as right ones; but only right ones explain the whole gradient together.
"""

import itertools
from collections.abc import Callable

import numpy as np

from softinv_jax.batches.candidates import accepted, cliques, distinct, is_plausible, overlaps, split, take_worst
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.last_example import completed
from softinv_jax.batches.rounds import ROUNDS, polish, solutions
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["NEARLY_DUAL", "search_assembling"]

LARGEST_ASSEMBLY = 6  # Examples put together from several solutions each,
LARGEST_POOL = 60  # out of at most so many solutions,
NEARLY_DUAL = 1e-3  # which are dual to each other but for their errors;
ASSEMBLIES_TRIED = 20  # so many sets of each size are tried,
MOST_MISSING = 3  # with so many examples missing.


def search_assembling(
    subspace: BatchSubspace, divisor: Divisor, progress: Callable[[int, int], None], total: int
) -> tuple[list[Component], JointFit | None]:
    """As `search_batch`: rounds of the search, solutions on trust until the joint fit; then sets of them."""
    rank = subspace.singular_values.size
    found: list[Component] = []
    rejected: list[Component] = []
    pool: list[Component] = []
    for round_ in ROUNDS:
        for solved in solutions(subspace, found, divisor, round_, confined=False):
            found += accepted(subspace, solved, found, rejected)
            pool += [one for one in split(solved) if is_plausible(one)]
            progress(len(found), total)
        found = polish(subspace, found, divisor, confined=False)
        progress(len(found), total)
        whole = completed(subspace, found, divisor, confined=False)
        if whole is not None:
            return whole
        if len(found) == rank:
            # One of them explains its own equation, but not the gradient with the others.
            rejected.append(take_worst(found))
    return (_assemble(subspace, pool, divisor) if rank <= LARGEST_ASSEMBLY else None) or (found, None)


def _assemble(
    subspace: BatchSubspace, pool: list[Component], divisor: Divisor
) -> tuple[list[Component], JointFit | None] | None:
    """A set of solutions that are dual to each other, and explain the gradient; what is missing is searched for."""
    values = np.asarray(subspace.singular_values)
    likely = distinct(pool, values, LARGEST_POOL)
    overlap = np.abs(overlaps(likely, values) / divisor.value)
    dual = np.maximum(overlap, overlap.T) < NEARLY_DUAL
    for size in range(values.size, max(values.size - 1 - MOST_MISSING, 0), -1):
        for chosen in itertools.islice(cliques(dual, size), ASSEMBLIES_TRIED):
            whole = _grown(subspace, [likely[index] for index in chosen], divisor)
            if whole is not None:
                return whole
    return None


def _grown(
    subspace: BatchSubspace, found: list[Component], divisor: Divisor
) -> tuple[list[Component], JointFit | None] | None:
    """Depth first: if those found are right, each leaves one unknown less to the others, and few wrong solutions."""
    if len(found) >= subspace.singular_values.size - 1:
        return completed(subspace, found, divisor, confined=False)
    tried: list[Component] = []
    for round_ in ROUNDS:
        for solved in solutions(subspace, found, divisor, round_, confined=True):
            for one in accepted(subspace, solved, found, tried):
                tried.append(one)
                whole = _grown(subspace, [*found, one], divisor)
                if whole is not None:
                    return whole
    return None
