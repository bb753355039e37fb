"""Exact inversion of a chain of layers: from the head's input back to the images, one layer at a time.

Going backwards, each layer's output and the loss's derivative by it are known. A dense layer's gradient
G = sum_b h_b delta_b^T gives its inputs in closed form; a convolution's input is a linear least-squares problem
(`layer_equations`); an activation is inverted. What each value's errors do to the next layer is carried along to first
order, and sets the weights there. Source: Zhu and Blaschko, R-GAP (ICLR 2021); Wang, Liang and He (ICLR 2024).

Labels play no part: the derivative by the logits is read off the head's gradient, so that an unknown scale of all
gradients drops out, and the client's own rounding of softmax(z) - y with it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.images.layer_chain import (
    Activation,
    Chain,
    Convolution,
    Dense,
    Flatten,
    Pool,
    apply_chain,
    chain_inputs,
    layer_parameters,
    layers_as_tree,
)
from softinv_jax.images.layer_equations import equations_of, solve_layer
from softinv_jax.images.layer_operator import Geometry, sum_patches
from softinv_jax.linear_algebra import inverse_and_log_determinant

__all__ = ["ChainInversion", "Known", "enter_head", "gradient_distance", "invert_chain", "invert_from", "undo_layers"]

# A value within so many standard deviations of its activation's limits says no more than that it is there.
CERTAIN = 6.0
# The client rounds every product of a sum: a few units of its largest entry.
ROUNDINGS = 4.0
STEPS = 3000


class ChainInversion(NamedTuple):
    """Images (B, H, W, c) and their standard deviations; and, (L,) by layer from the last, what the solver met."""

    images: jax.Array
    deviation: jax.Array
    logit_gradient: jax.Array
    condition: jax.Array
    misfit: jax.Array
    steps: jax.Array


class Known(NamedTuple):
    """What is known between two layers: values (B, ...), the loss's derivative by them, and both's deviations."""

    value: jax.Array
    value_deviation: jax.Array
    delta: jax.Array
    delta_deviation: jax.Array


class _Met(NamedTuple):
    """Of one layer's equations."""

    condition: jax.Array
    misfit: jax.Array
    steps: jax.Array


def invert_chain(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    features: jax.Array,
    image_shape: tuple[int, int, int],
    *,
    unit_roundoff: float | jax.Array,
    steps: int = STEPS,
) -> ChainInversion:
    """Invert one gradient; pure, to be traced in float64.

    Args:
      chain, image_shape, steps: static.
      parameters, gradients: by layer; the gradients those of the mean or sum over B examples, or any multiple of it.
      features: (B, d) the head's inputs, as recovered from its gradient.
      unit_roundoff: of the gradients' dtype.
    """
    head = chain[-1]
    assert isinstance(head, Dense)
    known, logit_gradient = enter_head(head, parameters, gradients, features, unit_roundoff)
    layers = range(len(chain) - 2, -1, -1)
    found = undo_layers(chain, parameters, gradients, known, image_shape, layers, unit_roundoff, steps)
    return _at_the_image(*found, logit_gradient)


def invert_from(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    inputs: jax.Array,
    input_deviation: jax.Array,
    delta: jax.Array,
    logit_gradient: jax.Array,
    image_shape: tuple[int, int, int],
    *,
    position: int,
    unit_roundoff: float | jax.Array,
    steps: int | jax.Array = STEPS,
    delta_shifts: Sequence[jax.Array] | None = None,
    guesses: Sequence[jax.Array] | None = None,
) -> ChainInversion:
    """Invert what comes before the layer at `position`, whose inputs are known, as `invert_chain` does.

    Args:
      chain, image_shape, position: static.
      inputs: (B, d) what enters that layer. input_deviation: (B, d). delta: (B, d) the loss's derivative by it.
      logit_gradient: (B, C), for the result.
      delta_shifts: for each layer before, (B, ...) what the derivative by its output differs from the one that follows
        from the layer after it, where the gradients are means over steps.
      guesses: for each layer before, (B, ...) what enters it in a guess: the solvers begin there.
    """
    known = Known(inputs, input_deviation, delta, ROUNDINGS * unit_roundoff * jnp.abs(delta))
    found = undo_layers(
        chain,
        parameters,
        gradients,
        known,
        image_shape,
        range(position - 1, -1, -1),
        unit_roundoff,
        steps,
        delta_shifts,
        guesses,
    )
    return _at_the_image(*found, logit_gradient)


def _at_the_image(known: Known, met: Sequence[_Met], logit_gradient: jax.Array) -> ChainInversion:
    return ChainInversion(
        known.value,
        known.value_deviation,
        logit_gradient,
        # A head alone has no layer before it.
        *(jnp.stack([getattr(one, name) for one in met]) if met else jnp.zeros(0) for name in _Met._fields),
    )


