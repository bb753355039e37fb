"""First images through convolutions with ReLU and max-pooling, which decide by gates what passes.

Between gates everything is linear, so that Gauss-Newton works as soon as most gates are right; from blank images they
are not. Two things lead there. A later convolution's own gradient has many more equations than its input has values,
so that the input is found to a few percent from noise, gates included. And a gate that is wrong spoils the one value
behind it: values are fitted by least absolute deviations, which leave such values aside.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmin
from softinv_jax.images.determinacy import count_equations
from softinv_jax.images.exact import CERTAIN, Known
from softinv_jax.images.layer_chain import (
    Activation,
    Chain,
    Convolution,
    Pool,
    apply_chain,
    chain_inputs,
    layer_parameters,
    layers_as_tree,
)
from softinv_jax.matrix_free import gauss_newton_move, root_mean_square

__all__ = ["are_gated", "images_through_gates"]

LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.03)  # Of a step, of which the best is taken.
INNER_STEPS = 400
LAYER_MOVES = 10  # Of a layer by itself: by then it is as near as its gates let it come.
MOVES = 100
SETTLED = 1e-3  # Of the sum of deviations, by ten moves; less is no progress.
SMALL = 0.05  # Of the root mean square: inputs found to a few percent may as well be zero below it.


class _Target(NamedTuple):
    """What is known behind gates: values, which of them passed, and up to which the others may be above zero."""

    value: jax.Array
    passed: jax.Array
    floor: jax.Array
    deviation: jax.Array


def are_gated(layers: Chain) -> bool:
    """Whether all of these are convolutions, ReLU and max-pooling, with a gate among them."""
    gates = [
        layer for layer in layers if layer == Activation("relu") or (isinstance(layer, Pool) and layer.kind == "max")
    ]
    convolutions = sum(isinstance(layer, Convolution) for layer in layers)
    return bool(gates) and 0 < convolutions == len(layers) - len(gates) and isinstance(layers[0], Convolution)


def images_through_gates(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    known: Known,
    image_shape: tuple[int, int, int],
    end: int,
) -> jax.Array | None:
    """(B, H, W, c) images whose values behind the layers before `end` are nearly all those known; in float64.

    Args:
      chain: whose layers before `end` `are_gated`. known: what leaves them.
      parameters, gradients, image_shape: as of `exact.invert_chain`.

    Returns:
      None where a later convolution has too few equations of its own.
    """
    starts = [index for index, layer in enumerate(chain[:end]) if isinstance(layer, Convolution)]
    counts = {count.layer: count for count in count_equations(chain, parameters, image_shape, len(known.value))}
    for start in starts[1:]:
        layer = chain[start]
        assert isinstance(layer, Convolution)
        if counts[layer.name].gradient_equations < counts[layer.name].unknowns:
            return None
    shapes = chain_inputs(chain, parameters, image_shape)
    ends = [*starts[1:], end]
    targets = [_target(known, chain[starts[-1] : end])]
    delta = known.delta
    for start, stop in list(zip(starts, ends, strict=True))[:0:-1]:
        step = partial(_layer_step, chain, start, stop, parameters, gradients, targets[-1], delta)
        noise = jax.random.normal(jax.random.key(0), (len(delta), *shapes[start]), jnp.float32).astype(delta.dtype)
        inputs = _layer_inputs(step, jnp.abs(noise) * root_mean_square(targets[-1].value) / 2)
        targets.append(_rough(inputs))
        delta = _backwards(chain, start, stop, parameters, inputs, delta)
    images = jnp.zeros((len(known.value), *shapes[0]))
    for stop, target in zip(ends, targets[::-1], strict=True):
        images = _fit(chain, stop, parameters, target, images)
    return images


def _target(known: Known, layers: Chain) -> _Target:
    sure = jnp.isfinite(known.value_deviation)
    deviation = jnp.where(sure, known.value_deviation, 0.0)
    value = jnp.where(sure, known.value, 0.0)
    floor = CERTAIN * deviation
    cut = any(isinstance(layer, Activation) for layer in layers) or not bool(jnp.all(sure))
    return _Target(value, (sure & (value > floor)) if cut else sure, floor, deviation)


def _rough(inputs: jax.Array) -> _Target:
    """Of a layer's inputs, found to a few percent."""
    floor = jnp.full(inputs.shape, SMALL * root_mean_square(inputs))
    return _Target(inputs, inputs > floor, floor, floor / 10)


