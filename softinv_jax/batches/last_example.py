"""Whether all examples of a batch are found; the last one, when all others are."""

from typing import Any

import numpy as np

from softinv_jax.batches.candidates import complement, cost, is_nontrivial, is_same, solve, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.explanation import explains, fit_found
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["MOST_STARTS", "completed", "is_near", "last_starts"]

SCAN = 1000  # Scalars tried for the last example, of either sign,
LAST_STARTS = 32  # how many of them are refined, and as many more,
MOST_STARTS = 2 * TARGETS * LAST_STARTS  # with each number of classes,
LAST_STEPS = 20  # by how many steps,
LAST_TRIED = 6  # and how many then take part in a joint fit,
LAST_CONFINED = 2  # where the other equations tell them apart.
LARGEST_MISFIT, LARGEST_ERROR = 100.0, 0.1  # Of solutions that are worth one.


def completed(
    subspace: BatchSubspace, found: list[Component], divisor: Divisor, *, confined: bool
) -> tuple[list[Component], JointFit | None] | None:
    """All examples, if they explain the gradient or the joint fit would be too large; with one missing, and it too.

    `confined`: with many classes the last one's own equations are enough to tell what is worth a joint fit.
    """
    rank = subspace.singular_values.size
    if len(found) == rank - 1:
        return _with_last(subspace, found, divisor, confined=confined)
    if len(found) == rank:
        joint = fit_found(subspace, found, divisor)
        if joint is None or explains(joint):
            return found, joint
    return None


def _with_last(
    subspace: BatchSubspace, found: list[Component], divisor: Divisor, *, confined: bool
) -> tuple[list[Component], JointFit] | None:
    """What explains most of the last one's equation is left to the joint fit, which also sharpens the others."""
    values = np.asarray(subspace.singular_values)
    starts, targets = last_starts(subspace, found, divisor)
    if not len(starts):
        return None
    basis = complement(found, values)
    solved = split(solve(subspace, starts, targets, divisor, None, LAST_STEPS, basis if confined else None))
    worthy = is_near if confined else is_nontrivial
    for one in sorted(filter(worthy, solved), key=cost)[: LAST_CONFINED if confined else LAST_TRIED]:
        if any(is_same(one, other, values) for other in found):
            continue
        joint = fit_found(subspace, [*found, one], divisor)
        if joint is not None and explains(joint):
            return [*found, one], joint
    return None


def last_starts(subspace: BatchSubspace, found: list[Component], divisor: Divisor) -> tuple[np.ndarray, np.ndarray]:
    """Starts (n, B) for the last example and the classes it may single out, (n, TARGETS); n is at most MOST_STARTS.

    Its two factors are known up to one scalar, as those of a single example's gradient are. Dual to all others, x and g
    have one direction left each; duality fixes their product. The scalar is scanned.
    """
    left, values = np.asarray(subspace.left), np.asarray(subspace.singular_values)
    others = np.array([one.coordinates / values for one in found]).reshape(len(found), values.size)
    direction, dual = complement(found, values)[:, 0], np.linalg.svd(others)[2][-1]
    product = (direction / values) @ dual
    if not np.isfinite(product) or product == 0:
        return np.zeros((0, values.size)), np.zeros((0, TARGETS), np.int32)
    dual = dual * divisor.value / product
    constant = float(np.asarray(subspace.constant) @ direction)
    scalars, targets = _scan_scalars(np.asarray(subspace.directions) @ direction, left @ dual, constant)
    return scalars[:, None] * direction, targets


def is_near(one: Component) -> Any:
    """A label, nearly, and dual to itself, nearly: errors of the others are in it, which its deviations do not know.

    () or with the solutions' leading axis; NumPy or jax, as they are.
    """
    return (
        (one.misfit <= LARGEST_MISFIT)
        & (abs(one.duality) <= LARGEST_ERROR)
        & (one.label >= -LARGEST_ERROR).all(axis=-1)
        & (one.label <= 1 + LARGEST_ERROR).all(axis=-1)
    )


def _scan_scalars(logits: np.ndarray, gradient: np.ndarray, constant: float) -> tuple[np.ndarray, np.ndarray]:
    """Scalars lambda at which most of y = softmax(lambda z) - u / lambda agrees, and classes that do not.

    Args:
      logits: (C,) z. gradient: (C,) u. constant: the constant feature of a head with a bias at lambda = 1, or 0.

    Returns:
      (n,) and (n, TARGETS) int32, -1 for none.
    """
    spread = max(float(np.ptp(logits)), 1e-300)
    magnitudes = np.geomspace(0.02, 500.0, SCAN) / spread
    if constant != 0:
        magnitudes = np.array([abs(1 / constant)])
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
    starts: list[float] = []
    targets: list[list[int]] = []
    # The best of each stretch: where all of them agree because u / lambda is nothing, its neighbours do too.
    stretches = np.array_split(np.arange(len(scalars)), min(LAST_STARTS, len(scalars)))
    best = [stretch[np.argmin(loss[stretch])] for stretch in stretches]
    for index in dict.fromkeys([*np.argsort(loss)[:LAST_STARTS], *best]):
        for count in range(1, TARGETS + 1):
            starts.append(scalars[index])
            strongest = order[index, :TARGETS]
            strongest = strongest[np.argsort(-label[index, strongest])]
            targets.append([*strongest[:count], *(-1,) * (TARGETS - count)])
    return np.array(starts), np.array(targets, np.int32)
