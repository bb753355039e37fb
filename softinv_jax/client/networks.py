"""The paper's networks LeNet and FCN-4 in flax.linen, and their initialisations.

Both take one image (H, W, channels) or a batch of them, and offer the last layer's input through
`network.apply({"params": parameters}, images, method="features")`. Products are computed at full float32
precision on every device, so that client and server compute the same logits.

Source: Wang, Liang and He, ICLR 2024, section 4 and appendix; LeNet in the form of Zhu et al. 2019 (DLG).
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

__all__ = [
    "FCN4",
    "LeNet",
    "PatchConvolution",
    "apply_function",
    "initialise",
    "initialise_fan_in",
    "initialise_uniform",
]

Parameters = dict[str, Any]
Shapes = dict[tuple[str, ...], tuple[int, ...]]


class PatchConvolution(nn.Module):
    """A 2-D convolution (channels last) as one matrix product over image patches.

    Parameters and result are those of `nn.Conv`. On a CPU, XLA's own convolution is about ten times slower
    inside a loop, and under vmap when differentiated twice, which is what attacks do all the time.

    Attributes:
        channels: of the output.
        size: side of the square kernel.
        stride: step in rows and columns.
        padding: zeros added on each side.
    """

    channels: int
    size: int
    stride: int
    padding: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (..., H, W, c) to (..., H', W', channels), H' = (H + 2 padding - size) // stride + 1."""
        kernel_shape = (self.size, self.size, images.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), kernel_shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        border = [(0, 0)] * (images.ndim - 3) + [(self.padding, self.padding)] * 2 + [(0, 0)]
        patches = jnp.pad(images, border)
        # Columns first, then rows: the last axis runs over (row offset, column offset, channel).
        for axis in (images.ndim - 2, images.ndim - 3):
            last_start = patches.shape[axis] - self.size
            shifted = [
                jax.lax.slice_in_dim(patches, offset, offset + last_start + 1, self.stride, axis)
                for offset in range(self.size)
            ]
            patches = jnp.concatenate(shifted, axis=-1)
        product = jnp.matmul(patches, kernel.reshape(-1, self.channels), precision="highest")
        return product + bias.reshape((1,) * (images.ndim - 1) + (-1,))


class LeNet(nn.Module):
    """Three 5x5 convolutions with 12 channels, strides 2, 2, 1, sigmoid after each; then a dense head.

    A 32x32 image has 768 features, flattened in the order row, column, channel. All features lie in (0, 1).

    Attributes:
        number_of_classes: C.
        head_bias: whether the head has a bias; the paper's has none.
    """

    number_of_classes: int
    head_bias: bool = False

    def setup(self) -> None:
        self.conv1 = self._convolution(stride=2)
        self.conv2 = self._convolution(stride=2)
        self.conv3 = self._convolution(stride=1)
        self.head = nn.Dense(self.number_of_classes, use_bias=self.head_bias, precision="highest")

    def _convolution(self, stride: int) -> PatchConvolution:
        return PatchConvolution(channels=12, size=5, stride=stride, padding=2)

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (d,) for one image (H, W, channels) and (N, d) for a batch."""
        _check_images(images)
        hidden = images
        for convolution in (self.conv1, self.conv2, self.conv3):
            hidden = nn.sigmoid(convolution(hidden))
        return _flatten(hidden)

    def logits_and_features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the logits (..., C) and the features (..., d) they were computed from."""
        features = self.features(images)
        return self.head(features), features

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, (C,) for one image (H, W, channels) and (N, C) for a batch."""
        return self.logits_and_features(images)[0]


class FCN4(nn.Module):
    """Four dense layers of widths 4096, 1024, 256 and C, with ReLU between and no biases.

    Attributes:
        number_of_classes: C.
        head_bias: whether the head has a bias; the paper's has none.
    """

    number_of_classes: int
    head_bias: bool = False

    def setup(self) -> None:
        self.dense1 = nn.Dense(4096, use_bias=False, precision="highest")
        self.dense2 = nn.Dense(1024, use_bias=False, precision="highest")
        self.dense3 = nn.Dense(256, use_bias=False, precision="highest")
        self.head = nn.Dense(self.number_of_classes, use_bias=self.head_bias, precision="highest")

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (256,) for one image (H, W, channels) and (N, 256) for a batch."""
        _check_images(images)
        hidden = _flatten(images)
        for dense in (self.dense1, self.dense2, self.dense3):
            hidden = nn.relu(dense(hidden))
        return hidden

    def logits_and_features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the logits (..., C) and the features (..., 256) they were computed from."""
        features = self.features(images)
        return self.head(features), features

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, (C,) for one image (H, W, channels) and (N, C) for a batch."""
        return self.logits_and_features(images)[0]