def undo_layers(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    known: Known,
    image_shape: tuple[int, int, int],
    layers: Sequence[int],
    unit_roundoff: float | jax.Array,
    steps: int | jax.Array = STEPS,
    delta_shifts: Sequence[jax.Array] | None = None,
    guesses: Sequence[jax.Array] | None = None,
) -> tuple[Known, list[_Met]]:
    """From what leaves the first of `layers` to what enters the last: positions that fall by one. See `invert_from`."""
    shapes = chain_inputs(chain, parameters, image_shape)
    met: list[_Met] = []
    for index in layers:
        layer, shape = chain[index], shapes[index]
        if delta_shifts is not None:
            known = known._replace(delta=known.delta + delta_shifts[index])
        if isinstance(layer, Flatten):
            known = Known(*(array.reshape(-1, *shape) for array in known))
        elif isinstance(layer, Activation):
            known = _undo_activation(layer, known)
        elif isinstance(layer, Pool):
            raise ValueError("pooling cannot be undone by itself; the images are solved for as a whole, or matched")
        else:
            held, gradient = layer_parameters(parameters, layer.name), layer_parameters(gradients, layer.name)["kernel"]
            if isinstance(layer, Dense):
                known, evidence = _undo_dense(held["kernel"], gradient, known, unit_roundoff)
            else:
                centre = jnp.asarray(_centre(chain[:index]), known.value.dtype)
                centre = jnp.broadcast_to(centre if guesses is None else guesses[index], (len(known.value), *shape))
                known, evidence = _undo_convolution(layer, held, gradient, known, shape, centre, unit_roundoff, steps)
            met.append(evidence)
    return known, met


def enter_head(
    head: Dense,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    features: jax.Array,
    unit_roundoff: float | jax.Array,
) -> tuple[Known, jax.Array]:
    """The client's own p - y, (B, C), is what the head's gradient X^T (p - y) holds."""
    kernel = layer_parameters(parameters, head.name)["kernel"].astype(features.dtype)
    observed = layer_parameters(gradients, head.name)["kernel"].astype(features.dtype)
    logit_gradient = _dual(features)[0] @ observed
    delta = logit_gradient @ kernel.T
    deviation = 2 * unit_roundoff * jnp.max(jnp.abs(features)) * jnp.ones_like(features)
    return Known(features, deviation, delta, unit_roundoff * jnp.abs(delta)), logit_gradient


