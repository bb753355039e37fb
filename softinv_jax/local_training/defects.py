"""From a guess of the example to a better one: what a simple model of the client gets wrong is measured and taken off.

In the simple model the feature stays as it is over all steps, so that only the head's logits move (`run_head`), and the
other layers' parameters stay too. Then the mean gradient of a layer is the mean derivative by its output, times its
input: the equations of one step, which `images/exact` solves from the head back to the image. The client is run on the
guess, and what its update and its mean derivatives differ from the simple model's is taken off the equations. Where
guess and result agree, both explain the update.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.images.exact import invert_from
from softinv_jax.images.layer_chain import Activation, Chain, Dense, Flatten, apply_chain, apply_layer, layer_parameters
from softinv_jax.images.refinement import with_sum_one
from softinv_jax.linear_algebra import inverse_and_log_determinant
from softinv_jax.local_training.client_run import ClientRun, run_client, run_head
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.observation.local_training import LocalTraining

__all__ = ["first_guess", "improve"]

POWERS = 20  # Of the iteration for the head's two factors, which starts next to them.
NEWTON_STEPS = 15
SHORTER = (1.0, 0.5, 0.25, 0.1, 0.03)  # Newton steps tried, of their full length.
WITHIN = 1 - 1e-6  # Of the largest value of an activation: no feature reaches it.


def first_guess(problem: Problem) -> Guess:
    """An image of zeros, with the label that the head alone gives for a feature along the update's own direction.

    A ReLU network without biases passes no zeros on: noise takes their place.
    """
    chain, parameters = problem.chain, problem.parameters
    blank = jnp.zeros(problem.image_shape, jax.tree.leaves(parameters)[0].dtype)
    noise = jax.random.normal(jax.random.key(0), blank.shape, jnp.float32).astype(blank.dtype)
    seen = apply_chain(chain[:-1], parameters, blank)
    image = jnp.where(jnp.any(seen != 0), blank, noise)
    entering = apply_chain(chain[:-1], parameters, image)
    held, own = _head(chain, parameters), _head(chain, problem.observed)
    strongest = own["kernel"][jnp.argmax(jnp.sum(own["kernel"] ** 2, axis=1))]
    feature, slope = _factors(chain, own["kernel"], own.get("bias"), strongest, entering)
    flat = jnp.full(slope.shape, 1 / slope.size, slope.dtype)
    return Guess(image[None], _label(held, feature, slope, flat, problem.training)[None])


def improve(problem: Problem, guess: Guess, steps: int | jax.Array) -> Guess:
    """One more guess of a single example; pure, to be traced in float64.

    Args:
      steps: of the solver of each convolution. Few of them keep a poor guess from growing wild.
    """
    chain, parameters, training = problem.chain, problem.parameters, problem.training
    run = run_client(chain, parameters, guess.images, guess.labels, training)
    target, shifts = _take_off(problem, run)
    held, corrected = _head(chain, parameters), _head(chain, target)
    entering, slope = run.inputs[-1][0], run.logit_gradient[0]
    feature, wanted = _factors(chain, corrected["kernel"], corrected.get("bias"), slope, entering)
    kernel, bias = held["kernel"], held.get("bias")
    simple_slope, simple_delta = run_head(kernel, bias, entering, guess.labels[0], training)
    label = _label(held, feature, wanted - (slope - simple_slope), guess.labels[0], training)
    delta = run_head(kernel, bias, feature, label, training)[1] + (run.deltas[-1][0] - simple_delta)
    found = invert_from(
        chain,
        parameters,
        target,
        feature[None],
        # Errors of the head's input are those of its gradient.
        problem.unit_roundoff * jnp.max(jnp.abs(feature)) * jnp.ones_like(feature)[None],
        delta[None],
        wanted[None],
        problem.image_shape,
        position=len(chain) - 1,
        unit_roundoff=problem.unit_roundoff,
        steps=steps,
        delta_shifts=shifts,
        guesses=run.inputs,
    )
    return Guess(found.images, label[None])


def _take_off(problem: Problem, run: ClientRun) -> tuple[Any, list[jax.Array]]:
    """The observed update as it would be in the simple model, and by how much its derivatives differ from the run's."""
    chain, deltas = problem.chain, (*run.deltas, run.logit_gradient)
    shifts = [jnp.zeros_like(delta) for delta in run.deltas]
    simple = jax.tree.map(jnp.zeros_like, run.update)
    for index in reversed(range(len(chain))):
        layer = chain[index]
        _, pull = jax.vjp(
            lambda held, values, layer=layer: apply_layer(layer, held, values), problem.parameters, run.inputs[index]
        )
        own, entering = pull(deltas[index])
        simple = jax.tree.map(jnp.add, simple, own)
        if 0 < index < len(chain) - 1:
            shifts[index - 1] = deltas[index - 1] - entering
    return jax.tree.map(lambda seen, real, model: seen - (real - model), problem.observed, run.update, simple), shifts


