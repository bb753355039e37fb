"""The search for the examples of a batch: rounds of starts, until all are found and explain the gradient together."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.candidates import (
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
from softinv_jax.batches.joint import JointFit, fit_jointly
from softinv_jax.batches.proposals import propose, propose_along_rays
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.scalar_equation import TOLERANCE

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
SCAN = 1000  # Scalars tried for the last example, of either sign,
LAST_STARTS = 16  # how many of them are refined,
LAST_STEPS = 20  # by how many steps,
LAST_TRIED = 6  # and how many then take part in a joint fit.
# With more unknowns than this, whose normal matrix alone has 288 MiB, the joint fit is left out.
LARGEST_JOINT = 6144


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
    rejected: list[Component] = []
    pool: list[Component] = []
    joint = None
    number_of_classes = observed.shape[0]
    tells_size = number_of_classes - 1 - rank > rank + TARGETS
    for round_ in (RAY_ROUNDS if tells_size else ()) + ROUNDS:
        remainder = _without(observed, found, np.asarray(subspace.singular_values))
        missing = rank - len(found)
        if round_ is None:
            starts, targets = propose_along_rays(subspace, remainder, missing, divisor.value)
        else:
            stretch, separately = round_
            starts, targets = propose(remainder, missing, divisor.value, stretch, separately=separately)
        solved = solve(subspace, starts, targets, divisor)
        found += _accepted(subspace, solved, found, rejected)
        progress(len(found), total)
        # The most promising of the rest: further steps; and one class more, where that explains what is left (one
        # shared with another example, or one of small weight).
        pool += [one for one in split(solved) if is_plausible(one)]
        starts, targets, weights = _continued(subspace, solved, found)
        if len(found) < rank and len(starts):
            solved = solve(subspace, starts, targets, divisor, weights, LONG)
            found += _accepted(subspace, solved, found, rejected)
            pool += [one for one in split(solved) if is_plausible(one)]
        found = _polish(subspace, found, divisor)
        progress(len(found), total)
        if len(found) == rank - 1:
            completed = _complete(subspace, found, divisor)
            if completed is not None:
                found, joint = completed
                break
        if len(found) == rank:
            joint = _joint(subspace, found, divisor)
            if joint is None or _consistent(joint):
                break
            # One of them explains its own equation, but not the gradient with the others: the one that fits worst.
            worst = max(range(rank), key=lambda index: found[index].misfit)
            rejected.append(found.pop(worst))
            joint = None
    if len(found) < rank <= LARGEST_ASSEMBLY:
        assembled = _assemble(subspace, pool, divisor)
        if assembled is not None:
            return assembled
    return found, joint


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
                completed = _complete(subspace, members, divisor) if members else None
                if completed is not None:
                    return completed
                continue
            joint = _joint(subspace, members, divisor)
            if joint is not None and _consistent(joint):
                return members, joint
    return None


def _without(observed: np.ndarray, found: list[Component], values: np.ndarray) -> np.ndarray:
    """(C, B) rows of the gradient less the examples found, and dual to them: free of the errors of their features."""
    if not found:
        return observed
    duals = np.array([one.dual / values for one in found])
    coordinates = np.array([one.coordinates for one in found])
    return observed - (observed @ duals.T) @ np.linalg.solve(coordinates @ duals.T, coordinates)


def _polish(subspace: BatchSubspace, found: list[Component], divisor: Divisor) -> list[Component]:
    """Further steps, with the deviations that weigh the equations known; without a second class if it can go."""
    if not found:
        return found
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    fewer = np.stack([stacked.targets[:, 0], np.full(len(found), -1, np.int32)], axis=1)
    twice = [np.concatenate([leaf, leaf]) for leaf in (stacked.coordinates, 1 / stacked.deviation)]
    solved = solve(subspace, twice[0], np.concatenate([stacked.targets, fewer]), divisor, twice[1], POLISHING)
    every = split(solved)
    values = np.asarray(subspace.singular_values)
    polished: list[Component] = []
    for old, new, bare in zip(found, every[: len(found)], every[len(found) :], strict=True):
        best = min([old] + [one for one in (new, bare) if is_plausible(one)], key=cost)
        # Two can turn out to be on their way to one and the same: the other is searched for again.
        if not any(is_same(best, other, values) for other in polished):
            polished.append(best)
    return polished


def _complete(
    subspace: BatchSubspace, found: list[Component], divisor: Divisor
) -> tuple[list[Component], JointFit] | None:
    """The last example: its two factors are known up to one scalar, as those of a single example's gradient are.

    Dual to all others, x and g have one direction left each; duality fixes their product. The scalar is scanned, and
    what explains most is left to the joint fit, which also sharpens the others.
    """
    left, values = np.asarray(subspace.left), np.asarray(subspace.singular_values)
    duals = np.array([one.dual / values for one in found]).reshape(len(found), values.size)
    others = np.array([one.coordinates / values for one in found]).reshape(len(found), values.size)
    direction, dual = np.linalg.svd(duals)[2][-1], np.linalg.svd(others)[2][-1]
    product = (direction / values) @ dual
    if not np.isfinite(product) or product == 0:
        return None
    dual = dual * divisor.value / product
    logits, gradient = np.asarray(subspace.directions) @ direction, left @ dual
    spread = max(float(np.ptp(logits)), 1e-300)
    magnitudes = np.geomspace(0.02, 500.0, SCAN) / spread
    if np.any(np.asarray(subspace.constant)):
        magnitudes = np.array([abs(1 / (np.asarray(subspace.constant) @ direction))])
    scalars = np.concatenate([-magnitudes[::-1], magnitudes])
    shifted = scalars[:, None] * logits
    prediction = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    prediction /= prediction.sum(axis=1, keepdims=True)
    label = prediction - gradient / scalars[:, None]
    level = np.median(label, axis=1, keepdims=True)
    # How far a step of the scan moves each entry bounds how well it can agree.
    slope = prediction * (shifted - np.sum(prediction * shifted, axis=1, keepdims=True)) + np.abs(label - prediction)
    residual = np.abs(label - level) / (np.abs(slope) * np.log(magnitudes[-1] / magnitudes[0]) / SCAN + 1e-9)
    order = np.argsort(-residual, axis=1)
    loss = np.sum(np.minimum(np.take_along_axis(residual, order[:, TARGETS:], axis=1), 1e6) ** 2, axis=1)
    starts: list[np.ndarray] = []
    targets: list[list[int]] = []
    for index in np.argsort(loss)[:LAST_STARTS]:
        for count in range(1, TARGETS + 1):
            starts.append(scalars[index] * direction)
            strongest = order[index, :TARGETS]
            strongest = strongest[np.argsort(-label[index, strongest])]
            targets.append([*strongest[:count], *(-1,) * (TARGETS - count)])
    solved = split(solve(subspace, np.array(starts), np.array(targets, np.int32), divisor, None, LAST_STEPS))
    for one in sorted(filter(is_nontrivial, solved), key=cost)[:LAST_TRIED]:
        if any(is_same(one, other, values) for other in found):
            continue
        joint = _joint(subspace, [*found, one], divisor)
        if joint is not None and _consistent(joint):
            return [*found, one], joint
    return None


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


def _consistent(joint: JointFit) -> bool:
    return bool(joint.misfit <= TOLERANCE / 2)


def _accepted(
    subspace: BatchSubspace, solved: Component, found: list[Component], rejected: list[Component]
) -> list[Component]:
    """Plausible solutions, the likeliest first, each different from all others."""
    values = np.asarray(subspace.singular_values)
    candidates = sorted((one for one in split(solved) if is_plausible(one)), key=cost)
    taken: list[Component] = []
    for one in candidates:
        if len(found) + len(taken) >= values.size:
            break
        again = any(
            np.max(np.abs(one.label - other.label)) <= TOLERANCE * np.max(one.label_deviation + other.label_deviation)
            for other in rejected
        )
        if not again and not any(is_same(one, other, values) for other in found + taken):
            taken.append(one)
    return taken


def _joint(subspace: BatchSubspace, found: list[Component], divisor: Divisor) -> JointFit | None:
    rank = subspace.singular_values.size
    if len(found) * (rank + TARGETS) > LARGEST_JOINT:
        return None
    coordinates = jnp.asarray(np.array([one.coordinates for one in found]))
    targets = jnp.asarray(np.array([one.targets for one in found]), jnp.int32)
    weights = np.array([np.where(one.targets >= 0, one.label[one.targets] - one.level, 0.0) for one in found])
    fit = fit_jointly(subspace, coordinates, jnp.asarray(weights), targets, divisor)
    return jax.tree.map(np.asarray, fit)
