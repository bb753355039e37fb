"""Which dense layer tells the examples apart, and what its gradient is as a sum of outer products."""

from dataclasses import dataclass

import numpy as np

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.gate_fit import NextLayer, next_layer
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.space import LayerSpace, layer_space

__all__ = ["ChosenLayer", "choose_layer"]

# Of the head's gradient: what rounding leaves of a sum over classes that is zero.
ZERO_SUM = 1e-5


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


def choose_layer(layers: DenseLayers, largest: int | None) -> ChosenLayer | None:
    """The layer with most equations to spare; None where none has any, or the gradient is zero.

    Of m units each gives one equation; unknown are the B coordinates of an example's delta and the n of the next layer's,
    of which one is its scale. largest: B, where it is told.
    """
    chosen: ChosenLayer | None = None
    for index in range(len(layers.activations)):
        kernel, gradient = layers.kernels[index], layers.kernel_gradients[index]
        if not np.any(gradient):
            continue
        slopes = ACTIVATIONS[layers.activations[index]].slopes or (0.0, 1.0)
        last = index == len(layers.activations) - 1
        following = next_layer(layers.kernels[index + 1], last and _sums_to_zero(layers), slopes)
        if chosen is not None and min(kernel.shape) - following.weight.shape[1] <= chosen.excess:
            continue  # Even one example would have fewer to spare there.
        space = layer_space(kernel, layers.biases[index], gradient, layers.bias_gradients[index], layers.dtype, largest)
        excess = kernel.shape[1] - space.rank - following.weight.shape[1] + 1
        if space.rank < min(gradient.shape) and excess > 0 and (chosen is None or excess > chosen.excess):
            chosen = ChosenLayer(index, space, following, excess)
    return chosen


def _sums_to_zero(layers: DenseLayers) -> bool:
    """Whether the derivatives by the logits do, as those of a softmax."""
    gradient = layers.kernel_gradients[-1]
    return bool(np.linalg.norm(gradient.sum(axis=1)) <= ZERO_SUM * np.linalg.norm(gradient))
