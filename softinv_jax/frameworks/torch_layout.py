"""PyTorch's layout of parameters, turned into flax linen's. Gradients turn alike: all of it is reordering.

| layer | PyTorch | linen |
|---|---|---|
| convolution | weight (out, in / groups, H, W) | kernel (H, W, in / groups, out) |
| dense | weight (out, in) | kernel (in, out) |
| dense after flattening (C, H, W) | columns in the order C, H, W | rows in the order H, W, C |
| normalisation | weight, bias; running_mean, running_var | scale, bias; mean, var |
"""

import math
from collections.abc import Mapping

import numpy as np

from softinv_jax.frameworks.parameter_files import Tree, nested
from softinv_jax.images.layer_chain import Chain, Dense, Flatten, chain_inputs

__all__ = ["linen_from_torch", "linen_from_torch_chain"]

_STATISTICS = {"running_mean": "mean", "running_var": "var"}


def linen_from_torch(
    state: Mapping[str, np.ndarray],
    *,
    flattened: Mapping[str, tuple[int, int, int]] | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[Tree, Tree]:
    """A `state_dict`, or gradients or updates named like one, as trees that linen and this package take.

    A layer is told by the number of axes of its weight: transposed convolutions and embeddings, whose weights cannot be
    told from those of convolutions and dense layers, are not supported.

    Args:
      state: arrays by PyTorch's names, such as `features.0.weight`.
      flattened: for each dense layer that takes in a flattened image, its PyTorch name and that image's (C, H, W).
      names: new names, parts joined by "/", for layers that shall not keep theirs: {"features.0": "conv1"}.

    Returns:
      Parameters and running statistics of normalisation, which may be {}, as nested dictionaries by layer.

    Raises:
      ValueError: naming the array: no part of a layer known here, a shape that does not fit, or entries that are
        not finite; or naming a layer of `flattened` or `names` that is not there.
    """
    flattened, names = dict(flattened or {}), dict(names or {})
    layers = {name.rpartition(".")[0] for name in state}
    for option, given in (("flattened", flattened), ("names", names)):
        unknown = sorted(set(given) - layers)
        if unknown:
            raise ValueError(f"{option} names {', '.join(unknown[:6])}, but the layers are {', '.join(sorted(layers))}")
    taken = [names.get(layer, layer.replace(".", "/")) for layer in sorted(layers)]
    if len(set(taken)) < len(taken):
        twice = sorted({name for name in taken if taken.count(name) > 1})
        raise ValueError(f"names gives {', '.join(twice)} to several layers")
    parameters: dict[str, np.ndarray] = {}
    statistics: dict[str, np.ndarray] = {}
    for name, value in state.items():
        layer, _, part = name.rpartition(".")
        new = names.get(layer, layer.replace(".", "/"))
        array = np.asarray(value)
        if part == "num_batches_tracked":
            continue
        if part in _STATISTICS:
            statistics[f"{new}/{_STATISTICS[part]}"] = array
        elif part == "bias" and array.ndim == 1 and layer:
            parameters[f"{new}/bias"] = array
        elif part == "weight" and array.ndim == 1 and layer:
            parameters[f"{new}/scale"] = array
        elif part == "weight" and array.ndim >= 2 and layer:
            parameters[f"{new}/kernel"] = _kernel(name, array, flattened.get(layer))
        else:
            raise ValueError(
                f"{name} of shape {array.shape} is no weight or bias of a convolution, dense or normalisation layer"
            )
    return nested(parameters), nested(statistics)


def linen_from_torch_chain(
    state: Mapping[str, np.ndarray],
    chain: Chain,
    image_shape: tuple[int, int, int],
    *,
    names: Mapping[str, str] | None = None,
) -> Tree:
    """The parameters of a chain of layers, whose description says what is flattened.

    Args:
      state: arrays by PyTorch's names.
      chain: the network, by the new names. image_shape: (H, W, channels).
      names: see `linen_from_torch`.

    Raises:
      ValueError: as `linen_from_torch`, and where the arrays do not fit the chain.
    """
    # Right but for the order of rows, which changes no shape.
    parameters, _ = linen_from_torch(state, names=names)
    shapes = chain_inputs(chain, parameters, image_shape)
    old = {new: name for name, new in (names or {}).items()}
    flattened: dict[str, tuple[int, int, int]] = {}
    for layer, following, shape in zip(chain, chain[1:], shapes, strict=False):
        if isinstance(layer, Flatten) and isinstance(following, Dense):
            height, width, channels = shape
            flattened[old.get(following.name, following.name.replace("/", "."))] = (channels, height, width)
    return linen_from_torch(state, flattened=flattened, names=names)[0]


def _kernel(name: str, weight: np.ndarray, image: tuple[int, int, int] | None) -> np.ndarray:
    """(out, in, *window) -> (*window, in, out)."""
    if image is not None:
        if weight.ndim != 2 or len(image) != 3 or math.prod(image) != weight.shape[1]:
            raise ValueError(f"{name} of shape {weight.shape} does not take in a flattened image (C, H, W) = {image}")
        weight = weight.reshape(-1, *image).transpose(0, 2, 3, 1).reshape(weight.shape)
    return np.ascontiguousarray(weight.transpose(*range(2, weight.ndim), 1, 0))
