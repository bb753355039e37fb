"""What gradient matching refuses, and why: every check of its input, before anything is compiled."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softinv_jax.images.objective import ApplyFunction, MatchingSettings, Model, Target, logits_of
from softinv_jax.observation.head import check_finite

__all__ = ["check_gradients", "check_matching_input", "checked_array", "output_shape"]


def check_matching_input(
    apply_fn: Model,
    parameters: Any,
    gradients: Any,
    image_shape: tuple[int, ...],
    labels: ArrayLike | None,
    features: ArrayLike | None,
    starts: ArrayLike | None,
    features_fn: ApplyFunction | None,
    settings: MatchingSettings,
    low: ArrayLike,
    high: ArrayLike,
) -> tuple[Target, jax.Array | None]:
    """Check everything that `match_gradients` is given and bundle it; its docstring says what is refused.

    Returns:
      A `Target` whose gradient, label and feature have a leading axis N, and the starts.
    """
    if len(image_shape) not in (3, 4) or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (H, W, channels) or (B, H, W, channels), not {image_shape}")
    batch = image_shape[:-3]
    examples = check_gradients(parameters, gradients)
    dtype = jnp.result_type(*jax.tree.leaves(parameters))
    classes = output_shape("apply_fn", apply_fn, parameters, image_shape, dtype)
    label_shape = (examples, *batch, *classes)
    if labels is None:
        if not settings.optimise_label:
            raise ValueError("labels are needed where they are held fixed; give them, or settings with optimise_label")
        label = jnp.zeros(label_shape, dtype)
    else:
        label = checked_array("labels", labels, label_shape, dtype)
    feature = None
    if settings.matches_feature:
        if features_fn is None or features is None:
            missing = "features_fn" if features_fn is None else "features"
            raise ValueError(
                f"method={settings.method!r} matches the head's input, but {missing} is not given; use 'g'"
            )
        size = output_shape("features_fn", features_fn, parameters, image_shape, dtype)
        feature = checked_array("features", features, (examples, *batch, *size), dtype)
    bounds = []
    for name, value in (("low", low), ("high", high)):
        bound = np.asarray(value)
        if bound.shape not in ((), image_shape[-1:]):
            raise ValueError(f"{name} must have shape () or (channels,) = {image_shape[-1:]}, not {bound.shape}")
        bounds.append(np.broadcast_to(bound, image_shape[-1:]))
    if not np.all(bounds[0] < bounds[1]):
        raise ValueError(f"low must be below high in every channel, but low = {bounds[0]} and high = {bounds[1]}")
    start = None if starts is None else checked_array("starts", starts, (examples, *image_shape), dtype)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), gradients)
    return Target(gradient, label, feature, jnp.asarray(bounds[0], dtype), jnp.asarray(bounds[1], dtype)), start


def check_gradients(parameters: Any, gradients: Any) -> int:
    """Check N gradients, a pytree like the parameters with a leading axis N on each leaf, and return N.

    Raises:
      ValueError: another structure, a shape that does not fit, an entry that is not finite, or a gradient of zeros.
    """
    expected, given = str(jax.tree.structure(parameters)), str(jax.tree.structure(gradients))
    if expected != given:
        raise ValueError(f"the gradient must have the structure of the parameters, {expected}, but it has {given}")
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    if not leaves:
        raise ValueError("the parameters hold no arrays, so there is no gradient to match")
    examples = np.shape(leaves[0][1])[:1]
    largest = 0.0
    for (path, leaf), parameter in zip(leaves, jax.tree.leaves(parameters), strict=True):
        name = f"the gradient of {jax.tree_util.keystr(path)}"
        if np.shape(leaf) != (*examples, *np.shape(parameter)) or examples in ((), (0,)):
            raise ValueError(
                f"{name} must have shape {np.shape(parameter)}, as the parameter, but it has {np.shape(leaf)[1:]}"
                f" (for each of {examples[0] if examples else 0} examples)"
            )
        check_finite(name, leaf)
        flat = np.abs(np.asarray(leaf)).reshape(examples[0], -1)
        largest = np.maximum(largest, flat.max(axis=1, initial=0.0))
    zero = np.flatnonzero(largest == 0.0)
    if zero.size:
        raise ValueError(f"the gradient of example {zero[0]} is zero everywhere: it says nothing about the image")
    return int(examples[0])


def output_shape(name: str, function: Model, parameters: Any, image_shape: tuple[int, ...], dtype: Any) -> tuple[int]:
    """Shape of what a model makes of one image, which must be a vector; image_shape: of the image, or of a batch."""
    images = jax.ShapeDtypeStruct(image_shape, dtype)
    shape = jax.eval_shape(partial(logits_of, function), parameters, images).shape[len(image_shape) - 3 :]
    if len(shape) != 1:
        raise ValueError(f"{name} must map one image {image_shape[-3:]} to a vector, but its result has shape {shape}")
    return shape


def checked_array(name: str, value: ArrayLike, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A finite array of the expected shape in the given dtype, or a ValueError with its name."""
    if np.shape(value) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {np.shape(value)}")
    check_finite(name, value)  # type: ignore[arg-type]
    return jnp.asarray(value, dtype)