def _before_gates(layers: Chain) -> Chain:
    """Without the ReLU after the last convolution: a value that passed it is one before it."""
    last = max(index for index, layer in enumerate(layers) if isinstance(layer, Convolution))
    return layers[: last + 1] + tuple(layer for layer in layers[last + 1 :] if not isinstance(layer, Activation))


def _differ(values: jax.Array, target: _Target) -> jax.Array:
    return jnp.where(target.passed, values - target.value, jnp.maximum(values - target.floor, 0.0))


def _layer_inputs(step: Callable[[jax.Array], tuple[jax.Array, jax.Array]], inputs: jax.Array) -> jax.Array:
    """(B, ...) what enters a convolution, from its gradient and what leaves its gates; to a few percent.

    Args:
      step: of Gauss-Newton, which returns the misfit too. inputs: to begin with.
    """
    least, best = np.inf, inputs
    for _ in range(LAYER_MOVES):
        inputs, misfit = step(inputs)
        if float(misfit) < least:
            least, best = float(misfit), inputs
    return jnp.maximum(best, 0.0)


@partial(jax.jit, static_argnames=("chain", "start", "stop"))
def _layer_step(
    chain: Chain,
    start: int,
    stop: int,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    target: _Target,
    delta: jax.Array,
    inputs: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    layer = chain[start]
    assert isinstance(layer, Convolution)
    held = layer_parameters(parameters, layer.name)
    observed = layer_parameters(gradients, layer.name)["kernel"]
    sizes = root_mean_square(target.value), root_mean_square(observed)
    layers = _before_gates(chain[start:stop])
    passed = jnp.where(target.passed, delta, 0.0)

    def residual(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, pull = jax.vjp(lambda own: apply_chain(layers, layers_as_tree({layer.name: own}), point), held)
        (own,) = pull(passed)
        return _differ(values, target) / sizes[0], (own["kernel"] - observed) / sizes[1]

    return _best_length(residual, gauss_newton_move(residual, inputs, INNER_STEPS, 1e-6), inputs)


def _backwards(
    chain: Chain, start: int, stop: int, parameters: Mapping[str, Any], inputs: jax.Array, delta: jax.Array
) -> jax.Array:
    """The derivative by a layer's inputs."""
    _, pull = jax.vjp(lambda point: apply_chain(chain[start:stop], parameters, point), inputs)
    return pull(delta)[0]


def _fit(chain: Chain, stop: int, parameters: Mapping[str, Any], target: _Target, images: jax.Array) -> jax.Array:
    """Least absolute deviations, until they are as small as the values are known, or fall no more."""
    costs: list[float] = []
    for _ in range(MOVES):
        images, cost = _fit_step(chain, stop, parameters, target, images)
        costs.append(float(cost))
        gained = len(costs) <= 10 or costs[-1] < (1 - SETTLED) * costs[-11]
        if not gained or costs[-1] < float(jnp.sum(target.deviation)):
            break
    return images


@partial(jax.jit, static_argnames=("chain", "stop"))
def _fit_step(
    chain: Chain, stop: int, parameters: Mapping[str, Any], target: _Target, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step of iteratively reweighted least squares; half of the values count by their square."""
    layers = _before_gates(chain[:stop])
    smallest = jnp.finfo(jnp.float32).eps * root_mean_square(target.value)

    def residual(point: jax.Array) -> jax.Array:
        return _differ(apply_chain(layers, parameters, point), target)

    distance = jnp.abs(residual(images))
    near = jnp.maximum(jnp.median(distance), smallest)
    weight = jax.lax.rsqrt(jnp.maximum(distance, near))
    move = gauss_newton_move(lambda point: residual(point) * weight, images, INNER_STEPS, 1e-6)
    return _best_length(residual, move, images)


def _best_length(residual: Any, move: jax.Array, point: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a step, by the sum of absolute deviations; and that sum."""
    lengths = jnp.asarray(LENGTHS)

    def cost(length: jax.Array) -> jax.Array:
        sums = [jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(residual(point + length * move))]
        return jnp.sum(jnp.stack(sums))

    costs = jax.lax.map(cost, lengths)
    best = argmin(jnp.where(jnp.isfinite(costs), costs, jnp.inf))
    return point + lengths[best] * move, costs[best]
