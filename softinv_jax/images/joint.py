"""Images from several layers at once, where one layer by itself has too few equations for what enters it.

An early layer has more values than the images have: what enters the layer after it lies on the surface of what images
can give. Going back layer by layer does not use that. So the layers are undone as far as each is determined; from
there on the images are the unknowns: run forward they must give the values known, and run backward, from the
derivatives known, the layers' gradients (Gauss-Newton, from blank images). In the end nothing is taken as known: images
and derivatives by the logits together must give the gradients of all layers, to rounding. An activation that cannot be
undone, as GELU, only makes this begin further back.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmin, in_float64
from softinv_jax.images.determinacy import count_equations
from softinv_jax.images.exact import ROUNDINGS, Known, enter_head, gradient_distance, undo_layers
from softinv_jax.images.gated_layers import are_gated, images_through_gates
from softinv_jax.images.layer_chain import (
    Chain,
    Convolution,
    Dense,
    apply_chain,
    can_be_undone,
    layer_can_be_undone,
    layer_parameters,
    layers_as_tree,
)
from softinv_jax.images.verdicts import EXPLAINED, ImageVerdict, judge_image
from softinv_jax.matrix_free import INNER_STEPS, descend, expected_errors, gauss_newton_move, root_mean_square
from softinv_jax.observation.rank_one import unit_roundoff

__all__ = [
    "JointInversion",
    "JointTask",
    "first_images",
    "from_head",
    "invert_jointly",
    "judge_joint",
    "largest_noise_share",
    "without_noise",
]

LENGTHS = (1.0, 0.5, 0.2, 0.05)  # Of a step, of which the best is taken.
NOISE_STARTS = 2
NEAR = 10.0  # Misfit from which all layers go on together.
ACCURACY = 1e-7  # Of LSMR in a step of Gauss-Newton; the next step corrects what is left.
ERROR_ACCURACY = 1e-11  # In the draw of the error, which nothing corrects: too coarse, the error is overstated.
FINAL_STEPS = 8000
SETTLED = 0.01  # Of the misfit.


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["parameters", "gradients", "inputs", "deviation", "delta", "logit_gradient", "unit_roundoff", "noise"],
    meta_fields=["chain", "image_shape", "position"],
)
@dataclass(frozen=True)
class JointTask:
    """One gradient of B examples; what is known of them is float64.

    Attributes:
      chain: the network. image_shape: (H, W, channels). position: of a layer whose inputs are known.
      parameters, gradients: by layer; the gradients those of the mean or sum over the examples, or a multiple of it.
      inputs: (B, d) of that layer. deviation: (B, d). delta: (B, d) the loss's derivative by them.
      logit_gradient: (B, C) the derivative by the logits.
      unit_roundoff: of the gradients' dtype.
      noise: the gradients' tree, () root mean square of each array's error beyond that, as rounded parameters leave it.
    """

    chain: Chain
    image_shape: tuple[int, int, int]
    position: int
    parameters: Mapping[str, Any]
    gradients: Mapping[str, Any]
    inputs: jax.Array
    deviation: jax.Array
    delta: jax.Array
    logit_gradient: jax.Array
    unit_roundoff: float
    noise: Mapping[str, Any]


class JointInversion(NamedTuple):
    """images: (B, H, W, c). error: (B,) root mean square to expect, for a misfit of 1 or more.

    misfit: root mean square of what the gradients of all layers differ by, in units of rounding. residual: see
    `exact.gradient_distance`.
    """

    images: np.ndarray
    error: np.ndarray
    misfit: float
    residual: float


class _Unknowns(NamedTuple):
    images: jax.Array
    logit_gradient: jax.Array


@in_float64
def from_head(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    features: np.ndarray,
    image_shape: tuple[int, int, int],
    noise: Mapping[str, Any] | None = None,
) -> JointTask:
    """One gradient, by layer, whose examples' features (B, d) are known from the head; noise: see `JointTask`."""
    head = chain[-1]
    assert isinstance(head, Dense)
    roundoff = unit_roundoff(layer_parameters(gradients, head.name)["kernel"].dtype)
    inputs = jnp.asarray(features, jnp.float64)
    noise = noise or without_noise(gradients)
    relative = largest_noise_share(gradients, noise, roundoff)
    known, logit_gradient = enter_head(head, parameters, gradients, inputs, relative)
    return JointTask(
        chain,
        image_shape,
        len(chain) - 1,
        parameters,
        gradients,
        inputs,
        known.value_deviation,
        known.delta,
        logit_gradient,
        roundoff,
        noise,
    )


def without_noise(gradients: Mapping[str, Any]) -> Mapping[str, Any]:
    """For `JointTask.noise`."""
    return jax.tree.map(lambda leaf: 0.0, dict(gradients))


