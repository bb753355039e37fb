"""`recover_batch`: every example's soft label and feature from one averaged gradient, each with a verdict."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.component import (
    ITERATIONS,
    TARGETS,
    Component,
    solve_components,
    strongest_residual,
)
from softinv_jax.batches.joint import JointFit, fit_jointly
from softinv_jax.batches.proposals import propose
from softinv_jax.batches.subspace import BatchSubspace, batch_subspace
from softinv_jax.float64 import in_float64
from softinv_jax.labels.recovery import SHARP_LABEL, UNIQUE_SURPRISE
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.observation.head import Observation, observe

__all__ = ["BatchRecovery", "Reduction", "recover_batch"]

Reduction = Literal["mean", "sum"]

# Rounds of search, each from what the examples found so far leave of the gradient: factor on the starts, and whether
# pairs of classes start from either row (see `propose`).
ROUNDS = ((1.0, False), (2.0, True), (1.0, True), (1.5, False), (4.0, True), (0.6, False))
# Starts are padded to a multiple, so that few programs are compiled.
PADDING = 64
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
# Above this many entries of its Jacobian (512 MiB of float64) the joint fit is left out.
LARGEST_JOINT = 2**26


@dataclass(frozen=True)
class BatchRecovery:
    """What the gradient of a batch gives away; NumPy arrays, examples in no particular order, those not found last.

    Attributes:
      label: (B, C) soft labels, NaN where not found. feature: (B, d), likewise.
      label_deviation: (B, C) standard deviation of the label's entries. feature_deviation: (B,) of the feature, as
        root mean square over its entries; NaN without a joint fit.
      targets: (B, TARGETS) int32 classes singled out, by falling weight, -1 for none.
      verdict: (B,) int32, a `Verdict`.
      surprise: (B,) nats, minus the logarithm of how many such explanations an accident would be expected to show.
      misfit: (B,) root mean square residual of the example's own equation, in standard deviations.
      rank: numerical rank of the gradient. singular_values: (min(C, d),). noise: standard deviation, per entry of the
        gradient, of what is not of that rank.
      joint_misfit: root mean square residual of the whole gradient in standard deviations, all examples together; NaN
        unless all were found. joint_surprise: nats, of all of them together.
      residual: relative distance between the gradient and the one that the recovered examples give.
    """

    label: np.ndarray
    feature: np.ndarray
    label_deviation: np.ndarray
    feature_deviation: np.ndarray
    targets: np.ndarray
    verdict: np.ndarray
    surprise: np.ndarray
    misfit: np.ndarray
    rank: int
    singular_values: np.ndarray
    noise: float
    joint_misfit: float
    joint_surprise: float
    residual: float


def recover_batch(
    observation: Observation,
    batch_size: int | Literal["auto"],
    *,
    reduction: Reduction = "mean",
    progress: Callable[[int, int], None] | None = None,
) -> BatchRecovery:
    """Recover every example of one batch from the gradient of its loss.

    The formats of the labels may differ and are not told; each may single out up to two classes. See
    docs/batches.md for the equations, and for where this ends.

    Args:
      observation: `weight_gradient` (C, d), with `bias_gradient` (C,) for a head with a bias.
      batch_size: B < C, B <= d; or `auto`: the numerical rank of the gradient.
      reduction: whether the loss was the mean or the sum over the batch. (With `auto` the mean is over the rank.)
      progress: called with (examples found, B).

    Returns:
      A `BatchRecovery`.

    Raises:
      ValueError: for arrays `observe` refuses, more than one gradient, or a batch size that cannot be.
    """
    observation = observe(observation.weight, observation.weight_gradient, observation.bias, observation.bias_gradient)
    if observation.weight_gradient.ndim != 2:
        raise ValueError(
            "recover_batch takes one gradient (C, d), but weight_gradient has shape"
            f" {observation.weight_gradient.shape}; call it for each"
        )
    number_of_classes, features = observation.weight.shape
    if batch_size != "auto":
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer or 'auto', not {batch_size!r}")
        if batch_size >= number_of_classes or batch_size > features:
            raise ValueError(
                f"batch_size = {batch_size}, but only batches smaller than the number of classes, C ="
                f" {number_of_classes}, and not larger than the number of features, d = {features}, can be separated:"
                " their gradient has lower rank than the batch has examples"
            )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    return _recover_batch(observation, batch_size, reduction, progress or (lambda found, total: None))


@in_float64
def _recover_batch(
    observation: Observation,
    batch_size: int | Literal["auto"],
    reduction: Reduction,
    progress: Callable[[int, int], None],
) -> BatchRecovery:
    dtype = np.dtype(observation.weight_gradient.dtype)
    weight = jnp.asarray(observation.weight, jnp.float64)
    gradient = jnp.asarray(observation.weight_gradient, jnp.float64)
    has_bias = observation.bias is not None
    if observation.bias is not None and observation.bias_gradient is not None:
        weight = jnp.concatenate([weight, jnp.asarray(observation.bias, jnp.float64)[:, None]], axis=1)
        gradient = jnp.concatenate([gradient, jnp.asarray(observation.bias_gradient, jnp.float64)[:, None]], axis=1)
    subspace, singular_values = batch_subspace(weight, gradient, None, dtype, has_bias=has_bias)
    rank = subspace.singular_values.size
    total = rank if batch_size == "auto" else batch_size
    if rank > total:  # More than the batch can have: the rest is noise that has no clear edge.
        subspace, singular_values = batch_subspace(weight, gradient, total, dtype, has_bias=has_bias)
        rank = total
    divisor = 1.0 if reduction == "sum" else float(total)
    if singular_values[0] == 0:
        return _finish(subspace, singular_values, [], None, gradient, divisor, total, 0, dtype, has_bias=has_bias)
    found, joint = _search(subspace, divisor, progress, total)
    if len(found) < rank:
        joint = None
    return _finish(subspace, singular_values, found, joint, gradient, divisor, total, rank, dtype, has_bias=has_bias)


def _search(
    subspace: BatchSubspace, divisor: float, progress: Callable[[int, int], None], total: int
) -> tuple[list[Component], JointFit | None]:
    """Rounds of proposals and solutions until all examples are found and explain the gradient together."""
    observed = np.asarray(subspace.left) * np.asarray(subspace.singular_values)
    rank = subspace.singular_values.size
    found: list[Component] = []
    rejected: list[Component] = []
    pool: list[Component] = []
    joint = None
    for stretch, separately in ROUNDS:
        remainder = _without(observed, found, np.asarray(subspace.singular_values))
        proposals = propose(remainder, rank - len(found), divisor, stretch, separately=separately)
        solved = _solve(subspace, proposals.starts, proposals.targets, divisor)
        found += _accepted(subspace, solved, found, rejected)
        progress(len(found), total)
        # The most promising of the rest: further steps; and one class more, where that explains what is left (one
        # shared with another example, or one of small weight).
        pool += [one for one in _split(solved) if _plausible(one)]
        starts, targets, weights = _continued(subspace, solved, found)
        if len(found) < rank and len(starts):
            solved = _solve(subspace, starts, targets, divisor, weights, LONG)
            found += _accepted(subspace, solved, found, rejected)
            pool += [one for one in _split(solved) if _plausible(one)]
        found = _polish(subspace, found, divisor)
        progress(len(found), total)
        if len(found) == rank - 1:
            completed = _complete(subspace, found, divisor)
            if completed is not None:
                found, joint = completed
                break
        if len(found) == rank:
            joint = _joint(subspace, found, divisor)
            if joint is None or joint.misfit <= TOLERANCE / 2:
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
    subspace: BatchSubspace, pool: list[Component], divisor: float
) -> tuple[list[Component], JointFit] | None:
    """Where one example's equation has several solutions: a set of solutions that are dual to each other.

    With few classes the equation of one example may be no more than determined, and wrong solutions explain it as
    well as right ones; but only the right ones are dual to each other.
    """
    values = np.asarray(subspace.singular_values)
    rank = values.size
    distinct: list[Component] = []
    for one in sorted(pool, key=_cost):
        if len(distinct) < LARGEST_POOL and not any(
            np.max(np.abs(one.label - other.label)) <= 1e-3 and _same(one, other, values) for other in distinct
        ):
            distinct.append(one)
    if len(distinct) < rank - 1:
        return None
    coordinates = np.array([one.coordinates / values for one in distinct])
    duals = np.array([one.dual for one in distinct])
    overlap = np.abs(coordinates @ duals.T) / divisor
    dual = np.maximum(overlap, overlap.T) < NEARLY_DUAL
    for size in (rank, rank - 1):
        tried = 0
        for chosen in _cliques(dual, size):
            tried += 1
            if tried > ASSEMBLIES_TRIED:
                break
            members = [distinct[index] for index in chosen]
            if size < rank:
                completed = _complete(subspace, members, divisor) if members else None
                if completed is not None:
                    return completed
                continue
            joint = _joint(subspace, members, divisor)
            if joint is not None and joint.misfit <= TOLERANCE / 2:
                return members, joint
    return None


def _cliques(joined: np.ndarray, size: int) -> Iterator[list[int]]:
    """All sets of `size` indices that are joined pairwise, in order."""

    def extend(chosen: list[int], candidates: list[int]) -> Iterator[list[int]]:
        if len(chosen) == size:
            yield chosen
            return
        for position, index in enumerate(candidates):
            rest = [other for other in candidates[position + 1 :] if joined[index, other]]
            yield from extend([*chosen, index], rest)

    yield from extend([], list(range(len(joined))))


def _without(observed: np.ndarray, found: list[Component], values: np.ndarray) -> np.ndarray:
    """(C, B) rows of the gradient less the examples found, and dual to them: free of the errors of their features."""
    if not found:
        return observed
    duals = np.array([one.dual / values for one in found])
    coordinates = np.array([one.coordinates for one in found])
    return observed - (observed @ duals.T) @ np.linalg.solve(coordinates @ duals.T, coordinates)


def _polish(subspace: BatchSubspace, found: list[Component], divisor: float) -> list[Component]:
    """Further steps, with the deviations that weigh the equations known; without a second class if it can go."""
    if not found:
        return found
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    fewer = np.stack([stacked.targets[:, 0], np.full(len(found), -1, np.int32)], axis=1)
    twice = [np.concatenate([leaf, leaf]) for leaf in (stacked.coordinates, 1 / stacked.deviation)]
    solved = _solve(subspace, twice[0], np.concatenate([stacked.targets, fewer]), divisor, twice[1], POLISHING)
    every = _split(solved)
    polished = []
    for old, new, bare in zip(found, every[: len(found)], every[len(found) :], strict=True):
        choices = [old] + [one for one in (new, bare) if _plausible(one)]
        polished.append(min(choices, key=_cost))
    return polished


def _split(stacked: Component) -> list[Component]:
    return [jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(len(stacked.misfit))]


def _complete(
    subspace: BatchSubspace, found: list[Component], divisor: float
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
    dual = dual * divisor / product
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
    solved = _split(_solve(subspace, np.array(starts), np.array(targets, np.int32), divisor, None, LAST_STEPS))
    solved = [one for one in solved if np.isfinite(one.misfit) and abs(one.duality) < 0.5]
    for one in sorted(solved, key=_cost)[:LAST_TRIED]:
        if any(_same(one, other, values) for other in found):
            continue
        joint = _joint(subspace, [*found, one], divisor)
        if joint is not None and joint.misfit <= TOLERANCE / 2:
            return [*found, one], joint
    return None


def _solve(
    subspace: BatchSubspace,
    starts: np.ndarray,
    targets: np.ndarray,
    divisor: float,
    weights: np.ndarray | None = None,
    iterations: int = ITERATIONS,
) -> Component:
    """All starts, padded; NumPy."""
    count = len(starts)
    missing = -count % (PADDING if count < 4 * PADDING else 4 * PADDING)
    starts = np.concatenate([starts, np.repeat(starts[-1:], missing, axis=0)])
    targets = np.concatenate([targets, np.repeat(targets[-1:], missing, axis=0)])
    if weights is None:
        weights = np.ones((len(starts), subspace.left.shape[0]))
    weights = np.concatenate([weights, np.repeat(weights[-1:], len(starts) - len(weights), axis=0)])
    solved = solve_components(
        subspace,
        jnp.asarray(starts),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights),
        divisor,
        iterations,
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], solved)


def _continued(
    subspace: BatchSubspace, solved: Component, found: list[Component]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the search got to from the best starts, with the same classes and with one more or another one."""
    values = np.asarray(subspace.singular_values)
    extra = np.asarray(strongest_residual(subspace, jax.tree.map(jnp.asarray, solved)))
    order = np.argsort(np.where(np.isfinite(solved.misfit), solved.misfit, np.inf))
    starts: list[np.ndarray] = []
    targets: list[tuple[int, int]] = []
    weights: list[np.ndarray] = []
    for index in order:
        if len(starts) >= 6 * (values.size - len(found)):
            break
        own = abs((solved.coordinates[index] / values) @ solved.dual[index])
        known = any(abs((solved.coordinates[index] / values) @ one.dual) > 0.5 * own for one in found)
        if not np.isfinite(solved.misfit[index]) or abs(solved.duality[index]) > 0.5 or known:
            continue
        first, second = solved.targets[index]
        choices = [(first, second)] + [(first, other) for other in extra[index]]
        for choice in choices:
            starts.append(np.asarray(solved.coordinates[index]))
            targets.append(choice)
            weights.append(1 / np.asarray(solved.deviation[index]))
    return np.array(starts), np.array(targets, np.int32), np.array(weights)


