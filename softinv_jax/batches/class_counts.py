"""More examples than can be separated: the mean label, and how many examples each class has.

Where a batch is as large as the number of classes or larger, its gradient has no rank to tell examples apart by. What
is left is the mean label, the share of each class (`labels/mean_label`). If labels are hard, B times that share is a
whole number: integer least squares under the sum B finds the likeliest counts, and the deviations say which of them are
sure. Without a bias one number is unknown, the length of the mean feature: each class then has an interval.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf, softmax

from softinv_jax.float64 import in_float64
from softinv_jax.labels.mean_label import mean_label
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.observation.head import Observation, observe

__all__ = ["ClassCounts", "count_classes", "whole_counts"]

SURE = 0.99  # Of a count that is told.
LENGTHS = 400  # Of the mean feature, tried without a bias.
EACH = 17  # How many of them share a deviation: 799 = 47 * 17, the last place.
SHORTEST, LONGEST = 1e-2, 1e2  # In ranges of the logits.


@dataclass(frozen=True)
class ClassCounts:
    """What the gradient of a large batch says of its labels; NumPy arrays.

    Attributes:
      label: (C,) mean label; NaN where nothing is known. deviation: (C,) standard deviation.
      interval: (C, 2) in which each entry lies: six deviations either way, within [0, 1].
      likeliest: (C,) int, whole numbers that add up to B and are the likeliest if labels are hard; -1 without B.
      certainty: (C,) probability that each of them is right, if labels are hard.
      count: (C,) int, the likeliest where it is sure to `SURE`; -1 where the count cannot be known.
      is_whole: the mean label is whole numbers over B, to within its deviations: labels are hard. (Where deviations are
        too large to tell, `count` is -1 anyway.)
      batch_size: B, or None.
    """

    label: np.ndarray
    deviation: np.ndarray
    interval: np.ndarray
    likeliest: np.ndarray
    certainty: np.ndarray
    count: np.ndarray
    is_whole: bool
    batch_size: int | None


def without_certainty(counts: ClassCounts) -> ClassCounts:
    """The likeliest counts alone, for a gradient that was not observed exactly, as after several local steps.

    What those change is no noise, and no deviation covers it.
    """
    unknown = np.full(counts.label.shape, np.nan)
    return replace(
        counts,
        deviation=unknown,
        interval=np.broadcast_to([0.0, 1.0], (len(unknown), 2)),
        certainty=unknown,
        count=np.full(len(unknown), -1),
        is_whole=False,
    )


@in_float64
def count_classes(
    observation: Observation, batch_size: int | None = None, *, reduction: Literal["mean", "sum"] = "mean"
) -> ClassCounts:
    """The mean label of a batch of any size, and counts of hard labels.

    >>> import numpy as np
    >>> import softinv_jax
    >>> rng = np.random.default_rng(0)
    >>> weight, features = rng.uniform(-0.1, 0.1, (12, 16)), 1 + 0.001 * rng.normal(size=(18, 16))
    >>> classes = np.array([0, 0, 0, 1, 1, 3, 3, 3, 4, 5, 5, 5, 6, 7, 8, 8, 9, 10])
    >>> powers = np.exp(features @ weight.T)
    >>> error = (powers / powers.sum(axis=1, keepdims=True) - np.eye(12)[classes]) / 18
    >>> observation = softinv_jax.observe(weight, error.T @ features, np.zeros(12), error.sum(axis=0))
    >>> count_classes(observation, 18).count.tolist()
    [3, 2, 0, 3, 1, 3, 1, 1, 2, 1, 1, 0]

    Args:
      observation: one gradient, `weight_gradient` (C, d).
      batch_size: B, or None where it is not known: then there are no counts.
      reduction: of the loss over the batch.

    Returns:
      `ClassCounts`.

    Raises:
      ValueError: for arrays `observe` refuses, more than one gradient, or a batch size that is no positive integer.
    """
    observation = observe(**vars(observation))
    if observation.weight_gradient.ndim != 2:
        raise ValueError(f"count_classes takes one gradient (C, d), not {observation.weight_gradient.shape}")
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer or None, not {batch_size!r}")
    if reduction == "sum" and batch_size is None:
        raise ValueError("reduction='sum' needs batch_size: the mean label is the sum over it")
    divisor = float(batch_size) if reduction == "sum" and batch_size else 1.0
    observation = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), observation)
    weight, gradient = observation.weight, observation.weight_gradient / divisor
    examples = float(batch_size or len(weight))
    if observation.bias is None or observation.bias_gradient is None:
        label, deviation, interval = _over_lengths(weight, gradient, examples)
    else:
        found = _mean_label(weight, gradient, observation.bias, observation.bias_gradient / divisor, examples)
        label, deviation = np.asarray(found.label), np.asarray(found.deviation)
        interval = np.stack([label - TOLERANCE * deviation, label + TOLERANCE * deviation], axis=1)
    outside = (interval[:, 1] < 0) | (interval[:, 0] > 1)
    if np.any(outside) or not np.all(np.isfinite(label)) or not np.any(np.asarray(gradient)):
        label, deviation = np.full_like(label, np.nan), np.full_like(deviation, np.inf)
        interval = np.broadcast_to([0.0, 1.0], interval.shape)
    has_bias = observation.bias_gradient is not None
    return _counted(label, deviation, np.clip(interval, 0.0, 1.0), batch_size, has_bias)


_mean_label = jax.jit(mean_label)


def _counted(
    label: np.ndarray, deviation: np.ndarray, interval: np.ndarray, batch_size: int | None, has_bias: bool
) -> ClassCounts:
    unknown = np.full(label.shape, -1)
    if batch_size is None or not np.all(np.isfinite(label)):
        nothing = np.zeros(label.shape)
        return ClassCounts(label, deviation, interval, unknown, nothing, unknown, False, batch_size)
    likeliest = whole_counts(batch_size * label, batch_size * deviation, batch_size)
    spread = np.maximum(batch_size * deviation, 1e-300)
    # The middle of the whole number's interval is not the mean label: what is left of the interval on either side.
    offset = likeliest - batch_size * label
    certainty = (erf((0.5 - offset) / (spread * np.sqrt(2))) + erf((0.5 + offset) / (spread * np.sqrt(2)))) / 2
    if not has_bias:  # One length moves all of the label: no error with a distribution, only an interval.
        below, above = batch_size * interval[:, 0] > likeliest - 1, batch_size * interval[:, 1] < likeliest + 1
        within = (batch_size * interval[:, 0] <= likeliest) & (batch_size * interval[:, 1] >= likeliest)
        certainty = np.where(below & above & within, 1.0, np.minimum(certainty, 0.5))
    is_whole = bool(np.all(np.abs(offset) <= TOLERANCE * spread + 1e-6))
    sure = is_whole & (certainty >= SURE)
    return ClassCounts(
        label,
        deviation,
        interval,
        likeliest,
        np.clip(certainty, 0, 1),
        np.where(sure, likeliest, -1),
        is_whole,
        batch_size,
    )


def whole_counts(counts: np.ndarray, deviation: np.ndarray, total: int) -> np.ndarray:
    """(C,) the likeliest whole numbers, none negative, that add up to `total`: integer least squares.

    A sum of squares of one number each: from the roundings, single steps at the least cost lead to the optimum.

    Args:
      counts, deviation: (C,) as they were estimated.
    """
    whole = np.maximum(np.round(counts), 0).astype(int)
    weights = 1 / np.maximum(deviation, 1e-12) ** 2
    while whole.sum() != total:
        step = 1 if whole.sum() < total else -1
        rise = weights * ((whole + step - counts) ** 2 - (whole - counts) ** 2)
        rise[whole + step < 0] = np.inf
        whole[np.argmin(rise)] += step
    return whole


def _over_lengths(weight: jax.Array, gradient: jax.Array, examples: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Without a bias: mean label, deviation and interval over all lengths of the mean feature that give a label."""
    left, values, right = np.linalg.svd(np.asarray(gradient), full_matrices=False)
    direction, size = right[0], left[:, 0] * values[0]
    spread = max(float(np.ptp(np.asarray(weight) @ direction)), 1e-300)
    lengths = np.geomspace(SHORTEST, LONGEST, LENGTHS) / spread
    every = np.concatenate([lengths[::-1], -lengths])
    at_some = every[::EACH]
    some = np.asarray(
        _deviations(jnp.asarray(at_some), weight, gradient, jnp.asarray(size), jnp.asarray(direction), examples)
    )
    places = np.arange(len(every))
    deviations = np.exp([np.interp(places, places[::EACH], row) for row in np.log(np.maximum(some, 1e-300)).T]).T
    logits = every[:, None] * (np.asarray(weight) @ direction)
    labels = softmax(logits, axis=1) - size / every[:, None]
    reach = TOLERANCE * deviations
    # The true length may lie between two that are tried: off by as much as a label moves from one to the next.
    steps = np.abs(np.diff(labels, axis=0))
    steps[LENGTHS - 1] = 0  # From the least positive length to the negative one is no step.
    slack = reach + np.maximum(np.pad(steps, ((1, 0), (0, 0))), np.pad(steps, ((0, 1), (0, 0))))
    possible = np.all((labels >= -slack) & (labels <= 1 + slack), axis=1)
    if not np.any(possible):
        nothing = np.full(len(size), np.nan)
        return nothing, nothing, np.broadcast_to([0.0, 1.0], (len(size), 2))
    possible[:-1] |= possible[1:].copy()
    possible[1:] |= possible[:-1].copy()
    low, high = np.min((labels - reach)[possible], axis=0), np.max((labels + reach)[possible], axis=0)
    return (low + high) / 2, (high - low) / (2 * TOLERANCE), np.stack([low, high], axis=1)


@jax.jit
def _deviations(
    lengths: jax.Array, weight: jax.Array, gradient: jax.Array, size: jax.Array, direction: jax.Array, examples: float
) -> jax.Array:
    """(L, C) of the mean label, at each length of the mean feature along the strongest direction."""
    across = jnp.sum((gradient - size[:, None] * direction[None, :]) ** 2, axis=1)

    def at(length: jax.Array) -> jax.Array:
        # The strongest direction times a length stands for the mean feature, and u over it for dL/db.
        found = mean_label(weight, gradient, jnp.zeros_like(size), size / length, examples)
        label = jax.nn.softmax(length * (weight @ direction)) - size / length
        # Features scatter along the direction too, unseen: at most as much as across it, all directions together.
        share = jnp.maximum(label, 0.5 / examples)
        along = jnp.sqrt(jnp.maximum(across, share * jnp.sum(across) / jnp.sum(share))) / jnp.abs(length)
        return jnp.sqrt(found.deviation**2 + along**2)

    return jax.lax.map(at, lengths)
