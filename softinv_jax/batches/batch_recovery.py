"""`recover_batch`: every example's soft label and feature from one averaged gradient, each with a verdict."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.evidence import example_surprise, joint_surprise
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.scale_search import search_any_scale
from softinv_jax.batches.search import search_batch
from softinv_jax.batches.subspace import BatchSubspace, batch_subspace
from softinv_jax.float64 import in_float64
from softinv_jax.labels.explanations import SHARP_LABEL, UNIQUE_SURPRISE
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.observation.head import Observation, append_bias, observe

__all__ = ["BatchRecovery", "Reduction", "recover_batch"]

Reduction = Literal["mean", "sum"]


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
    joint_misfit: float
    joint_surprise: float
    residual: float


def recover_batch(
    observation: Observation,
    batch_size: int | Literal["auto"],
    *,
    reduction: Reduction = "mean",
    unknown_scale: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> BatchRecovery:
    """Recover every example of one batch from the gradient of its loss.

    The formats of the labels may differ and are not told; each may single out up to two classes. See
    docs/batches.md for the equations, and for where this ends.

    Args:
      observation: `weight_gradient` (C, d), with `bias_gradient` (C,) for a head with a bias.
      batch_size: B < C, B <= d; or `auto`: the numerical rank of the gradient.
      reduction: whether the loss was the mean or the sum over the batch. (With `auto` the mean is over the rank.) Where
        the scale is unknown, it only says what `scale` is relative to.
      unknown_scale: the gradient carries an unknown factor, of either sign (learning rate, mean or sum).
      progress: called with (examples found, B).

    Returns:
      A `BatchRecovery`.

    Raises:
      ValueError: for arrays `observe` refuses, more than one gradient, or a batch size that cannot be.
    """
    observation = observe(**vars(observation))
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
    return _recover_batch(observation, batch_size, reduction, unknown_scale, progress or (lambda found, total: None))


@in_float64
def _recover_batch(
    observation: Observation,
    batch_size: int | Literal["auto"],
    reduction: Reduction,
    unknown_scale: bool,
    progress: Callable[[int, int], None],
) -> BatchRecovery:
    dtype = np.dtype(observation.weight_gradient.dtype)
    has_bias = observation.bias is not None
    weight, gradient = append_bias(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), observation))
    largest = None if batch_size == "auto" else batch_size
    known_noise = None if observation.noise is None else np.asarray(observation.noise, np.float64)
    subspace, right, singular_values = batch_subspace(
        weight, gradient, largest, dtype, has_bias=has_bias, known_noise=known_noise
    )
    rank = subspace.singular_values.size
    total = largest or rank
    usual = 1.0 if reduction == "sum" else float(total)
    found: list[Component] = []
    joint = None
    divisor = Divisor(math.nan) if unknown_scale else Divisor(usual)
    has_signal = singular_values[0] > 0
    if has_signal and unknown_scale:
        divisor, found, joint = search_any_scale(subspace, progress, total)
    elif has_signal:
        found, joint = search_batch(subspace, divisor, progress, total)
    return _finish(observation, gradient, subspace, right, singular_values, (divisor, found, joint), usual, total)


def _finish(
    observation: Observation,
    gradient: jax.Array,
    subspace: BatchSubspace,
    right: np.ndarray,
    singular_values: np.ndarray,
    search: tuple[Divisor, list[Component], JointFit | None],
    usual: float,
    total: int,
) -> BatchRecovery:
    """Verdicts and arrays. `usual`: D at scale 1."""
    divisor, found, joint = search
    rank = subspace.singular_values.size if singular_values[0] > 0 else 0
    number_of_classes, features = observation.weight.shape
    label = np.full((total, number_of_classes), np.nan)
    feature = np.full((total, features), np.nan)
    label_deviation, feature_deviation = np.full_like(label, np.nan), np.full((total,), np.nan)
    targets = np.full((total, TARGETS), -1, np.int32)
    surprise, misfit = np.full((total,), np.nan), np.full((total,), np.nan)
    verdict = np.full((total,), Verdict.NO_SIGNAL if rank == 0 else Verdict.NOT_FOUND, np.int32)
    together = math.nan
    known_divisor = divisor.deviation == 0
    predicted = np.zeros(gradient.shape)
    for row, one in enumerate(found):
        structured = _structured(one, number_of_classes) if joint is None else joint.label[row]
        coordinates = one.coordinates if joint is None else joint.coordinates[row]
        full = right @ coordinates
        label[row], feature[row] = structured, full[:features]
        # As the joint fit does: residuals larger than expected mean more noise than expected.
        own_deviation = one.label_deviation * max(float(one.misfit), 1.0)
        label_deviation[row] = own_deviation if joint is None else joint.label_deviation[row]
        if joint is not None:
            feature_deviation[row] = np.sqrt(np.sum(joint.coordinates_deviation[row] ** 2) / features)
        weights = np.where(one.targets >= 0, structured[one.targets], -np.inf)
        targets[row] = one.targets[np.argsort(-weights)]
        surprise[row] = example_surprise(subspace, one, known_divisor=known_divisor)
        misfit[row] = one.misfit
        prediction = np.asarray(jax.nn.softmax(subspace.directions @ coordinates))
        predicted += np.outer(prediction - structured, full) / divisor.value
    if joint is not None:
        together = joint_surprise(subspace, found, known_divisor=known_divisor)
    for row, one in enumerate(found):
        accident = max(surprise[row], np.nan_to_num(together, nan=-np.inf)) < UNIQUE_SURPRISE
        vague = joint is None and TOLERANCE * one.logit_deviation > 1
        if accident or vague:
            # It explains its own equation, as an accident might, or too many labels do: not enough to report it.
            label[row], feature[row], label_deviation[row] = np.nan, np.nan, np.nan
            targets[row] = -1
            continue
        # Nothing confirms an example of a batch that is not explained as a whole: its own equation may have others.
        sharp = joint is not None and TOLERANCE * np.max(label_deviation[row]) <= SHARP_LABEL
        verdict[row] = Verdict.UNIQUE if sharp else Verdict.AMBIGUOUS
    size = np.linalg.norm(gradient)
    if not np.any((verdict == Verdict.UNIQUE) | (verdict == Verdict.AMBIGUOUS)) and not known_divisor:
        divisor = Divisor(math.nan, math.nan)
    scale = usual / divisor.value
    residual = np.linalg.norm(np.asarray(gradient) - predicted) / (size if size else 1.0)
    kind = np.promote_types(np.dtype(observation.weight_gradient.dtype), np.float32)
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
        noise=np.asarray(subspace.noise),
        scale=scale,
        scale_deviation=abs(scale) * divisor.deviation,
        joint_misfit=math.nan if joint is None else float(joint.misfit),
        joint_surprise=together,
        residual=float(residual),
    )


def _structured(one: Component, number_of_classes: int) -> np.ndarray:
    """(C,) the label with its common level made exact and a sum of 1."""
    singled = one.targets[one.targets >= 0]
    label = np.full((number_of_classes,), max(float(one.level), 0.0))
    label[singled] = one.label[singled]
    label[singled] += (1 - label.sum()) / max(len(singled), 1)
    return label