def _nats(subspace: BatchSubspace, one: Component) -> np.ndarray:
    """(C,) minus the logarithm of the chance that an entry of a dense label agrees to within its margin.

    Entries of a dense label are of the order 1 / C, and those of U beta no larger than |U_j| |beta|: a class that no
    example of the batch says anything about agrees with everything.
    """
    size = np.linalg.norm(np.asarray(subspace.left), axis=1) * np.linalg.norm(one.dual)
    room = np.minimum(1 / one.label.size, size)
    return np.log(np.maximum(room / (2 * TOLERANCE * one.deviation), 1.0))


def _surprise(subspace: BatchSubspace, one: Component, tried: int) -> float:
    """Nats by which the agreement beyond what the unknowns account for would surprise in a dense label.

    As for one example (`labels/consensus.py`): each class that agrees to within its margin does so by accident with a
    chance of the margin over the room it has. a and beta, less one for duality, absorb the sharpest agreements; every
    choice of classes and every start is one more chance.
    """
    number_of_classes, rank = subspace.left.shape
    singled = one.targets[one.targets >= 0]
    clean = np.setdiff1d(np.arange(number_of_classes), singled)
    nats = _nats(subspace, one)[clean]
    unknowns = 2 * rank - 1 + 1
    kept = np.sort(nats)[: max(len(nats) - unknowns, 0)]
    return float(kept.sum() - math.log(math.comb(number_of_classes, len(singled))) - math.log(max(tried, 1)))


