"""One step of a client's optimiser, on any tree of parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.observation.local_training import LocalTraining

__all__ = ["OptimiserState", "optimiser_step", "start_optimiser"]


class OptimiserState(NamedTuple):
    """Parameters and velocity, both trees like the parameters; and the number of steps taken."""

    parameters: Any
    velocity: Any
    step: jax.Array


def start_optimiser(parameters: Any) -> OptimiserState:
    """A fresh optimiser."""
    return OptimiserState(parameters, jax.tree.map(jnp.zeros_like, parameters), jnp.zeros((), jnp.int32))


def optimiser_step(state: OptimiserState, gradient: Any, sent: Any, training: LocalTraining) -> OptimiserState:
    """As `torch.optim.SGD` steps, in the dtype of the parameters.

    Args:
      gradient: tree like the parameters. sent: the parameters that FedProx's term pulls back to.
      training: static.
    """
    rates = jnp.asarray(training.rates)
    # The first velocity is the gradient itself, whatever the dampening.
    entering = jnp.where(state.step == 0, 1.0, 1.0 - training.dampening)

    def one(value: jax.Array, slope: jax.Array, velocity: jax.Array, origin: jax.Array) -> tuple[jax.Array, jax.Array]:
        if training.proximal:
            slope = slope + training.proximal * (value - origin)
        if training.weight_decay:
            slope = slope + training.weight_decay * value
        if training.momentum:
            velocity = training.momentum * velocity + entering.astype(value.dtype) * slope
            slope = slope + training.momentum * velocity if training.nesterov else velocity
        return value - rates[state.step].astype(value.dtype) * slope, velocity

    moved = jax.tree.map(one, state.parameters, gradient, state.velocity, sent)
    parameters, velocity = jax.tree.transpose(jax.tree.structure(gradient), jax.tree.structure((0, 0)), moved)
    return OptimiserState(parameters, velocity, state.step + 1)
