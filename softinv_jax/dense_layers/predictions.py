"""What inputs that were found predict, run forward, and what their deltas say of g; both with their deviations."""

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from softinv_jax.dense_layers.assembly import Assembled
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.observation.rank_one import unit_roundoff

__all__ = ["logit_gradients", "predictions"]

DRAWS = 4
ROUNDED_OPERATIONS = 3


def logit_gradients(
    layers: DenseLayers, index: int, before: list[np.ndarray], assembled: Assembled
) -> tuple[np.ndarray, np.ndarray]:
    """(k, C) g and its deviation: the next layer's delta, or what makes it, by least squares."""
    if index == len(layers.kernels) - 2:
        return assembled.next_delta, assembled.next_deviation
    found, deviation = [], []
    unit = np.eye(layers.number_of_classes)
    for row in range(len(assembled.inputs)):
        own = [np.repeat(values[row : row + 1], len(unit), axis=0) for values in before]
        backward = layers.backward(index, own, unit)[1].T
        inverse = np.linalg.pinv(backward)
        found.append(inverse @ assembled.next_delta[row])
        deviation.append(np.sqrt(inverse**2 @ assembled.next_deviation[row] ** 2))
    return np.array(found), np.array(deviation)


def predictions(
    layers: DenseLayers, index: int, assembled: Assembled, factor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(k, C) the softmax, and its standard deviation from the errors of the inputs and the client's own rounding.

    factor: (k,) what the inputs must be multiplied by.
    """
    generator = np.random.default_rng(0)
    roundoff = unit_roundoff(layers.dtype)
    inputs = assembled.inputs * factor[:, None]
    logits = layers.before(index, inputs)[-1]
    exact = np.asarray(softmax(logits, axis=1))
    # All logits of an example err about as much: together they show the size that a few draws of one would not.
    square = np.mean((_rounded_logits(layers, index, inputs) - logits) ** 2, axis=1)
    for _ in range(DRAWS):
        hidden = inputs + assembled.draw_errors(generator) * factor[:, None]
        for place in range(index, len(layers.kernels)):
            lengths = np.linalg.norm(hidden, axis=1, keepdims=True) * np.linalg.norm(layers.kernels[place], axis=0)
            values = layers.output(place, hidden)
            # Of a sum of products, every one and every partial sum is rounded.
            values = values + roundoff * (lengths + np.abs(values)) * generator.standard_normal(values.shape)
            hidden = layers.activate(place, values) if place < len(layers.activations) else values
        square += np.mean((hidden - logits) ** 2, axis=1) / DRAWS
    others = np.sum(exact**2, axis=1, keepdims=True) - exact**2
    moved = exact * np.sqrt(square[:, None] * ((1 - exact) ** 2 + others))
    # The softmax is made of its rounded logarithm.
    logarithm = -np.log(np.maximum(exact, jnp.finfo(layers.dtype).tiny))
    return exact, np.hypot(moved, (ROUNDED_OPERATIONS + logarithm) * roundoff * exact)


def _rounded_logits(layers: DenseLayers, index: int, inputs: np.ndarray) -> np.ndarray:
    """(k, C) as the gradient's own number format gives them: about what the client's arithmetic does to them."""
    wide = np.promote_types(layers.dtype, np.float32)

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(layers.dtype).astype(wide)

    hidden = rounded(inputs)
    for place in range(index, len(layers.kernels)):
        bias = layers.biases[place]
        # Products of half precision are summed in float32.
        hidden = rounded(hidden @ rounded(layers.kernels[place]))
        hidden = hidden if bias is None else rounded(hidden + rounded(bias))
        if place < len(layers.activations):
            hidden = rounded(layers.activate(place, hidden))
    return np.asarray(hidden, np.float64)