def _plausible(one: Component) -> bool:
    """Converged, residuals as small as expected, dual to itself, constant feature 1 if there is one, and a label."""
    reach = 2 * TOLERANCE * one.label_deviation
    return bool(
        np.isfinite(one.misfit)
        and one.misfit <= TOLERANCE / 2
        and one.decrement <= 1
        and abs(one.duality) <= TOLERANCE * one.duality_deviation + 1e-9
        and abs(one.constant_error) <= 1e-6
        and np.all(one.label >= -reach)
        and np.all(one.label <= 1 + reach)
    )


def _cost(one: Component) -> float:
    """Chi^2 with a price on each class singled out: twice minus the logarithm of its chance among C classes."""
    number_of_classes, rank = one.label.size, one.coordinates.size
    singled = int(np.sum(one.targets >= 0))
    freedom = max(number_of_classes - singled - 2 * rank, 1)
    return float(one.misfit**2 * freedom + 2 * singled * math.log(10 * number_of_classes))


def _same(first: Component, second: Component, values: np.ndarray) -> bool:
    """Examples are dual to each other: x_i^T G^+ g_j is B for one and the same, and 0 for two."""
    own = abs((first.coordinates / values) @ first.dual)
    return bool(abs((first.coordinates / values) @ second.dual) > 0.5 * own)


