"""Pooling in a chain of layers: values and gradients against NumPy; images through it, and where none can be known."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import data

from softinv_jax.convolution import Padding, average_pool, max_pool
from softinv_jax.images.determinacy import count_equations, is_determined
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import (
    Activation,
    Chain,
    Convolution,
    Dense,
    Flatten,
    Pool,
    apply_chain,
    chain_inputs,
    check_chain,
)
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.labels.verdicts import Verdict

NONE: Padding = ((0, 0), (0, 0))
GEOMETRIES = [
    ((8, 8), (2, 2), (2, 2), NONE),
    ((7, 9), (3, 2), (2, 1), NONE),  # rows in no window
    ((6, 5), (3, 3), (2, 2), ((1, 1), (1, 0))),
    ((4, 4), (4, 4), (4, 4), NONE),
]


def by_hand(images: np.ndarray, size: Any, strides: Any, padding: Padding, kind: str) -> np.ndarray:
    fill = -np.inf if kind == "max" else 0.0
    bordered = np.pad(images, ((0, 0), *padding, (0, 0)), constant_values=fill)
    sizes = [(bordered.shape[axis + 1] - size[axis]) // strides[axis] + 1 for axis in range(2)]
    found = np.empty((len(images), *sizes, images.shape[-1]))
    for row, column in itertools.product(*map(range, sizes)):
        top, left = row * strides[0], column * strides[1]
        window = bordered[:, top : top + size[0], left : left + size[1]]
        found[:, row, column] = window.max(axis=(1, 2)) if kind == "max" else window.mean(axis=(1, 2))
    return found


@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize(("side", "size", "strides", "padding"), GEOMETRIES)
def test_pooling_is_what_it_says(side: Any, size: Any, strides: Any, padding: Padding, kind: str) -> None:
    images = np.random.default_rng(0).normal(size=(2, *side, 3)).astype(np.float32)
    chain = (Pool(kind, size, strides, padding), Flatten(), Dense("head"))
    expected = by_hand(images, size, strides, padding, kind)
    pool = jax.jit({"max": max_pool, "average": average_pool}[kind], static_argnums=(1, 2, 3))
    np.testing.assert_allclose(pool(images, size, strides, padding), expected, atol=1e-6)
    head = {"head": {"kernel": np.zeros((expected[0].size, 3), np.float32)}}
    assert chain_inputs(chain, head, (*side, 3))[1] == expected.shape[1:]


def test_of_equal_values_the_first_has_the_gradient() -> None:
    """As PyTorch's: shared, the gradient of a flat image would be another one."""
    slopes = jax.jit(jax.grad(lambda image: jnp.sum(max_pool(image, (2, 2), (2, 2), NONE))))(jnp.ones((4, 4, 1)))
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(slopes[..., 0], expected)


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ((Flatten(), Pool("max", (2, 2), (2, 2)), Dense("head")), "after Flatten"),
        ((Pool("max", (2, 2), (0, 2)), Flatten(), Dense("head")), "strides"),
        ((Pool("median", (2, 2), (2, 2)), Flatten(), Dense("head")), "median"),  # type: ignore[arg-type]
        ((Pool("max", (2, 2), (2, 2), ((2, 0), (0, 0))), Flatten(), Dense("head")), "padding"),
    ],
)
def test_pooling_that_cannot_be(chain: Chain, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_chain(chain)


def test_windows_larger_than_the_image() -> None:
    chain = (Pool("max", (5, 5), (5, 5)), Flatten(), Dense("head"))
    with pytest.raises(ValueError, match=r"\(4, 4, 1\)"):
        chain_inputs(chain, {"head": {"kernel": np.zeros((1, 2))}}, (4, 4, 1))


SHAPE, CLASSES = (8, 8, 1), 8


def network(kind: str, activation: str, channels: int) -> tuple[Chain, dict[str, Any]]:
    """Convolution, pooling, convolution, two dense layers."""
    chain = (
        *(Convolution("conv1", (1, 1), ((1, 1), (1, 1))), Activation(activation), Pool(kind, (2, 2), (2, 2))),
        *(Convolution("conv2", (1, 1), ((1, 1), (1, 1))), Activation(activation), Flatten()),
        *(Dense("dense"), Activation(activation), Dense("head")),
    )
    rng = np.random.default_rng(3)

    def layer(*shape: int) -> dict[str, np.ndarray]:
        reach = 1.5 / np.sqrt(np.prod(shape[:-1]))
        kernel = rng.uniform(-reach, reach, shape).astype(np.float32)
        return {"kernel": kernel, "bias": rng.uniform(-reach, reach, shape[-1]).astype(np.float32)}

    sizes = {"conv1": (3, 3, 1, channels), "conv2": (3, 3, channels, 6), "dense": (96, 24), "head": (24, CLASSES)}
    return chain, {name: layer(*shape) for name, shape in sizes.items()}


def example() -> tuple[np.ndarray, np.ndarray]:
    image = data.camera()[100:180:10, 200:280:10, None] / 127.5 - 1
    return image.astype(np.float32), (0.8 * np.eye(CLASSES)[2] + 0.2 / CLASSES).astype(np.float32)


def gradient_of(chain: Chain, parameters: Any) -> Any:
    image, label = example()

    def loss(held: Any) -> jax.Array:
        return -jnp.sum(label * jax.nn.log_softmax(apply_chain(chain, held, image)))

    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], jax.jit(jax.grad(loss))(parameters))