def _head(chain: Chain, tree: Mapping[str, Any]) -> Mapping[str, Any]:
    head = chain[-1]
    assert isinstance(head, Dense)
    return layer_parameters(tree, head.name)


def _factors(
    chain: Chain, gradient: jax.Array, bias_gradient: jax.Array | None, slope: jax.Array, entering: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(d,) feature and (C,) derivative by the logits, whose product the head's gradient is; from near the latter.

    The bias's gradient is the derivative itself. Without a bias the feature is as long as that which enters the head in
    the run, but stays within the range of the activation before it.
    """
    right = slope / jnp.linalg.norm(slope)
    for _ in range(POWERS):
        left = gradient @ right
        left = left / jnp.linalg.norm(left)
        right = gradient.T @ left
        right = right / jnp.linalg.norm(right)
    both = gradient.T @ left
    if bias_gradient is not None:
        length = (both @ bias_gradient) / (bias_gradient @ bias_gradient)
        return left * length, both / length
    left = left * jnp.sign(left @ entering)
    length = jnp.minimum(jnp.linalg.norm(entering), _longest(chain, left))
    return left * length, gradient.T @ left / length


def _longest(chain: Chain, direction: jax.Array) -> jax.Array:
    """How long a feature of this direction can be."""
    before = [layer for layer in chain[:-1] if not isinstance(layer, Flatten)]
    if not before or not isinstance(before[-1], Activation):
        return jnp.asarray(jnp.inf)
    function = ACTIVATIONS[before[-1].function]
    reach = jnp.where(direction > 0, function.high / direction, function.low / direction)
    # A lower limit of zero says nothing of how long it is: entries below it are errors.
    return WITHIN * jnp.min(jnp.where(reach > 0, reach, jnp.inf))


def _label(
    held: Mapping[str, Any], feature: jax.Array, wanted: jax.Array, start: jax.Array, training: LocalTraining
) -> jax.Array:
    """(C,) the label whose mean derivative by the logits is the one wanted, by Newton's method."""
    unit = jnp.eye(start.size, dtype=start.dtype)

    def lacks(label: jax.Array) -> jax.Array:
        return run_head(held["kernel"], held.get("bias"), feature, label, training)[0] - wanted

    def step(label: jax.Array, _: None) -> tuple[jax.Array, None]:
        gap, jacobian = lacks(label), jax.jacfwd(lacks)(label)
        normal = jacobian.T @ jacobian
        # All labels together move no logit: that direction is left alone.
        inverse = inverse_and_log_determinant(normal + 1e-12 * jnp.trace(normal) * unit)[0]
        move = -inverse @ (jacobian.T @ gap)
        lengths = jnp.asarray(SHORTER)
        gaps = jax.vmap(lambda length: jnp.sum(lacks(label + length * move) ** 2))(lengths)
        return with_sum_one(label + lengths[jnp.argmin(gaps)] * move), None

    return jax.lax.scan(step, start, None, length=NEWTON_STEPS)[0]
