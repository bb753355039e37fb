"""From the deltas of a layer to its inputs, each example at its own scale.

With X the matrix of all beta, the gradient is R U X diag(s) A V^T / D: once all are found, A = D diag(1/s) X^-1 S,
and the constant 1 of a bias fixes every s, its sign too. An example with a row of its own has its input without the
others, and s = D / (beta^T S^-1 a).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softinv_jax.dense_layers.gate_fit import GateSolution, NextLayer, surprise
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.single_rows import SingleRow
from softinv_jax.dense_layers.smooth import SmoothSolution
from softinv_jax.dense_layers.space import LayerSpace
from softinv_jax.labels.scalar_equation import TOLERANCE

__all__ = ["Assembled", "assemble", "assemble_smooth"]

# Of a smooth solution's own deviation.
OUTPUT_NOISE = 3.0


@dataclass(frozen=True)
class Assembled:
    """k examples of one layer; NumPy float64.

    Attributes:
      inputs: (k, d) h. independent: (k, d) standard deviation of each entry from the noise on the gradient.
      carried: (k, k) standard deviations of how much of each other input is in an input, from errors of the deltas.
      delta: (k, m) the loss's derivative by the layer's output, with the gates that were found.
      next_delta: (k, outputs) the loss's derivative by the next layer's output. next_deviation: likewise.
      misfit, surprise: (k,) see `gate_fit`.
      opened, closed: (k,) how many units the input, run forward, surely opens that its delta says are closed, and the
        other way round: 0 for what is really there. Where a client drops units, many of the first kind and none of the
        second.
      scaled: whether each input's length is known; if not, `inputs` and `next_delta` are a factor and its inverse off.
      complete: whether these are all the examples that the rank shows.
    """

    inputs: np.ndarray
    independent: np.ndarray
    carried: np.ndarray
    delta: np.ndarray
    next_delta: np.ndarray
    next_deviation: np.ndarray
    misfit: np.ndarray
    surprise: np.ndarray
    opened: np.ndarray
    closed: np.ndarray
    scaled: bool
    complete: bool

    def draw_errors(self, generator: np.random.Generator) -> np.ndarray:
        """(k, d) errors of the inputs as they may be."""
        own = self.independent * generator.standard_normal(self.inputs.shape)
        return own + (self.carried * generator.standard_normal(self.carried.shape)) @ self.inputs

    def input_deviation(self) -> np.ndarray:
        """(k,) root mean square over the entries of an input."""
        square = self.independent**2 + self.carried**2 @ self.inputs**2
        return np.asarray(np.sqrt(np.mean(square, axis=1)))


def assemble(
    layers: DenseLayers,
    index: int,
    space: LayerSpace,
    following: NextLayer,
    solutions: Sequence[GateSolution],
    known: Sequence[SingleRow],
    divisor: float,
) -> Assembled:
    """Put together all solutions, those of the known rows included, or the known rows alone where some are missing.

    divisor: D, what the sum over the examples was divided by.
    """
    complete = len(solutions) == space.rank
    if complete:
        mixing = np.linalg.inv(np.stack([one.coordinates for one in solutions], axis=1))
        coordinates = divisor * mixing * space.singular_values
    else:
        solutions = [row.solution for row in known]
        coordinates = np.array([row.input_coordinates for row in known]).reshape(len(known), space.rank)
        pairing = np.array([one.coordinates for one in solutions]).reshape(coordinates.shape) / space.singular_values
        # Such that the product of delta and input is what the gradient holds.
        coordinates = divisor * coordinates / np.sum(pairing * coordinates, axis=1, keepdims=True)
        mixing = coordinates / (divisor * space.singular_values)
    scale = _scale(layers, index, space, solutions, coordinates)
    shape = len(solutions), following.weight.shape[1]
    combination = np.array([one.combination for one in solutions]).reshape(shape)
    spread = np.array([one.combination_deviation for one in solutions]).reshape(shape)
    inputs = (coordinates / scale[:, None]) @ space.right.T
    # In units of a column's own deviation.
    own = space.common * divisor * np.linalg.norm(mixing, axis=1) / np.abs(scale)
    errors = np.array([one.delta_deviation for one in solutions]) * np.abs(scale)
    carried = np.linalg.norm(mixing, axis=1)[:, None] / np.abs(scale)[:, None] * errors[None, :]
    next_delta = scale[:, None] * combination @ following.basis.T
    # What rows have in common, as of an example that leaves next to nothing, moves g more than independent noise does.
    next_deviation = space.common * np.abs(scale)[:, None] * np.sqrt(spread**2 @ following.basis.T**2)
    if following.own is not None:
        outside = np.linalg.norm(combination / following.own.singular_values, axis=1)
        next_deviation = np.hypot(next_deviation, np.outer(np.abs(scale) * outside, following.own.noise))
    # The client rounds what it passes on.
    next_deviation = np.hypot(next_deviation, space.roundoff * np.abs(next_delta))
    if space.has_bias:
        # The scale is as uncertain as the constant 1 is.
        uncertain = np.hypot(own * space.columns[-1], np.linalg.norm(carried, axis=1))
        next_deviation = np.hypot(next_deviation, np.abs(next_delta) * uncertain[:, None])
    features = layers.kernels[index].shape[0]
    low, high = following.slopes
    slopes = np.where(np.array([one.gates for one in solutions], bool).reshape(-1, len(space.noise)), high, low)
    opened, closed = _contradictions(layers, index, space, solutions, inputs, own, carried)
    return Assembled(
        inputs=inputs[:, :features],
        independent=own[:, None] * space.columns[None, :features],
        carried=carried,
        delta=slopes * (next_delta @ layers.kernels[index + 1].T),
        next_delta=next_delta,
        next_deviation=next_deviation,
        misfit=np.array([one.misfit for one in solutions]),
        surprise=np.array([surprise(one) for one in solutions]),
        opened=opened,
        closed=closed,
        scaled=space.has_bias,
        complete=complete,
    )


def assemble_smooth(
    layers: DenseLayers, index: int, space: LayerSpace, solutions: Sequence[SmoothSolution], divisor: float
) -> Assembled:
    """Put together what the equation of a smooth activation gave: each example's input and next delta by itself."""
    count, features = len(solutions), layers.kernels[index].shape[0]
    coordinates = np.array([one.coordinates for one in solutions]).reshape(count, space.rank)
    next_delta = np.array([one.logit_gradient * divisor / one.divisor for one in solutions])
    next_delta = next_delta.reshape(count, layers.kernels[index + 1].shape[1])
    inputs = (coordinates @ space.right.T)[:, :features]
    if not space.has_bias:
        sign = _sign(layers, index, inputs, next_delta)
        inputs, next_delta = sign * inputs, sign * next_delta
    # The noise on V moves the outputs as well, which the solver's own deviation does not hold.
    relative = OUTPUT_NOISE * space.common * np.array([one.deviation for one in solutions])
    own = relative * np.linalg.norm(coordinates, axis=1) / np.sqrt(len(space.right))
    before = layers.output(index, inputs)
    freedom = np.array([one.freedom for one in solutions])
    spread = np.array([max(one.spread, 1.0) / max(one.misfit, 1.0) for one in solutions])
    return Assembled(
        inputs=inputs,
        independent=own[:, None] * space.columns[None, :features],
        carried=np.zeros((count, count)),
        delta=layers.slope(index, before) * (next_delta @ layers.kernels[index + 1].T),
        next_delta=next_delta,
        next_deviation=np.broadcast_to(relative[:, None], next_delta.shape)
        * np.linalg.norm(next_delta, axis=1, keepdims=True),
        misfit=np.array([one.misfit for one in solutions]),
        surprise=freedom * np.log(spread),
        opened=np.zeros(count, int),
        closed=np.zeros(count, int),
        scaled=True,
        complete=count == space.rank,
    )


