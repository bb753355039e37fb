"""The gradients a client uploads: of the cross-entropy with a soft label, by automatic differentiation.

With logits z = W x + b, p = softmax(z) and a label y of sum 1, the last layer's gradient is the rank-one
matrix (p - y) x^T, and p - y for the bias (Wang, Liang and He, ICLR 2024, section 3). Nothing here uses that
closed form: the gradients are those of any client that differentiates its loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = [
    "ApplyFunction",
    "LastLayerGradient",
    "cross_entropy",
    "last_layer_gradient",
    "model_gradient",
    "per_sample_last_layer_gradients",
    "per_sample_model_gradients",
]

ApplyFunction = Callable[[Any, jax.Array], jax.Array]
"""A model: (parameters, image (H, W, channels)) -> logits (C,)."""


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=[])
@dataclass(frozen=True)
class LastLayerGradient:
    """Gradient of the last dense layer: weight (C, d); bias (C,), or None for a layer without one.

    From the per-sample functions, both carry a leading axis N.
    """

    weight: jax.Array
    bias: jax.Array | None


def cross_entropy(logits: ArrayLike, label: ArrayLike) -> jax.Array:
    """Return -sum_k y_k log softmax(z)_k, in nats, for logits z (C,) and a soft label y (C,).

    Raises:
        ValueError: if the shapes differ or are not (C,).
    """
    logits, label = jnp.asarray(logits), jnp.asarray(label)
    if logits.ndim != 1 or logits.shape != label.shape:
        raise ValueError(
            f"Expected logits and label of one shape (C,), got {logits.shape} and {label.shape}. "
            "Give one example; use jax.vmap for several."
        )
    return -jnp.sum(label * jax.nn.log_softmax(logits))


def last_layer_gradient(
    weight: ArrayLike, feature: ArrayLike, label: ArrayLike, bias: ArrayLike | None = None
) -> LastLayerGradient:
    """Gradient of one example's loss with respect to the last dense layer z = W x + b.

    Args:
        weight: W, (C, d).
        feature: x, (d,), the last layer's input.
        label: y, (C,).
        bias: b, (C,), or None for a layer without a bias (the paper's case).

    Returns:
        A `LastLayerGradient` with weight (C, d) and bias (C,) or None.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    weight, feature = jnp.asarray(weight), jnp.asarray(feature)
    offset = None if bias is None else jnp.asarray(bias)
    if weight.ndim != 2 or feature.shape != weight.shape[1:]:
        raise ValueError(
            f"Expected weight (C, d) and feature (d,), got {weight.shape} and {feature.shape}. "
            "A flax kernel is (d, C): transpose it."
        )
    if offset is not None and offset.shape != weight.shape[:1]:
        raise ValueError(f"Expected bias ({weight.shape[0]},), got {offset.shape}. Give one entry a class.")

    def loss(layer: LastLayerGradient) -> jax.Array:
        # Accelerators round a float32 product's inputs unless told otherwise.
        logits = jnp.matmul(layer.weight, feature, precision=jax.lax.Precision.HIGHEST)
        return cross_entropy(logits if layer.bias is None else logits + layer.bias, label)

    return jax.grad(loss)(LastLayerGradient(weight=weight, bias=offset))


def model_gradient(apply_fn: ApplyFunction, parameters: Any, image: ArrayLike, label: ArrayLike) -> Any:
    """Gradient of one example's loss with respect to every parameter of a model.

    Args:
        apply_fn: model, (parameters, image) -> logits (C,).
        parameters: pytree of arrays.
        image: (H, W, channels).
        label: (C,).

    Returns:
        A pytree like `parameters`.
    """
    image = jnp.asarray(image)
    return jax.grad(lambda candidate: cross_entropy(apply_fn(candidate, image), label))(parameters)


@partial(jax.jit, static_argnames="apply_fn")
def per_sample_model_gradients(apply_fn: ApplyFunction, parameters: Any, images: ArrayLike, labels: ArrayLike) -> Any:
    """Gradients of N examples, each by itself, compiled.

    The result holds N copies of the model's size: take large models in pieces. It compiles once for each
    `apply_fn` object, so keep one (`softinv_jax.client.networks.apply_function`) and not a fresh lambda.

    Args:
        apply_fn: model for one example, (parameters, image) -> logits (C,); hashable.
        parameters: pytree of arrays.
        images: (N, H, W, channels).
        labels: (N, C).

    Returns:
        A pytree like `parameters`, each leaf with a leading axis N.
    """
    return jax.vmap(partial(model_gradient, apply_fn), in_axes=(None, 0, 0))(parameters, images, labels)


@jax.jit
def per_sample_last_layer_gradients(
    weight: ArrayLike, features: ArrayLike, labels: ArrayLike, bias: ArrayLike | None = None
) -> LastLayerGradient:
    """Last-layer gradients of N examples, each by itself, compiled.

    Args:
        weight: (C, d).
        features: (N, d).
        labels: (N, C).
        bias: (C,) or None.

    Returns:
        A `LastLayerGradient` with weight (N, C, d) and bias (N, C) or None.
    """
    return jax.vmap(last_layer_gradient, in_axes=(None, 0, 0, None))(weight, features, labels, bias)
