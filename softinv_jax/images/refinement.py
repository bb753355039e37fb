"""A second-order polish of an image: nonlinear least squares on the equations gradient(image) = observed gradient."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax.typing import ArrayLike

from softinv_jax.float64 import in_float64
from softinv_jax.images.distances import norm
from softinv_jax.images.matching_input import check_gradients, checked_array, output_shape
from softinv_jax.images.objective import Model, mean_loss_gradient
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict
from softinv_jax.matrix_free import TruncatedLSMR, random_signs

__all__ = ["Refinement", "refine", "refine_image", "with_sum_one"]

# The first step is damped by this share of the mean squared column of the Jacobian (Marquardt's choice of scale).
FIRST_DAMPING = 1e-3
# Of the inner solver. At 1e-4 it stops before it sees the small singular values, and the image stays at 45 to 50 dB.
STEP_ACCURACY = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Refinement:
    """A polished image, in the dtype of the gradient.

    Attributes:
      image: like the image given. label: like the label given.
      misfit: () root mean square of (gradient of the image - observed) over the rounding noise of its layer; about 1 or
        less where the image explains the gradient to its last digit. start_misfit: () of the image given.
      gradient_residual: () |gradient of the image - observed| / |observed|. largest_residual: () the largest of that
        over the parameters.
      steps: () int32, trial steps taken.
      converged: () whether a step no longer changed the image or the misfit by more than `tolerance`.
    """

    image: jax.Array
    label: jax.Array
    misfit: jax.Array
    start_misfit: jax.Array
    gradient_residual: jax.Array
    largest_residual: jax.Array
    steps: jax.Array
    converged: jax.Array


def refine(
    apply_fn: Model,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    recovery: ImageRecovery,
    *,
    steps: int = 20,
    inner_steps: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> ImageRecovery:
    """Polish the images of `inversion.invert` or `inversion.match`, one gradient after the other, with their labels.

    An image is replaced where the new one explains the gradient better. What was inconsistent is then approximate if it
    explains it to half of the digits; nothing becomes exact, as the expected error stays that of the images given.

    Args:
      apply_fn, parameters: the model, as for `refine_image`.
      gradients: the parameters' names, each array with a leading axis of N gradients.
      recovery: of these. Images with NaN, and those `undetermined`, stay as they are.
      steps, inner_steps: see `refine_image`.
      progress: called with (gradients done, N).

    Returns:
      An `ImageRecovery`.

    Raises:
      ValueError: as `refine_image`.
    """
    images, verdict, residual = recovery.images.copy(), recovery.verdict.copy(), recovery.residual.copy()
    total, examples = verdict.shape
    for index in range(total):
        if np.all(np.isfinite(images[index])) and np.all(verdict[index] != ImageVerdict.UNDETERMINED):
            gradient = jax.tree.map(lambda leaf, index=index: leaf[index], gradients)
            start, label = images[index], recovery.labels[index]
            if examples == 1:
                start, label = start[0], label[0]
            found = refine_image(apply_fn, parameters, gradient, start, label, steps=steps, inner_steps=inner_steps)
            if found.misfit < found.start_misfit:
                images[index] = np.asarray(found.image).reshape(images[index].shape)
                residual[index] = float(found.largest_residual)
                agrees = residual[index] <= np.sqrt(np.finfo(recovery.labels.dtype).eps)
                mended = agrees & (verdict[index] == ImageVerdict.INCONSISTENT)
                verdict[index] = np.where(mended, ImageVerdict.APPROXIMATE, verdict[index])
        if progress is not None:
            progress(index + 1, total)
    return replace(recovery, images=images, verdict=verdict, residual=residual)


def refine_image(
    apply_fn: Model,
    parameters: Any,
    gradient: Any,
    image: ArrayLike,
    label: ArrayLike,
    *,
    optimise_label: bool = False,
    steps: int = 100,
    inner_steps: int = 500,
    tolerance: float = 1e-4,
) -> Refinement:
    """Levenberg-Marquardt from a given image, without forming the Jacobian; float64 inside.

    Each layer's equations are weighted by its rounding noise, eps max|gradient of the layer|. The model must compute in
    the dtype of its parameters, and its derivatives must be continuous where this is to converge fast.

    Args:
      apply_fn: the model, (parameters, image (H, W, channels)) -> logits (C,), one function object for all calls.
      parameters: pytree of floating arrays.
      gradient: pytree like the parameters, of one example or of the mean loss of a batch.
      image: (H, W, channels) or (B, H, W, channels), where to begin.
      label: (C,) or (B, C).
      optimise_label: solve for the label too, with a sum of 1; its entries are not kept from being negative.
      steps: largest number of trial steps.
      inner_steps: largest number of products with the Jacobian and its transpose in each step (LSMR). It also
        regularises: directions that the gradient hardly determines come last.
      tolerance: see `Refinement`.

    Returns:
      A `Refinement`.

    Raises:
      ValueError: a gradient that does not fit the parameters, shapes that do not fit each other, NaN or infinite
        entries, a gradient of zeros, or limits below 1.
    """
    check_gradients(parameters, jax.tree.map(lambda leaf: np.asarray(leaf)[None], gradient))
    shape = np.shape(image)
    if len(shape) not in (3, 4):
        raise ValueError(f"image must have shape (H, W, channels) or (B, H, W, channels), not {shape}")
    for name, value in (("steps", steps), ("inner_steps", inner_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    dtype = jnp.result_type(*jax.tree.leaves(gradient))
    classes = output_shape("apply_fn", apply_fn, parameters, shape, jnp.result_type(*jax.tree.leaves(parameters)))
    arrays = (
        checked_array("image", image, shape, dtype),
        checked_array("label", label, (*shape[:-3], *classes), dtype),
    )
    found = _refine(apply_fn, parameters, gradient, arrays, optimise_label, steps, inner_steps, tolerance)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, found)


@in_float64
def _refine(
    apply_fn: Model,
    parameters: Any,
    gradient: Any,
    arrays: tuple[jax.Array, jax.Array],
    optimise_label: bool,
    steps: int,
    inner_steps: int,
    tolerance: float,
) -> Refinement:
    epsilon = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(gradient))).eps)
    parameters, gradient, arrays = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64), (parameters, gradient, arrays)
    )
    return _solve(parameters, gradient, *arrays, epsilon, tolerance, apply_fn, optimise_label, steps, inner_steps)


def with_sum_one(label: jax.Array) -> jax.Array:
    """(..., C) the label, what its sum lacks of 1 spread over all classes."""
    return label + (1 - jnp.sum(label, axis=-1, keepdims=True)) / label.shape[-1]


@partial(jax.jit, static_argnames=("apply_fn", "optimise_label", "steps", "inner_steps"))
def _solve(
    parameters: Any,
    gradient: Any,
    image: jax.Array,
    label: jax.Array,
    epsilon: jax.Array,
    tolerance: jax.Array,
    apply_fn: Model,
    optimise_label: bool,
    steps: int,
    inner_steps: int,
) -> Refinement:
    noise = jax.tree.map(lambda leaf: epsilon * jnp.max(jnp.abs(leaf)), gradient)
    # A layer without gradient has none to compare with: it counts like one at the smallest noise of the others.
    least = jnp.min(jnp.stack([jnp.where(leaf > 0, leaf, jnp.inf) for leaf in jax.tree.leaves(noise)]))
    noise = jax.tree.map(lambda leaf: jnp.where(leaf > 0, leaf, least), noise)

    def residual(unknown: tuple[jax.Array, jax.Array | None], scale: jax.Array) -> Any:
        image, free_label = unknown
        dummy = mean_loss_gradient(
            apply_fn, parameters, image, label if free_label is None else with_sum_one(free_label)
        )
        return jax.tree.map(lambda one, other, unit: (one - other) / (unit * scale), dummy, gradient, noise)

    start = (image, label if optimise_label else None)
    one = jnp.ones((), image.dtype)
    start_residual, transpose = jax.vjp(partial(residual, scale=one), start)
    # E |J^T v|^2 over random signs v is the sum of J's squared columns; their mean scales the damping.
    (column,) = transpose(random_signs(jax.random.key(0), start_residual))
    scale = jnp.sqrt(FIRST_DAMPING * jnp.mean(jnp.square(column[0])))
    inner = TruncatedLSMR(rtol=STEP_ACCURACY, atol=0.0, max_steps=inner_steps, conlim=np.inf)
    solver = optimistix.LevenbergMarquardt(rtol=tolerance, atol=tolerance, linear_solver=inner)
    solution = optimistix.least_squares(
        residual, solver, start, args=jnp.where(scale > 0, scale, one), max_steps=steps, throw=False
    )
    image, free_label = solution.value
    final = residual(solution.value, one)
    count = sum(leaf.size for leaf in jax.tree.leaves(final))
    difference = jax.tree.map(jnp.multiply, final, noise)
    # As `exact.gradient_distance`: a parameter without gradient counts by itself.
    residuals = jax.tree.map(
        lambda one, other: norm(one) / jnp.where(norm(other) > 0, norm(other), 1.0), difference, gradient
    )
    return Refinement(
        image=image,
        label=label if free_label is None else with_sum_one(free_label),
        misfit=norm(final) / np.sqrt(count),
        start_misfit=norm(start_residual) / np.sqrt(count),
        gradient_residual=norm(difference) / norm(gradient),
        largest_residual=jnp.max(jnp.stack(jax.tree.leaves(residuals))),
        steps=solution.stats["num_steps"].astype(jnp.int32),
        converged=solution.result == optimistix.RESULTS.successful,
    )
