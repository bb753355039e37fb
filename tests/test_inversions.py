"""Which way leads to the images: exact where the layers are determined, the client run, matching, or labels alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.images.layer_chain import Activation, Chain, Convolution, Dense, Flatten, Pool, apply_chain
from softinv_jax.images.objective import MatchingSettings, WholeBatch
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.inversions import Network, describe_determinacy, invert_gradients, invert_observed
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.observation.updates import observe_update

SHAPE, CLASSES, RATE = (6, 5, 1), 4, 0.5
FEW = MatchingSettings(steps=5)


CHAIN: Chain = (Convolution("conv"), Activation("sigmoid"), Flatten(), Dense("head"))


def make_parameters() -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def layer(*shape: int) -> dict[str, np.ndarray]:
        return {
            "kernel": rng.uniform(-0.5, 0.5, shape).astype(np.float32),
            "bias": rng.uniform(-0.5, 0.5, shape[-1]).astype(np.float32),
        }

    return {"conv": layer(2, 2, 1, 8), "head": layer(160, CLASSES)}


def example() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return rng.uniform(-1, 1, (2, *SHAPE)).astype(np.float32), np.eye(CLASSES, dtype=np.float32)[[1, 3]]


def gradients_of(chain: Chain, parameters: Any) -> Any:
    """Of each example by itself."""

    def loss(held: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        return -jnp.sum(label * jax.nn.log_softmax(apply_chain(chain, held, image)))

    each = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))
    return jax.device_get(each(parameters, *example()))


def test_a_determined_chain_is_inverted() -> None:
    chain, parameters = CHAIN, make_parameters()
    assert describe_determinacy(chain, parameters, SHAPE) == ""
    found = invert_gradients(Network(SHAPE, chain), parameters, gradients_of(chain, parameters))
    assert (found.method, found.reason) == ("exact", "")
    assert np.all(found.recovery.verdict == ImageVerdict.EXACT)
    np.testing.assert_allclose(found.recovery.images[:, 0], example()[0], atol=1e-3)


def test_too_few_equations_are_counted_out_and_matched() -> None:
    chain = (Convolution("conv"), Activation("sigmoid"), Pool("max", (4, 4), (4, 4)), Flatten(), Dense("head"))
    parameters = make_parameters()
    parameters["conv"] = {part: array[..., :6] for part, array in parameters["conv"].items()}
    parameters["head"]["kernel"] = parameters["head"]["kernel"][:6]
    reason = describe_determinacy(chain, parameters, SHAPE, 2)
    assert "2 images have 60 unknowns" in reason
    assert "at most 36 equations (layer conv" in reason
    gradients = gradients_of(chain, parameters)
    network = Network(SHAPE, chain)
    found = invert_gradients(network, parameters, gradients, matching=FEW)
    assert found.method == "matching"
    assert "many images fit" in found.reason
    # An image that matches would still be one of many.
    assert np.all(found.recovery.verdict <= ImageVerdict.INCONSISTENT)
    assert np.all(np.isfinite(found.recovery.images))
    told = invert_gradients(network, parameters, gradients, unknown_scale=True)
    assert told.method == "labels"
    assert np.all(np.isnan(told.recovery.images))
    alone = invert_gradients(Network(SHAPE, None, network.apply_fn), parameters, gradients, matching=None)
    assert alone.method == "labels"
    assert np.all(np.isnan(alone.recovery.images))


def test_a_function_is_matched() -> None:
    chain, parameters = CHAIN, make_parameters()

    def apply_fn(held: Any, image: jax.Array) -> jax.Array:
        return apply_chain(chain, held, image)

    gradients = gradients_of(chain, parameters)
    found = invert_gradients(Network(SHAPE, None, apply_fn), parameters, gradients, matching=FEW)
    assert found.method == "matching"
    assert np.all(found.recovery.label_verdict == Verdict.UNIQUE)
    together = WholeBatch(lambda held, images: apply_chain(chain, held, images))
    same = invert_gradients(Network(SHAPE, None, together), parameters, gradients, matching=FEW)
    np.testing.assert_allclose(same.recovery.images, found.recovery.images, atol=1e-2)


def test_batches_of_a_function_that_nothing_tells_apart() -> None:
    chain, parameters = CHAIN, make_parameters()
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0, keepdims=True), gradients_of(chain, parameters))
    network = Network(SHAPE, None, Network(SHAPE, chain).apply_fn)
    found = invert_gradients(network, parameters, mean, batch_size=2, matching=FEW)
    assert found.recovery.images.shape == (1, 2, *SHAPE)
    with pytest.raises(ValueError, match="nothing tells the examples"):
        invert_gradients(network, parameters, mean, batch_size=9, matching=FEW)


def updates_of(parameters: Any, gradients: Any, index: int, **options: Any) -> Any:
    after = jax.tree.map(lambda value, slope: value - np.float32(RATE) * slope[index], parameters, gradients)
    return observe_update(parameters, after, **options)


def test_updates_of_one_step_and_of_several() -> None:
    chain, parameters = CHAIN, make_parameters()
    gradients = gradients_of(chain, parameters)
    one = [updates_of(parameters, gradients, index, learning_rate=RATE) for index in range(2)]
    found = invert_observed(Network(SHAPE, chain), one)
    assert found.method == "exact"
    np.testing.assert_allclose(found.recovery.images[:, 0], example()[0], atol=1e-2)
    # Not what the client did: then no guess explains the update, and nothing is certain.
    several = [updates_of(parameters, gradients, 0, learning_rate=RATE / 2, local_steps=2)]
    run = invert_observed(Network(SHAPE, chain), several)
    assert run.method == "client"
    assert run.recovery.verdict[0, 0] == ImageVerdict.INCONSISTENT


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "magic"}, "magic"),
        ({"method": "exact"}, "chain"),
        ({"unknown_scale": True}, "scale"),
        ({"method": "matching", "matching": None}, "settings"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], said: str) -> None:
    parameters = make_parameters()
    network = Network(SHAPE, None, Network(SHAPE, CHAIN).apply_fn)
    with pytest.raises(ValueError, match=said):
        invert_gradients(network, parameters, gradients_of(CHAIN, parameters), **options)
    with pytest.raises(ValueError, match="no updates"):
        invert_observed(network, [])
    with pytest.raises(ValueError, match="a chain of layers or a function"):
        _ = Network(SHAPE).apply_fn


def test_an_average_of_steps_is_never_sure() -> None:
    """So small that the steps hardly differ; yet no stated error covers what they change."""
    parameters = make_parameters()
    gradients = gradients_of(CHAIN, parameters)
    updates = [updates_of(parameters, gradients, 0, learning_rate=RATE / 2, local_steps=2)]
    found = invert_observed(Network(SHAPE, CHAIN), updates, method="exact")
    assert found.method == "exact"
    assert found.recovery.label_verdict[0, 0] == Verdict.AMBIGUOUS
    assert found.recovery.verdict[0, 0] == ImageVerdict.APPROXIMATE
    np.testing.assert_allclose(found.recovery.images[0, 0], example()[0][0], atol=1e-2)
