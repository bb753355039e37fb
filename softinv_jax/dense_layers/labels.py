"""Labels of examples whose features and derivatives are known: y = p - g, of any format.

Where a bias fixed the scale of the inputs, p is known, and so is a dense label. Where nothing did, or the gradient
has a factor, or p - g is no label, each example's share of the head's gradient, g h^T, is searched as that of a
single example.
"""

from dataclasses import dataclass

import jax
import numpy as np

from softinv_jax.dense_layers.assembly import Assembled
from softinv_jax.dense_layers.common_scale import common_scale
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.predictions import logit_gradients, predictions
from softinv_jax.labels.assumptions import Assumption, Loss
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation
from softinv_jax.recoveries import recover_many

__all__ = ["LabelsFound", "find_labels"]

# More features than this many times the examples are turned into as many as there are examples.
WIDE = 4
FEWEST_FEATURES = 16
# Predictions of classes at one level of the label that differ; of two the scale could be made to fit, and a level.
CONFIRMING = 4
DISTINCT = 10.0
MOST_REPEATED = 8
# Of what a level's error may be: what may still be one level at a scale that is a little different.
NEAR = 100.0
# Of the scales of several examples, relative: one gradient has one.
ONE_SCALE = 1e-3
UNKNOWN_LENGTH = 1.0
ORDINARY = 15.0


@dataclass(frozen=True)
class LabelsFound:
    """k examples; NumPy.

    Attributes:
      label: (k, C), NaN where none is told. label_deviation: (k, C). verdict: (k,) a `Verdict`.
      feature: (k, d) the head's inputs. logit_gradient: (k, C) g.
      factor: (k,) what the inputs that were given must be multiplied by, 1 where their scale was known;
        factor_deviation: (k,).
      scale: (k,) factor on the gradient. loss: (k,) a `Loss`. refuted, rests_on: (k,) `Assumption` flags.
    """

    label: np.ndarray
    label_deviation: np.ndarray
    verdict: np.ndarray
    feature: np.ndarray
    logit_gradient: np.ndarray
    factor: np.ndarray
    factor_deviation: np.ndarray
    scale: np.ndarray
    loss: np.ndarray
    refuted: np.ndarray
    rests_on: np.ndarray


def find_labels(
    layers: DenseLayers, index: int, assembled: Assembled, *, unknown_scale: bool, missing: int | None
) -> LabelsFound:
    """Labels of the examples that were put together at layer `index`.

    missing: how many examples more there are than the gradient shows; None where that is not known, nor, so, what a
    mean over them was divided by.
    """
    before = layers.before(index, assembled.inputs)
    feature = layers.activate(len(layers.kernels) - 2, before[-2])
    gradient, deviation = logit_gradients(layers, index, before, assembled)
    found = _none(feature, gradient)
    if assembled.scaled:
        found = _at_common_scale(layers, index, assembled, found, deviation, unknown_scale, missing)
    rows = np.flatnonzero(_open_to_others(found, deviation))
    if rows.size:
        _search_singly(layers, index, assembled, found, rows, deviation, unknown_scale=unknown_scale)
    return found


def _at_common_scale(
    layers: DenseLayers,
    index: int,
    assembled: Assembled,
    nothing: LabelsFound,
    deviation: np.ndarray,
    unknown_scale: bool,
    missing: int | None,
) -> LabelsFound:
    """Where the inputs' scale is known, and so the predictions: at the gradient's scale, told or found."""
    gradient = nothing.logit_gradient
    prediction, error = predictions(layers, index, assembled, np.ones(len(gradient)))
    found, told = nothing, not unknown_scale and missing is not None
    if not unknown_scale:
        found = _at_known_scale(prediction, gradient, np.hypot(deviation, error), nothing)
        found.rests_on[:] |= int(Assumption.BATCH_SIZE) if missing else 0
        found = _repeated(prediction, gradient, deviation, error, found, missing)
        if np.all(found.verdict == Verdict.UNIQUE):
            return found
    scale = common_scale(prediction, gradient, error, deviation)
    if scale is None or (not unknown_scale and abs(scale.value - 1) < max(ONE_SCALE, TOLERANCE * scale.deviation)):
        return found
    relative = scale.deviation / abs(scale.value)
    own = np.hypot(deviation / abs(scale.value), np.abs(gradient / scale.value) * relative)
    other = _at_known_scale(prediction, gradient / scale.value, np.hypot(own, error), nothing, relative)
    if not unknown_scale and _confirmed(other) <= _confirmed(found):
        return found
    other.scale[:] = scale.value
    other = _repeated(prediction, gradient / scale.value, own, error, other, missing)
    if told:
        other.refuted[:] |= int(Assumption.SCALE)
        # Some examples may have a factor of their own (one that is there twice), so that one for all confirms nothing.
        other.verdict[:] = np.where(other.verdict == Verdict.CONDITIONAL, Verdict.AMBIGUOUS, other.verdict)
    return other


