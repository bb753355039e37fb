"""Images from gradients: real photographs, other networks, and honest verdicts where the images are not there."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client import (
    LeNet,
    apply_function,
    initialise,
    load_photographs,
    per_sample_model_gradients,
)
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import (
    Activation,
    Chain,
    Convolution,
    Dense,
    Flatten,
    apply_chain,
    chain_inputs,
    fcn_chain,
    lenet_chain,
)
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict, image_verdict_names
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.measures.image_quality import match_images, peak_signal_to_noise_ratio

CLASSES = 10
HARD, SMOOTHED, MIXED = (
    np.eye(CLASSES)[2],
    0.03 + 0.7 * np.eye(CLASSES)[5],
    np.array([0, 0.3, 0, 0, 0, 0, 0, 0.7, 0, 0]),
)
LABELS = np.stack([HARD, SMOOTHED, MIXED]).astype(np.float32)


class Client(NamedTuple):
    """Photographs (N, H, W, channels), normalised, and what their client uploads; `restore` undoes the former."""

    chain: Chain
    parameters: Any
    images: np.ndarray
    labels: np.ndarray
    gradients: Any
    restore: Callable[[np.ndarray], np.ndarray]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]  # type: ignore[return-value]

    def invert(self, gradients: Any = None, **options: Any) -> ImageRecovery:
        return invert(self.chain, self.parameters, gradients or self.gradients, self.image_shape, **options)


def photographs(height: int, width: int) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Three photographs, normalised, and how to get back to the scale [0, 1]."""
    dataset = load_photographs(per_class=1, image_size=max(height, width))
    images = np.asarray(dataset.normalised())[: len(LABELS), :height, :width]
    return images, lambda values: np.asarray(dataset.denormalise(values))


def draw_parameters(names: dict[str, tuple[int, ...]], *, bias: bool) -> Any:
    """Uniform to 1 / sqrt(fan-in), times the square root of 3, so that signals keep their size."""
    rng = np.random.default_rng(0)
    parameters = {}
    for name, shape in names.items():
        bound = np.sqrt(3 / np.prod(shape[:-1]))
        parameters[name] = {"kernel": rng.uniform(-bound, bound, shape).astype(np.float32)}
        if bias:
            parameters[name]["bias"] = rng.uniform(-0.5, 0.5, shape[-1:]).astype(np.float32)
    return parameters


@lru_cache
def apply_of(chain: Chain) -> Callable[[Any, jax.Array], jax.Array]:
    return partial(apply_chain, chain)


def make_client(chain: Chain, size: tuple[int, int], shapes: dict[str, tuple[int, ...]], *, bias: bool) -> Client:
    images, restore = photographs(*size)
    parameters = draw_parameters(shapes, bias=bias)
    gradients = jax.device_get(per_sample_model_gradients(apply_of(chain), parameters, images, LABELS))
    return Client(chain, parameters, images, LABELS, gradients, restore)


FCN_SHAPES = {"dense1": (192, 128), "dense2": (128, 64), "dense3": (64, 32), "head": (32, CLASSES)}
# 12x10 rows and columns, kernels 3x2, strides (1, 2): first to 12x6, then to 11x4.
ODD_CHAIN = (
    Convolution("block/conv1", (1, 2), ((2, 0), (1, 1))),
    Activation("tanh"),
    Convolution("block/conv2", (1, 2), ((0, 1), (1, 2))),
    Activation("leaky_relu"),
    Flatten(),
    Dense("dense"),
    Activation("tanh"),
    Dense("head"),
)


def make_odd_client() -> Client:
    shapes = {"conv1": (3, 2, 3, 16), "conv2": (3, 2, 16, 24), "dense": (11 * 4 * 24, 32), "head": (32, CLASSES)}
    drawn = draw_parameters(shapes, bias=True)
    parameters = {"block": {name: drawn.pop(name) for name in ("conv1", "conv2")}} | drawn
    images, restore = photographs(12, 10)
    gradients = jax.device_get(per_sample_model_gradients(apply_of(ODD_CHAIN), parameters, images, LABELS))
    return Client(ODD_CHAIN, parameters, images, LABELS, gradients, restore)


