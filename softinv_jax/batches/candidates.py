"""Solutions of one example's equation: whether each is one at all, how likely it is, which of them go together."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.component import (
    ITERATIONS,
    Component,
    Divisor,
    solve_components,
    starting_weights,
)
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = [
    "accepted",
    "cliques",
    "complement",
    "complements",
    "cost",
    "distinct",
    "in_pieces",
    "is_nontrivial",
    "is_plausible",
    "is_same",
    "largest_misfit",
    "overlaps",
    "plausible",
    "solve",
    "split",
    "take_worst",
    "without",
]

PIECE = 64  # Starts solved at a time.
# Misfit of the truth by the noise expected of a client's float32: 0.5 to 1.4, by the order in which it sums.
LARGEST_EXPECTED = 1.4


def solve(
    subspace: BatchSubspace,
    starts: np.ndarray,
    targets: np.ndarray,
    divisor: Divisor,
    weights: np.ndarray | None = None,
    iterations: int = ITERATIONS,
    bases: np.ndarray | None = None,
    *,
    thorough: bool = False,
) -> Component:
    """All starts; NumPy. bases: (B, B) for all of them, or (n, B, B). thorough: as for `minimise`."""
    chosen = targets.astype(np.int32)
    bases = np.broadcast_to(np.eye(starts.shape[1]) if bases is None else bases, (len(starts), *[starts.shape[1]] * 2))
    if weights is None:
        weights = in_pieces(partial(starting_weights, subspace), starts, chosen)

    def solve_piece(*piece: jax.Array) -> Component:
        return solve_components(subspace, *piece[:3], divisor, iterations, piece[3], thorough=thorough)

    return in_pieces(solve_piece, starts, chosen, weights, bases)


def in_pieces(function: Callable[..., Any], *inputs: Any) -> Any:
    """A function of arrays with a common leading axis, PIECE entries at a time: one compiled program for any number."""
    count = len(jax.tree.leaves(inputs)[0])
    missing = -count % PIECE
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], missing, axis=0)]), inputs)
    results = []
    for first in range(0, count, PIECE):
        piece = jax.tree.map(lambda leaf, first=first: jnp.asarray(leaf[first : first + PIECE]), padded)
        results.append(function(*piece))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *results)


def split(stacked: Component) -> list[Component]:
    """One by one, along the leading axis."""
    return [jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(len(stacked.misfit))]


def plausible(stacked: Component) -> list[Component]:
    """Those that are, one by one."""
    return split(jax.tree.map(lambda leaf: leaf[is_plausible(stacked)], stacked))


def largest_misfit(freedom: Any) -> Any:
    """Root mean square residual, in standard deviations, that noise may cause; of numbers, NumPy or jax arrays.

    A single one may miss by TOLERANCE deviations, few may be no more than that one, and many have at most half of it as
    their root mean square: with many degrees of freedom six of its own deviations above what expecting too little noise
    explains.
    """
    few = TOLERANCE / (freedom**0.5).clip(max=2.0)
    return few.clip(max=LARGEST_EXPECTED * (1 + TOLERANCE / (2 * freedom) ** 0.5))


def is_plausible(one: Component) -> Any:
    """() or with the solutions' leading axis; NumPy or jax, as they are.

    Converged, residuals as small as expected, dual to itself, constant feature 1 if there is one, and a label.
    """
    # The label's common level has errors of its own, which entries have in common.
    hypot = jnp.hypot if isinstance(one.misfit, jax.Array) else np.hypot
    reach = 2 * TOLERANCE * hypot(one.label_deviation, one.level_deviation[..., None])
    return (
        (one.misfit <= largest_misfit(one.freedom))
        & (one.decrement <= 1)
        & (abs(one.duality) <= (TOLERANCE * one.duality_deviation + 1e-9).clip(max=0.5))
        & (abs(one.constant_error) <= 1e-6)
        & (one.label >= -reach).all(axis=-1)
        & (one.label <= 1 + reach).all(axis=-1)
    )


def is_nontrivial(one: Component) -> bool:
    """Not on its way to a = 0 or to infinity, where the residual vanishes for any gradient and duality fails."""
    return bool(np.isfinite(one.misfit) and abs(one.duality) <= 0.5)


def take_worst(found: list[Component]) -> Component:
    """The one that fits its own equation worst; no longer among those found."""
    return found.pop(max(range(len(found)), key=lambda index: found[index].misfit))


def cost(one: Component) -> Any:
    """Chi^2 with a price on each class singled out: twice minus the logarithm of its chance among C classes.

    () or with the solutions' leading axis; NumPy or jax, as they are.
    """
    number_of_classes, rank = one.label.shape[-1], one.coordinates.shape[-1]
    singled = (one.targets >= 0).sum(axis=-1)
    freedom = (number_of_classes - singled - 2 * rank).clip(min=1)
    return one.misfit**2 * freedom + 2 * singled * math.log(10 * number_of_classes)


def is_same(first: Component, second: Component, values: np.ndarray) -> bool:
    """Examples are dual to each other: x_i^T G^+ g_j is D for one and the same, and 0 for two."""
    own = abs((first.coordinates / values) @ first.dual)
    return bool(abs((first.coordinates / values) @ second.dual) > 0.5 * own)


def distinct(pool: list[Component], values: np.ndarray, most: int) -> list[Component]:
    """The likeliest, each once."""
    kept: list[Component] = []
    for one in sorted(pool, key=cost):
        if len(kept) < most and not any(
            np.max(np.abs(one.label - other.label)) <= 1e-3 and is_same(one, other, values) for other in kept
        ):
            kept.append(one)
    return kept


def accepted(
    subspace: BatchSubspace, solved: Component, found: list[Component], rejected: list[Component]
) -> list[Component]:
    """Plausible solutions, the likeliest first, each different from all others."""
    values = np.asarray(subspace.singular_values)
    candidates = sorted(plausible(solved), key=cost)
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


def complement(found: list[Component], values: np.ndarray) -> np.ndarray:
    """(B, B) orthonormal columns, zeros in the last places: coordinates of whatever is dual to those found.

    With x_i^T G^+ g_j = 0, exact g_j leave that many fewer unknowns to any other example, however vague x_j is.
    """
    rank = values.size
    duals = np.array([one.dual / values for one in found]).reshape(len(found), rank)
    duals = duals / np.maximum(np.linalg.norm(duals, axis=1, keepdims=True), 1e-300)
    basis = np.zeros((rank, rank))
    basis[:, : max(rank - len(found), 0)] = np.linalg.svd(duals)[2][len(found) :].T
    return basis


def complements(found: list[Component], values: np.ndarray) -> np.ndarray:
    """(n, B, B) for each of those found, the `complement` of all others."""
    return np.array([complement(found[:index] + found[index + 1 :], values) for index in range(len(found))])


def without(observed: np.ndarray, found: list[Component], values: np.ndarray) -> np.ndarray:
    """(C, B) rows of the gradient less the examples found, and dual to them: free of the errors of their features."""
    if not found:
        return observed
    duals = np.array([one.dual / values for one in found])
    coordinates = np.array([one.coordinates for one in found])
    return observed - (observed @ duals.T) @ np.linalg.solve(coordinates @ duals.T, coordinates)


def overlaps(pool: list[Component], values: np.ndarray) -> np.ndarray:
    """(n, n) x_i^T G^+ g_j; n may be 0, where no solution is plausible."""
    shape = len(pool), values.size
    features = np.array([one.coordinates / values for one in pool]).reshape(shape)
    return features @ np.array([one.dual for one in pool]).reshape(shape).T


def cliques(joined: np.ndarray, size: int) -> Iterator[list[int]]:
    """All sets of `size` indices that are joined pairwise, in order."""

    def extend(chosen: list[int], candidates: list[int]) -> Iterator[list[int]]:
        if len(chosen) == size:
            yield chosen
            return
        for position, index in enumerate(candidates):
            rest = [other for other in candidates[position + 1 :] if joined[index, other]]
            yield from extend([*chosen, index], rest)

    yield from extend([], list(range(len(joined))))
