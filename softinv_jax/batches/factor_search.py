"""The search for the examples of a batch each of which carries a factor of its own.

Class weights and focal loss put one on every example, and an image that is there twice has twice the share. Then no
example's own equation knows its D. But whatever D is, the examples are dual to each other: each that is found leaves
one unknown less to all others. Sets that are complete go into a joint fit that finds every D, and has to explain the
gradient as a whole.
"""

from collections.abc import Callable, Iterator

import numpy as np

from softinv_jax.batches.candidates import complement, distinct, is_plausible, solve, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.evidence import joint_surprise
from softinv_jax.batches.explanation import explains, fit_found
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.scale_search import solutions_of_any_size
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.explanations import UNIQUE_SURPRISE

__all__ = ["LARGEST_RANK", "search_own_factors", "whole_multiples"]

LARGEST_RANK = 12  # Beyond, there are too many sets.
SEEDS = 8  # First examples tried after each round of starts,
BRANCHES = 4  # and next ones after each of them,
JOINT_FITS = 24  # until so many sets were tried.
ROUNDS = 4
SPREADS = (0.0, 0.3, 1.0, 1.0, 3.0)
NEARLY_WHOLE = 1e-2
NEARLY_LABEL = 0.05  # What errors of the others may take entries out of [0, 1] by, before the joint fit.

Whole = tuple[list[Component], JointFit]


def search_own_factors(
    subspace: BatchSubspace, progress: Callable[[int, int], None], total: int
) -> tuple[list[Component], JointFit | None]:
    """Find the examples of a batch and the D of each.

    Args:
      subspace: of the batch. progress: called with (examples found, total). total: the batch size.

    Returns:
      What was found, and the joint fit that is consistent with all of it; nothing where there is none.
    """
    values = np.asarray(subspace.singular_values)
    if not 1 < values.size <= LARGEST_RANK:
        return [], None
    search = _Search(subspace)
    for number, solved in enumerate(_first_solutions(subspace)):
        seeds = distinct([one for one in solved if is_plausible(one)], values, SEEDS)
        for seed in seeds:
            whole = search.grown([seed])
            if whole is not None:
                progress(values.size, total)
                return whole
        if number >= ROUNDS or search.left <= 0:
            break
    return [], None


class _Search:
    """Depth first through sets of examples, up to a number of joint fits."""

    def __init__(self, subspace: BatchSubspace) -> None:
        self.subspace, self.left = subspace, JOINT_FITS

    def grown(self, found: list[Component]) -> Whole | None:
        """The set with what is missing searched for among what is dual to it, if it then explains the gradient."""
        values = np.asarray(self.subspace.singular_values)
        if len(found) == values.size:
            return self._explained(found)
        basis = complement(found, values)
        solved = split(_solve_from_mean(self.subspace, basis, len(found)))
        # Errors of those found reach the others through duality: the joint fit, not this misfit, says what is right.
        for one in distinct([one for one in solved if _is_label(one)], values, BRANCHES):
            if self.left <= 0:
                return None
            whole = self.grown([*found, one])
            if whole is not None:
                return whole
        return None

    def _explained(self, found: list[Component]) -> Whole | None:
        self.left -= 1
        divisors = np.array([float(one.divisor) for one in found])
        joint = fit_found(self.subspace, found, Divisor(1.0), divisors)
        if joint is None or not explains(joint) or np.any(joint.divisors * joint.divisors[0] <= 0):
            return None
        nats = joint_surprise(self.subspace, found, known_divisor=False, own_divisors=True)
        return (found, joint) if nats >= UNIQUE_SURPRISE else None


def _is_label(one: Component) -> bool:
    within = np.all((one.label > -NEARLY_LABEL) & (one.label < 1 + NEARLY_LABEL))
    return bool(np.isfinite(one.misfit) and within and abs(one.constant_error) <= 1e-6)


def _first_solutions(subspace: BatchSubspace) -> Iterator[list[Component]]:
    """Solutions of single equations whose D is not known: from the mean feature where a bias tells it, then any."""
    if np.any(np.asarray(subspace.constant) != 0):
        yield split(_solve_from_mean(subspace, np.eye(subspace.singular_values.size), 0))
    yield from solutions_of_any_size(subspace)


def _solve_from_mean(subspace: BatchSubspace, basis: np.ndarray, found: int) -> Component:
    """From about the mean feature, for every class that the example may single out.

    Features of one network resemble each other: the strongest direction is nearly their mean, and others stand off it
    by the share that the second strongest has.
    """
    values, constant = np.asarray(subspace.singular_values), np.asarray(subspace.constant)
    rng = np.random.default_rng(found)  # Fixed starts, not a random attack.
    spread = np.ptp(np.asarray(subspace.directions)[:, 0])
    mean = np.eye(values.size)[0] * (1 / constant[0] if constant[0] else 4.0 / max(spread, 1e-300))
    share = values[min(1, values.size - 1)] / values[0] * np.linalg.norm(mean)
    starts = mean + np.array([size * share * rng.normal(size=values.size) for size in SPREADS])
    classes = np.arange(len(np.asarray(subspace.left)), dtype=np.int32)
    every = np.repeat(starts, classes.size, axis=0)
    targets = np.stack([np.tile(classes, len(starts)), np.full(len(every), -1, np.int32)], axis=1)
    # Signs of either kind: without a bias nothing tells which way features point.
    if not np.any(constant != 0):
        every, targets = np.concatenate([every, -every]), np.concatenate([targets, targets])
    return solve(subspace, every, targets, Divisor(float(values.size), np.inf), bases=basis)


def whole_multiples(divisors: np.ndarray, deviations: np.ndarray, batch_size: int) -> np.ndarray | None:
    """(n,) how many examples each stands for, where D says whole numbers that add up to the batch size; else None.

    Args:
      divisors: (n,) D of each. deviations: (n,) relative. batch_size: that the gradient is the mean over.
    """
    multiples = batch_size / divisors
    whole = np.round(multiples)
    near = np.abs(multiples - whole) <= np.minimum(NEARLY_WHOLE, 6 * deviations * np.abs(multiples) + 1e-6)
    if np.all(near) and np.all(whole >= 1) and whole.sum() == batch_size:
        return whole.astype(np.int32)
    return None
