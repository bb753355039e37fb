"""Reading the format off a label: which classes it singles out, in which shares, over how much smoothing."""

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argsort
from softinv_jax.labels.verdicts import LabelFormat, LabelKind

__all__ = ["read_format", "structured_label"]

LISTED_CLASSES = 8


def structured_label(label: jax.Array, deviation: jax.Array, agreeing: jax.Array, level: jax.Array) -> jax.Array:
    """(C,) the label with its common level made exact, and what is missing to 1 laid on the classes singled out.

    The correction is shared in proportion to their variances, which is least squares under the sum constraint.
    """
    targets = ~agreeing
    level = jnp.maximum(level, 0.0)
    variance = jnp.where(targets, deviation**2, 0.0)
    total = jnp.sum(variance)
    missing = 1 - jnp.sum(jnp.where(targets, label, level))
    share = jnp.where(
        total > 0, variance / jnp.where(total > 0, total, 1.0), targets / jnp.maximum(jnp.sum(targets), 1)
    )
    structured = jnp.where(targets, jnp.clip(label + missing * share, 0.0, 1.0), level)
    return jnp.where(jnp.any(targets), structured, 1 / label.size)


def read_format(label: jax.Array, agreeing: jax.Array, smoothed: jax.Array) -> LabelFormat:
    """The `LabelFormat` of a structured label.

    Args:
      label: (C,) structured. agreeing: (C,) bool. smoothed: () bool, the common level differs from zero.
    """
    number_of_classes = label.size
    listed = min(LISTED_CLASSES, number_of_classes)
    level = jnp.min(jnp.where(agreeing, label, jnp.inf))
    smoothing = jnp.where(smoothed, number_of_classes * level, 0.0)
    excess = jnp.where(agreeing, 0.0, label - jnp.where(smoothed, level, 0.0))
    order = argsort(-jnp.abs(excess))[:listed]
    weights = excess[order] / jnp.where(jnp.sum(excess) == 0, 1.0, jnp.sum(excess))
    count = jnp.sum(~agreeing, dtype=jnp.int32)
    position = jnp.arange(listed, dtype=jnp.int32)
    plain = jnp.where(count == 1, jnp.int32(LabelKind.HARD), jnp.int32(LabelKind.MIXUP))
    with_smoothing = jnp.where(count <= 1, jnp.int32(LabelKind.SMOOTHING), jnp.int32(LabelKind.SMOOTHED_MIXUP))
    return LabelFormat(
        kind=jnp.where(smoothed, with_smoothing, plain),
        classes=jnp.where(position < count, order, -1),
        weights=jnp.where(position < count, weights, 0.0),
        count=count,
        smoothing=smoothing,
    )