@pytest.fixture(scope="module")
def fcn() -> Client:
    return make_client(fcn_chain(3), (8, 8), FCN_SHAPES, bias=False)


@pytest.fixture(scope="module")
def small_convolution() -> Client:
    """One convolution with sigmoid on 8x8 images: quickly compiled."""
    chain = (Convolution("conv", (2, 2), ((1, 1), (1, 1))), Activation("sigmoid"), Flatten(), Dense("head"))
    return make_client(chain, (8, 8), {"conv": (3, 3, 3, 12), "head": (4 * 4 * 12, CLASSES)}, bias=True)


def errors(client: Client, found: ImageRecovery) -> np.ndarray:
    """(N,) root mean square."""
    return np.sqrt(np.mean((found.images[:, 0] - client.images) ** 2, axis=(1, 2, 3)))


def check_exact(client: Client, found: ImageRecovery, decibels: float = 60.0) -> None:
    assert image_verdict_names(found.verdict).tolist() == [["exact"]] * len(client.images)
    quality = peak_signal_to_noise_ratio(client.restore(found.images[:, 0]), client.restore(client.images))
    assert np.all(quality > decibels), quality
    np.testing.assert_allclose(found.labels[:, 0], client.labels, atol=1e-3)
    ratio = errors(client, found) / found.expected_error[:, 0]
    assert np.all((ratio > 1 / 30) & (ratio < 30)), ratio
    assert found.images.dtype == np.float32
    assert np.all(found.residual < 3e-4)
    layers = len(found.layers)
    assert found.condition.shape == found.misfit.shape == (len(client.images), layers)
    assert np.all(found.condition >= 0.99)


@pytest.fixture(scope="module")
def lenet() -> Client:
    network, (images, restore) = LeNet(CLASSES), photographs(32, 32)
    parameters = initialise(network, jax.random.key(0), (32, 32, 3))
    gradients = jax.device_get(per_sample_model_gradients(apply_function(network), parameters, images, LABELS))
    return Client(lenet_chain(), parameters, images, LABELS, gradients, restore)


def test_lenet_on_photographs(lenet: Client) -> None:
    """Untrained; hard, smoothed and mixed labels; and again with an unknown factor on all gradients."""
    done = []
    found = lenet.invert(progress=lambda *state: done.append(state))
    check_exact(lenet, found)
    assert found.layers == ("conv3", "conv2", "conv1")
    assert done[-1] == (3, 3)
    scaled = jax.tree.map(lambda leaf: np.float32(-0.037) * leaf, lenet.gradients)
    check_exact(lenet, lenet.invert(scaled, unknown_scale=True))


@pytest.mark.parametrize(("activation", "bias"), [("relu", False), ("tanh", True)])
def test_fully_connected(activation: str, bias: bool) -> None:
    client = make_client(fcn_chain(3, activation), (8, 8), FCN_SHAPES, bias=bias)
    found = client.invert()
    check_exact(client, found)
    assert found.layers == ("dense3", "dense2", "dense1")


def test_head_alone() -> None:
    """Softmax regression: the head's input is the image."""
    client = make_client((Flatten(), Dense("head")), (4, 4), {"head": (48, CLASSES)}, bias=False)
    found = client.invert()
    check_exact(client, found)
    assert found.layers == ()


def test_odd_shapes() -> None:
    client = make_odd_client()
    assert chain_inputs(client.chain, client.parameters, (12, 10, 3))[5] == (11 * 4 * 24,)
    found = client.invert()
    check_exact(client, found)
    assert found.layers == ("dense", "block/conv2", "block/conv1")