def largest_noise_share(gradients: Mapping[str, Any], noise: Mapping[str, Any], roundoff: float) -> jax.Array:
    """() of the array with most noise: relative to its largest entry; the unit roundoff where that is more."""
    shares = jax.tree.map(
        lambda leaf, error: error / jnp.maximum(jnp.max(jnp.abs(leaf)), jnp.finfo(jnp.float32).tiny),
        dict(gradients),
        dict(noise),
    )
    return jnp.maximum(roundoff, jnp.max(jnp.stack([jnp.asarray(share) for share in jax.tree.leaves(shares)])))


@in_float64
def invert_jointly(task: JointTask, start: np.ndarray | None = None) -> JointInversion:
    """Find the images; see `JointTask`.

    Args:
      start: (B, H, W, c) images to begin with, if there are any; else blank ones.

    Returns:
      A `JointInversion`. Its error is that of the linearised equations at the solution: noise's part, and what they or
      the solver leave undetermined; it says nothing unless the misfit is about 1 or less.
    """
    task = _with_float64(task)
    images = iter([jnp.asarray(start, jnp.float64)]) if start is not None else _search(task)
    point, misfit = _settle(task, _Unknowns(next(images), task.logit_gradient))
    for others in images:
        if misfit < EXPLAINED:
            break
        after, found = _settle(task, _Unknowns(others, task.logit_gradient))
        if found < misfit:
            point, misfit = after, found
    size = jnp.std(point.images)
    error = np.asarray(_error(task, point, jnp.where(size > 0, size, 1.0), FINAL_STEPS)) * max(misfit, 1.0)
    residual = gradient_distance(task.chain, task.parameters, task.gradients, point.images, point.logit_gradient)
    return JointInversion(np.asarray(point.images), error, misfit, float(residual))


@in_float64
def first_images(task: JointTask) -> jax.Array:
    """(B, H, W, c) images near those that `invert_jointly` ends with; also for what is no gradient, but nearly one."""
    return next(_search(_with_float64(task)))


def judge_joint(found: JointInversion, error: float, image: np.ndarray, roundoff: float) -> ImageVerdict:
    """The verdict on one of the images, with its error; roundoff: of the gradient's dtype."""
    if not found.misfit < EXPLAINED:
        return ImageVerdict.INCONSISTENT
    # That they agree the misfit has said: of an update's digits half may be rounded away.
    return judge_image(True, 0.0, error, image, roundoff)


def _with_float64(task: JointTask) -> JointTask:
    parameters, gradients = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64), (dict(task.parameters), dict(task.gradients))
    )
    return replace(task, parameters=parameters, gradients=gradients)


def _search(task: JointTask) -> Iterator[jax.Array]:
    """Gauss-Newton on the layers that are left when those after them are undone; from one start, then from others."""
    end = _end(task)
    known = _undone(task, end)
    if are_gated(task.chain[:end]):
        through = images_through_gates(task.chain, task.parameters, task.gradients, known, task.image_shape, end)
        if through is not None:
            yield through
    firsts = [_improved(task, end, known, start, INNER_STEPS[0]) for start in _starts(task, end)]

    def step(images: jax.Array, steps: int) -> tuple[jax.Array, float]:
        after, found = _improved(task, end, known, images, steps)
        return after, float(found)

    firsts = [first for first in firsts if jnp.isfinite(first[1])] or firsts[:1]
    for images, misfit in sorted(firsts, key=lambda first: float(first[1])):
        yield descend(step, images, float(misfit), NEAR)[0]


def _starts(task: JointTask, end: int) -> list[jax.Array]:
    """Blank images, what one layer after the other gives, and noise: it is what gets through ReLU without biases."""
    blank = jnp.zeros((len(task.inputs), *task.image_shape))
    keys = jax.random.split(jax.random.key(0), NOISE_STARTS)
    # Drawn in float32: a TPU draws no float64.
    starts = [blank, *(jax.random.normal(key, blank.shape, jnp.float32).astype(blank.dtype) / 2 for key in keys)]
    if can_be_undone(task.chain[:end]):
        starts.insert(1, _undone(task, 0).value)
    return starts


def _settle(task: JointTask, point: _Unknowns) -> tuple[_Unknowns, float]:
    """Gauss-Newton on everything, until it gains no more."""
    misfit = np.inf
    for steps in (*INNER_STEPS[2:], *([FINAL_STEPS] * 4)):
        after, found = _moved(task, point, steps)
        if not found < misfit:
            break
        gain, point, misfit = 1 - float(found) / misfit, after, float(found)
        if misfit < ROUNDINGS and gain < SETTLED:
            break
    return point, misfit


def _end(task: JointTask) -> int:
    """Where the layers end that are solved together: the last of them is not determined, or cannot be undone."""
    chain, batch = task.chain, len(task.inputs)
    counts = {
        count.layer: count.determined for count in count_equations(chain, task.parameters, task.image_shape, batch)
    }
    for index in range(task.position - 1, -1, -1):
        layer = chain[index]
        if not layer_can_be_undone(layer):
            return index + 1
        if isinstance(layer, Convolution | Dense) and not counts[layer.name]:
            return index + 1
    # Every layer by itself would do: the first one takes the others along.
    first = next(index for index, layer in enumerate(chain) if isinstance(layer, Convolution | Dense))
    return first + 1


