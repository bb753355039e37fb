"""How far a dummy gradient is from the observed one, and how rough an image is: the terms of gradient matching."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["DISTANCES", "cosine", "l2", "layerwise_cosine", "norm", "total_variation"]


def l2(tree: Any, target: Any) -> jax.Array:
    """Sum of squared differences over all entries of two pytrees of one structure (Zhu et al. 2019, DLG)."""
    return _sum_of_squares(jax.tree.map(jnp.subtract, tree, target))


def cosine(tree: Any, target: Any) -> jax.Array:
    """1 - cos of the angle between two pytrees, all leaves taken as one vector (Geiping et al. 2020).

    Computed as half the squared distance of the two unit vectors, which is the same number without its cancellation:
    `1 - cos` in float32 cannot go below 1e-7, and a gradient match goes far below it. A pytree of zeros has no
    direction: its distance is 1/2, and the derivative stays finite.
    """
    return l2(_unit(tree), _unit(target)) / 2


def layerwise_cosine(tree: Any, target: Any) -> jax.Array:
    """Mean of `cosine` over the leaves, each by itself; leaves whose target is zero are left out."""
    leaves, targets = jax.tree.leaves(tree), jax.tree.leaves(target)
    distances = jnp.stack([cosine(leaf, other) for leaf, other in zip(leaves, targets, strict=True)])
    counted = jnp.stack([jnp.any(other != 0) for other in targets])
    return jnp.sum(jnp.where(counted, distances, 0.0)) / jnp.maximum(jnp.sum(counted), 1)


DISTANCES: dict[str, Callable[[Any, Any], jax.Array]] = {
    "l2": l2,
    "cosine": cosine,
    "layerwise_cosine": layerwise_cosine,
}


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over all entries of a pytree."""
    return jnp.sqrt(_sum_of_squares(tree))


def total_variation(image: jax.Array) -> jax.Array:
    """Anisotropic total variation of images (..., H, W, channels): mean |difference of rows| + mean of columns."""
    variation = jnp.zeros((), image.dtype)
    for axis in (image.ndim - 3, image.ndim - 2):
        if image.shape[axis] > 1:
            variation += jnp.mean(jnp.abs(jnp.diff(image, axis=axis)))
    return variation


def _sum_of_squares(tree: Any) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]))


def _unit(tree: Any) -> Any:
    # Scaled by the largest entry, so that squares neither overflow nor vanish; the scale itself cancels.
    leaves = jax.tree.leaves(tree)
    largest = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves])))
    has_direction = largest > 0
    safe = jnp.where(has_direction, largest, 1.0)
    scaled = [leaf / safe for leaf in leaves]
    # At least 1 where there is a direction: the entry of largest size counts 1.
    square = jnp.where(has_direction, _sum_of_squares(scaled), 1.0)
    return [leaf * jax.lax.rsqrt(square) for leaf in scaled]
