"""The search where one example's equation may have several solutions: with few classes.

Wrong solutions explain it as well as right ones; but only right ones explain the whole gradient together.
"""

from collections.abc import Callable

import numpy as np

from softinv_jax.batches.candidates import accepted, cliques, distinct, is_plausible, overlaps, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.explanation import explains, fit_found
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.last_example import complete_last
from softinv_jax.batches.rounds import ROUNDS, polish, solutions
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["NEARLY_DUAL", "search_assembling"]

LARGEST_ASSEMBLY = 6  # Examples put together from several solutions each,
LARGEST_POOL = 60  # out of at most so many solutions,
NEARLY_DUAL = 1e-3  # which are dual to each other but for their errors;
ASSEMBLIES_TRIED = 20  # so many sets of them are fitted.


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
        if len(found) == rank - 1:
            completed = complete_last(subspace, found, divisor, confined=False)
            if completed is not None:
                return completed
        if len(found) == rank:
            joint = fit_found(subspace, found, divisor)
            if joint is None or explains(joint):
                return found, joint
            # One of them explains its own equation, but not the gradient with the others: the one that fits worst.
            rejected.append(found.pop(max(range(rank), key=lambda index: found[index].misfit)))
    return (_assemble(subspace, pool, divisor) if rank <= LARGEST_ASSEMBLY else None) or (found, None)


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
                completed = complete_last(subspace, members, divisor, confined=False) if members else None
                if completed is not None:
                    return completed
                continue
            joint = fit_found(subspace, members, divisor)
            if joint is not None and explains(joint):
                return members, joint
    return None