def _accepted(
    subspace: BatchSubspace, solved: Component, found: list[Component], rejected: list[Component]
) -> list[Component]:
    """Plausible solutions, the likeliest first, each different from all others."""
    values = np.asarray(subspace.singular_values)
    candidates = sorted((one for one in _split(solved) if _plausible(one)), key=_cost)
    taken: list[Component] = []
    for one in candidates:
        if len(found) + len(taken) >= values.size:
            break
        again = any(
            np.max(np.abs(one.label - other.label)) <= TOLERANCE * np.max(one.label_deviation + other.label_deviation)
            for other in rejected
        )
        if not again and not any(_same(one, other, values) for other in found + taken):
            taken.append(one)
    return taken


def _joint(subspace: BatchSubspace, found: list[Component], divisor: float) -> JointFit | None:
    number_of_classes, rank = subspace.left.shape
    if number_of_classes * rank * rank * (rank + TARGETS) > LARGEST_JOINT:
        return None
    coordinates = jnp.asarray(np.array([one.coordinates for one in found]))
    targets = jnp.asarray(np.array([one.targets for one in found]), jnp.int32)
    weights = np.array([np.where(one.targets >= 0, one.label[one.targets] - one.level, 0.0) for one in found])
    fit = fit_jointly(subspace, coordinates, jnp.asarray(weights), targets, divisor)
    return jax.tree.map(np.asarray, fit)


