"""`recover_batch`: every example's soft label and feature from one averaged gradient, each with a verdict."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.special import softmax

from softinv_jax.batches.batch_search import BatchAsked, BatchGradient, BatchOutcome, search_all
from softinv_jax.batches.component import Component
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.evidence import example_surprise, joint_surprise
from softinv_jax.float64 import in_float64
from softinv_jax.labels.assumptions import Assumption, Loss
from softinv_jax.labels.explanations import SHARP_LABEL, UNIQUE_SURPRISE
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.observation.head import Observation, observe

__all__ = ["BatchLoss", "BatchRecovery", "Reduction", "recover_batch"]

Reduction = Literal["mean", "sum"]
BatchLoss = Literal["auto", "cross_entropy", "weighted_cross_entropy"]


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
      rank: numerical rank of the gradient. singular_values: (min(C, d),), with each row in units of its noise. noise:
        (C,) standard deviation, per entry of each row of the gradient, of what is not of that rank.
      scale: the factor on the gradient, 1 unless it was to be found; NaN where no example was. scale_deviation: its
        standard deviation.
      factor: (B,) the factor of each example beside `scale`: class weights, or how often the example is there; 1 unless
        the gradient says otherwise. factor_deviation: (B,).
      loss: a `Loss`. refuted: `Assumption` flags of what was told or taken for granted and is not so; in words by
        `softinv_jax.labels.assumptions.explain_assumptions`.
      joint_misfit: root mean square residual of the whole gradient in standard deviations, all examples together; NaN
        unless all were found. joint_surprise: nats, of all of them together.
      residual: relative distance between the gradient and the one that all solutions give together, those included that
        are not sure enough to be reported.
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
    noise: np.ndarray
    scale: float
    scale_deviation: float
    factor: np.ndarray
    factor_deviation: np.ndarray
    loss: int
    refuted: int
    joint_misfit: float
    joint_surprise: float
    residual: float


def recover_batch(
    observation: Observation,
    batch_size: int | Literal["auto"],
    *,
    reduction: Reduction = "mean",
    unknown_scale: bool = False,
    loss: BatchLoss = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> BatchRecovery:
    """Recover every example of one batch from the gradient of its loss.

    The formats of the labels may differ and are not told; each may single out up to two classes. See
    docs/batches.md for the equations, and for where this ends.

    Args:
      observation: `weight_gradient` (C, d), with `bias_gradient` (C,) for a head with a bias.
      batch_size: B < C, B <= d; or `auto`: the numerical rank of the gradient. Where the rank shows another number,
        that is tried too, and said in `refuted`.
      reduction: whether the loss was the mean or the sum over the batch. (With `auto` the mean is over the rank.) Where
        the scale is unknown, it only says what `scale` is relative to.
      unknown_scale: the gradient carries an unknown factor, of either sign (learning rate, mean or sum).
      loss: `auto` tries plain cross-entropy, then a factor on each example (class weights, focal loss with hard labels,
        one image twice); or the name of the one it is.
      progress: called with (examples found, B).

    Returns:
      A `BatchRecovery`, with as many rows as there are examples (those that were found, where another number was told).

    Raises:
      ValueError: for arrays `observe` refuses, more than one gradient, or a batch size that cannot be.
    """
    observation = observe(**vars(observation))
    if observation.weight_gradient.ndim != 2:
        raise ValueError(
            "recover_batch takes one gradient (C, d), but weight_gradient has shape"
            f" {observation.weight_gradient.shape}; call it for each"
        )
    asked = batch_asked(observation.weight.shape, batch_size, reduction, unknown_scale, loss)
    return _recover_batch(observation, asked, progress or (lambda found, total: None))


@in_float64
def _recover_batch(observation: Observation, asked: BatchAsked, progress: Callable[[int, int], None]) -> BatchRecovery:
    (gradient,) = batch_gradients(observation)
    return conclude_batch(gradient, search_all(gradient, asked, progress))


def batch_asked(
    shape: tuple[int, ...], batch_size: int | str, reduction: str, unknown_scale: bool, loss: str
) -> BatchAsked:
    """What was told of the batch, checked; shape: (C, d) of the head's weight."""
    number_of_classes, features = shape
    if batch_size != "auto":
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer or 'auto', not {batch_size!r}")
        if batch_size >= number_of_classes or batch_size > features:
            raise ValueError(
                f"batch_size = {batch_size}, but only batches smaller than the number of classes, C ="
                f" {number_of_classes}, and not larger than the number of features, d = {features}, can be separated:"
                " their gradient has lower rank than the batch has examples"
            )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if loss not in get_args(BatchLoss):
        raise ValueError(f"loss of a batch must be one of {', '.join(get_args(BatchLoss))}, not {loss!r}")
    size = None if batch_size == "auto" else int(batch_size)
    return BatchAsked(size, reduction == "mean", not unknown_scale, loss)  # type: ignore[arg-type]