def test_an_image_through_average_pooling_is_exact() -> None:
    chain, parameters = network("average", "tanh", 6)
    assert not all(count.determined for count in count_equations(chain, parameters, SHAPE))
    assert is_determined(chain, parameters, SHAPE)
    found = invert(chain, parameters, gradient_of(chain, parameters), SHAPE)
    assert found.label_verdict[0, 0] == Verdict.UNIQUE
    assert found.verdict[0, 0] == ImageVerdict.EXACT
    error = np.sqrt(np.mean((found.images[0, 0] - example()[0]) ** 2))
    assert error < np.minimum(1e-3, 6 * found.expected_error[0, 0])


def test_rounded_parameters_are_noise_that_is_told() -> None:
    """Told, the image is known as well as it can be; not told, what is left of the equations contradicts it."""
    chain, parameters = network("average", "tanh", 6)
    gradient, spacing = gradient_of(chain, parameters), 1e-5
    rounded = jax.tree.map(lambda leaf: (np.round(leaf / spacing) * spacing).astype(np.float32), gradient)
    noise = jax.tree.map(lambda leaf: np.full(1, spacing / np.sqrt(12)), gradient)
    told = invert(chain, parameters, rounded, SHAPE, noise=noise)
    error = np.sqrt(np.mean((told.images[0, 0] - example()[0]) ** 2))
    assert told.verdict[0, 0] >= ImageVerdict.APPROXIMATE
    assert error < 6 * told.expected_error[0, 0]
    assert invert(chain, parameters, rounded, SHAPE).verdict[0, 0] == ImageVerdict.INCONSISTENT


def test_labels_are_told_where_no_image_can_be() -> None:
    chain, parameters = network("max", "relu", 1)
    parameters["conv2"]["kernel"] = parameters["conv2"]["kernel"][..., :2]
    parameters["conv2"]["bias"] = parameters["conv2"]["bias"][:2]
    parameters["dense"]["kernel"] = parameters["dense"]["kernel"][:32]
    assert not is_determined(chain, parameters, SHAPE)
    found = invert(chain, parameters, gradient_of(chain, parameters), SHAPE)
    assert found.label_verdict[0, 0] == Verdict.UNIQUE
    np.testing.assert_allclose(found.labels[0, 0], example()[1], atol=1e-4)
    assert found.verdict[0, 0] == ImageVerdict.UNDETERMINED
    assert np.all(np.isnan(found.images))
