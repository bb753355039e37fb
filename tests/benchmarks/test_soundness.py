"""The clients of the soundness benchmark, against automatic differentiation of the losses themselves."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
soundness_clients = pytest.importorskip("soundness_clients")

WEIGHTS, PRIOR = np.linspace(0.5, 2, 6), np.linspace(1, 5, 6)


def log_p(z: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(z)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cross_entropy": lambda z, y: -jnp.sum(y * log_p(z)),
    "temperature2": lambda z, y: -jnp.sum(y * log_p(z / 2)),
    "bce_sum": lambda z, y: jnp.sum(jax.nn.softplus(z) - y * z),
    "bce_mean": lambda z, y: jnp.mean(jax.nn.softplus(z) - y * z),
    "focal": lambda z, y: -jnp.sum(y * (1 - jnp.exp(log_p(z))) ** 2 * log_p(z)),
    "squared_softmax": lambda z, y: jnp.mean((jax.nn.softmax(z) - y) ** 2),
    "squared_logits": lambda z, y: jnp.mean((z - y) ** 2),
    "class_weights": lambda z, y: -jnp.sum(WEIGHTS * y * log_p(z)),
    "logit_adjustment": lambda z, y: -jnp.sum(y * log_p(z + np.log(PRIOR / PRIOR.sum()))),
    "entropy": lambda z, y: -jnp.sum(y * log_p(z)) + 0.1 * jnp.sum(jnp.exp(log_p(z)) * log_p(z)),
    "distillation": lambda z, y: -jnp.sum((y + jax.lax.stop_gradient(jax.nn.softmax(jnp.cos(3 * z)))) / 2 * log_p(z)),
}


def test_every_loss_has_a_truth() -> None:
    named = {name for name in LOSSES if not name.startswith("temperature")}
    assert named == set(soundness_clients.LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_loss(loss: str) -> None:
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(5, 6)), rng.dirichlet(np.ones(6), 5)
    with jax.enable_x64(True):
        expected = jax.vmap(jax.grad(LOSSES[loss]))(jnp.asarray(z), jnp.asarray(y))
    np.testing.assert_allclose(soundness_clients.logit_gradient(loss, z, y), expected, rtol=1e-6, atol=1e-9)


def test_one_example_by_loops() -> None:
    """The client of the benchmark against one that is written out."""
    cell = soundness_clients.Cell(name="plain", bias=True, classes=4, features=8, examples=2)
    clients = soundness_clients.draw(cell, 3, 0)
    assert clients.gradient.shape == (3, 4, 8)
    assert clients.label.shape == (3, 2, 4)
    np.testing.assert_allclose(clients.gradient.sum(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(clients.bias_gradient.sum(axis=1), 0, atol=1e-6)
