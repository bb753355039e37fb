"""Which dense layers tell the examples apart, and what its gradient is as a sum of outer products."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.gate_fit import NextLayer, next_layer
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.space import LayerSpace, layer_space

__all__ = ["ChosenLayer", "choose_layers"]

# In place of two slopes, which nobody asks for.
SMOOTH = (0.0, 1.0)


@dataclass(frozen=True)
class ChosenLayer:
    """A layer with an activation after it.

    Attributes:
      index: which. space: of its gradient. following: what comes after it.
      excess: equations that an example has there beyond its unknowns.
    """

    index: int
    space: LayerSpace
    following: NextLayer
    excess: int


def choose_layers(layers: DenseLayers, largest: int | None) -> Iterator[ChosenLayer]:
    """The layers that can tell the examples apart, from the last before the head on.

    Of m units each gives one equation; unknown are the B coordinates of an example's delta and the n of the next
    layer's, of which one is its scale: as many as that layer has outputs, or B, where its own gradient tells the B
    examples apart as well. largest: B, where it is told.
    """
    following: LayerSpace | None = None
    for index in range(len(layers.kernels) - 1, -1, -1):
        kernel, gradient = layers.kernels[index], layers.kernel_gradients[index]
        if not np.any(gradient):
            return
        space = layer_space(kernel, layers.biases[index], gradient, layers.bias_gradients[index], layers.dtype, largest)
        apart, after = space.rank < min(gradient.shape), following
        following = space if apart else None
        # Nothing tells examples apart where there is no activation, or one whose derivative is everywhere the same.
        if not apart or index == len(layers.activations) or layers.activations[index] == "identity":
            continue
        slopes = ACTIVATIONS[layers.activations[index]].slopes or SMOOTH
        own = after if after is not None and after.rank == space.rank else None
        coming = next_layer(layers.kernels[index + 1], own, slopes)
        excess = kernel.shape[1] - space.rank - coming.weight.shape[1] + 1
        if excess > 0:
            yield ChosenLayer(index, space, coming, excess)
