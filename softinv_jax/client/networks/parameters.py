"""A network's parameters and batch statistics: how they are drawn, and how they enter the network."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from softinv_jax.client.networks.lenet import LeNet
from softinv_jax.client.networks.resnet import ResNet

__all__ = [
    "apply_function",
    "initial_batch_statistics",
    "initialise",
    "initialise_fan_in",
    "initialise_uniform",
]

Parameters = dict[str, Any]
Path = tuple[str, ...]
Shapes = dict[Path, tuple[int, ...]]


def apply_function(
    network: nn.Module, batch_statistics: Mapping[str, Any] | None = None
) -> Callable[[Any, jax.Array], jax.Array]:
    """Return the network as (parameters, images) -> logits, the same function object every time.

    Because equal networks with equal statistics give the same object, functions that are compiled for it compile
    once.

    Args:
        network: a linen module that takes an image.
        batch_statistics: running means and variances of batch normalisation by layer, as `train` returns them or
            `initial_batch_statistics` makes them. They are fixed in the function, so that `jax.grad` differentiates
            with respect to what is trained alone. None or {} for a network without batch normalisation.

    Raises:
        ValueError: if `network` is a `ResNet` in training mode, or one without statistics.
    """
    if isinstance(network, ResNet) and network.training:
        raise ValueError("Expected training=False: in training mode an example has no gradient of its own.")
    if isinstance(network, ResNet) and not batch_statistics:
        raise ValueError(
            f"Expected the batch_statistics of {type(network).__name__}, got {batch_statistics}. "
            "Untrained, they are initial_batch_statistics(network, image_shape)."
        )
    # Arrays cannot be cache keys, their bytes can: 38 kilobytes for ResNet18, 212 for ResNet50.
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(dict(batch_statistics or {})).items()}
    return _bind(network, tuple((path, leaf.dtype.str, leaf.tobytes()) for path, leaf in sorted(leaves.items())))


@lru_cache(maxsize=64)
def _bind(network: nn.Module, leaves: tuple[tuple[Path, str, bytes], ...]) -> Callable[[Any, jax.Array], jax.Array]:
    statistics = unflatten_dict({path: np.frombuffer(content, dtype) for path, dtype, content in leaves})

    def apply_network(parameters: Any, images: jax.Array) -> jax.Array:
        return network.apply({"params": parameters, "batch_stats": statistics}, images)

    return apply_network


def initial_batch_statistics(network: nn.Module, image_shape: tuple[int, int, int]) -> Parameters:
    """Return the running statistics of an untrained network, mean 0 and variance 1, float32; {} if it has none.

    Args:
        network: a linen module that takes an image.
        image_shape: (H, W, channels).

    Returns:
        Statistics by layer, e.g. {"stem_norm": {"mean": (64,), "var": (64,)}, ...}.

    Raises:
        ValueError: if `image_shape` is not (H, W, channels).
    """
    shapes = _shapes(network, image_shape, "batch_stats")
    return unflatten_dict(
        {path: jnp.full(shape, float(path[-1] == "var"), jnp.float32) for path, shape in shapes.items()}
    )


def initialise(network: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> Parameters:
    """Draw an untrained network's parameters as the paper does.

    That is U(-0.5, 0.5) for every parameter of `LeNet`, and `initialise_fan_in` for any other network.
    To train a LeNet, start from `initialise_fan_in`. (torchvision draws its ResNets otherwise: normal, by fan-out.)
    """
    if isinstance(network, LeNet):
        return initialise_uniform(network, key, image_shape)
    return initialise_fan_in(network, key, image_shape)


def initialise_uniform(
    network: nn.Module, key: jax.Array, image_shape: tuple[int, int, int], bound: float = 0.5
) -> Parameters:
    """Draw every parameter from U(-bound, bound).

    Args:
        network: a linen module that takes an image.
        key: random key.
        image_shape: (H, W, channels).
        bound: positive.

    Returns:
        The parameters by layer, e.g. {"conv1": {"kernel", "bias"}, ..., "head": {"kernel" (d, C)}}, float32.

    Raises:
        ValueError: if `bound` is not positive or `image_shape` not (H, W, channels).
    """
    if bound <= 0:
        raise ValueError(f"Expected bound={bound} > 0. The paper's is 0.5.")
    shapes = _shapes(network, image_shape, "params")
    return _draw(key, shapes, dict.fromkeys(shapes, bound))


def initialise_fan_in(network: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> Parameters:
    """Draw kernel and bias of each layer from U(-b, b), b = 1 / sqrt(fan-in), PyTorch's default.

    Batch normalisation gets scale 1 and bias 0.

    Args and result as in `initialise_uniform`.

    Raises:
        ValueError: if `image_shape` is not (H, W, channels), or a layer has no kernel to take fan-in from.
    """
    shapes = _shapes(network, image_shape, "params")
    bounds = {}
    for path in shapes:
        kernel, scale = (*path[:-1], "kernel"), (*path[:-1], "scale")
        if kernel in shapes:
            bounds[path] = 1.0 / math.sqrt(math.prod(shapes[kernel][:-1]))
        elif scale not in shapes:
            raise ValueError(f"Layer {'/'.join(path[:-1])} has no kernel. Use `initialise_uniform` for it.")
    drawn = flatten_dict(_draw(key, {path: shapes[path] for path in bounds}, bounds))
    normalisation = {
        path: jnp.full(shape, float(path[-1] == "scale"), jnp.float32)
        for path, shape in shapes.items()
        if path not in bounds
    }
    return unflatten_dict(drawn | normalisation)


def _shapes(network: nn.Module, image_shape: tuple[int, int, int], collection: str) -> Shapes:
    if len(image_shape) != 3:
        raise ValueError(f"Expected image_shape={image_shape} to be (H, W, channels). Leave the batch out.")
    variables = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct(image_shape, jnp.float32))
    return {path: leaf.shape for path, leaf in flatten_dict(variables.get(collection, {})).items()}


def _draw(key: jax.Array, shapes: Shapes, bounds: dict[Path, float]) -> Parameters:
    paths = sorted(shapes)
    leaves = _draw_leaves(key, tuple(shapes[path] for path in paths), tuple(float(bounds[path]) for path in paths))
    return unflatten_dict(dict(zip(paths, leaves, strict=True)))


@partial(jax.jit, static_argnames=("shapes", "bounds"))
def _draw_leaves(key: jax.Array, shapes: tuple[tuple[int, ...], ...], bounds: tuple[float, ...]) -> list[jax.Array]:
    # One draw for all leaves: compiling one per shape would take seconds.
    ends = list(accumulate(math.prod(shape) for shape in shapes))
    pieces = jnp.split(jax.random.uniform(key, (ends[-1],), jnp.float32, -1.0, 1.0), ends[:-1])
    return [bound * piece.reshape(shape) for piece, shape, bound in zip(pieces, shapes, bounds, strict=True)]