def _confirmed(found: LabelsFound) -> tuple[int, int]:
    """How many labels confirm the scale, and how many are possible at it."""
    return int(np.sum(found.verdict == Verdict.UNIQUE)), int(np.sum(found.verdict != Verdict.REFUTED))


def _none(feature: np.ndarray, gradient: np.ndarray) -> LabelsFound:
    examples = len(feature)
    return LabelsFound(
        label=np.full_like(gradient, np.nan),
        label_deviation=np.full_like(gradient, np.nan),
        verdict=np.full(examples, Verdict.REFUTED, np.int32),
        feature=feature.copy(),
        logit_gradient=gradient.copy(),
        factor=np.ones(examples),
        factor_deviation=np.zeros(examples),
        scale=np.ones(examples),
        loss=np.full(examples, int(Loss.CROSS_ENTROPY)),
        refuted=np.zeros(examples, np.int64),
        rests_on=np.full(examples, int(Assumption.LOSS | Assumption.SCALE), np.int64),
    )


def _at_known_scale(
    prediction: np.ndarray, gradient: np.ndarray, deviation: np.ndarray, nothing: LabelsFound, relative: float = 0.0
) -> LabelsFound:
    """y = p - g, if that is a label. Nothing is assumed of its format; where it has one, that confirms loss and scale.

    Were the loss or the scale another, p - c g would not be one level over classes whose p differ.
    relative: standard deviation of the scale.
    """
    found = _none(nothing.feature, nothing.logit_gradient)
    label = prediction - gradient
    for row, (own, error) in enumerate(zip(label, deviation, strict=True)):
        reach = TOLERANCE * error
        if np.any(own < -reach) or np.any(own > 1 + reach):
            continue
        apart = np.abs(own - np.median(own))
        agreeing, near = apart <= reach, apart <= NEAR * reach
        if _leans(own[near], gradient[row][near], prediction[row][near], error[near], relative):
            continue
        distinct = _distinct(prediction[row][agreeing], reach[agreeing])
        found.verdict[row] = Verdict.UNIQUE if distinct >= CONFIRMING else Verdict.CONDITIONAL
        found.label[row], found.label_deviation[row] = np.clip(_levelled(own, error, agreeing), 0, 1), error
    return found


def _leans(label: np.ndarray, gradient: np.ndarray, prediction: np.ndarray, error: np.ndarray, relative: float) -> bool:
    """Whether what seems one level grows with g, as where an example has a factor of its own near 1. All (n,)."""
    if len(label) < CONFIRMING:
        return False
    weights = 1 / np.maximum(error, 1e-300) ** 2
    run = gradient - np.average(gradient, weights=weights)
    square = float(np.sum(weights * run**2))
    if square == 0:
        return False
    slope = float(np.sum(weights * run * label)) / square
    rest = label - slope * run
    if np.any(np.abs(rest - np.average(rest, weights=weights)) > TOLERANCE * error):
        return False  # Classes of other levels are among them.
    # Independent errors of the logits move all predictions by one factor as well.
    shared = float(np.max(error / np.maximum(prediction, 1e-300)))
    return abs(slope) > TOLERANCE * (square**-0.5 + shared + relative)


def _levelled(label: np.ndarray, error: np.ndarray, agreeing: np.ndarray) -> np.ndarray:
    """(C,) the label as near to what was found as its errors allow, with one level where classes agree, and sum 1.

    A prediction that is nearly certain errs in two classes alone; the others tell the level, and the sum the rest. That
    classes are at one level is likely and no more: the deviations stay.
    """
    if abs(1 - label.sum()) > TOLERANCE * np.linalg.norm(error):
        return label
    levelled = label.copy()
    if np.count_nonzero(agreeing) > len(label) / 2:
        weights = 1 / np.maximum(error[agreeing], 1e-300) ** 2
        levelled[agreeing] = np.sum(weights * label[agreeing]) / np.sum(weights)
    free = ~agreeing if np.any(~agreeing) else np.ones_like(agreeing)
    square = np.where(free, error**2, 0)
    return np.asarray(levelled + (1 - levelled.sum()) * square / max(square.sum(), 1e-300))