def _check_images(images: jax.Array) -> None:
    if images.ndim not in (3, 4):
        raise ValueError(
            f"Expected an image (H, W, channels) or a batch (N, H, W, channels), got {images.shape}. "
            "Put the channels last."
        )


def _flatten(images: jax.Array) -> jax.Array:
    return images.reshape((*images.shape[:-3], -1))


@lru_cache(maxsize=64)
def apply_function(network: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Return the network as (parameters, images) -> logits, the same function object every time.

    Because equal networks give the same object, functions that are compiled for it compile once.
    """

    def apply_network(parameters: Any, images: jax.Array) -> jax.Array:
        return network.apply({"params": parameters}, images)

    return apply_network


def initialise(network: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> Parameters:
    """Draw an untrained network's parameters as the paper does.

    That is U(-0.5, 0.5) for every parameter of `LeNet`, and `initialise_fan_in` for any other network.
    To train a LeNet, start from `initialise_fan_in`.
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
    shapes = _parameter_shapes(network, key, image_shape)
    return _draw(key, shapes, dict.fromkeys(shapes, bound))


def initialise_fan_in(network: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> Parameters:
    """Draw kernel and bias of each layer from U(-b, b), b = 1 / sqrt(fan-in), PyTorch's default.

    Args and result as in `initialise_uniform`.

    Raises:
        ValueError: if `image_shape` is not (H, W, channels), or a layer has no kernel to take fan-in from.
    """
    shapes = _parameter_shapes(network, key, image_shape)
    bounds = {}
    for path in shapes:
        kernel = (*path[:-1], "kernel")
        if kernel not in shapes:
            raise ValueError(f"Layer {'/'.join(path[:-1])} has no kernel. Use `initialise_uniform` for it.")
        bounds[path] = 1.0 / math.sqrt(math.prod(shapes[kernel][:-1]))
    return _draw(key, shapes, bounds)


def _parameter_shapes(network: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> Shapes:
    if len(image_shape) != 3:
        raise ValueError(f"Expected image_shape={image_shape} to be (H, W, channels). Leave the batch out.")
    variables = jax.eval_shape(network.init, key, jax.ShapeDtypeStruct(image_shape, jnp.float32))
    return {path: leaf.shape for path, leaf in flatten_dict(variables["params"]).items()}


def _draw(key: jax.Array, shapes: Shapes, bounds: dict[tuple[str, ...], float]) -> Parameters:
    paths = sorted(shapes)
    leaves = _draw_leaves(key, tuple(shapes[path] for path in paths), tuple(float(bounds[path]) for path in paths))
    return unflatten_dict(dict(zip(paths, leaves, strict=True)))


@partial(jax.jit, static_argnames=("shapes", "bounds"))
def _draw_leaves(key: jax.Array, shapes: tuple[tuple[int, ...], ...], bounds: tuple[float, ...]) -> list[jax.Array]:
    # One draw for all leaves: compiling one per shape would take seconds.
    ends = list(accumulate(math.prod(shape) for shape in shapes))
    pieces = jnp.split(jax.random.uniform(key, (ends[-1],), jnp.float32, -1.0, 1.0), ends[:-1])
    return [bound * piece.reshape(shape) for piece, shape, bound in zip(pieces, shapes, bounds, strict=True)]
