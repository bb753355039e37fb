"""Images through ReLU and max-pooling, whose gates nobody tells: exact where the layers are wide enough."""

from typing import Any

import jax
import numpy as np
import pytest
from skimage import data

from softinv_jax.images.gated_layers import are_gated
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import Activation, Chain, Convolution, Dense, Flatten, Pool, apply_chain
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.labels.verdicts import Verdict

SIDE, CLASSES = 16, 6
PAD = ((2, 2), (2, 2))
RELU, POOL = Activation("relu"), Pool("max", (2, 2), (2, 2))


def network(pool_first: bool, seed: int) -> tuple[Chain, dict[str, Any]]:
    """As the CNN of McMahan et al. (2017), small; PyTorch's initial weights."""
    gates = (POOL, RELU) if pool_first else (RELU, POOL)
    chain = (
        *(Convolution("conv1", (1, 1), PAD), *gates, Convolution("conv2", (1, 1), PAD), *gates),
        *(Flatten(), Dense("dense"), RELU, Dense("head")),
    )
    rng = np.random.default_rng(seed)

    def layer(*shape: int) -> dict[str, np.ndarray]:
        reach = 1 / np.sqrt(np.prod(shape[:-1]))
        return {
            "kernel": rng.uniform(-reach, reach, shape).astype(np.float32),
            "bias": rng.uniform(-reach, reach, shape[-1]).astype(np.float32),
        }

    shapes = {"conv1": (5, 5, 1, 24), "conv2": (5, 5, 24, 48), "dense": (768, 48), "head": (48, CLASSES)}
    return chain, {name: layer(*shape) for name, shape in shapes.items()}


def photograph() -> np.ndarray:
    return (data.camera()[:240:15, 200:440:15, None] / 127.5 - 1).astype(np.float32)


def gradient_of(chain: Chain, parameters: Any) -> Any:
    def loss(held: Any) -> jax.Array:
        return -jax.nn.log_softmax(apply_chain(chain, held, photograph()))[1]

    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], jax.jit(jax.grad(loss))(parameters))


def test_an_image_comes_back_through_gates() -> None:
    """ReLU after the pooling; the other order is the test below."""
    chain, parameters = network(True, 1)
    found = invert(chain, parameters, gradient_of(chain, parameters), (SIDE, SIDE, 1))
    assert found.label_verdict[0, 0] == Verdict.UNIQUE
    assert found.verdict[0, 0] == ImageVerdict.EXACT
    error = np.sqrt(np.mean((found.images[0, 0] - photograph()) ** 2))
    assert error < np.minimum(1e-4, 6 * found.expected_error[0, 0] + 1e-6)


def test_another_gradient_is_not_called_exact() -> None:
    """A little of the truth changed, as by a defence: the gates may be right, the equations are not met."""
    chain, parameters = network(False, 1)
    gradient = gradient_of(chain, parameters)
    kernel = gradient["conv1"]["kernel"]
    noise = np.random.default_rng(0).standard_normal(kernel.shape)
    gradient["conv1"]["kernel"] = kernel * (1 + 1e-2 * noise).astype(np.float32)
    assert np.all(invert(chain, parameters, gradient, (SIDE, SIDE, 1)).verdict == ImageVerdict.INCONSISTENT)


@pytest.mark.parametrize(
    ("layers", "gated"),
    [
        ((Convolution("a"), RELU, POOL), True),
        ((Convolution("a"), Convolution("b"), POOL), True),
        ((Convolution("a"), Activation("sigmoid"), POOL), False),
        ((Convolution("a"), RELU, Pool("average", (2, 2), (2, 2))), False),
        ((POOL, Convolution("a"), RELU), False),
        ((Convolution("a"),), False),
    ],
)
def test_which_layers_are_gated(layers: Chain, gated: bool) -> None:
    assert are_gated(layers) == gated