def _dual(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(A A^T)^-1 A for independent rows A, and its condition (an upper bound); not finite where they depend.

    Without LAPACK: several inversions run at once, and such calls can hang XLA's CPU runtime.
    """
    scale = jnp.sqrt(jnp.sum(rows**2, axis=1, keepdims=True))
    unit = rows / scale
    gram = unit @ unit.T
    inverse, _ = inverse_and_log_determinant(gram)
    return inverse @ unit / scale, jnp.sqrt(jnp.sqrt(jnp.sum(gram**2) * jnp.sum(inverse**2)))


def _undo_activation(layer: Activation, known: Known) -> Known:
    function = ACTIVATIONS[layer.function]
    value, deviation = known.value, known.value_deviation
    reach = CERTAIN * deviation
    certain = (value > function.low + reach) & (value < function.high - reach)
    # A deviation beyond the whole range must not lead out of it.
    margin = jnp.minimum(deviation, (function.high - function.low) / 4)
    inside = jnp.clip(value, function.low + margin, function.high - margin)
    if function.invert is None:
        raise ValueError(f"activation {layer.function!r} falls and rises, so that it cannot be undone; use matching")
    before = function.invert(inside if function.one_to_one else value)

    def slope(inputs: jax.Array) -> jax.Array:
        return jax.grad(lambda values: jnp.sum(function.apply(values)))(inputs)

    first = slope(before)
    second = jax.grad(lambda inputs: jnp.sum(slope(inputs)))(before)
    if not function.one_to_one:
        first = jnp.where(certain, first, 0.0)
    # Where the value is not certain, neither is the input; but the derivative there is as small as the slope is.
    carried = deviation / jnp.where(first > 0, first, 1.0)
    delta_deviation = jnp.hypot(
        second * known.delta * jnp.where(first > 0, carried, 0.0), first * known.delta_deviation
    )
    return Known(before, jnp.where(certain, carried, jnp.inf), first * known.delta, delta_deviation)


def _undo_dense(
    kernel: jax.Array, gradient: jax.Array, known: Known, unit_roundoff: float | jax.Array
) -> tuple[Known, _Met]:
    """H = pinv(delta)^T G^T. The large products stay in the gradient's own dtype: they are exact enough."""
    dual, condition = _dual(known.delta)
    # Matrix times vectors, as the matrix lies in memory: transposed, XLA would copy it first.
    value = jnp.matmul(gradient, dual.astype(gradient.dtype).T, precision="highest").T.astype(known.value.dtype)
    noise = unit_roundoff * jnp.max(jnp.abs(gradient)) * jnp.sqrt(jnp.sum(dual**2, axis=1))[:, None]
    deviation = noise + unit_roundoff * jnp.abs(value)
    delta = jnp.matmul(kernel, known.delta.astype(kernel.dtype).T, precision="highest").T.astype(known.delta.dtype)
    evidence = _Met(condition, jnp.zeros(()), jnp.zeros((), jnp.int32))
    return Known(value, deviation, delta, ROUNDINGS * unit_roundoff * jnp.abs(delta)), evidence


def _undo_convolution(
    layer: Convolution,
    held: Mapping[str, Any],
    gradient: jax.Array,
    known: Known,
    shape: tuple[int, ...],
    centre: jax.Array,
    unit_roundoff: float | jax.Array,
    steps: int | jax.Array,
) -> tuple[Known, _Met]:
    dtype = known.value.dtype
    kernel, gradient = held["kernel"].astype(dtype), gradient.astype(dtype)
    bias = held["bias"].astype(dtype) if "bias" in held else jnp.zeros((kernel.shape[-1],), dtype)
    geometry = Geometry((shape[0], shape[1], shape[2]), kernel.shape[:2], layer.strides, layer.padding)
    examples = known.value.shape[0]
    # The coefficients of the gradient's equations have errors of their own, which the input's size multiplies.
    size = jnp.sum(gradient**2, axis=(0, 1, 3)) / (kernel.shape[0] * kernel.shape[1] * jnp.sum(known.delta**2))
    carried = size[:, None] * jnp.sum(known.delta_deviation**2, axis=(0, 1, 2))[None, :]
    rounding = ROUNDINGS * unit_roundoff * jnp.max(jnp.abs(gradient))
    gradient_deviation = jnp.broadcast_to(jnp.sqrt(rounding**2 + carried[None, None]), kernel.shape)
    forward_deviation = jnp.hypot(known.value_deviation, unit_roundoff * jnp.abs(known.value))
    equations = equations_of(
        kernel,
        known.delta,
        known.value - bias[None, None, None],
        forward_deviation,
        gradient,
        gradient_deviation,
        geometry,
    )
    keys = jax.random.split(jax.random.key(0))
    # Drawn in float32: a float64 would be made from its bits, for which there is nothing on a TPU.
    noise = (
        jax.random.normal(keys[0], (1, *equations.forward.shape), jnp.float32).astype(dtype)
        * (equations.forward_weight > 0)[None],
        jax.random.normal(keys[1], (1, *equations.gradient.shape), jnp.float32).astype(dtype),
    )
    solution = solve_layer(equations, centre, noise, geometry, steps)
    # One draw of the noise shows each entry's deviation but roughly: half of it, and half its channel's mean.
    own = solution.deviation**2
    deviation = jnp.sqrt((own + jnp.mean(own, axis=(1, 2), keepdims=True)) / 2 + unit_roundoff**2)
    flat = kernel.reshape(-1, kernel.shape[-1])

    def backwards(derivative: jax.Array, weights: jax.Array) -> jax.Array:
        return sum_patches(jnp.matmul(derivative.reshape(examples, -1, derivative.shape[-1]), weights.T), geometry)

    delta = backwards(known.delta, flat)
    delta_deviation = jnp.sqrt(backwards(known.delta_deviation**2, flat**2))
    evidence = _Met(solution.condition, solution.misfit, solution.steps)
    return Known(solution.value, deviation, delta, delta_deviation), evidence


def _centre(before: Chain) -> float:
    """What the output of the layers before is taken to be where nothing is known of it."""
    for layer in reversed(before):
        if isinstance(layer, Activation):
            function = ACTIVATIONS[layer.function]
            return (function.low + function.high) / 2 if math.isfinite(function.low + function.high) else 0.0
    return 0.0


@partial(jax.jit, static_argnames=("chain",))
def gradient_distance(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    images: jax.Array,
    logit_gradient: jax.Array,
) -> jax.Array:
    """() relative distance between the gradient of the images and the one observed, the largest over the kernels.

    Args:
      images: (B, H, W, c). logit_gradient: (B, C), derivative of the loss by the logits.
    """
    names = [layer.name for layer in chain if isinstance(layer, Convolution | Dense)]
    kernels = {name: layer_parameters(parameters, name) for name in names}
    _, pullback = jax.vjp(lambda held: apply_chain(chain, layers_as_tree(held), images), kernels)
    (own,) = pullback(logit_gradient)
    distances = []
    for name in names:
        observed = layer_parameters(gradients, name)["kernel"]
        size = jnp.sqrt(jnp.sum(observed**2))
        distances.append(jnp.sqrt(jnp.sum((own[name]["kernel"] - observed) ** 2)) / jnp.where(size > 0, size, 1.0))
    return jnp.max(jnp.stack(distances))