def _finish(
    subspace: BatchSubspace,
    singular_values: np.ndarray,
    found: list[Component],
    joint: JointFit | None,
    gradient: jax.Array,
    divisor: float,
    total: int,
    rank: int,
    dtype: np.dtype,
    *,
    has_bias: bool,
) -> BatchRecovery:
    """Verdicts and arrays."""
    number_of_classes = subspace.left.shape[0]
    right = np.asarray(subspace.right)
    features = right.shape[0] - has_bias
    label = np.full((total, number_of_classes), np.nan)
    feature = np.full((total, features), np.nan)
    label_deviation, feature_deviation = np.full_like(label, np.nan), np.full((total,), np.nan)
    targets = np.full((total, TARGETS), -1, np.int32)
    surprise, misfit = np.full((total,), np.nan), np.full((total,), np.nan)
    verdict = np.full((total,), Verdict.NO_SIGNAL if rank == 0 else Verdict.NOT_FOUND, np.int32)
    consistent = joint is None or joint.misfit <= TOLERANCE / 2
    joint_surprise = math.nan
    predicted = np.zeros(gradient.shape)
    for row, one in enumerate(found):
        structured = _structured(one, number_of_classes) if joint is None else joint.label[row]
        coordinates = one.coordinates if joint is None else joint.coordinates[row]
        full = right @ coordinates
        label[row], feature[row] = structured, full[:features]
        label_deviation[row] = one.label_deviation if joint is None else joint.label_deviation[row]
        if joint is not None:
            feature_deviation[row] = np.sqrt(np.sum(joint.coordinates_deviation[row] ** 2) / features)
        weights = np.where(one.targets >= 0, structured[one.targets], -np.inf)
        targets[row] = one.targets[np.argsort(-weights)]
        surprise[row] = _surprise(subspace, one, 1)
        misfit[row] = one.misfit
        prediction = np.asarray(jax.nn.softmax(subspace.directions @ coordinates))
        predicted += np.outer(prediction - structured, full) / divisor
    if joint is not None:
        joint_surprise = _joint_surprise(subspace, found, joint)
    for row, one in enumerate(found):
        accident = max(surprise[row], np.nan_to_num(joint_surprise, nan=-np.inf)) < UNIQUE_SURPRISE
        vague = joint is None and TOLERANCE * one.logit_deviation > 1
        if accident or vague:
            # It explains its own equation, as an accident might, or too many labels do: not enough to report it.
            label[row], feature[row], label_deviation[row] = np.nan, np.nan, np.nan
            targets[row] = -1
            continue
        sharp = TOLERANCE * np.max(label_deviation[row]) <= SHARP_LABEL
        verdict[row] = Verdict.UNIQUE if consistent and sharp else Verdict.AMBIGUOUS
    size = np.linalg.norm(gradient)
    residual = np.linalg.norm(np.asarray(gradient) - predicted) / (size if size else 1.0)
    kind = np.promote_types(dtype, np.float32)
    return BatchRecovery(
        label=label.astype(kind),
        feature=feature.astype(kind),
        label_deviation=label_deviation.astype(kind),
        feature_deviation=feature_deviation.astype(kind),
        targets=targets,
        verdict=verdict,
        surprise=surprise,
        misfit=misfit,
        rank=rank,
        singular_values=singular_values,
        noise=float(subspace.noise),
        joint_misfit=math.nan if joint is None else float(joint.misfit),
        joint_surprise=joint_surprise,
        residual=float(residual),
    )


def _structured(one: Component, number_of_classes: int) -> np.ndarray:
    """(C,) the label with its common level made exact and a sum of 1."""
    singled = one.targets[one.targets >= 0]
    label = np.full((number_of_classes,), max(float(one.level), 0.0))
    label[singled] = one.label[singled]
    label[singled] += (1 - label.sum()) / max(len(singled), 1)
    return label


def _joint_surprise(subspace: BatchSubspace, found: list[Component], joint: JointFit) -> float:
    """Nats of the agreement of all equations together, as `_surprise` counts them for one."""
    number_of_classes, rank = subspace.left.shape
    nats = []
    for one in found:
        clean = np.setdiff1d(np.arange(number_of_classes), one.targets[one.targets >= 0])
        nats.append(_nats(subspace, one)[clean])
    every = np.sort(np.concatenate(nats))
    # B^2 coordinates, which leave the duals no freedom, and a level each.
    kept = every[: max(len(every) - rank * rank - rank, 0)]
    choices = sum(math.log(math.comb(number_of_classes, int(np.sum(one.targets >= 0)))) for one in found)
    return float(kept.sum() - choices)
