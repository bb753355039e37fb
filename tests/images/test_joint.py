"""Images that no layer by itself determines: all layers together do, and where they do not, nothing says they did."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from skimage import data

from softinv_jax.images.determinacy import count_equations, determined_together
from softinv_jax.images.inversion import invert
from softinv_jax.images.joint import (
    JointInversion,
    from_head,
    invert_jointly,
    judge_joint,
)
from softinv_jax.images.layer_chain import Activation, Chain, Convolution, Dense, Flatten, apply_chain
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.labels.verdicts import Verdict

SHAPE, CLASSES = (8, 8, 2), 12
PAD = ((1, 1), (1, 1))


def chain_of(activation: str) -> Chain:
    return (
        Convolution("conv1", (1, 1), PAD),
        Activation(activation),
        Convolution("conv2", (2, 2), PAD),
        Activation(activation),
        Flatten(),
        Dense("head"),
    )


def make_parameters(channels: int, width: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        reach = 1 / np.sqrt(np.prod(shape[:-1]))
        return rng.uniform(-reach, reach, shape).astype(np.float32)

    return {
        "conv1": {"kernel": draw(3, 3, 2, channels), "bias": draw(1, channels)[0]},
        "conv2": {"kernel": draw(3, 3, channels, width), "bias": draw(1, width)[0]},
        "head": {"kernel": draw(16 * width, CLASSES), "bias": draw(1, CLASSES)[0]},
    }


def photographs(count: int) -> np.ndarray:
    whole = data.astronaut()[:, :, :2] / 255.0
    crops = np.stack([whole[60 + 40 * n : 140 + 40 * n : 10, 200:280:10] for n in range(count)])
    return ((crops - crops.mean()) / crops.std()).astype(np.float32)


def labels_of(count: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    hard = np.eye(CLASSES)[rng.permutation(CLASSES)[: 2 * count]]
    return (0.7 * hard[:count] + 0.3 * hard[count:]).astype(np.float32)


def gradient_of(chain: Chain, parameters: Any, images: np.ndarray, labels: np.ndarray) -> Any:
    def loss(held: Any) -> jax.Array:
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(apply_chain(chain, held, images)), axis=-1))

    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], jax.jit(jax.grad(loss))(parameters))


def errors(found: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Of each image found, its distance from the nearest of the true ones."""
    distances = np.sqrt(np.mean((found[:, None] - images[None]) ** 2, axis=(2, 3, 4)))
    assert sorted(distances.argmin(axis=1)) == list(range(len(images)))
    return distances.min(axis=1)


def determined(chain: Chain, parameters: Any, examples: int) -> bool:
    return all(count.determined for count in count_equations(chain, parameters, SHAPE, examples))


def jointly(chain: Chain, parameters: Any, images: np.ndarray, gradient: Any) -> JointInversion:
    """With the features told, which the head gives: the layers before it are what is tried."""
    features = np.asarray(jax.jit(lambda: apply_chain(chain[:-1], parameters, images))())
    own = jax.tree.map(lambda leaf: leaf[0], gradient)
    return invert_jointly(from_head(chain, parameters, own, features, SHAPE))


def verdicts_of(found: JointInversion) -> list[ImageVerdict]:
    roundoff = float(np.finfo(np.float32).eps)
    return [
        judge_joint(found, float(error), image, roundoff)
        for error, image in zip(found.error, found.images, strict=True)
    ]


def test_two_images_of_which_no_layer_has_equations_enough() -> None:
    chain, parameters, images = chain_of("sigmoid"), make_parameters(10, 8), photographs(2)
    assert not determined(chain, parameters, 2)
    found = invert(chain, parameters, gradient_of(chain, parameters, images, labels_of(2)), SHAPE, batch_size=2)
    assert np.all(found.label_verdict == Verdict.UNIQUE)
    assert np.all(found.verdict == ImageVerdict.EXACT)
    wrong = errors(found.images[0], images)
    assert np.all(wrong < 1e-4)
    # One draw over 128 entries that hang together: a factor of 6 is beyond what it can be off by.
    assert np.all(wrong < 6 * found.expected_error[0])


def test_gelu_which_cannot_be_undone() -> None:
    chain, parameters, images = chain_of("gelu"), make_parameters(12, 12), photographs(1)
    gradient = gradient_of(chain, parameters, images, labels_of(1))
    found = invert(chain, parameters, gradient, SHAPE)
    assert np.all(found.verdict == ImageVerdict.EXACT)
    assert np.all(errors(found.images[0], images) < np.minimum(1e-4, 6 * found.expected_error[0]))
    rng = np.random.default_rng(2)
    for layer in ("conv1", "conv2"):
        kernel = gradient[layer]["kernel"]
        gradient[layer]["kernel"] = kernel * (1 + 1e-3 * rng.standard_normal(kernel.shape)).astype(np.float32)
    noisy = invert(chain, parameters, gradient, SHAPE)
    assert np.all(noisy.verdict == ImageVerdict.INCONSISTENT)


def test_relu_cuts_off_less_than_is_feared() -> None:
    chain, parameters, images = chain_of("relu"), make_parameters(6, 24), photographs(1)
    assert not determined(chain, parameters, 1)
    found = jointly(chain, parameters, images, gradient_of(chain, parameters, images, labels_of(1)))
    assert verdicts_of(found) == [ImageVerdict.EXACT]
    assert np.all(errors(found.images, images) < np.minimum(1e-4, 6 * found.error))


def test_layers_that_say_the_same_are_not_counted_on() -> None:
    """Enough equations by number, but the first layer's channels are copies of one."""
    chain, parameters, images = chain_of("sigmoid"), make_parameters(10, 8), photographs(2)
    copies = np.zeros(10, int)
    parameters["conv1"] = {part: array[..., copies] for part, array in parameters["conv1"].items()}
    parameters["conv2"]["kernel"] = parameters["conv2"]["kernel"][:, :, copies]
    assert determined_together(chain, parameters, SHAPE, 2, len(chain) - 1)
    found = jointly(chain, parameters, images, gradient_of(chain, parameters, images, labels_of(2)))
    assert np.all(errors(found.images, images) > 0.1)
    assert all(verdict < ImageVerdict.EXACT for verdict in verdicts_of(found))


def test_too_few_equations_are_undetermined() -> None:
    chain, parameters = chain_of("sigmoid"), make_parameters(4, 4)
    assert not determined_together(chain, parameters, SHAPE, 4, len(chain) - 1)
