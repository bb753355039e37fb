"""Before any inversion: has each layer of a chain as many equations as unknowns?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softinv_jax.images.layer_chain import ACTIVATIONS, Activation, Chain, Convolution, Dense, chain_inputs

__all__ = ["LayerCount", "count_equations"]


@dataclass(frozen=True)
class LayerCount:
    """Equations and unknowns of one layer's input, for all examples behind one gradient.

    Attributes:
      layer: name. unknowns: entries of the input.
      forward_equations: entries of the output, zero where the activation after it is not one to one.
      gradient_equations: of dL/dK, no more than can be independent of each other.
    """

    layer: str
    unknowns: int
    forward_equations: int
    gradient_equations: int

    @property
    def determined(self) -> bool:
        """Necessary, not sufficient: equations may depend on each other for other reasons."""
        return self.forward_equations + self.gradient_equations >= self.unknowns


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
        following = chain[index + 1]
        invertible = not isinstance(following, Activation) or ACTIVATIONS[following.function].one_to_one
        if isinstance(layer, Dense):
            unknowns = batch_size * inputs[0]
            gradient = inputs[0] * min(batch_size, outputs[0])
        else:
            unknowns = batch_size * inputs[0] * inputs[1] * inputs[2]
            gradient = inputs[2] * _gradient_rank(layer, parameters, inputs, outputs, batch_size)
        size = 1
        for length in outputs:
            size *= length
        counts.append(LayerCount(layer.name, unknowns, batch_size * size if invertible else 0, gradient))
    return counts


def _gradient_rank(
    layer: Convolution, parameters: Mapping[str, Any], inputs: tuple[int, ...], outputs: tuple[int, ...], batch: int
) -> int:
    """Of one input channel's gradient equations, how many can be independent."""
    found: Any = parameters
    for part in layer.name.split("/"):
        found = found[part]
    height, width = found["kernel"].shape[:2]
    total = 0
    for row in range(layer.strides[0]):
        for column in range(layer.strides[1]):
            taps = len(range(row, height, layer.strides[0])) * len(range(column, width, layer.strides[1]))
            # Pixel i meets offset i + padding - stride * position: its phase is that of i + padding.
            rows = len(range((row - layer.padding[0][0]) % layer.strides[0], inputs[0], layer.strides[0]))
            columns = len(range((column - layer.padding[1][0]) % layer.strides[1], inputs[1], layer.strides[1]))
            total += min(taps * outputs[2], rows * columns * batch)
    return total
