"""Rank, noise and duality of a layer's gradient, against what it was made of."""

from collections.abc import Callable

import numpy as np
import pytest

from softinv_jax.dense_layers import space as space_module
from softinv_jax.dense_layers.space import LayerSpace, layer_space


def _space(client: object, index: int = 0, largest: int | None = None, **others: np.ndarray) -> LayerSpace:
    layers = client.layers  # type: ignore[attr-defined]
    parts = {"kernel": layers.kernels[index], "bias": layers.biases[index]}
    parts |= {"kernel_gradient": layers.kernel_gradients[index], "bias_gradient": layers.bias_gradients[index]}
    return layer_space(**(parts | others), dtype=layers.dtype, largest=largest)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_deltas_and_inputs_are_dual(dense_client: Callable, batch_size: int, bias: bool) -> None:
    """beta_c . a_b / S is D if b = c, else 0; both lie in the spaces; and the layer's outputs are directions @ a."""
    client = dense_client((96, 48, 6), batch_size, bias=bias, dtype=np.float64)
    space = _space(client)
    assert space.rank == batch_size
    assert space.has_bias == bias
    np.testing.assert_allclose(space.left.T @ space.left, np.eye(batch_size), atol=1e-12)
    deltas = client.deltas[0] / space.noise
    inputs = np.concatenate([client.inputs, np.ones((batch_size, int(bias)))], axis=1)
    beta = deltas @ space.left
    a = np.linalg.lstsq(space.right, inputs.T, rcond=None)[0].T
    np.testing.assert_allclose(beta @ space.left.T, deltas, atol=1e-10 * np.abs(deltas).max())
    np.testing.assert_allclose(a @ space.right.T, inputs, atol=1e-10)
    np.testing.assert_allclose(beta @ (a / space.singular_values).T, batch_size * np.eye(batch_size), atol=1e-8)
    np.testing.assert_allclose(a @ space.directions.T, client.layers.output(0, client.inputs), atol=1e-10)
    if bias:
        np.testing.assert_allclose(a @ space.constant, 1, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 40])
@pytest.mark.parametrize("seed", range(3))
def test_rank_is_the_batch_size(dense_client: Callable, batch_size: int, seed: int) -> None:
    assert _space(dense_client((96, 48, 6), batch_size, seed)).rank == batch_size


def test_examples_that_say_nothing_new_do_not_count(dense_client: Callable) -> None:
    """An input that is there twice with one label, and entries that are zero in all inputs."""
    inputs = np.random.default_rng(0).normal(0.1, 1, (4, 96))
    inputs[:, 10:30] = 0
    inputs[3] = inputs[2]
    client = dense_client((96, 48, 6), inputs=inputs, labels=np.eye(6)[[0, 1, 2, 2]])
    assert _space(client).rank == 3


def test_noise_of_known_size(dense_client: Callable) -> None:
    client = dense_client((120, 64, 6), 4, noise=0.0)
    gradient, offset = client.layers.kernel_gradients[0], client.layers.bias_gradients[0]
    generator = np.random.default_rng(1)
    sigma = 1e-3 * np.sqrt(np.mean(gradient**2))
    space = _space(
        client,
        kernel_gradient=gradient + sigma * generator.standard_normal(gradient.shape),
        bias_gradient=offset + sigma * generator.standard_normal(offset.shape),
    )
    assert space.rank == 4
    np.testing.assert_allclose(space.columns, 1)
    # Each row's is measured on 117 entries.
    assert np.sqrt(np.mean(space.noise**2)) == pytest.approx(sigma, rel=0.05)
    assert np.abs(space.noise / sigma - 1).max() < 0.4
    assert 1 <= space.common < 2


def test_noise_hides_small_examples_and_a_told_size_is_the_most(dense_client: Callable) -> None:
    client = dense_client((120, 64, 6), 6, noise=0.03, seed=2)
    seen = _space(client).rank
    assert 1 <= seen <= 6
    assert _space(client, largest=2).rank == min(seen, 2)


def test_rounding_is_the_noise_of_a_float32_gradient(dense_client: Callable) -> None:
    client = dense_client((96, 64, 6), 4)
    exact = dense_client((96, 64, 6), 4, dtype=np.float64)
    space = _space(client)
    assert space.roundoff == np.finfo(np.float32).eps / 2
    rounded = client.layers.kernel_gradients[0] - exact.layers.kernel_gradients[0]
    # Parameters and inputs differ in the two by a rounding as well: the same order of magnitude.
    size = np.sqrt(np.mean(rounded**2))
    assert size / 30 < np.sqrt(np.mean(space.noise**2)) < 3 * size


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_sketch_gives_the_same_as_all_singular_values(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """A large matrix, of which only the leading singular values are computed."""
    generator = np.random.default_rng(0)
    rank = 20
    kernel = generator.standard_normal((400, 300)) / 20
    gradient = (generator.standard_normal((400, rank)) @ generator.standard_normal((rank, 300))).astype(np.float32)
    gradient = gradient.astype(np.float64) + 1e-3 * noise * generator.standard_normal(gradient.shape)
    spaces = []
    for width in (40, 1000):
        monkeypatch.setattr(space_module, "SKETCH", width)
        spaces.append(layer_space(kernel, None, gradient, None, np.dtype(np.float32), None))
    sketched, whole = spaces
    assert sketched.rank == whole.rank == rank
    np.testing.assert_allclose(sketched.singular_values, whole.singular_values, rtol=1e-4)
    np.testing.assert_allclose(sketched.noise, whole.noise, rtol=1e-3)
    assert np.linalg.svd(sketched.left.T @ whole.left)[1].min() > 1 - 1e-7


def test_a_gradient_that_is_noise_has_no_rank_to_spare() -> None:
    generator = np.random.default_rng(0)
    gradient = generator.standard_normal((60, 40))
    space = layer_space(generator.standard_normal((60, 40)), None, gradient, None, np.dtype(np.float32), None)
    assert space.rank == 40
