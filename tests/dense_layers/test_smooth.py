"""Examples behind a dense layer with a smooth activation, from float32 gradients, against the truth."""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.layers import DenseLayers, dense_layers
from softinv_jax.dense_layers.smooth import SmoothSolution, search_smooth
from softinv_jax.dense_layers.space import LayerSpace, layer_space

INPUTS, UNITS, CLASSES, BATCH = 192, 60, 5, 4


class Case(NamedTuple):
    layers: DenseLayers
    space: LayerSpace
    coordinates: np.ndarray
    logit_gradients: np.ndarray


def _space(layers: DenseLayers) -> LayerSpace:
    return layer_space(
        layers.kernels[0],
        layers.biases[0],
        layers.kernel_gradients[0],
        layers.bias_gradients[0],
        layers.dtype,
        BATCH,
    )


def _case(activation: str, hidden: tuple[int, ...] = (UNITS,), *, bias: bool = True, noise: float = 0.0) -> Case:
    """A float32 client with dense labels; noise relative to the gradient's root mean square."""
    generator = np.random.default_rng(3)
    widths = (INPUTS, *hidden, CLASSES)
    inputs = generator.normal(0.2, 1, (BATCH, INPUTS)).astype(np.float32)
    labels = generator.dirichlet(np.ones(CLASSES), BATCH).astype(np.float32)
    parameters = []
    for before, after in pairwise(widths):
        bound = np.sqrt(3 / before)
        kernel = generator.uniform(-bound, bound, (before, after)).astype(np.float32)
        offset = generator.uniform(-bound, bound, after).astype(np.float32)
        parameters.append((kernel, offset if bias else np.zeros_like(offset)))

    def loss(parameters: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        values = jnp.asarray(inputs)
        for place, (kernel, offset) in enumerate(parameters):
            values = values @ kernel + offset[None, :]
            if place < len(hidden):
                values = ACTIVATIONS[activation].apply(values)
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(values), axis=-1))

    gradients = jax.device_get(jax.grad(loss)(parameters))
    if noise:
        gradients = jax.tree.map(
            lambda leaf: leaf + noise * np.sqrt(np.mean(leaf**2)) * generator.standard_normal(leaf.shape), gradients
        )
    layers = dense_layers(
        [kernel for kernel, _ in parameters],
        [offset if bias else None for _, offset in parameters],
        [kernel for kernel, _ in gradients],
        [offset if bias else None for _, offset in gradients],
        [activation] * len(hidden),
    )
    space = _space(layers)
    before = layers.before(0, inputs.astype(np.float64))
    probabilities = np.exp(before[-1]) / np.exp(before[-1]).sum(1, keepdims=True)
    extended = np.concatenate([inputs, np.ones((BATCH, 1))], axis=1) if bias else inputs
    deltas = layers.backward(0, before, probabilities - labels)
    return Case(layers, space, (extended / space.columns) @ (space.right / space.columns[:, None]), deltas[1])


def _errors(case: Case, solutions: list[SmoothSolution], signs: tuple[int, ...] = (1,)) -> np.ndarray:
    """(BATCH, solutions) relative distances, to the nearest sign."""
    found = np.array([one.coordinates for one in solutions])
    distances = [np.linalg.norm(case.coordinates[:, None] - sign * found[None], axis=2) for sign in signs]
    return np.min(distances, axis=0) / np.linalg.norm(case.coordinates, axis=1)[:, None]


@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])
def test_every_example_is_found_with_its_logit_gradient(activation: str) -> None:
    case = _case(activation)
    solutions = search_smooth(case.layers, 0, case.space, BATCH, 0)
    assert len(solutions) == BATCH
    errors = _errors(case, solutions)
    order = errors.argmin(axis=1)
    assert sorted(order) == list(range(BATCH))
    assert errors.min(axis=1).max() < 1e-4
    for number, place in enumerate(order):
        one = solutions[place]
        assert errors[number, place] < 6 * one.deviation
        np.testing.assert_allclose(one.logit_gradient * BATCH / one.divisor, case.logit_gradients[number], atol=1e-4)
        assert case.space.constant @ one.coordinates == pytest.approx(1)


def test_without_biases_up_to_the_sign() -> None:
    case = _case("tanh", bias=False)
    solutions = search_smooth(case.layers, 0, case.space, BATCH, 0)
    errors = _errors(case, solutions, (1, -1))
    assert len(solutions) == BATCH
    assert errors.min(axis=1).max() < 1e-4


def test_before_another_hidden_layer() -> None:
    """The next layer's g has as many entries as units, but its own gradient confines it, and its input as well."""
    case = _case("silu", (UNITS, UNITS))
    solutions = search_smooth(case.layers, 0, case.space, BATCH, 0)
    assert len(solutions) == BATCH
    assert _errors(case, solutions).min(axis=1).max() < 1e-4


def test_nothing_in_a_gradient_that_is_noise() -> None:
    case = _case("sigmoid")
    generator = np.random.default_rng(5)
    noise = [generator.standard_normal(gradient.shape) for gradient in case.layers.kernel_gradients]
    offsets = [
        generator.standard_normal(len(gradient)) for gradient in case.layers.bias_gradients if gradient is not None
    ]
    layers = DenseLayers(
        case.layers.kernels, case.layers.biases, tuple(noise), tuple(offsets), ("sigmoid",), np.dtype("float32")
    )
    assert search_smooth(layers, 0, _space(layers), BATCH, 0) == []


def test_nothing_where_the_activation_is_another() -> None:
    case = _case("sigmoid")
    layers = DenseLayers(
        case.layers.kernels,
        case.layers.biases,
        case.layers.kernel_gradients,
        case.layers.bias_gradients,
        ("gelu",),
        case.layers.dtype,
    )
    assert search_smooth(layers, 0, case.space, BATCH, 0) == []


def test_noise_is_within_the_deviations() -> None:
    case = _case("gelu", noise=1e-4)
    solutions = search_smooth(case.layers, 0, case.space, BATCH, 0)
    errors = _errors(case, solutions)
    assert len(solutions) == BATCH
    assert np.max(errors.min(axis=0) / [one.deviation for one in solutions]) < 4
