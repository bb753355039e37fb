"""Before any inversion: has each layer of a chain as many equations as unknowns?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.images.layer_chain import (
    Activation,
    Chain,
    Convolution,
    Dense,
    Pool,
    chain_inputs,
    layer_parameters,
)

__all__ = ["LayerCount", "count_equations", "determined_together", "equations_together", "is_determined"]

# So many equations beyond the unknowns: none of them is met to rounding by accident.
SURPLUS = 10


@dataclass(frozen=True)
class LayerCount:
    """Equations and unknowns of one layer's input, for all examples behind one gradient.

    Attributes:
      layer: name. unknowns: entries of the input.
      forward_equations: entries of the output, zero where the activation after it is not one to one, or
        pooling follows.
      gradient_equations: of dL/dK, no more than can be independent of each other.
      unmet: entries of the input that no window of the convolution meets; no equation has them.
    """

    layer: str
    unknowns: int
    forward_equations: int
    gradient_equations: int
    unmet: int = 0

    @property
    def determined(self) -> bool:
        """Necessary, not sufficient: equations may depend on each other for other reasons."""
        return self.unmet == 0 and self.forward_equations + self.gradient_equations >= self.unknowns


def count_equations(
    chain: Chain, parameters: Mapping[str, Any], image_shape: tuple[int, int, int], batch_size: int = 1
) -> list[LayerCount]:
    """Count for each layer but the head, from the last to the first, as the inversion goes.

    The gradient of a convolution couples an input channel's pixels only within one phase of the strides: pixels whose
    row and column leave the same remainders meet the same entries of the kernel, and those of no other phase. An
    equation that a phase has beyond its pixels says nothing about another phase.

    Args:
      batch_size: examples behind one gradient; the forward equations are each example's own, the gradient's shared.

    Raises:
      ValueError: if the chain, the parameters and the image do not fit each other.
    """
    shapes = chain_inputs(chain, parameters, image_shape)
    kernels = [layer for layer in chain if isinstance(layer, Convolution | Dense)]
    counts = []
    for layer in kernels[-2::-1]:
        index = chain.index(layer)
        inputs, outputs = shapes[index], shapes[index + 1]
        invertible = _passes_on(chain[index + 1 :])
        if isinstance(layer, Dense):
            unknowns = batch_size * inputs[0]
            gradient = inputs[0] * min(batch_size, outputs[0])
        else:
            unknowns = batch_size * inputs[0] * inputs[1] * inputs[2]
            gradient = inputs[2] * _gradient_rank(layer, parameters, inputs, outputs, batch_size)
        unmet = _unmet(layer, parameters, inputs, outputs) * batch_size if isinstance(layer, Convolution) else 0
        forward = batch_size * math.prod(outputs) if invertible else 0
        counts.append(LayerCount(layer.name, unknowns, forward, gradient, unmet))
    return counts


def _passes_on(following: Chain) -> bool:
    """Whether all that leaves a layer is known from what enters the next one with parameters."""
    for layer in following:
        if isinstance(layer, Dense | Convolution):
            break
        if isinstance(layer, Pool) or (isinstance(layer, Activation) and not ACTIVATIONS[layer.function].one_to_one):
            return False
    return True


def is_determined(
    chain: Chain, parameters: Mapping[str, Any], image_shape: tuple[int, int, int], batch_size: int = 1
) -> bool:
    """Whether each layer before the head is determined, or all of them together."""
    counts = count_equations(chain, parameters, image_shape, batch_size)
    return all(count.determined for count in counts) or determined_together(
        chain, parameters, image_shape, batch_size, len(chain) - 1
    )


def determined_together(
    chain: Chain, parameters: Mapping[str, Any], image_shape: tuple[int, int, int], batch_size: int, position: int
) -> bool:
    """Whether the layers before the one at `position` have equations enough; necessary, the error tells the rest."""
    unknowns = batch_size * math.prod(image_shape)
    return equations_together(chain, parameters, image_shape, batch_size, position) >= unknowns + SURPLUS


def equations_together(
    chain: Chain,
    parameters: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    batch_size: int,
    position: int,
) -> int:
    """Of all layers before the one at `position`, whose inputs are known: how many equations have the images at most?

    From the last to the first, of a layer's output no more can be known than its entries, and its gradient adds what
    can be independent there. An activation is taken to pass everything on: what ReLU cuts off, only the data tell. Of
    pooling no more is known than leaves it.

    Returns:
      The number; zero where an entry of the images is in no equation.
    """
    shapes = chain_inputs(chain, parameters, image_shape)
    known = found = batch_size * math.prod(shapes[position])
    for index in range(position - 1, -1, -1):
        layer, inputs, outputs = chain[index], shapes[index], shapes[index + 1]
        if isinstance(layer, Dense | Convolution):
            if isinstance(layer, Dense):
                found = known + inputs[0] * min(batch_size, outputs[0])
            else:
                found = known + inputs[2] * _gradient_rank(layer, parameters, inputs, outputs, batch_size)
            known = min(found, batch_size * math.prod(inputs))
    first = next(index for index, layer in enumerate(chain) if isinstance(layer, Dense | Convolution))
    layer = chain[first]
    unmet = isinstance(layer, Convolution) and _unmet(layer, parameters, shapes[first], shapes[first + 1])
    return 0 if unmet else found


def _gradient_rank(
    layer: Convolution, parameters: Mapping[str, Any], inputs: tuple[int, ...], outputs: tuple[int, ...], batch: int
) -> int:
    """Of one input channel's gradient equations, how many can be independent."""
    rows, columns = _meetings(layer, parameters, inputs, outputs)
    return sum(
        min(taps * other_taps * outputs[2], pixels * other_pixels * batch)
        for taps, pixels in rows
        for other_taps, other_pixels in columns
    )


def _unmet(layer: Convolution, parameters: Mapping[str, Any], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    rows, columns = (sum(pixels for _, pixels in phases) for phases in _meetings(layer, parameters, inputs, outputs))
    return (inputs[0] * inputs[1] - rows * columns) * inputs[2]


def _meetings(
    layer: Convolution, parameters: Mapping[str, Any], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> list[list[tuple[int, int]]]:
    """`_phases` of the rows and of the columns."""
    kernel = layer_parameters(parameters, layer.name)["kernel"].shape
    return [
        _phases(inputs[axis], kernel[axis], layer.strides[axis], layer.padding[axis][0], outputs[axis])
        for axis in range(2)
    ]


def _phases(size: int, kernel: int, stride: int, before: int, positions: int) -> list[tuple[int, int]]:
    """For each phase along one axis: kernel entries that meet a pixel, pixels that are met. Borders may be unmet."""
    phases = []
    for phase in range(stride):
        meetings = [
            (tap, tap + stride * position - before)
            for tap in range(phase, kernel, stride)
            for position in range(positions)
            if 0 <= tap + stride * position - before < size
        ]
        phases.append((len({tap for tap, _ in meetings}), len({pixel for _, pixel in meetings})))
    return phases
