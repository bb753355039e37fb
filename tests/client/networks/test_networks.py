"""The networks against the same computation in NumPy, and their initialisations against their bounds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from softinv_jax.client.networks import (
    FCN4,
    LeNet,
    PatchConvolution,
    apply_function,
    initialise,
    initialise_fan_in,
    initialise_uniform,
)


def convolve(image: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """Convolution with two zeros on each side, by its definition."""
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    rows, columns = (-(-size // stride) for size in image.shape[:2])
    result = np.empty((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = padded[i * stride : i * stride + 5, j * stride : j * stride + 5]
            result[i, j] = np.einsum("abc,abck->k", patch, kernel) + bias
    return result


def lenet_features(parameters: dict, image: np.ndarray) -> np.ndarray:
    hidden = np.asarray(image, np.float64)
    for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
        layer = {key: np.asarray(value, np.float64) for key, value in parameters[name].items()}
        hidden = 1 / (1 + np.exp(-convolve(hidden, layer["kernel"], layer["bias"], stride)))
    return hidden.reshape(-1)


@pytest.mark.parametrize("shape", [(32, 32, 3), (15, 18, 1)])
def test_lenet_is_its_definition(shape) -> None:
    network = LeNet(10)
    parameters = initialise(network, jax.random.key(0), shape)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = lenet_features(parameters, image)
    compiled = jax.jit(partial(network.apply, method="logits_and_features"))
    logits, features = compiled({"params": parameters}, image)
    # Float32 sums over 300 terms, and over all features.
    np.testing.assert_allclose(features, expected, atol=3e-6)
    kernel = np.asarray(parameters["head"]["kernel"], np.float64)
    np.testing.assert_allclose(logits, expected @ kernel, atol=1e-4)


def test_lenet_has_the_papers_shapes() -> None:
    parameters = initialise(LeNet(10), jax.random.key(0), (32, 32, 3))
    assert jax.tree.map(jnp.shape, parameters) == {
        "conv1": {"kernel": (5, 5, 3, 12), "bias": (12,)},
        "conv2": {"kernel": (5, 5, 12, 12), "bias": (12,)},
        "conv3": {"kernel": (5, 5, 12, 12), "bias": (12,)},
        "head": {"kernel": (768, 10)},
    }


def test_fcn4_is_its_definition() -> None:
    network = FCN4(5, head_bias=True)
    parameters = initialise(network, jax.random.key(0), (4, 4, 3))
    assert sorted(parameters) == ["dense1", "dense2", "dense3", "head"]
    assert sorted(parameters["head"]) == ["bias", "kernel"]
    image = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    hidden = image.reshape(-1).astype(np.float64)
    for name, width in (("dense1", 4096), ("dense2", 1024), ("dense3", 256)):
        assert list(parameters[name]) == ["kernel"]
        hidden = np.maximum(hidden @ np.asarray(parameters[name]["kernel"], np.float64), 0)
        assert hidden.shape == (width,)
    features = network.apply({"params": parameters}, image, method="features")
    np.testing.assert_allclose(features, hidden, atol=1e-6)
    head = {key: np.asarray(value, np.float64) for key, value in parameters["head"].items()}
    logits = network.apply({"params": parameters}, image)
    np.testing.assert_allclose(logits, hidden @ head["kernel"] + head["bias"], atol=1e-6)


@pytest.mark.parametrize("network", [LeNet(10), LeNet(3, head_bias=True), FCN4(10)])
def test_single_batched_and_vmapped_agree(network) -> None:
    parameters = initialise(network, jax.random.key(0), (8, 8, 3))
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    function = jax.jit(apply_function(network))
    batched = function(parameters, images)
    assert batched.shape == (3, network.number_of_classes)
    np.testing.assert_allclose(function(parameters, images[1]), batched[1], atol=1e-5)
    mapped = jax.jit(jax.vmap(function, in_axes=(None, 0)))(parameters, images)
    np.testing.assert_allclose(mapped, batched, atol=1e-5)


@pytest.mark.parametrize(("size", "stride", "padding"), [(5, 2, 2), (3, 1, 0), (4, 3, 1)])
def test_patch_convolution_has_the_parameters_and_values_of_linen_conv(size, stride, padding) -> None:
    images = jax.random.normal(jax.random.key(0), (2, 11, 14, 3))
    patches = PatchConvolution(channels=4, size=size, stride=stride, padding=padding)
    pads = ((padding, padding), (padding, padding))
    linen = nn.Conv(4, (size, size), strides=(stride, stride), padding=pads, precision="highest")
    variables = linen.init(jax.random.key(1), images)
    np.testing.assert_allclose(patches.apply(variables, images), linen.apply(variables, images), atol=5e-6)


def test_equal_networks_share_one_function() -> None:
    assert apply_function(LeNet(10)) is apply_function(LeNet(10))
    assert apply_function(LeNet(10)) is not apply_function(LeNet(11))


def test_initialisations_fill_their_bounds() -> None:
    key, shape = jax.random.key(0), (32, 32, 3)
    for leaf in jax.tree.leaves(initialise(LeNet(10), key, shape)):
        assert float(jnp.max(jnp.abs(leaf))) <= 0.5
    head = initialise(LeNet(10), key, shape)["head"]["kernel"]
    assert float(jnp.max(head)) > 0.499
    # Variance of U(-b, b) is b^2 / 3.
    np.testing.assert_allclose(float(jnp.var(head)), 1 / 12, rtol=0.05)
    kernel = initialise_fan_in(LeNet(10), key, shape)["conv2"]["kernel"]
    np.testing.assert_allclose(float(jnp.max(kernel)), 1 / np.sqrt(300), rtol=0.01)
    dense = initialise(FCN4(10), key, (8, 8, 3))["dense1"]["kernel"]
    np.testing.assert_allclose(float(jnp.max(-dense)), 1 / np.sqrt(192), rtol=0.01)
    wide = initialise_uniform(LeNet(10), key, shape, bound=2.0)["head"]["kernel"]
    np.testing.assert_allclose(wide, 4 * head, rtol=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"image_shape=\(32, 32\)"):
        initialise(LeNet(10), jax.random.key(0), (32, 32))
    with pytest.raises(ValueError, match=r"bound=0"):
        initialise_uniform(LeNet(10), jax.random.key(0), (32, 32, 3), bound=0)
    parameters = initialise(LeNet(10), jax.random.key(0), (8, 8, 3))
    with pytest.raises(ValueError, match=r"got \(8, 8\)"):
        apply_function(LeNet(10))(parameters, jnp.zeros((8, 8)))
