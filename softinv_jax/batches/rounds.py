"""One round of the search for a batch's examples: starts from what is left of the gradient, and their solutions."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from softinv_jax.batches.candidates import (
    complement,
    complements,
    cost,
    in_pieces,
    is_nontrivial,
    is_plausible,
    is_same,
    solve,
    split,
    without,
)
from softinv_jax.batches.component import Component, Divisor, strongest_residual
from softinv_jax.batches.proposals import propose, propose_along_rays
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["RAY_ROUNDS", "ROUNDS", "polish", "solutions"]

# Along single rows (None): where an equation has more classes than unknowns to tell sizes by. Or with a factor on the
# starts, and whether pairs of classes start from either row (see `propose`).
RAY_ROUNDS = (None, None)
ROUNDS = ((1.0, False), (2.0, True), (1.0, True), (1.5, False), (4.0, True), (0.6, False))
LONG = 200  # Steps for those few that are worth it.
POLISHING = 30  # Steps for what is nearly there already.


def solutions(
    subspace: BatchSubspace,
    found: list[Component],
    divisor: Divisor,
    round_: tuple[float, bool] | None,
    *,
    confined: bool,
    thorough: bool = False,
) -> Iterator[Component]:
    """Those from all starts; then from the most promising of the rest, by further steps, with other classes too.

    One class more may explain what is left: one shared with another example, or one of small weight.

    Args:
      subspace: of the batch. divisor: D. round_: one of ROUNDS or RAY_ROUNDS.
      found: examples; may grow in between.
      confined: to what is dual to those found. thorough: as for `minimise`.
    """
    values = np.asarray(subspace.singular_values)
    remainder = without(np.asarray(subspace.left) * values, found, values)
    missing = values.size - len(found)
    if round_ is None:
        starts, targets = propose_along_rays(subspace, remainder, missing, divisor.value)
    else:
        stretch, separately = round_
        starts, targets = propose(remainder, missing, divisor.value, stretch, separately=separately)
    bases = complement(found, values) if confined else None
    solved = solve(subspace, starts, targets, divisor, bases=bases, thorough=thorough)
    yield solved
    starts, targets, weights = _continued(subspace, solved, found)
    if len(found) < values.size and len(starts):
        bases = complement(found, values) if confined else None
        yield solve(subspace, starts, targets, divisor, weights, LONG, bases, thorough=thorough)


def polish(subspace: BatchSubspace, found: list[Component], divisor: Divisor, *, confined: bool) -> list[Component]:
    """Each dual to all others, by further steps; without a second class if it can go."""
    if not found:
        return found
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    fewer = np.stack([stacked.targets[:, 0], np.full(len(found), -1, np.int32)], axis=1)
    twice = [np.concatenate([leaf, leaf]) for leaf in (stacked.coordinates, 1 / stacked.deviation)]
    values = np.asarray(subspace.singular_values)
    bases = np.concatenate([complements(found, values)] * 2) if confined else None
    targets = np.concatenate([stacked.targets, fewer])
    solved = solve(subspace, twice[0], targets, divisor, twice[1], POLISHING, bases)
    every = split(solved)
    polished: list[Component] = []
    for old, new, bare in zip(found, every[: len(found)], every[len(found) :], strict=True):
        better = [one for one in (new, bare) if is_plausible(one)]
        best = min(better if confined and better else [old, *better], key=cost)
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
