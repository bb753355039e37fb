"""What the examples found leave of a batch's gradient, and the others in it.

Taking k examples out of B leaves a matrix of rank B - k, whose row space holds the features of the others: far fewer
unknowns for each of them, against as many equations; one, for the last. Errors of those taken out hardly move that row
space, but they do move the column space: the equations stay those of the whole gradient.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.candidates import cost, is_nontrivial, is_same, solve, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.growth import Together, described, explains, fit_found, grow, pruned, simplified
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.proposals import propose
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["complete_last", "deflate", "gather", "without"]

SHARP = 0.2  # Standard deviation of logits,
DOUBTFUL = 1.5  # and a misfit that tens of degrees of freedom do not show by accident.
LARGEST_MISFIT, LARGEST_ERROR = 100.0, 0.1  # Of solutions that are worth a joint fit.
ROUNDS = ((1.0, False), (2.0, True), (1.0, True))  # See `propose`.
SCAN = 1000  # Scalars tried for the last example, of either sign,
LAST_STARTS = 32  # how many of them are refined,
LAST_STEPS = 20  # by how many steps,
LAST_TRIED = 6  # and how many then take part in a joint fit.


def without(observed: np.ndarray, found: list[Component], values: np.ndarray) -> np.ndarray:
    """(C, B) rows of the gradient less the examples found, and dual to them: free of the errors of their features."""
    if not found:
        return observed
    duals = np.array([one.dual / values for one in found])
    coordinates = np.array([one.coordinates for one in found])
    return observed - (observed @ duals.T) @ np.linalg.solve(coordinates @ duals.T, coordinates)


def deflate(subspace: BatchSubspace, fit: JointFit) -> tuple[BatchSubspace, np.ndarray, np.ndarray]:
    """The row space of what a joint fit of k examples leaves.

    Args:
      subspace: of the batch. fit: of those examples.

    Returns:
      The batch's subspace with features confined to that row space: coordinates there are c in a = basis c, padded with
      zeros, so that the same compiled programs serve both. The basis, (r, r - k). And the rows of what is left in these
      coordinates, (C, r - k).
    """
    observed = np.asarray(subspace.left) * np.asarray(subspace.singular_values)
    directions = np.asarray(subspace.directions)
    rank = observed.shape[1]
    missing = rank - len(fit.coordinates)
    prediction = np.asarray(jax.nn.softmax(fit.coordinates @ directions.T, axis=1))
    remainder = observed - (prediction - fit.label).T @ fit.coordinates / fit.divisor
    # Errors of the levels of their labels move all rows alike, and rows of unlikely classes are known far better.
    noise = np.asarray(subspace.noise)[:, None]
    level = (1 / noise) / np.linalg.norm(1 / noise)
    right = np.linalg.svd((remainder / noise) - level @ (level.T @ (remainder / noise)), full_matrices=False)[2]
    basis = right[:missing].T
    padded = jnp.asarray(np.pad(basis, ((0, 0), (0, rank - missing))))
    confined = replace(
        subspace,
        directions=subspace.directions @ padded,
        coupling=padded.T @ subspace.coupling,
        constant=subspace.constant @ padded,
    )
    return confined, basis, remainder @ basis


def gather(
    subspace: BatchSubspace, known: Together | None, found: list[Component], divisor: Divisor
) -> tuple[Together | None, list[Component]]:
    """Of those found the ones that go together, with more from what they leave, as long as there are more.

    Args:
      subspace: of the batch. divisor: D.
      known: what this function returned before: the first of those found.
      found: different examples.

    Returns:
      Those that go together, None where no two do, and all examples, those first; never more than the batch has.
    """
    values = np.asarray(subspace.singular_values)
    others = found[0 if known is None else len(known.examples) :]
    # Of the others first order says little; they are easier to find again than to make fit.
    sharp = [one for one in others if one.logit_deviation <= SHARP]
    sharp.sort(key=lambda one: (bool(one.misfit > DOUBTFUL), float(one.logit_deviation)))
    start = grow(subspace, known, sharp, divisor)
    grown = _spread(subspace, start, divisor)
    while known is None and len(sharp) > 1 and (grown is None or grown is start):
        # One of them may be wrong, and keep all others out.
        sharp = sharp[: len(sharp) // 2]
        start = grow(subspace, None, sharp, divisor)
        grown = _spread(subspace, start, divisor)
    if grown is None or (known is None and grown is start):
        return known, found
    grown = simplified(subspace, grown, divisor)
    examples = described(subspace, grown, divisor)
    rest = [one for one in others if not any(is_same(one, other, values) for other in examples)]
    return grown._replace(examples=examples), (examples + rest)[: values.size]


def _spread(subspace: BatchSubspace, known: Together | None, divisor: Divisor) -> Together | None:
    """With more examples from what those known leave, as long as there are more; the same object if there are none."""
    rounds, most = list(ROUNDS), 0
    while known is not None and rounds and len(known.examples) < subspace.singular_values.size:
        wider = grow(subspace, known, _search_remainder(subspace, known, divisor, *rounds.pop(0)), divisor)
        assert wider is not None
        known = wider if wider is known else pruned(subspace, wider, divisor)
        if len(known.examples) > most:
            most, rounds = len(known.examples), list(ROUNDS)
    return known


def _search_remainder(
    subspace: BatchSubspace, known: Together, divisor: Divisor, stretch: float, separately: bool
) -> list[Component]:
    """Solutions of single equations in what those known leave, as they are in the whole."""
    rank = subspace.singular_values.size
    missing = rank - len(known.examples)
    confined, basis, remainder = deflate(subspace, known.fit)
    if missing == 1:
        directions, constant = (np.asarray(whole) @ basis[:, 0] for whole in (subspace.directions, subspace.constant))
        scalars, targets = _scan_scalars(directions, divisor.value * remainder[:, 0], float(constant))
        starts = scalars[:, None]
    else:
        starts, targets = propose(remainder, missing, divisor.value, stretch, separately=separately)
    starts = np.pad(starts, ((0, 0), (0, rank - missing)))
    solved = solve(confined, starts, targets, divisor)
    solved = replace(solved, coordinates=solved.coordinates[:, :missing] @ basis.T)
    # The row space has errors, which their deviations know nothing of: what they are worth, the joint fit shows.
    values = np.asarray(subspace.singular_values)
    chosen: list[Component] = []
    for one in sorted(split(solved), key=cost):
        if len(chosen) < missing and _is_near(one) and not any(is_same(one, other, values) for other in chosen):
            chosen.append(one)
    return chosen


def _is_near(one: Component) -> bool:
    """A label, nearly, and dual to itself, nearly."""
    return bool(
        one.misfit <= LARGEST_MISFIT
        and abs(one.duality) <= LARGEST_ERROR
        and np.all(one.label >= -LARGEST_ERROR)
        and np.all(one.label <= 1 + LARGEST_ERROR)
    )


def complete_last(
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
    constant = float(np.asarray(subspace.constant) @ direction)
    scalars, targets = _scan_scalars(np.asarray(subspace.directions) @ direction, left @ dual, constant)
    starts = scalars[:, None] * direction
    solved = split(solve(subspace, starts, targets, divisor, None, LAST_STEPS))
    for one in sorted(filter(is_nontrivial, solved), key=cost)[:LAST_TRIED]:
        if any(is_same(one, other, values) for other in found):
            continue
        joint = fit_found(subspace, [*found, one], divisor)
        if joint is not None and explains(joint):
            return [*found, one], joint
    return None


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
    for stretch in np.array_split(np.arange(len(scalars)), min(LAST_STARTS, len(scalars))):
        index = stretch[np.argmin(loss[stretch])]
        for count in range(1, TARGETS + 1):
            starts.append(scalars[index])
            strongest = order[index, :TARGETS]
            strongest = strongest[np.argsort(-label[index, strongest])]
            targets.append([*strongest[:count], *(-1,) * (TARGETS - count)])
    return np.array(starts), np.array(targets, np.int32)