def _repeated(
    prediction: np.ndarray,
    gradient: np.ndarray,
    deviation: np.ndarray,
    error: np.ndarray,
    found: LabelsFound,
    missing: int | None,
) -> LabelsFound:
    """Examples that are there several times have as large a factor of their own, and the mean of their labels.

    Only where the factor is confirmed by classes at one level, and other examples by the scale that they share.
    """
    most = MOST_REPEATED if missing is None else min(missing + 1, MOST_REPEATED)
    for row in np.flatnonzero(found.verdict == Verdict.REFUTED):
        for times in range(2, most + 1):
            own = slice(row, row + 1)
            noise = np.hypot(deviation[own] / times, error[own])
            one = _at_known_scale(
                prediction[own], gradient[own] / times, noise, _none(found.feature[own], gradient[own])
            )
            if one.verdict[0] == Verdict.UNIQUE:
                found.verdict[row] = Verdict.CONDITIONAL
                found.label[row], found.label_deviation[row] = one.label[0], one.label_deviation[0]
                found.refuted[row] |= int(Assumption.DISTINCT_EXAMPLES)
                break
    return found


def _distinct(values: np.ndarray, reach: np.ndarray) -> int:
    """How many of them can be told apart."""
    order = np.argsort(values)
    count, last = 0, -np.inf
    for value, width in zip(values[order], reach[order], strict=True):
        if value - last > max(DISTINCT * width, 0):
            count, last = count + 1, value
    return count


def _open_to_others(found: LabelsFound, deviation: np.ndarray) -> np.ndarray:
    """(k,) of which labels another loss or scale may say more.

    Not of those that are sure; nor of an example that is there several times, which needs no other loss; nor where most
    classes are at one level, and confirm nothing as their predictions are all 0.
    """
    with np.errstate(invalid="ignore"):
        apart = np.abs(found.label - np.median(found.label, axis=1, keepdims=True))
        formatted = np.mean(apart <= TOLERANCE * found.label_deviation, axis=1) > 0.5
    formatted &= ~_unbalanced(found.logit_gradient, deviation) & (found.verdict == Verdict.CONDITIONAL)
    several = found.refuted & int(Assumption.DISTINCT_EXAMPLES) != 0
    return (found.verdict != Verdict.UNIQUE) & ~several & ~formatted


def _unbalanced(gradient: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """(k,) whether the derivatives do not add up to 0, as those of a softmax do."""
    return np.asarray(np.abs(gradient.sum(axis=1)) > TOLERANCE * np.linalg.norm(deviation, axis=1))


def _search_singly(
    layers: DenseLayers,
    index: int,
    assembled: Assembled,
    found: LabelsFound,
    rows: np.ndarray,
    deviation: np.ndarray,
    *,
    unknown_scale: bool,
) -> None:
    """Fill in what the search for one example says of each: other losses and scales, and the length of its feature.

    What was found before stays, unless that search refutes it.
    """
    turned, weight = _turned(found.feature[rows], layers.kernels[-1].T)
    gradient = found.logit_gradient[rows]
    observation = _observation(layers, assembled.scaled, turned, weight, gradient, deviation[rows])
    recovery = recover_many(observation, unknown_scale=unknown_scale)
    unbalanced = _unbalanced(gradient, deviation[rows])
    chosen = np.flatnonzero((found.verdict[rows] == Verdict.REFUTED) | _contradicts(recovery, unbalanced))
    if not chosen.size:
        return
    rows, turned, gradient = rows[chosen], turned[chosen], gradient[chosen]
    recovery = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], recovery)
    factor, relative = np.ones(len(rows)), np.zeros(len(rows))
    if not assembled.scaled:
        factor = _factor(recovery, turned)
        scalar = np.maximum(np.abs(np.asarray(recovery.scalar, np.float64)), 1e-300)
        relative = np.nan_to_num(np.asarray(recovery.evidence.scalar_deviation, np.float64) / scalar)
        # Where no label fixes the length, all of the interval is possible.
        ends = np.abs(np.asarray(recovery.interval, np.float64))
        with np.errstate(invalid="ignore"):
            half = np.abs(ends[:, 1] - ends[:, 0]) / np.maximum(ends.sum(axis=1), 1e-300)
        known = np.asarray(recovery.verdict) >= Verdict.AMBIGUOUS
        # Where not even a label of one example bounds it, anything is possible.
        half = np.where(np.isfinite(half), np.maximum(half, UNKNOWN_LENGTH), UNKNOWN_LENGTH)
        relative = np.where(known, relative, half)
    whole = np.ones(len(found.factor))
    whole[rows] = factor
    _, error = predictions(layers, index, assembled, whole)
    own = np.hypot(deviation[rows] / factor[:, None], error[rows])
    found.label[rows] = np.asarray(recovery.label, np.float64)
    found.label_deviation[rows] = np.hypot(np.asarray(recovery.evidence.label_deviation, np.float64), own)
    found.verdict[rows] = np.asarray(recovery.verdict)
    found.feature[rows] *= factor[:, None]
    found.logit_gradient[rows] /= factor[:, None]
    found.factor[rows], found.factor_deviation[rows] = factor, factor * relative
    found.scale[rows] = np.asarray(recovery.scale, np.float64)
    found.loss[rows] = np.asarray(recovery.assumptions.loss)
    found.refuted[rows] = np.asarray(recovery.assumptions.refuted)
    found.rests_on[rows] = np.asarray(recovery.assumptions.rests_on)
    if unknown_scale:
        _agree_on_scale(found, rows)


