"""A network as data: a chain of convolutions, pooling, dense layers, activations and a flattening, ending in the head.

What can be inverted layer by layer is described here, not programmed for one network. Parameters are those of flax
linen: `kernel` (height, width, channels in, channels out) or (d, C), and perhaps `bias`, under the layer's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.convolution import Padding, average_pool, convolve, max_pool, output_size

__all__ = [
    "Activation",
    "Chain",
    "Convolution",
    "Dense",
    "Flatten",
    "Layer",
    "Pool",
    "apply_chain",
    "apply_layer",
    "can_be_undone",
    "chain_inputs",
    "check_chain",
    "fcn_chain",
    "layer_can_be_undone",
    "layer_parameters",
    "layers_as_tree",
    "lenet_chain",
]


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution of the parameters `name`.

    Attributes:
      strides: (rows, columns). padding: zeros ((above, below), (left, right)).
    """

    name: str
    strides: tuple[int, int] = (1, 1)
    padding: Padding = ((0, 0), (0, 0))


@dataclass(frozen=True)
class Dense:
    """A dense layer of the parameters `name`."""

    name: str


@dataclass(frozen=True)
class Activation:
    """An entrywise function, one of `ACTIVATIONS`."""

    function: str


@dataclass(frozen=True)
class Pool:
    """The largest value or the mean of each window.

    Attributes:
      kind: `max` or `average`. size: of the window, (rows, columns). strides: (rows, columns).
      padding: ((above, below), (left, right)); a mean counts its zeros, a maximum does not.
    """

    kind: Literal["max", "average"]
    size: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding = ((0, 0), (0, 0))


@dataclass(frozen=True)
class Flatten:
    """From (H, W, channels) to a vector, in the order row, column, channel."""


Layer = Convolution | Pool | Dense | Activation | Flatten
Chain = tuple[Layer, ...]


def lenet_chain() -> Chain:
    """The paper's LeNet (Wang, Liang and He, ICLR 2024): three 5x5 convolutions, sigmoid after each, and the head."""
    padding = ((2, 2), (2, 2))
    layers: list[Layer] = []
    for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
        layers += [Convolution(name, (stride, stride), padding), Activation("sigmoid")]
    return (*layers, Flatten(), Dense("head"))


def fcn_chain(hidden: int = 3, activation: str = "relu") -> Chain:
    """A fully connected network: layers dense1, dense2, ..., as many as `hidden`, and the head. FCN-4 has three."""
    layers: list[Layer] = [Flatten()]
    for index in range(hidden):
        layers += [Dense(f"dense{index + 1}"), Activation(activation)]
    return (*layers, Dense("head"))