@partial(jax.jit, static_argnames="end")
def _undone(task: JointTask, end: int) -> Known:
    """What leaves the layers that are solved together."""
    relative = largest_noise_share(task.gradients, task.noise, task.unit_roundoff)
    known = Known(task.inputs, task.deviation, task.delta, ROUNDINGS * relative * jnp.abs(task.delta))
    layers = range(task.position - 1, end - 1, -1)
    return undo_layers(task.chain, task.parameters, task.gradients, known, task.image_shape, layers, relative)[0]


@partial(jax.jit, static_argnames="end")
def _improved(task: JointTask, end: int, known: Known, images: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """One step on the layers before `end`; and the misfit."""
    kernels = _kernels(task, end)
    sure = jnp.isfinite(known.value_deviation)
    deviation = jnp.hypot(known.value_deviation, task.unit_roundoff * jnp.abs(known.value))
    forward_weight = jnp.where(sure, 1 / deviation, 0.0)
    carried = root_mean_square(known.delta_deviation) / root_mean_square(known.delta)
    deviations = _deviations(task, kernels, jnp.hypot(ROUNDINGS * task.unit_roundoff, carried))

    def residual(images: jax.Array) -> Any:
        value, gradients = _run(task, end, kernels, images, known.delta)
        return forward_weight * (value - jnp.where(sure, known.value, 0.0)), _differ(task, gradients, deviations)

    return _best_step(residual, images, steps)


@jax.jit
def _moved(task: JointTask, point: _Unknowns, steps: int) -> tuple[_Unknowns, jax.Array]:
    """One step on all layers; and the misfit."""
    return _best_step(_whole(task), point, steps)


@jax.jit
def _error(task: JointTask, point: _Unknowns, size: jax.Array, steps: int) -> jax.Array:
    sizes = _Unknowns(size, root_mean_square(point.logit_gradient))
    drawn = expected_errors(_whole(task), point, sizes, jax.random.key(1), steps, ERROR_ACCURACY)
    return jnp.sqrt(jnp.mean(drawn.images**2, axis=(1, 2, 3)))


def _whole(task: JointTask) -> Callable[[_Unknowns], Any]:
    """The equations of everything that was sent, each in units of its rounding."""
    end = len(task.chain)
    kernels = _kernels(task, end)
    deviations = _deviations(task, kernels, task.unit_roundoff)

    def residual(point: _Unknowns) -> Any:
        return _differ(task, _run(task, end, kernels, point.images, point.logit_gradient)[1], deviations)

    return residual


def _run(
    task: JointTask, end: int, kernels: dict[str, Any], images: jax.Array, delta: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """What leaves the layers before `end`, and their gradients for a derivative by it."""
    value, pull = jax.vjp(lambda held: apply_chain(task.chain[:end], layers_as_tree(held), images), kernels)
    return value, pull(delta)[0]


def _kernels(task: JointTask, end: int) -> dict[str, Any]:
    layers = [layer for layer in task.chain[:end] if isinstance(layer, Convolution | Dense)]
    return {layer.name: layer_parameters(task.parameters, layer.name) for layer in layers}


def _deviations(task: JointTask, kernels: dict[str, Any], relative: jax.Array | float) -> dict[str, Any]:
    """Of each array that was sent: relative to its largest entry, and its noise.

    Where all entries are zero, as the smallest of the others.
    """
    largest = {
        name: jax.tree.map(lambda leaf: jnp.max(jnp.abs(leaf)), layer_parameters(task.gradients, name))
        for name in kernels
    }
    noise = {name: layer_parameters(task.noise, name) for name in kernels}
    least = jnp.min(jnp.stack([jnp.where(leaf > 0, leaf, jnp.inf) for leaf in jax.tree.leaves(largest)]))
    return jax.tree.map(
        lambda leaf, error: jnp.hypot(relative * jnp.where(leaf > 0, leaf, least), error), largest, noise
    )


def _differ(task: JointTask, own: dict[str, Any], deviations: dict[str, Any]) -> dict[str, Any]:
    """Biases whose gradients were not sent are left out."""
    return {
        name: {
            part: (own[name][part] - layer_parameters(task.gradients, name)[part]) / deviation
            for part, deviation in parts.items()
        }
        for name, parts in deviations.items()
    }


def _best_step(residual: Callable[[Any], Any], point: Any, steps: int) -> tuple[Any, jax.Array]:
    move = gauss_newton_move(residual, point, steps, ACCURACY)

    def after(length: jax.Array) -> Any:
        return jax.tree.map(lambda value, change: value + length * change, point, move)

    lengths = jnp.asarray(LENGTHS)
    misfits = jax.lax.map(lambda length: root_mean_square(residual(after(length))), lengths)
    misfits = jnp.where(jnp.isfinite(misfits), misfits, jnp.inf)
    best = argmin(misfits)
    return after(lengths[best]), misfits[best]
