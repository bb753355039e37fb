"""Which dense layers tell the examples apart, and what its gradient is as a sum of outer products."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.gate_fit import NextLayer, next_layer
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.space import LayerSpace, layer_space

__all__ = ["ChosenLayer", "choose_layers", "with_fewer"]

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
    """The layers that can tell the examples apart, from the last before the head on. largest: B, where it is told."""
    following: LayerSpace | None = None
    for index in range(len(layers.kernels) - 1, -1, -1):
        if not np.any(layers.kernel_gradients[index]):
            return
        space = _space(layers, index, largest)
        # Nothing tells examples apart where there is no activation, or one whose derivative is everywhere the same.
        if index < len(layers.activations) and layers.activations[index] != "identity":
            chosen = _chosen(layers, index, space, following)
            if _apart(space) and chosen.excess > 0:
                yield chosen
        following = space


def with_fewer(layers: DenseLayers, chosen: ChosenLayer, rank: int) -> ChosenLayer:
    """The same layer, if so many examples are all that stands out: what else there is is taken for noise."""
    space = _space(layers, chosen.index, None, rank)
    return _chosen(layers, chosen.index, space, _space(layers, chosen.index + 1, None, rank))


def _space(layers: DenseLayers, index: int, largest: int | None, rank: int | None = None) -> LayerSpace:
    kernel, gradient = layers.kernels[index], layers.kernel_gradients[index]
    return layer_space(
        kernel, layers.biases[index], gradient, layers.bias_gradients[index], layers.dtype, largest, rank
    )


def _apart(space: LayerSpace) -> bool:
    """Whether more examples would have been seen."""
    return space.rank < min(len(space.noise), len(space.right) - space.has_bias)


def _chosen(layers: DenseLayers, index: int, space: LayerSpace, following: LayerSpace | None) -> ChosenLayer:
    """Of m units each gives one equation; unknown are the B coordinates of an example's delta and the n of the next
    layer's, of which one is its scale: as many as that layer has outputs, or B, where its own gradient tells the B
    examples apart as well.
    """
    slopes = ACTIVATIONS[layers.activations[index]].slopes or SMOOTH
    own = following if following is not None and _apart(following) and following.rank == space.rank else None
    coming = next_layer(layers.kernels[index + 1], own, slopes)
    return ChosenLayer(index, space, coming, len(space.noise) - space.rank - coming.weight.shape[1] + 1)