def test_float64_gradients_give_more(small_convolution: Client) -> None:
    client = small_convolution
    single = client.invert()
    check_exact(client, single)
    with jax.enable_x64(True):
        parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), client.parameters)
        images, labels = np.asarray(client.images, np.float64), np.asarray(LABELS, np.float64)
        labels[1] /= labels[1].sum()
        gradients = jax.device_get(per_sample_model_gradients(apply_of(client.chain), parameters, images, labels))
    double = client._replace(parameters=parameters).invert(gradients)
    assert np.all(double.verdict == ImageVerdict.EXACT)
    assert np.all(double.expected_error < 1e-4 * single.expected_error)
    assert np.all(double.residual < 1e-6)
    # The images themselves are given in float32.
    assert np.all(errors(client, double) < 2e-7)
    assert np.all(errors(client, double) < errors(client, single))


def test_batch_of_two(fcn: Client) -> None:
    """A gradient of the mean loss of two examples."""

    @jax.jit
    @jax.grad
    def gradient(parameters: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply_chain(fcn.chain, parameters, images)
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))

    pairs = [[0, 1], [1, 2]]
    uploads = [jax.device_get(gradient(fcn.parameters, fcn.images[pair], fcn.labels[pair])) for pair in pairs]
    # The second with an unknown factor on all of it.
    stacked = jax.tree.map(lambda first, second: np.stack([first, np.float32(0.02) * second]), *uploads)
    found = fcn.invert(stacked, batch_size=2, unknown_scale=True)
    assert found.images.shape == (2, 2, 8, 8, 3)
    assert np.all(found.verdict == ImageVerdict.EXACT), image_verdict_names(found.verdict)
    for row, pair in enumerate(pairs):
        recovered, true = fcn.restore(found.images[row]), fcn.restore(fcn.images[pair])
        order = match_images(recovered, true)
        assert sorted(order) == [0, 1]
        assert np.all(peak_signal_to_noise_ratio(recovered[order], true) > 50)
        np.testing.assert_allclose(found.labels[row][order], fcn.labels[pair], atol=1e-2)


@pytest.mark.parametrize(
    ("convolution", "channels", "side"),
    [
        (Convolution("conv", (3, 3)), 64, 2),  # a row and a column of three are in no window
        (Convolution("conv", (2, 2), ((0, 0), (0, 0))), 2, 3),  # too few channels
    ],
)
def test_undetermined(convolution: Convolution, channels: int, side: int) -> None:
    """The image's gradient agrees, and yet it is one of many."""
    chain = (convolution, Activation("sigmoid"), Flatten(), Dense("head"))
    shapes = {"conv": (2, 2, 3, channels), "head": (side * side * channels, CLASSES)}
    client = make_client(chain, (6, 6), shapes, bias=True)
    found = client.invert()
    np.testing.assert_array_equal(found.verdict, ImageVerdict.UNDETERMINED)
    assert np.all(errors(client, found) > 0.05)


def test_gradients_of_another_model(small_convolution: Client) -> None:
    """The head is as it was, so that labels are found; the convolution is not."""
    changed = jax.tree.map(np.array, small_convolution.parameters)
    changed["conv"]["kernel"] *= np.float32(1.1)
    found = small_convolution._replace(parameters=changed).invert()
    assert np.all(found.label_verdict >= Verdict.AMBIGUOUS)
    np.testing.assert_array_equal(found.verdict, ImageVerdict.INCONSISTENT)


@pytest.mark.parametrize("noise", [1e-4, 1e-3])
def test_noise_is_not_exact(small_convolution: Client, noise: float) -> None:
    rng = np.random.default_rng(0)
    disturbed = jax.tree.map(
        lambda leaf: (leaf + noise * np.abs(leaf).max() * rng.normal(size=leaf.shape)).astype(np.float32),
        small_convolution.gradients,
    )
    assert not np.any(small_convolution.invert(disturbed).verdict == ImageVerdict.EXACT)