def layer_parameters(parameters: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping with `kernel` (and `bias`) under a name whose parts are joined by "/".

    Raises:
      ValueError: if there is none; the message lists what there is.
    """
    found: Any = parameters
    for part in name.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            held = ", ".join(map(str, parameters)) or "nothing"
            raise ValueError(f"no layer {name!r} among the parameters, which hold {held}; name the chain's layers so")
        found = found[part]
    if not isinstance(found, Mapping) or "kernel" not in found:
        raise ValueError(
            f"layer {name!r} of the parameters has no 'kernel'; a chain's layers are convolutions and dense"
        )
    return found


def apply_chain(chain: Chain, parameters: Mapping[str, Any], image: ArrayLike) -> jax.Array:
    """The network: (parameters, image (H, W, channels) or (..., H, W, channels)) -> logits (..., C).

    Pure; `functools.partial(apply_chain, chain)` is an `apply_fn(parameters, image)`.
    """
    values = jnp.asarray(image)
    for layer in chain:
        values = apply_layer(layer, parameters, values)
    return values


def apply_layer(layer: Layer, parameters: Mapping[str, Any], values: jax.Array) -> jax.Array:
    """What leaves one layer of a chain, for values (..., H, W, c) or (..., d) that enter it."""
    if isinstance(layer, Flatten):
        return values.reshape((*values.shape[:-3], -1))
    if isinstance(layer, Activation):
        return ACTIVATIONS[layer.function].apply(values)
    if isinstance(layer, Pool):
        pool = max_pool if layer.kind == "max" else average_pool
        return pool(values, layer.size, layer.strides, layer.padding)
    held = layer_parameters(parameters, layer.name)
    kernel = jnp.asarray(held["kernel"])
    if isinstance(layer, Convolution):
        result = convolve(values, kernel, layer.strides, layer.padding)
    else:
        result = jnp.matmul(values, kernel, precision="highest")
    if "bias" not in held:
        return result
    return result + jnp.asarray(held["bias"]).reshape((1,) * (result.ndim - 1) + (-1,))


def chain_inputs(
    chain: Chain, parameters: Mapping[str, Any], image_shape: tuple[int, int, int]
) -> list[tuple[int, ...]]:
    """Shape of what enters each layer, and, last, of the logits; checks that everything fits.

    Raises:
      ValueError: naming the layer, and the shapes that do not fit.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (H, W, channels), not {image_shape}")
    check_chain(chain)
    shapes: list[tuple[int, ...]] = [tuple(image_shape)]
    for layer in chain:
        shape = shapes[-1]
        if isinstance(layer, Flatten):
            shape = (shape[0] * shape[1] * shape[2],)
        elif isinstance(layer, Pool):
            sizes = _window_positions(layer.size, layer.strides, layer.padding, shape)
            if min(sizes) < 1:
                raise ValueError(f"windows {layer.size} of a Pool do not fit into its input {shape}; check image_shape")
            shape = (*sizes, shape[-1])
        elif isinstance(layer, Dense | Convolution):
            shape = _output_shape(layer, layer_parameters(parameters, layer.name), shape)
        shapes.append(shape)
    return shapes


def _window_positions(
    size: tuple[int, ...], strides: tuple[int, int], padding: Padding, shape: tuple[int, ...]
) -> tuple[int, int]:
    rows, columns = (output_size(shape[axis], size[axis], strides[axis], padding[axis]) for axis in range(2))
    return rows, columns


def _output_shape(layer: Dense | Convolution, held: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    kernel = tuple(held["kernel"].shape)
    dimensions = 2 if isinstance(layer, Dense) else 4
    if len(kernel) != dimensions or kernel[-2] != shape[-1]:
        form = "(inputs, outputs)" if isinstance(layer, Dense) else "(height, width, channels in, channels out)"
        raise ValueError(
            f"layer {layer.name!r} has a kernel {kernel}, but a {form} with {shape[-1]} inputs is needed after what"
            f" comes before it, of shape {shape}; check image_shape and the chain"
        )
    if "bias" in held and tuple(held["bias"].shape) != kernel[-1:]:
        raise ValueError(f"layer {layer.name!r} has a bias {tuple(held['bias'].shape)}, but {kernel[-1:]} is needed")
    if isinstance(layer, Dense):
        return kernel[-1:]
    sizes = _window_positions(kernel, layer.strides, layer.padding, shape)
    if min(sizes) < 1:
        raise ValueError(f"the kernel {kernel} of layer {layer.name!r} does not fit into its input {shape}")
    return (*sizes, kernel[-1])


def check_chain(chain: Chain) -> None:
    """Raise ValueError unless the layers can follow each other: images first, vectors from one `Flatten` on."""
    if not chain or not isinstance(chain[-1], Dense):
        raise ValueError("the last layer of a chain must be the Dense head")
    names = [layer.name for layer in chain if isinstance(layer, Convolution | Dense)]
    if len(set(names)) < len(names):
        raise ValueError(f"a chain names each layer once, but has {', '.join(names)}; layers cannot share parameters")
    flat = False
    for layer in chain:
        if isinstance(layer, Flatten):
            if flat:
                raise ValueError("a chain has one Flatten")
            flat = True
        elif isinstance(layer, Activation):
            if layer.function not in ACTIVATIONS:
                raise ValueError(f"unknown activation {layer.function!r}; choose one of {', '.join(ACTIVATIONS)}")
        elif isinstance(layer, Dense):
            if not flat:
                raise ValueError(f"Dense layer {layer.name!r} comes before Flatten")
        else:
            _check_windows(layer, flat)


def _check_windows(layer: Convolution | Pool, flat: bool) -> None:
    what = f"Convolution {layer.name!r}" if isinstance(layer, Convolution) else f"Pool {layer.kind!r}"
    if flat:
        raise ValueError(f"{what} comes after Flatten")
    if min(layer.strides) < 1 or min(min(side) for side in layer.padding) < 0:
        raise ValueError(
            f"{what} has strides {layer.strides} and padding {layer.padding}; strides are positive, padding is not"
            " negative"
        )
    if isinstance(layer, Pool):
        inside = all(max(layer.padding[axis]) < layer.size[axis] for axis in range(2))
        if layer.kind not in ("max", "average") or min(layer.size) < 1 or not inside:
            raise ValueError(
                f"{what} has windows {layer.size} and padding {layer.padding}; a Pool is max or average, and its"
                " windows are larger than the padding"
            )


def can_be_undone(chain: Chain) -> bool:
    """Whether every layer can be undone by itself."""
    return all(layer_can_be_undone(layer) for layer in chain)


def layer_can_be_undone(layer: Layer) -> bool:
    """Whether its input follows from its output, the loss's derivative by it, and its gradient.

    Of an activation, where it is not flat; GELU and SiLU have no inverse, and pooling leaves values out.
    """
    if isinstance(layer, Activation):
        return ACTIVATIONS[layer.function].invert is not None
    return not isinstance(layer, Pool)


def layers_as_tree(held: Mapping[str, Any]) -> dict[str, Any]:
    """Layers by full name, as the tree that `layer_parameters` looks them up in."""
    tree: dict[str, Any] = {}
    for name, layer in held.items():
        *parents, last = name.split("/")
        branch = tree
        for part in parents:
            branch = branch.setdefault(part, {})
        branch[last] = layer
    return tree
