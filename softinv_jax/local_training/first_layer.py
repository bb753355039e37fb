"""Images that a client puts straight into a dense layer with ReLU: from its update alone, whatever came after.

See `dense_layers/many_steps`: the images come first, without labels, loss, rate or the order of minibatches.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.many_steps import recover_over_steps, returned_layers, rough_logit_gradients
from softinv_jax.dense_layers.recovery import DenseRecovery
from softinv_jax.images.dense_batches import chain_layers, dense_end
from softinv_jax.images.layer_chain import Chain, Dense, Flatten, layer_parameters, layers_as_tree
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.polish import summing_to_one
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.observation.updates import ObservedUpdate
from softinv_jax.recoveries import BatchSize

__all__ = ["begins_dense", "labels_by_trial", "recover_first_layer"]

TRIALS = 60
_run = jax.jit(run_client, static_argnames=("chain", "training"))


def begins_dense(chain: Chain) -> bool:
    """Whether the image itself enters a dense layer with ReLU after it."""
    end = dense_end(chain)
    return end is not None and end[1][0] == "relu" and all(isinstance(layer, Flatten) for layer in chain[: end[0]])


def recover_first_layer(chain: Chain, update: ObservedUpdate, batch_size: BatchSize) -> DenseRecovery:
    """See `recover_over_steps`; the chain is one that `begins_dense`."""
    moved = update.training.total_weight()
    return recover_over_steps(_layers(chain, update), moved, batch_size, scale_known=update.scale_known)


def labels_by_trial(
    chain: Chain, update: ObservedUpdate, found: DenseRecovery, problem: Problem
) -> tuple[Problem, Guess]:
    """The rough labels made better: what they get wrong of the client's deltas is seen when the client is run on them.

    Where a label is off, other units open on the way than did, so that what explains all of the update best may be far
    from the truth; the deltas' least squares of the units that are open throughout are not misled. Call with float64
    enabled.

    Args:
      problem: of the update. found: all its examples.

    Returns:
      The problem in the images' own span, and the guess.
    """
    layers = _layers(chain, update)
    returned, examples = returned_layers(layers, update.training.total_weight()), len(found.label)
    inputs = np.asarray(found.inputs, np.float64)
    own, guess = _in_own_span(problem, inputs, found.label)
    place = next(index for index, layer in enumerate(chain) if isinstance(layer, Dense))
    labels = best = np.asarray(guess.labels)
    correction, least, share = np.zeros_like(best), np.inf, 1.0
    for _ in range(TRIALS):
        run = _run(own.chain, own.parameters, guess.images, jnp.asarray(labels), own.training)
        slopes = rough_logit_gradients(layers, returned, inputs, examples * np.asarray(run.deltas[place]))
        wrong = float(np.linalg.norm(slopes - found.logit_gradient))
        if wrong < least:
            best, least, correction, share = labels, wrong, slopes - found.logit_gradient, min(2 * share, 1.0)
        else:
            share /= 4
        labels = best + share * correction
    return own, guess._replace(labels=jnp.asarray(best))


def _layers(chain: Chain, update: ObservedUpdate) -> DenseLayers:
    end = dense_end(chain)
    assert end is not None
    return chain_layers(chain, *end, update.parameters, update.gradients)


def _in_own_span(problem: Problem, inputs: np.ndarray, labels: np.ndarray) -> tuple[Problem, Guess]:
    """The same client on the images' coordinates in the space that they span: B numbers each, whatever their size.

    Every step moves the first kernel within that space, so that nothing is lost. Call with float64 enabled.

    Args:
      problem: of a chain that begins with a dense layer. inputs: (B, d) flattened images. labels: (B, C).
    """
    flat = jnp.asarray(inputs, jnp.float64)
    basis, _ = jnp.linalg.qr(flat.T)
    coordinates = flat @ basis
    names = [layer.name for layer in problem.chain if isinstance(layer, Dense)]

    def reduced(tree: Mapping[str, Any], turn: jax.Array, power: int) -> dict[str, Any]:
        held = {name: dict(layer_parameters(tree, name)) for name in names}
        held[names[0]]["kernel"] = (turn.T @ held[names[0]]["kernel"] ** power) ** (1 / power)
        return layers_as_tree(held)

    own = replace(
        problem,
        image_shape=(1, 1, coordinates.shape[1]),
        parameters=reduced(problem.parameters, basis, 1),
        observed=reduced(problem.observed, basis, 1),
        noise=reduced(problem.noise, basis**2, 2),
    )
    guess = Guess(coordinates[:, None, None, :], jnp.asarray(labels, jnp.float64))
    return own, summing_to_one(guess)