def test_bad_samples_do_not_spoil_the_others(lenet: Client) -> None:
    """A label that cannot be told, a zero gradient and one of another image's convolution, then a good one."""
    # LeNet's head has no bias, whose gradient would tell any label.
    dense = np.random.default_rng(0).dirichlet(np.ones(CLASSES)).astype(np.float32)
    labels = np.stack([dense, HARD, MIXED]).astype(np.float32)
    network = apply_function(LeNet(CLASSES))
    unknown = jax.device_get(per_sample_model_gradients(network, lenet.parameters, lenet.images, labels))
    good = lenet.gradients
    mixed = good | {"conv1": jax.tree.map(lambda leaf: leaf[[1, 0, 2]], good["conv1"])}
    sources = [(unknown, 0), (jax.tree.map(np.zeros_like, good), 0), (mixed, 0), (good, 1)]
    gradients = jax.tree.map(lambda *leaves: np.stack(leaves), *(jax.tree.map(lambda a: a[i], g) for g, i in sources))  # noqa: B023
    found = lenet.invert(gradients)
    assert image_verdict_names(found.verdict[:, 0]).tolist() == ["not_found", "not_found", "inconsistent", "exact"]
    for values in (found.images[:2], found.residual[:2], found.expected_error[:2], found.condition[:2]):
        assert np.all(np.isnan(values))
    np.testing.assert_allclose(found.images[3], lenet.invert().images[1], atol=1e-6)


def test_nothing_found_at_all(small_convolution: Client) -> None:
    found = small_convolution.invert(jax.tree.map(np.zeros_like, small_convolution.gradients))
    np.testing.assert_array_equal(found.verdict, ImageVerdict.NOT_FOUND)
    assert np.all(np.isnan(found.images))
    assert found.images.shape == (3, 1, 8, 8, 3)


def change(client: Client, name: str, part: str, function: Callable[[np.ndarray], np.ndarray]) -> Any:
    changed = {layer: dict(held) for layer, held in client.gradients.items()}
    changed[name][part] = function(np.array(changed[name][part]))
    return changed


def put_nan(array: np.ndarray) -> np.ndarray:
    array[(1,) * array.ndim] = np.nan
    return array


@pytest.mark.parametrize(
    ("name", "part", "function", "words"),
    [
        ("conv", "kernel", put_nan, ["conv/kernel", "not finite", "nan"]),
        ("conv", "bias", put_nan, ["conv/bias", "not finite"]),
        ("head", "kernel", put_nan, ["head/kernel", "not finite"]),
        ("conv", "kernel", lambda array: array[..., :-1], ["conv/kernel", "(3, 3, 3, 3, 11)", "(3, 3, 3, 12)"]),
        ("head", "kernel", lambda array: array[0], ["head/kernel", "(192, 10)"]),
        ("head", "kernel", lambda array: array[:0], ["head/kernel", "(0, 192, 10)"]),
        ("head", "kernel", lambda array: array[:2], ["head/kernel", "2", "3"]),
        ("conv", "kernel", lambda array: array.astype(np.int32), ["conv/kernel", "int32", "floating"]),
        ("conv", "scale", None, ["conv/scale"]),
    ],
)
def test_refuses_gradients(
    small_convolution: Client, name: str, part: str, function: Callable[[np.ndarray], np.ndarray], words: list[str]
) -> None:
    if function is None:
        changed = {layer: dict(held) for layer, held in small_convolution.gradients.items()}
        changed[name][part] = np.ones((3, 12), np.float32)
    else:
        changed = change(small_convolution, name, part, function)
    with pytest.raises(ValueError) as caught:
        small_convolution.invert(changed)
    for word in words:
        assert word in str(caught.value)


def test_refuses_wrong_names_and_options(small_convolution: Client) -> None:
    client = small_convolution
    with pytest.raises(ValueError, match=r"gradients.*'conv'.*head"):
        client.invert({"head": client.gradients["head"]})
    with pytest.raises(ValueError, match=r"'head'.*conv, classifier"):
        renamed = {"conv": client.parameters["conv"], "classifier": client.parameters["head"]}
        client._replace(parameters=renamed).invert()
    with pytest.raises(ValueError, match=r"'head'.*\(192, 10\)"):
        invert(client.chain, client.parameters, client.gradients, (12, 8, 3))
    with pytest.raises(ValueError, match=r"batch_size.*0"):
        client.invert(batch_size=0)
    with pytest.raises(ValueError, match="bias"):
        without = {"conv": client.gradients["conv"], "head": {"kernel": client.gradients["head"]["kernel"]}}
        client.invert(without)
