"""Chains of layers: the same functions as the flax networks, activations and their inverses, and what is refused."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.client import FCN4, LeNet, apply_function, initialise
from softinv_jax.images.layer_chain import (
    Activation,
    Chain,
    Convolution,
    Dense,
    Flatten,
    apply_chain,
    chain_inputs,
    check_chain,
    fcn_chain,
    layer_parameters,
    lenet_chain,
)


@pytest.mark.parametrize(
    ("network", "chain", "image_shape"),
    [
        (LeNet(10, head_bias=True), lenet_chain(), (16, 12, 3)),
        (FCN4(10), fcn_chain(), (4, 5, 3)),
    ],
)
def test_equals_the_flax_network(network: Any, chain: Chain, image_shape: tuple[int, int, int]) -> None:
    parameters = initialise(network, jax.random.key(0), image_shape)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, *image_shape)), jnp.float32)
    expected = jax.jit(apply_function(network))(parameters, images)
    apply_fn = jax.jit(partial(apply_chain, chain))
    found = apply_fn(parameters, images)
    assert found.shape == (2, 10)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply_fn(parameters, images[1]), expected[1], rtol=1e-5, atol=1e-5)
    shapes = chain_inputs(chain, parameters, image_shape)
    assert len(shapes) == len(chain) + 1
    assert shapes[0] == image_shape
    assert shapes[-1] == (10,)
    for index in range(1, len(chain)):  # The shape that enters a layer is what the layers before it make.
        rest = jax.eval_shape(partial(apply_chain, chain[:index], parameters), images[0])
        assert shapes[index] == rest.shape


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_jax(name: str) -> None:
    values = jnp.linspace(-3, 3, 25)
    named = {"identity": lambda z: z, "gelu": partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu}
    expected = (named.get(name) or getattr(jax.nn, name))(values)
    np.testing.assert_allclose(ACTIVATIONS[name].apply(values), expected, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, function in ACTIVATIONS.items() if function.invert is not None])
def test_inverse_undoes_the_activation(name: str) -> None:
    function = ACTIVATIONS[name]
    with jax.enable_x64(True):
        values = jnp.linspace(-5.0, 5.0, 101) if function.one_to_one else jnp.linspace(0.0, 5.0, 51)
        if np.isfinite(function.high) and not function.one_to_one:
            values = jnp.linspace(function.low, function.high, 51)[1:-1]
        applied = function.apply(values)
        np.testing.assert_allclose(function.invert(applied), values, rtol=1e-9, atol=1e-9)
        assert np.all((applied >= function.low) & (applied <= function.high))
        assert np.all(np.diff(applied) > 0)
        # The limits are the infimum and the supremum; where they are not finite, the function is not bounded.
        ends = function.apply(jnp.asarray([-1e4, 1e4]))
        for end, limit in zip(ends, (function.low, function.high), strict=True):
            assert abs(end) >= 100 if np.isinf(limit) else abs(end - limit) < 1e-6


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_to_one_and_two_slopes_are_as_stated(name: str) -> None:
    function = ACTIVATIONS[name]
    with jax.enable_x64(True):
        values = jnp.linspace(-8.0, 8.0, 1601)
        rising = np.all(np.diff(function.apply(values)) > 0)
        slopes = set(np.unique(np.asarray(jax.vmap(jax.grad(function.apply))(values + 1e-3)).round(6)).tolist())
    assert rising == function.one_to_one
    assert (function.slopes is not None and set(function.slopes) == slopes) or (
        function.slopes is None and (name == "identity" or len(slopes) > 2)
    )


def kernel(*shape: int, bias: int | None = None) -> dict[str, np.ndarray]:
    held = {"kernel": np.zeros(shape, np.float32)}
    return held if bias is None else held | {"bias": np.zeros(bias, np.float32)}


HEAD = (Flatten(), Dense("head"))


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ((), ["head"]),
        ((Flatten(),), ["last layer", "Dense head"]),
        ((Flatten(), Flatten(), Dense("head")), ["one Flatten"]),
        ((Activation("swish"), *HEAD), ["'swish'", "sigmoid", "leaky_relu"]),
        ((Dense("first"), *HEAD), ["'first'", "before Flatten"]),
        ((Flatten(), Convolution("late"), Dense("head")), ["'late'", "after Flatten"]),
        ((Convolution("conv", (0, 1)), *HEAD), ["'conv'", "(0, 1)", "positive"]),
        ((Convolution("conv", (1, 1), ((0, 0), (-1, 0))), *HEAD), ["'conv'", "(-1, 0)", "not negative"]),
    ],
)
def test_refuses_layers_that_cannot_follow_each_other(chain: Chain, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        check_chain(chain)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "image_shape", "words"),
    [
        ({"conv": kernel(3, 3, 1, 4)}, (6, 6, 3), ["'conv'", "(3, 3, 1, 4)", "(6, 6, 3)", "3 inputs"]),
        ({"conv": kernel(3, 4)}, (6, 6, 3), ["'conv'", "(3, 4)", "channels in"]),
        ({"conv": kernel(3, 3, 3, 4, bias=3)}, (6, 6, 3), ["'conv'", "bias (3,)", "(4,)"]),
        ({"conv": kernel(3, 7, 3, 4)}, (6, 6, 3), ["'conv'", "(3, 7, 3, 4)", "(6, 6, 3)", "does not fit"]),
        ({"conv": kernel(3, 3, 3, 4), "head": kernel(60, 10)}, (6, 6, 3), ["'head'", "(60, 10)", "(64,)"]),
        ({"conv": kernel(3, 3, 3, 4), "head": kernel(1, 64, 10)}, (6, 6, 3), ["'head'", "(1, 64, 10)"]),
        ({"conv": kernel(3, 3, 3, 4), "head": kernel(64, 10, bias=9)}, (6, 6, 3), ["'head'", "(9,)", "(10,)"]),
        ({"conv": kernel(3, 3, 3, 4)}, (6, 6, 3), ["'head'", "conv"]),
        ({"conv": kernel(3, 3, 3, 4)}, (6, 6), ["(6, 6)", "(H, W, channels)"]),
        ({"conv": kernel(3, 3, 3, 4)}, (6, 0, 3), ["(6, 0, 3)"]),
    ],
)
def test_refuses_shapes_that_do_not_fit(parameters: Any, image_shape: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        chain_inputs((Convolution("conv"), *HEAD), parameters, image_shape)
    for word in words:
        assert word in str(caught.value)


def test_finds_nested_parameters_and_names_missing_ones() -> None:
    inner = kernel(2, 3)
    parameters = {"block": {"dense": inner}, "norm": {"scale": np.ones(3)}}
    assert layer_parameters(parameters, "block/dense") is inner
    with pytest.raises(ValueError, match=r"'block/conv'.*block, norm"):
        layer_parameters(parameters, "block/conv")
    with pytest.raises(ValueError, match=r"'norm'.*no 'kernel'"):
        layer_parameters(parameters, "norm")
    with pytest.raises(ValueError, match=r"'head'.*nothing"):
        layer_parameters({}, "head")
    chain = (Flatten(), Dense("block/dense"), Dense("head"))
    assert chain_inputs(chain, parameters | {"head": kernel(3, 5)}, (1, 1, 2))[-1] == (5,)
