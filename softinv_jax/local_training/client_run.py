"""The client, run again: from images and labels to the update it would send, and what passes each layer on the way."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.images.layer_chain import Chain, apply_layer
from softinv_jax.local_training.optimiser import OptimiserState, optimiser_step, start_optimiser
from softinv_jax.observation.local_training import LocalTraining

__all__ = ["ClientRun", "run_client", "run_head", "sent_update"]


class ClientRun(NamedTuple):
    """What K steps on B examples leave behind. Means over the steps are weighed by `LocalTraining.weights`.

    update: tree like the parameters, in the form of `observe_update`: the mean gradient.
    deltas: for each layer but the head, (B, ...) the mean derivative of the loss by its output.
    logit_gradient: (B, C) the mean derivative by the logits.
    inputs: for each layer, (B, ...) what enters it in the first step.
    """

    update: Any
    deltas: tuple[jax.Array, ...]
    logit_gradient: jax.Array
    inputs: tuple[jax.Array, ...]


def sent_update(sent: Any, returned: Any, training: LocalTraining) -> Any:
    """The mean gradient that `observe_update` would make of the parameters sent and returned."""
    divisor, shrinkage = training.total_weight(), training.shrinkage()
    return jax.tree.map(lambda before, after: (shrinkage * before - after) / divisor, sent, returned)


def run_client(
    chain: Chain, parameters: Mapping[str, Any], images: jax.Array, labels: jax.Array, training: LocalTraining
) -> ClientRun:
    """K steps, each on all examples; pure, in the dtype of the parameters.

    Args:
      chain, training: static. parameters: by layer.
      images: (B, H, W, c). labels: (B, C); the loss is the mean cross-entropy.
    """
    passing = [images]
    for layer in chain:
        passing.append(apply_layer(layer, parameters, passing[-1]))
    nothing = tuple(jnp.zeros_like(values) for values in passing[1:])

    def loss(held: Mapping[str, Any], taps: tuple[jax.Array, ...]) -> jax.Array:
        values = images
        for layer, tap in zip(chain, taps, strict=True):
            values = apply_layer(layer, held, values) + tap
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(values), axis=-1))

    def step(state: OptimiserState, _: None) -> tuple[OptimiserState, tuple[jax.Array, ...]]:
        slope, deltas = jax.grad(loss, argnums=(0, 1))(state.parameters, nothing)
        return optimiser_step(state, slope, parameters, training), deltas

    end, deltas = jax.lax.scan(step, start_optimiser(parameters), None, length=training.steps)
    means = tuple(_weighed(each, training) for each in deltas)
    return ClientRun(sent_update(parameters, end.parameters, training), means[:-1], means[-1], tuple(passing[:-1]))


def run_head(
    kernel: jax.Array, bias: jax.Array | None, feature: jax.Array, label: jax.Array, training: LocalTraining
) -> tuple[jax.Array, jax.Array]:
    """What the head alone would do, if the feature stayed as it is: mean derivatives by the logits and by the feature.

    The head then moves along the feature only, and its logits are the client's parameters: C numbers in place of C d.

    Args:
      kernel: (d, C). bias: (C,). feature: (d,). label: (C,). training: static.

    Returns:
      (C,) and (d,).
    """
    size = feature @ feature + (bias is not None)
    first = feature @ kernel + (0.0 if bias is None else bias)

    def step(state: OptimiserState, _: None) -> tuple[OptimiserState, tuple[jax.Array, jax.Array]]:
        slope = jax.nn.softmax(state.parameters) - label
        delta = kernel @ slope + feature * ((state.parameters - first) @ slope / size)
        return optimiser_step(state, size * slope, first, training), (slope, delta)

    _, (slopes, deltas) = jax.lax.scan(step, start_optimiser(first), None, length=training.steps)
    return _weighed(slopes, training), _weighed(deltas, training)


def _weighed(values: jax.Array, training: LocalTraining) -> jax.Array:
    weights = training.weights()
    return jnp.tensordot(jnp.asarray(weights / weights.sum(), values.dtype), values, axes=1)
