"""Learned perceptual image patch similarity (LPIPS) on AlexNet's features; for evaluation only.

Source: Zhang, Isola, Efros, Shechtman and Wang, "The unreasonable effectiveness of deep features as a perceptual
metric", CVPR 2018; its version 0.1 with the linear layers. The weights are the caller's to give.
"""

from collections.abc import Mapping
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from softinv_jax.measures.image_quality import check_image_pairs

__all__ = ["WEIGHT_SHAPES", "check_weights", "perceptual_distance"]

# torchvision's AlexNet: the module's number in `features`, kernel side, stride and padding of each convolution.
_CONVOLUTIONS = ((0, 11, 4, 2), (3, 5, 1, 2), (6, 3, 1, 1), (8, 3, 1, 1), (10, 3, 1, 1))
_CHANNELS = (3, 64, 192, 384, 256, 256)
_POOLED_BEFORE = (3, 6)
# 31 pixels become 7, 3 and 1.
_SMALLEST = 31
# Mean and deviation of ImageNet's channels on the scale [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

WEIGHT_SHAPES: dict[str, tuple[int, ...]] = {
    f"features.{number}.weight": (width, before, size, size)
    for (number, size, _, _), (before, width) in zip(_CONVOLUTIONS, pairwise(_CHANNELS), strict=True)
}
WEIGHT_SHAPES |= {
    f"features.{number}.bias": (width,) for (number, *_), width in zip(_CONVOLUTIONS, _CHANNELS[1:], strict=True)
}
WEIGHT_SHAPES |= {f"lin{layer}.model.1.weight": (1, width, 1, 1) for layer, width in enumerate(_CHANNELS[1:])}
"""Names and shapes of the weights: those of torchvision's AlexNet and of the LPIPS linear layers."""


def perceptual_distance(weights: Mapping[str, ArrayLike], recovered: ArrayLike, true: ArrayLike) -> NDArray[np.float32]:
    """Return the LPIPS distance: 0 up to rounding for identical images, larger the less alike.

    Args:
      weights: one array for each name in `WEIGHT_SHAPES`, as PyTorch stores them.
      recovered: (H, W, 3) or (N, H, W, 3), on the scale [0, 1]; what lies outside is clipped.
      true: likewise, the same shape; sides of at least 31 pixels.

    Returns:
      () or (N,) float32.

    Raises:
      ValueError: on weights that are missing or of another shape, images that do not fit each other, integers,
        entries that are not finite, sides below 31, or other than 3 channels.
    """
    arrays = check_weights(weights)
    pair = check_image_pairs(recovered, true, smallest=_SMALLEST)
    shape = pair[0].shape
    if shape[-1] != 3:
        raise ValueError(f"images must have 3 channels, but have shape {shape}; repeat a gray channel")
    first, second = (jnp.asarray(images.reshape(-1, *shape[-3:]), jnp.float32) for images in pair)
    return np.asarray(_distances(arrays, first, second)).reshape(shape[:-3])


def check_weights(weights: Mapping[str, ArrayLike]) -> dict[str, jax.Array]:
    """Return the weights named in `WEIGHT_SHAPES`, float32.

    Raises:
      ValueError: naming a weight that is missing or has another shape.
    """
    missing = sorted(WEIGHT_SHAPES.keys() - weights.keys())
    if missing:
        raise ValueError(f"weights lack {', '.join(missing)}; they have {', '.join(sorted(weights)) or 'none'}")
    arrays = {name: jnp.asarray(weights[name], jnp.float32) for name in WEIGHT_SHAPES}
    for name, shape in WEIGHT_SHAPES.items():
        if arrays[name].shape != shape:
            raise ValueError(f"weight {name} must have shape {shape}, but it has shape {arrays[name].shape}")
    return arrays


@jax.jit
def _distances(weights: dict[str, jax.Array], first: jax.Array, second: jax.Array) -> jax.Array:
    total = jnp.zeros(len(first), jnp.float32)
    for layer, pair in enumerate(zip(_features(weights, first), _features(weights, second), strict=True)):
        # Unit length over the channels; the small number is the source's.
        one, other = (images / (jnp.linalg.norm(images, axis=-1, keepdims=True) + 1e-10) for images in pair)
        importance = weights[f"lin{layer}.model.1.weight"].reshape(-1)
        total += jnp.mean(jnp.matmul((one - other) ** 2, importance, precision="highest"), axis=(1, 2))
    return total


def _features(weights: dict[str, jax.Array], images: jax.Array) -> list[jax.Array]:
    """The five convolutions' outputs after ReLU, (N, H', W', channels)."""
    shift, scale = (jnp.asarray(value, jnp.float32)[None, None, None] for value in (_SHIFT, _SCALE))
    hidden = (2.0 * images - 1.0 - shift) / scale
    outputs = []
    for number, _, stride, padding in _CONVOLUTIONS:
        if number in _POOLED_BEFORE:
            hidden = jax.lax.reduce_window(hidden, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        hidden = jax.lax.conv_general_dilated(
            hidden,
            weights[f"features.{number}.weight"],
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision="highest",
        )
        hidden = jax.nn.relu(hidden + weights[f"features.{number}.bias"][None, None, None])
        outputs.append(hidden)
    return outputs