def _sign(layers: DenseLayers, index: int, inputs: np.ndarray, next_delta: np.ndarray) -> np.ndarray:
    """(k, 1) 1 or -1: without a bias an even derivative leaves the sign open, and p - g is a label with one of them."""
    if index < len(layers.kernels) - 2:
        # The next layer's own bias gradient, or nothing, would tell; as it was found.
        return np.ones((len(inputs), 1))
    outside = []
    for sign in (1.0, -1.0):
        label = layers.predictions(index, sign * inputs) - sign * next_delta
        outside.append(np.max(np.maximum(-label, label - 1), axis=1))
    return np.where(outside[0] <= outside[1], 1.0, -1.0)[:, None]


def _scale(
    layers: DenseLayers,
    index: int,
    space: LayerSpace,
    solutions: Sequence[GateSolution],
    coordinates: np.ndarray,
) -> np.ndarray:
    """(k,) s: by the constant 1, or no more than its sign, by which units are open."""
    if space.has_bias:
        return np.asarray(coordinates @ space.constant)
    opened = layers.gates(index, coordinates @ space.directions.T)
    agreeing = np.array([np.mean(own == one.gates) for own, one in zip(opened, solutions, strict=True)])
    return np.where(agreeing >= 0.5, 1.0, -1.0)


def _contradictions(
    layers: DenseLayers,
    index: int,
    space: LayerSpace,
    solutions: Sequence[GateSolution],
    inputs: np.ndarray,
    independent: np.ndarray,
    carried: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(k,) and (k,) units that are surely open and found closed, and the reverse."""
    features = layers.kernels[index].shape[0]
    outputs = layers.output(index, inputs[:, :features])
    norms = np.linalg.norm(layers.kernels[index] * space.columns[:features, None], axis=0)
    lengths = np.linalg.norm(inputs, axis=1, keepdims=True) * np.linalg.norm(layers.kernels[index], axis=0)
    noise = independent[:, None] * norms + np.sqrt(carried**2 @ outputs**2)
    reach = TOLERANCE * (noise + space.roundoff * (lengths + np.abs(outputs)))
    above, below = layers.gates(index, outputs - reach), layers.gates(index, outputs + reach)
    found = np.array([one.gates for one in solutions], bool).reshape(outputs.shape)
    # What the gate is shows only where something arrives at it.
    told = np.array([one.told for one in solutions], bool).reshape(outputs.shape)
    sure = told & (above == below)
    return np.sum(sure & above & ~found, axis=1), np.sum(sure & ~above & found, axis=1)
