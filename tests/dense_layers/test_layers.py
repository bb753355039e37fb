"""Dense layers forward and backward against jax's own derivative, and what does not fit."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.layers import dense_layers

WIDTHS = (7, 6, 5, 4)


def _arrays(seed=0):
    generator = np.random.default_rng(seed)
    kernels = [generator.standard_normal(shape) for shape in pairwise(WIDTHS)]
    biases = [generator.standard_normal(width) for width in WIDTHS[1:]]
    return kernels, biases


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_deltas_are_the_derivatives_of_the_loss(activation) -> None:
    kernels, biases = _arrays()
    layers = dense_layers(kernels, biases, kernels, biases, [activation] * 2)
    inputs = np.random.default_rng(1).standard_normal((3, WIDTHS[0]))
    labels = np.eye(WIDTHS[-1])[[0, 3, 1]]

    def loss(shifts):
        hidden = jnp.asarray(inputs)
        for place, (kernel, bias, shift) in enumerate(zip(kernels, biases, shifts, strict=True)):
            hidden = hidden @ kernel + bias[None] + shift
            if place < 2:
                hidden = ACTIVATIONS[activation].apply(hidden)
        return -jnp.sum(labels * jax.nn.log_softmax(hidden))

    before = layers.before(0, inputs)
    deltas = layers.backward(0, before, layers.predictions(0, inputs) - labels)
    with jax.enable_x64(True):
        expected = jax.grad(loss)([jnp.zeros((3, width)) for width in WIDTHS[1:]])
    for own, other in zip(deltas, expected, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-12)


def test_a_later_layer_alone_goes_on_from_its_own_inputs() -> None:
    kernels, biases = _arrays()
    layers = dense_layers(kernels, biases, kernels, biases, ["relu"] * 2)
    inputs = np.random.default_rng(1).standard_normal((3, WIDTHS[0]))
    before = layers.before(0, inputs)
    np.testing.assert_array_equal(layers.before(1, layers.activate(0, before[0]))[-1], before[-1])
    np.testing.assert_allclose(layers.predictions(0, inputs).sum(axis=1), 1)
    np.testing.assert_array_equal(layers.gates(0, before[0]), before[0] > 0)


def _changed(values, place, new):
    return [new if index == place else value for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": ["relu"]}, "3 dense layers need 2 activations"),
        ({"activations": ["relu", "swish"]}, "unknown activation swish"),
        ({"kernels": (1, np.zeros((6, 9)))}, r"dense layer 2 of 3 has a kernel \(6, 9\) and a gradient \(6, 5\)"),
        ({"kernels": (0, np.zeros(7))}, "dense layer 1 of 3 has a kernel"),
        ({"kernels": (1, np.zeros((8, 5))), "kernel_gradients": (1, np.zeros((8, 5)))}, "takes 8 inputs, but 6 come"),
        ({"biases": (0, None)}, "dense layer 1 of 3: give the bias and its gradient"),
        ({"bias_gradients": (2, np.zeros(5))}, r"dense layer 3 of 3 has a bias \(4,\) and its gradient \(5,\)"),
        ({"kernel_gradients": (0, np.full((7, 6), np.inf))}, "dense layer 1 of 3: its gradient is not finite"),
        ({"bias_gradients": (1, np.full(5, np.nan))}, "dense layer 2 of 3: its bias is not finite"),
    ],
)
def test_what_does_not_fit_is_named(change, message) -> None:
    kernels, biases = _arrays()
    given = {
        "kernels": kernels,
        "biases": biases,
        "kernel_gradients": kernels,
        "bias_gradients": biases,
        "activations": ["relu", "relu"],
    }
    for name, new in change.items():
        given[name] = new if name == "activations" else _changed(given[name], *new)
    with pytest.raises(ValueError, match=message):
        dense_layers(**given)
