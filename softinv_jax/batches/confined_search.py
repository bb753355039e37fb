"""The search where one example's equation has many more classes than unknowns, each found leaving fewer to the others.

Examples are dual to each other, x_i^T G^+ g_j = 0. A label found is known far better than its feature, and so is g_j:
from then on every other example has one unknown less, and those found already become sharper too.
"""

from collections.abc import Callable

import numpy as np

from softinv_jax.batches.candidates import accepted, complement, complements, cost, is_same, take_worst
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.consistency import unrivalled, without_contradictions
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.last_example import completed
from softinv_jax.batches.rounds import RAY_ROUNDS, ROUNDS, polish, solutions
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["search_confined"]

WELL_DETERMINED = 3  # So many equations for each unknown.
REVISIONS = 8  # How often those found are gone over for wrong ones.


def search_confined(
    subspace: BatchSubspace, divisor: Divisor, progress: Callable[[int, int], None], total: int
) -> tuple[list[Component], JointFit | None]:
    """As `search_batch`: rounds of the search, from the first again as long as there are more."""
    values = np.asarray(subspace.singular_values)
    found: list[Component] = []
    doubtful: list[Component] = []
    rejected: list[Component] = []
    rounds: list[tuple[float, bool] | None] = [*RAY_ROUNDS, *ROUNDS]
    most = revisions = 0
    thorough_from = -1 if len(subspace.left) - 1 - values.size < WELL_DETERMINED * values.size else values.size
    thorough = False
    while True:
        for solved in solutions(subspace, found, divisor, rounds.pop(0), confined=True, thorough=thorough):
            new = accepted(subspace, solved, found, rejected)
            bases = np.array([complement(found, values)] * len(new))
            new, rivalled = unrivalled(subspace, new, bases, divisor)
            found += new
            doubtful += rivalled
            progress(len(found), total)
        found = polish(subspace, found, divisor, confined=True)
        progress(len(found), total)
        if len(found) > most:
            most, rounds = len(found), [round_ for round_ in rounds if round_ is None] + list(ROUNDS)
        if rounds and len(found) < values.size - 1:
            continue
        if thorough_from < len(found) < values.size - 1:
            # Straight steps crawl where equations hardly tell all unknowns; and those found since leave fewer.
            thorough, thorough_from, rounds = True, len(found), [*RAY_ROUNDS, *ROUNDS]
            found, _ = without_contradictions(subspace, found, divisor)
            continue
        whole = completed(subspace, found, divisor, confined=True)
        if whole is not None:
            return whole
        revisions += 1
        if revisions > REVISIONS:
            break
        found, wrong = without_contradictions(subspace, found, divisor)
        if len(found) == values.size:
            # Each explains its own equation, dual to the others, but not all together.
            rejected.append(take_worst(found))
        elif not (wrong or rounds):
            # Right or wrong: the more there are, the sooner it shows.
            added = _different(doubtful, found, values)
            if not added:
                break
            found, doubtful = found + added, []
        rounds = rounds or list(ROUNDS)
    # What is still doubtful is not told.
    return unrivalled(subspace, found, complements(found, values), divisor)[0], None


def _different(doubtful: list[Component], found: list[Component], values: np.ndarray) -> list[Component]:
    """The likeliest, each once, of those that are not among those found; they leave one missing."""
    added: list[Component] = []
    for one in sorted(doubtful, key=cost):
        if not any(is_same(one, other, values) for other in found + added):
            added.append(one)
    return added[: max(values.size - 1 - len(found), 0)]
