"""The client that the observer runs, against optax's optimisers and the chain's own gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_client import CHAIN, Client

from softinv_jax import observe_update
from softinv_jax.images.layer_chain import Dense, apply_chain
from softinv_jax.local_training.client_run import run_client, run_head
from softinv_jax.local_training.optimiser import optimiser_step, start_optimiser
from softinv_jax.observation.local_training import LocalTraining

RATE = 0.2
DECAY = 0.05


def proximal(sent: Any, strength: float) -> optax.GradientTransformation:
    """FedProx's pull, as a transformation of optax."""

    def update(gradient: Any, state: Any, held: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda own, value, origin: own + strength * (value - origin), gradient, held, sent), state

    return optax.GradientTransformation(lambda held: (), update)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.9, "weight_decay": DECAY},
        {"proximal": 0.3},
        {"learning_rate": (0.2, 0.1, 0.05)},
    ],
)
def test_the_update_is_that_of_optax(options: dict[str, Any], smoothed: Client) -> None:
    own = smoothed
    training = LocalTraining(3, **{"learning_rate": RATE, **options})
    rates = jnp.asarray(training.rates)
    parts = [
        optax.add_decayed_weights(training.weight_decay),
        proximal(own.parameters, training.proximal),
        optax.sgd(lambda step: rates[step], momentum=training.momentum or None, nesterov=training.nesterov),
    ]
    returned = own.train(3, RATE, optax.chain(*parts))
    settings = {"learning_rate": RATE, **options}
    update = observe_update(own.parameters, returned, local_steps=3, **settings)
    found = run_client(CHAIN, own.parameters, own.image[None], own.label[None], training).update
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=3e-6), found, update.gradients)


def test_dampening_is_that_of_torch(mixed: Client) -> None:
    torch = pytest.importorskip("torch")
    training = LocalTraining(3, 0.1, momentum=0.9, dampening=0.4)
    # Of one parameter with the loss 3 x + x^2.
    value = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimiser = torch.optim.SGD([value], lr=0.1, momentum=0.9, dampening=0.4)
    with jax.enable_x64(True):
        state = start_optimiser(jnp.asarray([2.0]))
        for _ in range(3):
            optimiser.zero_grad()
            (3 * value + value**2).sum().backward()
            optimiser.step()
            state = optimiser_step(state, 3 + 2 * state.parameters, jnp.asarray([2.0]), training)
    np.testing.assert_allclose(np.asarray(state.parameters), value.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.7, "nesterov": True}, {"proximal": 0.2}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_head_by_itself_needs_its_logits_only(with_bias: bool, options: dict[str, Any]) -> None:
    """The logits' own equation, against the head as a whole network."""
    rng = np.random.default_rng(0)
    feature, kernel, bias = rng.normal(size=7), rng.normal(size=(7, 4)), rng.normal(size=4)
    label = np.array([0.1, 0.2, 0.7, 0.0])
    training = LocalTraining(4, 0.05, **options)
    with jax.enable_x64(True):
        held = {"kernel": jnp.asarray(kernel)} | ({"bias": jnp.asarray(bias)} if with_bias else {})
        whole = run_client(
            (Dense("head"),), {"head": held}, jnp.asarray(feature)[None], jnp.asarray(label)[None], training
        )
        slope, delta = run_head(held["kernel"], held.get("bias"), jnp.asarray(feature), jnp.asarray(label), training)
        # The derivative by the feature, step by step with the head's own parameters.
        expected = _feature_derivative(held, jnp.asarray(feature), jnp.asarray(label), training)
    np.testing.assert_allclose(slope, whole.logit_gradient[0], rtol=1e-10)
    np.testing.assert_allclose(delta, expected, rtol=1e-10)


def _feature_derivative(held: Any, feature: jax.Array, label: jax.Array, training: LocalTraining) -> np.ndarray:
    """By running the head for 1, 2, ... steps and differentiating the loss of each by the feature."""

    def loss(own: Any, entering: jax.Array) -> jax.Array:
        return -jnp.sum(label * jax.nn.log_softmax(apply_chain((Dense("head"),), {"head": own}, entering)))

    total = np.zeros(feature.shape)
    weights = training.weights()
    for step in range(training.steps):
        own = held
        if step:
            shorter = LocalTraining(
                step, training.rates[:step], training.momentum, 0.0, training.nesterov, 0.0, training.proximal
            )
            run = run_client((Dense("head"),), {"head": held}, feature[None], label[None], shorter)
            divisor = shorter.weights().sum()
            own = jax.tree.map(lambda value, change, size=divisor: value - size * change, held, run.update["head"])
        total += weights[step] * np.asarray(jax.grad(loss, argnums=1)(own, feature))
    return total / weights.sum()


def test_weights_are_those_of_one_impulse() -> None:
    np.testing.assert_allclose(LocalTraining(3, 0.1).weights(), 0.1)
    np.testing.assert_allclose(LocalTraining(3, 1.0, momentum=0.5).weights(), [1.75, 1.5, 1.0])
    np.testing.assert_allclose(LocalTraining(2, (1.0, 2.0), momentum=0.5).weights(), [2.0, 2.0])


def test_without_gradients_only_decay_moves_the_parameters() -> None:
    assert LocalTraining(3, 0.1, momentum=0.9, proximal=0.5).shrinkage() == 1
    assert LocalTraining(3, 0.1, weight_decay=0.2).shrinkage() == pytest.approx(0.98**3)
    # Velocities 0.2 and 0.5 * 0.2 + 0.2 * 0.98, of which each moves by a tenth.
    assert LocalTraining(2, 0.1, momentum=0.5, weight_decay=0.2).shrinkage() == pytest.approx(0.98 - 0.0296)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "local_steps must be a positive integer, not 0"),
        ({"steps": 2, "learning_rate": (0.1,)}, "holds 1 rates for 2 local_steps"),
        ({"learning_rate": -0.1}, "learning_rate must be positive"),
        ({"proximal": float("nan")}, "proximal must be zero or positive"),
        ({"nesterov": True}, "nesterov needs momentum"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalTraining(**options)
