"""Examples that explain the gradient together, but for what is missing: a set grown one by one.

One example's own equation leaves its coordinates vague along some directions where the batch is large. With others it
shares that they are dual to each other: the joint fit of some examples, beside a matrix of as low a rank as examples
are missing, makes all of them sharper, and shows a wrong one among them by its residual.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.candidates import solve, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.joint import STEPS, JointFit, fit_jointly
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = ["Together", "described", "explains", "fit_found", "grow", "pruned", "simplified"]

# Misfit of the truth by the noise expected of a client's float32: 0.5 to 1.4, by the order in which it sums.
LARGEST_EXPECTED = 1.4
SMALLEST_EXPECTED = 0.01  # Of a client that rounds far less than it is given credit for.
TRIAL_STEPS = 40  # What goes with the others is near already.
PRUNING_STEPS = 10  # Whether all but one go together shows sooner.
LARGEST_PRUNED = 1 / 3  # Of a set in which more are wrong, nothing is known.
# With more unknowns than this, whose normal matrix alone has 288 MiB, the joint fit is left out.
LARGEST_JOINT = 6144


class _Start(NamedTuple):
    """What the joint fit of some examples starts from: (n, r), (n, TARGETS) and (n, TARGETS) int32."""

    coordinates: np.ndarray
    weights: np.ndarray
    targets: np.ndarray


def fit_found(subspace: BatchSubspace, found: list[Component], divisor: Divisor) -> JointFit | None:
    """The joint fit of the examples found; None where it would be too large. Rows beyond those found are left out."""
    return _fit(subspace, _start(found), divisor)


def explains(joint: JointFit) -> bool:
    """Residuals no larger than noise may make them: at most half of what a single one may be, as root mean square.

    With many degrees of freedom far less: six of its own standard deviations above what expecting too little noise
    explains. And not next to nothing: then it is the noise that is too large, of an example that ran off to infinity.
    """
    expected = LARGEST_EXPECTED * (1 + TOLERANCE / np.sqrt(2 * joint.freedom))
    smallest = 0.0 if joint.freedom <= 1 else SMALLEST_EXPECTED
    return bool(smallest <= joint.misfit <= min(TOLERANCE / 2, float(expected)))


class Together(NamedTuple):
    """Examples that explain the gradient together, and their joint fit."""

    examples: list[Component]
    fit: JointFit
    start: _Start


def grow(
    subspace: BatchSubspace, known: Together | None, candidates: list[Component], divisor: Divisor
) -> Together | None:
    """Those known and the candidates that go with them, sharpened by each other.

    Args:
      subspace: of the batch.
      known: examples that explain the gradient together, or None; they stay.
      candidates: others, which all differ, the likeliest first.
      divisor: D.

    Returns:
      Those known first; None where none of the candidates goes with a rest of lower rank, or where the joint fit would
      be too large.
    """
    wider = _widened(subspace, known, candidates, divisor) if candidates else known
    if wider is not None or len(candidates) <= 1:
        return wider or known
    half = len(candidates) // 2
    for part in (candidates[:half], candidates[half:]):
        known = grow(subspace, known, part, divisor)
    return known


def pruned(subspace: BatchSubspace, known: Together, divisor: Divisor) -> Together:
    """Without the few that are wrong, if all others explain the gradient; else as it was.

    A wrong one among the first lets in what fits no worse; of a larger set, all but that one go together.
    """
    kept, start, fit = list(known.examples), known.start, known.fit
    for _ in range(int(LARGEST_PRUNED * len(kept))):
        if explains(fit):
            break
        best: tuple[int, JointFit] | None = None
        for index in range(len(kept)):
            others = _Start(*(np.delete(array, index, axis=0) for array in start))
            trial = _fit(subspace, others, divisor, PRUNING_STEPS)
            assert trial is not None
            if best is None or trial.misfit < best[1].misfit:
                best = index, trial
        assert best is not None
        index, fit = best
        del kept[index]
        start = _after(fit, _Start(*(np.delete(array, index, axis=0) for array in start)))
    return Together(kept, fit, start) if explains(fit) else known


def simplified(subspace: BatchSubspace, known: Together, divisor: Divisor) -> Together:
    """Without the second classes whose weight is no larger than its errors, if what is left explains as much."""
    targets, label = known.start.targets, np.asarray(known.fit.label)
    chosen = np.maximum(targets, 0)
    weight = np.take_along_axis(label, chosen, axis=1) - np.median(label, axis=1, keepdims=True)
    deviation = np.take_along_axis(np.asarray(known.fit.label_deviation), chosen, axis=1)
    order = np.argsort(-np.where(targets >= 0, weight, -np.inf), axis=1)
    ranked = (np.take_along_axis(values, order, axis=1) for values in (targets, weight, deviation))
    targets, weight, deviation = ranked
    needless = (targets >= 0) & (weight <= TOLERANCE / 2 * deviation)
    needless[:, 0] = False
    if not needless.any():
        return known
    start = known.start._replace(
        targets=np.where(needless, -1, targets).astype(np.int32), weights=np.where(needless, 0.0, weight)
    )
    fit = _fit(subspace, start, divisor)
    assert fit is not None
    if not _is_tolerable(known.fit, fit, int(needless.sum())):
        return known
    return known._replace(fit=fit, start=_after(fit, start))


def described(subspace: BatchSubspace, known: Together, divisor: Divisor) -> list[Component]:
    """The examples where their joint fit has them."""
    weights = np.array([1 / one.deviation for one in known.examples])
    return split(solve(subspace, known.start.coordinates, known.start.targets, divisor, weights, 0))


def _widened(
    subspace: BatchSubspace, known: Together | None, added: list[Component], divisor: Divisor
) -> Together | None:
    """All together, if what is added fits as well as a whole must, in the noise that those known show."""
    start = _start(added)
    if known is not None:
        start = _Start(*(np.concatenate(pair) for pair in zip(known.start, start, strict=True)))
    is_last = len(added) == 1 and len(start.targets) == subspace.singular_values.size
    fit = _fit(subspace, start, divisor, STEPS if is_last else TRIAL_STEPS)
    if fit is None:
        return None
    if not (explains(fit) if known is None else _is_tolerable(known.fit, fit, fit.freedom - known.fit.freedom)):
        return None
    return Together([*(known.examples if known else []), *added], fit, _after(fit, start))


def _is_tolerable(before: JointFit, after: JointFit, equations: int | jax.Array) -> bool:
    """What so many more equations add to the residuals is what a whole may have, in the noise that was there before.

    And the residuals are not far smaller than before, as they are where the noise that is expected has grown.
    """
    added = after.misfit**2 * after.freedom - before.misfit**2 * before.freedom
    limit = (TOLERANCE / 2 * max(float(before.misfit), 1.0)) ** 2 * equations
    return bool(added <= limit and after.misfit >= before.misfit / 2)


def _start(found: list[Component]) -> _Start:
    weights = [np.where(one.targets >= 0, one.label[one.targets] - one.level, 0.0) for one in found]
    targets = np.array([one.targets for one in found], np.int32)
    return _Start(np.array([one.coordinates for one in found]), np.array(weights), targets)


def _after(fit: JointFit, start: _Start) -> _Start:
    """The same examples where the fit has left them."""
    label = np.asarray(fit.label)
    weights = np.take_along_axis(label, np.maximum(start.targets, 0), axis=1) - np.median(label, axis=1, keepdims=True)
    return start._replace(coordinates=np.asarray(fit.coordinates), weights=np.where(start.targets >= 0, weights, 0.0))


def _fit(subspace: BatchSubspace, start: _Start, divisor: Divisor, steps: int = STEPS) -> JointFit | None:
    count, rank = start.coordinates.shape
    if rank * (rank + TARGETS) > LARGEST_JOINT:
        return None
    missing = rank - count
    # Always as many rows as there are examples in all: one compiled program.
    coordinates = np.concatenate([start.coordinates, np.zeros((missing, rank))])
    weights = np.concatenate([start.weights, np.zeros((missing, TARGETS))])
    targets = np.concatenate([start.targets, np.full((missing, TARGETS), -1, np.int32)])
    arrays = map(jnp.asarray, (coordinates, weights, targets))
    fit = jax.tree.map(np.asarray, fit_jointly(subspace, *arrays, divisor, missing, steps))
    each = ("coordinates", "label", "coordinates_deviation", "label_deviation")
    return fit._replace(**{name: getattr(fit, name)[:count] for name in each})
