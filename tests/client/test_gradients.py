"""Gradients against the closed form (p - y) x^T in NumPy float64, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from softinv_jax.client.gradients import (
    cross_entropy,
    last_layer_gradient,
    model_gradient,
    per_sample_last_layer_gradients,
    per_sample_model_gradients,
)
from softinv_jax.client.networks import LeNet, apply_function, initialise

# Float32 arithmetic on values of order one.
TOLERANCE = 2e-6


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def layer() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "weight": generator.uniform(-0.5, 0.5, (6, 9)),
        "bias": generator.normal(size=6),
        "features": generator.uniform(size=(5, 9)),
        "labels": generator.dirichlet(np.ones(6), 5),
    }


def closed_form(layer: dict[str, np.ndarray], with_bias: bool) -> tuple[np.ndarray, np.ndarray]:
    logits = layer["features"] @ layer["weight"].T + with_bias * layer["bias"]
    error = softmax(logits) - layer["labels"]
    return np.einsum("nc,nd->ncd", error, layer["features"]), error


def test_cross_entropy_is_its_definition(layer) -> None:
    logits, label = layer["bias"] * 30, layer["labels"][0]
    expected = -np.sum(label * (logits - np.log(np.sum(np.exp(logits)))))
    np.testing.assert_allclose(cross_entropy(np.float32(logits), np.float32(label)), expected, rtol=1e-6)


def test_cross_entropy_stays_finite_for_large_logits() -> None:
    assert float(cross_entropy(np.float32([1e4, 0.0]), np.float32([0.0, 1.0]))) == 1e4


@pytest.mark.parametrize("with_bias", [False, True])
def test_last_layer_gradient_is_the_closed_form(layer, with_bias) -> None:
    weight_gradients, errors = closed_form(layer, with_bias)
    single = {name: np.float32(value) for name, value in layer.items()}
    bias = single["bias"] if with_bias else None
    gradient = last_layer_gradient(single["weight"], single["features"][2], single["labels"][2], bias)
    np.testing.assert_allclose(gradient.weight, weight_gradients[2], atol=TOLERANCE)
    many = per_sample_last_layer_gradients(single["weight"], single["features"], single["labels"], bias)
    np.testing.assert_allclose(many.weight, weight_gradients, atol=TOLERANCE)
    if with_bias:
        np.testing.assert_allclose(gradient.bias, errors[2], atol=TOLERANCE)
        np.testing.assert_allclose(many.bias, errors, atol=TOLERANCE)
    else:
        assert gradient.bias is None
        assert many.bias is None


def test_last_layer_gradient_reaches_float64(layer) -> None:
    expected, _ = closed_form(layer, with_bias=True)
    with jax.enable_x64(True):
        gradient = last_layer_gradient(layer["weight"], layer["features"][0], layer["labels"][0], layer["bias"])
        assert gradient.weight.dtype == jnp.float64
    np.testing.assert_allclose(gradient.weight, expected[0], atol=1e-15)


def test_gradients_agree_with_finite_differences(layer) -> None:
    with jax.enable_x64(True):
        feature, label = jnp.asarray(layer["features"][0]), jnp.asarray(layer["labels"][0])

        def loss(weight: jax.Array) -> jax.Array:
            return cross_entropy(weight @ feature, label)

        check_grads(loss, (jnp.asarray(layer["weight"]),), order=2)


def test_model_gradient_of_a_network_ends_in_its_last_layer_gradient() -> None:
    network = LeNet(6)
    parameters = initialise(network, jax.random.key(0), (12, 12, 3))
    images = jax.random.normal(jax.random.key(1), (3, 12, 12, 3))
    labels = np.float32(np.random.default_rng(2).dirichlet(np.ones(6), 3))
    gradients = per_sample_model_gradients(apply_function(network), parameters, images, labels)
    features = jax.jit(lambda batch: network.apply({"params": parameters}, batch, method="features"))(images)
    head = per_sample_last_layer_gradients(parameters["head"]["kernel"].T, features, labels)
    np.testing.assert_allclose(np.swapaxes(gradients["head"]["kernel"], 1, 2), head.weight, atol=1e-5, rtol=1e-5)
    compiled = jax.jit(model_gradient, static_argnums=0)
    one = compiled(apply_function(network), parameters, images[1], labels[1])
    jax.tree.map(lambda many, single: np.testing.assert_allclose(many[1], single, atol=1e-5), gradients, one)


def test_model_gradient_agrees_with_finite_differences() -> None:
    network = LeNet(4)
    image = np.random.default_rng(3).normal(size=(8, 8, 1))
    label = np.array([0.1, 0.2, 0.3, 0.4])
    with jax.enable_x64(True):
        single = initialise(network, jax.random.key(0), (8, 8, 1))
        parameters = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), single)
        function = jax.jit(apply_function(network))
        gradient = jax.jit(model_gradient, static_argnums=0)(function, parameters, image, label)
        direction = jax.tree.map(
            lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape)), parameters
        )

        def along(step: float) -> jax.Array:
            moved = jax.tree.map(lambda leaf, way: leaf + step * way, parameters, direction)
            return cross_entropy(function(moved, jnp.asarray(image)), label)

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        products = jax.tree.map(lambda left, right: jnp.sum(left * right), gradient, direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-7)


def test_per_sample_gradients_compile_once_for_one_model() -> None:
    traces = []

    def linear(parameters: jax.Array, image: jax.Array) -> jax.Array:
        traces.append(1)
        return parameters @ image.reshape(-1)

    parameters, labels = jnp.ones((3, 4)), jnp.ones((2, 3)) / 3
    for seed in range(3):
        images = jax.random.normal(jax.random.key(seed), (2, 2, 2, 1))
        per_sample_model_gradients(linear, parameters, images, labels)
    assert len(traces) == 1


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        cross_entropy(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="transpose"):
        last_layer_gradient(np.zeros((9, 6)), np.zeros(9), np.zeros(6))
    with pytest.raises(ValueError, match=r"Expected bias \(6,\)"):
        last_layer_gradient(np.zeros((6, 9)), np.zeros(9), np.zeros(6), np.zeros(9))
