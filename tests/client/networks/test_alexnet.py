"""AlexNet against its definition in NumPy, and against torchvision's published size and shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client.networks import AlexNet, apply_function, initialise
from softinv_jax.client.networks.layers import adaptive_average_pool

THIN = AlexNet(10, width=4, hidden=24)


def average_cells(image: np.ndarray, size: int) -> np.ndarray:
    """PyTorch's AdaptiveAvgPool2d: cell i covers floor(i n / size) up to ceil((i + 1) n / size)."""
    height, width, channels = image.shape
    result = np.empty((size, size, channels))
    for i in range(size):
        for j in range(size):
            rows = slice(int(np.floor(i * height / size)), int(np.ceil((i + 1) * height / size)))
            columns = slice(int(np.floor(j * width / size)), int(np.ceil((j + 1) * width / size)))
            result[i, j] = image[rows, columns].mean(axis=(0, 1))
    return result


def test_torchvisions_number_of_parameters() -> None:
    variables = jax.eval_shape(AlexNet(1000).init, jax.random.key(0), jnp.zeros((224, 224, 3)))
    # torchvision's head has a bias.
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 61_100_840 - 1000
    assert variables["params"]["head"]["kernel"].shape == (4096, 1000)
    assert list(variables["params"]["head"]) == ["kernel"]


def test_torchvisions_shapes() -> None:
    run = partial(AlexNet(10).init_with_output, method="convolution_outputs")
    outputs, _ = jax.eval_shape(run, jax.random.key(0), jnp.zeros((224, 224, 3)))
    assert [output.shape for output in outputs] == [
        (55, 55, 64),
        (27, 27, 192),
        (13, 13, 384),
        (13, 13, 256),
        (13, 13, 256),
    ]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (7, 6), (13, 20), (6, 6)])
def test_adaptive_average_pool_is_its_definition(shape) -> None:
    image = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
    expected = average_cells(image, 6)
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(image), 6), expected, atol=1e-6)
    batch = adaptive_average_pool(jnp.asarray(np.stack([0 * image, image])), 6)
    np.testing.assert_allclose(batch[1], expected, atol=1e-6)


# The last pooling leaves 1x3, 7x6 and 6x6.
@pytest.mark.parametrize("shape", [(67, 131, 3), (260, 230, 3), (224, 224, 1)])
def test_alexnet_is_its_definition(shape, naive, quick_jit) -> None:
    parameters = initialise(THIN, jax.random.key(0), shape)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    hidden = image.astype(np.float64)
    for name, stride, padding, pooled in (
        ("conv1", 4, 2, True),
        ("conv2", 1, 2, True),
        ("conv3", 1, 1, False),
        ("conv4", 1, 1, False),
        ("conv5", 1, 1, True),
    ):
        hidden = np.maximum(naive.convolve(hidden, parameters[name], stride, padding), 0)
        hidden = naive.max_pool(hidden) if pooled else hidden
    hidden = average_cells(hidden, 6).reshape(-1)
    for name in ("dense1", "dense2"):
        kernel, bias = (np.asarray(parameters[name][part], np.float64) for part in ("kernel", "bias"))
        hidden = np.maximum(hidden @ kernel + bias, 0)
    logits, features = quick_jit(partial(THIN.apply, method="logits_and_features"))({"params": parameters}, image)
    assert features.max() > 0.01
    np.testing.assert_allclose(features, hidden, atol=1e-6)
    np.testing.assert_allclose(logits, hidden @ np.asarray(parameters["head"]["kernel"], np.float64), atol=1e-6)


def test_single_and_batched_agree(quick_jit) -> None:
    images = jax.random.normal(jax.random.key(1), (2, 63, 70, 3))
    parameters = initialise(THIN, jax.random.key(0), (63, 70, 3))
    function = quick_jit(apply_function(THIN))
    np.testing.assert_allclose(function(parameters, images[1]), function(parameters, images)[1], atol=1e-6)


def test_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 63 pixels, got \(224, 62, 3\)"):
        initialise(THIN, jax.random.key(0), (224, 62, 3))