def batch_gradients(observation: Observation) -> Iterator[BatchGradient]:
    """The gradient of an observation, or each of N, on the host."""
    has_bias = observation.bias is not None
    weight = np.asarray(observation.weight, np.float64)
    dtype = np.dtype(observation.weight_gradient.dtype)
    gradients = np.asarray(observation.weight_gradient)
    biases = np.asarray(observation.bias_gradient) if has_bias else gradients[..., :0]
    noises = None if observation.noise is None else np.asarray(observation.noise, np.float64)
    if has_bias:
        weight = np.concatenate([weight, np.asarray(observation.bias, np.float64)[:, None]], axis=1)
    number_of_classes, features = observation.weight.shape
    count = gradients.size // max(number_of_classes * features, 1)
    gradients = gradients.reshape(count, number_of_classes, features)
    for index in range(count):
        values = gradients[index].astype(np.float64)
        if has_bias:
            bias = biases.reshape(count, number_of_classes, 1)[index].astype(dtype).astype(np.float64)
            values = np.concatenate([values, bias], axis=1)
        noise = None if noises is None else noises.reshape(count, number_of_classes)[index]
        yield BatchGradient(weight, values, dtype, noise, has_bias)


def conclude_batch(gradient: BatchGradient, outcome: BatchOutcome) -> BatchRecovery:
    """Deviations, verdicts and what goes with them."""
    rows = _Rows(outcome, (len(gradient.weight), gradient.weight.shape[1] - gradient.has_bias))
    rows.fill()
    rows.conclude()
    return _finish(gradient, outcome, rows)


