"""Which dense layers tell the examples apart, and what its gradient is as a sum of outer products."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.gate_fit import NextLayer, next_layer
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.space import LayerSpace, layer_space

__all__ = ["ChosenLayer", "choose_layers"]

# Of the head's gradient: what rounding leaves of a sum over classes that is zero.
ZERO_SUM = 1e-5
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
    layer's, of which one is its scale. Before the head n is the number of classes; farther from it, it is a layer's
    width, and less is known of where to start. largest: B, where it is told.
    """
    for index in range(len(layers.activations) - 1, -1, -1):
        kernel, gradient = layers.kernels[index], layers.kernel_gradients[index]
        if layers.activations[index] == "identity":
            continue  # Nothing tells examples apart whose derivative is everywhere the same.
        slopes = ACTIVATIONS[layers.activations[index]].slopes or SMOOTH
        last = index == len(layers.activations) - 1
        following = next_layer(layers.kernels[index + 1], last and _sums_to_zero(layers), slopes)
        unknowns = following.weight.shape[1]
        if not np.any(gradient) or kernel.shape[1] <= unknowns:
            continue
        space = layer_space(kernel, layers.biases[index], gradient, layers.bias_gradients[index], layers.dtype, largest)
        excess = kernel.shape[1] - space.rank - unknowns + 1
        if space.rank < min(gradient.shape) and excess > 0:
            yield ChosenLayer(index, space, following, excess)


def _sums_to_zero(layers: DenseLayers) -> bool:
    """Whether the derivatives by the logits do, as those of a softmax."""
    gradient = layers.kernel_gradients[-1]
    return bool(np.linalg.norm(gradient.sum(axis=1)) <= ZERO_SUM * np.linalg.norm(gradient))