def _contradicts(recovery: Recovery, unbalanced: np.ndarray) -> np.ndarray:
    """(k,) whether loss or scale is another: a label has a format there, or the derivatives do not add up to 0."""
    verdict, refuted = np.asarray(recovery.verdict), np.asarray(recovery.assumptions.refuted)
    another = refuted & int(Assumption.LOSS | Assumption.SCALE | Assumption.LABEL_RANGE) != 0
    formatted = (verdict == Verdict.UNIQUE) | ((verdict >= Verdict.CONDITIONAL) & another)
    return np.where(refuted & int(Assumption.SOFTMAX) != 0, unbalanced, formatted)


def _agree_on_scale(found: LabelsFound, rows: np.ndarray) -> None:
    """Labels whose scale is another than that of those that are sure, or than each other's, are not to be relied on."""
    claimed = rows[found.verdict[rows] >= Verdict.CONDITIONAL]
    sure = claimed[found.verdict[claimed] == Verdict.UNIQUE]
    judges = sure if sure.size else claimed
    if not judges.size:
        return
    apart = np.abs(found.scale / np.median(found.scale[judges]) - 1) > ONE_SCALE
    wrong = claimed if np.any(apart[judges]) else claimed[apart[claimed]]
    found.verdict[wrong] = Verdict.AMBIGUOUS


def _observation(
    layers: DenseLayers,
    scaled: bool,
    turned: np.ndarray,
    weight: np.ndarray,
    gradient: np.ndarray,
    deviation: np.ndarray,
) -> Observation:
    """What each example by itself would show of the head."""
    kind = np.promote_types(layers.dtype, np.float32)
    bias = layers.biases[-1]
    if scaled and bias is None:
        bias = np.zeros(layers.number_of_classes)
    # Errors like those of one rounding are what a gradient of this dtype is taken to have in any case.
    ordinary = np.all(deviation <= ORDINARY * float(np.finfo(kind).eps) * np.max(np.abs(gradient), axis=1)[:, None])
    noise = None if ordinary else (deviation * np.sqrt(np.mean(turned**2, axis=1, keepdims=True))).astype(kind)
    return Observation(  # NumPy until it is moved to the device
        weight=weight,  # type: ignore[arg-type]
        weight_gradient=(gradient[:, :, None] * turned[:, None, :]).astype(kind),
        bias=bias,  # type: ignore[arg-type]
        bias_gradient=None if bias is None else gradient.astype(kind),  # type: ignore[arg-type]
        noise=noise,
    )


def _turned(feature: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and (C, d) weight on a basis of the features, where that is much smaller: logits and lengths stay."""
    examples, width = feature.shape
    if width <= max(WIDE * examples, FEWEST_FEATURES):
        return feature, weight
    basis = np.linalg.qr(feature.T)[0]
    if basis.shape[1] < FEWEST_FEATURES:
        # Some rest of the space, for the noise to be seen in.
        other = np.random.default_rng(0).standard_normal((width, FEWEST_FEATURES - basis.shape[1]))
        basis = np.linalg.qr(np.concatenate([basis, other], axis=1))[0]
    return feature @ basis, weight @ basis


def _factor(recovery: Recovery, turned: np.ndarray) -> np.ndarray:
    """(k,) by which each feature must be multiplied; where no label was found, the middle of what is possible."""
    length = np.linalg.norm(turned, axis=1)
    scalar = np.abs(np.asarray(recovery.scalar, np.float64))
    interval = np.asarray(recovery.interval, np.float64)
    middle = np.abs(np.mean(interval, axis=1))
    middle = np.where(np.isfinite(middle), middle, length)
    known = np.asarray(recovery.verdict) >= Verdict.AMBIGUOUS
    return np.asarray(np.where(known, scalar, middle) / length)