class _Rows:
    """The arrays of a `BatchRecovery`, one row an example."""

    def __init__(self, outcome: BatchOutcome, shape: tuple[int, ...]) -> None:
        number_of_classes, features = shape
        self.outcome, self.total = outcome, max(outcome.total, len(outcome.found))
        self.label = np.full((self.total, number_of_classes), np.nan)
        self.feature = np.full((self.total, features), np.nan)
        self.label_deviation = np.full_like(self.label, np.nan)
        self.feature_deviation = np.full((self.total,), np.nan)
        self.targets = np.full((self.total, TARGETS), -1, np.int32)
        self.surprise, self.misfit = np.full((self.total,), np.nan), np.full((self.total,), np.nan)
        self.factor, self.factor_deviation = np.full((self.total,), np.nan), np.full((self.total,), np.nan)
        nothing = Verdict.NO_SIGNAL if outcome.spaces.rank == 0 else Verdict.NOT_FOUND
        self.verdict = np.full((self.total,), nothing, np.int32)
        self.predicted = np.zeros((number_of_classes, len(outcome.spaces.right)))
        self.together = math.nan

    @property
    def own_divisors(self) -> bool:
        return self.outcome.loss == Loss.WEIGHTED_CROSS_ENTROPY or self.outcome.multiples is not None

    def fill(self) -> None:
        """Every example that was found."""
        outcome, joint = self.outcome, self.outcome.joint
        subspace, right = outcome.spaces.subspace, outcome.spaces.right
        features = self.feature.shape[1]
        known = outcome.divisor.deviation == 0
        for row, one in enumerate(outcome.found):
            structured = _structured(one, self.label.shape[1]) if joint is None else joint.label[row]
            coordinates = one.coordinates if joint is None else joint.coordinates[row]
            full = right @ coordinates
            self.label[row], self.feature[row] = structured, full[:features]
            # As the joint fit does: residuals larger than expected mean more noise than expected.
            own_deviation = one.label_deviation * max(float(one.misfit), 1.0)
            self.label_deviation[row] = own_deviation if joint is None else joint.label_deviation[row]
            divisor, relative = outcome.divisor.value, 0.0
            if joint is not None:
                self.feature_deviation[row] = np.sqrt(np.sum(joint.coordinates_deviation[row] ** 2) / features)
                if self.own_divisors:
                    divisor, relative = float(joint.divisors[row]), float(joint.divisors_deviation[row])
            self.factor[row] = outcome.usual / divisor if self.own_divisors else 1.0
            self.factor_deviation[row] = abs(self.factor[row]) * relative
            weights = np.where(one.targets >= 0, structured[one.targets], -np.inf)
            self.targets[row] = one.targets[np.argsort(-weights)]
            self.surprise[row] = example_surprise(subspace, one, known_divisor=known and not self.own_divisors)
            self.misfit[row] = one.misfit
            prediction = softmax(subspace.directions @ coordinates)
            self.predicted += np.outer(prediction - structured, full) / divisor
        if joint is not None:
            self.together = joint_surprise(subspace, outcome.found, known_divisor=known, own_divisors=self.own_divisors)

    def conclude(self) -> None:
        """Verdicts; what is not sure enough is not told."""
        joint = self.outcome.joint
        lost = int(Assumption.SOFTMAX | Assumption.ALL_ENTRIES)
        if self.outcome.refuted & lost:
            self.verdict[:] = np.where(self.verdict == Verdict.NO_SIGNAL, self.verdict, Verdict.REFUTED)
        for row, one in enumerate(self.outcome.found):
            accident = max(self.surprise[row], np.nan_to_num(self.together, nan=-np.inf)) < UNIQUE_SURPRISE
            vague = joint is None and TOLERANCE * one.logit_deviation > 1
            if accident or vague or self.outcome.refuted & lost:
                # It explains its own equation, as an accident might, or too many labels do: not enough to report it.
                self.label[row], self.feature[row], self.label_deviation[row] = np.nan, np.nan, np.nan
                self.targets[row], self.factor[row], self.factor_deviation[row] = -1, np.nan, np.nan
                continue
            # Nothing confirms an example of a batch that is not explained as a whole: its own equation may have others.
            sharp = joint is not None and TOLERANCE * np.max(self.label_deviation[row]) <= SHARP_LABEL
            # A factor of its own bends any label but a hard one, as it does for one example.
            supple = self.outcome.loss == Loss.WEIGHTED_CROSS_ENTROPY and not self._is_hard(row)
            self.verdict[row] = Verdict.CONDITIONAL if supple else Verdict.UNIQUE
            if not sharp:
                self.verdict[row] = Verdict.AMBIGUOUS

    def _is_hard(self, row: int) -> bool:
        unit = np.eye(self.label.shape[1])[np.argmax(self.label[row])]
        return bool(np.all(np.abs(self.label[row] - unit) <= TOLERANCE * self.label_deviation[row] + 1e-6))


def _finish(gradient: BatchGradient, outcome: BatchOutcome, rows: _Rows) -> BatchRecovery:
    divisor, joint = outcome.divisor, outcome.joint
    size = np.linalg.norm(gradient.values)
    scale, deviation = outcome.usual / divisor.value, divisor.deviation
    if not np.any(rows.verdict >= Verdict.AMBIGUOUS) and deviation != 0:
        scale, deviation = math.nan, math.nan
    kind = np.promote_types(gradient.dtype, np.float32)
    return BatchRecovery(
        label=rows.label.astype(kind),
        feature=rows.feature.astype(kind),
        label_deviation=rows.label_deviation.astype(kind),
        feature_deviation=rows.feature_deviation.astype(kind),
        targets=rows.targets,
        verdict=rows.verdict,
        surprise=rows.surprise,
        misfit=rows.misfit,
        rank=outcome.spaces.rank,
        singular_values=outcome.spaces.singular_values,
        noise=np.asarray(outcome.spaces.subspace.noise),
        scale=scale,
        scale_deviation=abs(scale) * deviation,
        factor=rows.factor,
        factor_deviation=rows.factor_deviation,
        loss=int(outcome.loss),
        refuted=outcome.refuted,
        joint_misfit=math.nan if joint is None else float(joint.misfit),
        joint_surprise=rows.together,
        residual=float(np.linalg.norm(gradient.values - rows.predicted) / (size if size else 1.0)),
    )


def _structured(one: Component, number_of_classes: int) -> np.ndarray:
    """(C,) the label with its common level made exact and a sum of 1."""
    singled = one.targets[one.targets >= 0]
    label = np.full((number_of_classes,), max(float(one.level), 0.0))
    label[singled] = one.label[singled]
    label[singled] += (1 - label.sum()) / max(len(singled), 1)
    return label
