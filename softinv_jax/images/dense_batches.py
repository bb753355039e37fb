"""Images of a batch through the dense end of a chain: the examples told apart there, the layers before it undone."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.dense_layers.layers import DenseLayers, dense_layers
from softinv_jax.dense_layers.recovery import DenseRecovery, recover_dense
from softinv_jax.images.determinacy import count_equations, determined_together
from softinv_jax.images.exact import ChainInversion, gradient_distance, invert_from
from softinv_jax.images.joint import JointInversion, JointTask, invert_jointly, largest_noise_share, without_noise
from softinv_jax.images.layer_chain import (
    Activation,
    Chain,
    Convolution,
    Dense,
    Flatten,
    can_be_undone,
    layer_parameters,
)
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.observation.rank_one import unit_roundoff

__all__ = ["DenseImages", "chain_layers", "dense_end", "invert_dense"]


class DenseImages(NamedTuple):
    """Of one gradient of B examples.

    recovery: labels and what else the dense layers give. images: (B, H, W, channels), NaN where not found. deviation:
    (B,) root mean square. residual: relative distance of the gradient from that of all images together, NaN unless all
    were found; tolerated: what it may be. condition, misfit: by layer before the one that told the examples apart,
    see `exact.ChainInversion`. joint: where those layers were solved together.
    """

    recovery: DenseRecovery
    images: np.ndarray
    deviation: np.ndarray
    residual: float
    tolerated: float
    condition: np.ndarray
    misfit: np.ndarray
    joint: JointInversion | None = None


def dense_end(chain: Chain) -> tuple[int, list[str]] | None:
    """Where the dense end of a chain begins, and the activations in it; None where it is the head alone.

    Between two dense layers stands one activation or none.
    """
    start = next(index for index, layer in enumerate(chain) if isinstance(layer, Flatten)) + 1
    if not isinstance(chain[start], Dense):
        return None
    activations: list[str] = []
    for layer, following in zip(chain[start:], chain[start + 1 :], strict=False):
        if isinstance(layer, Dense) and isinstance(following, Dense):
            activations.append("identity")
        elif isinstance(layer, Activation):
            if isinstance(following, Activation):
                return None
            activations.append(layer.function)
    return (start, activations) if activations else None


def chain_layers(
    chain: Chain, start: int, activations: list[str], parameters: Mapping[str, Any], gradients: Mapping[str, Any]
) -> DenseLayers:
    """The dense end of a chain, see `dense_end`, as arrays; gradients: of one batch."""
    names = [layer.name for layer in chain[start:] if isinstance(layer, Dense)]
    held = [{part: np.asarray(array) for part, array in layer_parameters(parameters, name).items()} for name in names]
    given = [{part: np.asarray(array) for part, array in layer_parameters(gradients, name).items()} for name in names]
    # A bias whose gradient is not among what was sent is a constant, and does not say where zero is.
    return dense_layers(
        [one["kernel"] for one in held],
        [one.get("bias") for one in held],
        [one["kernel"] for one in given],
        [one.get("bias") for one in given],
        activations,
    )


def invert_dense(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    batch_size: int | Literal["auto"],
    *,
    unknown_scale: bool = False,
    noise: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DenseImages:
    """Recover the examples behind one gradient, see `recover_dense`, and undo the layers before.

    Args:
      chain: whose `dense_end` is not None. parameters, gradients: by layer; one gradient.
      image_shape, batch_size, unknown_scale, progress: as of `inversion.invert`. noise: as of `joint.JointTask`.
    """
    end = dense_end(chain)
    assert end is not None
    start, activations = end
    layers = chain_layers(chain, start, activations, parameters, gradients)
    recovery = recover_dense(layers, batch_size, unknown_scale=unknown_scale, progress=progress)
    examples = len(recovery.verdict)
    found = np.all(np.isfinite(recovery.inputs), axis=1)
    images = np.full((examples, *image_shape), np.nan, recovery.inputs.dtype)
    deviation, nothing = np.full(examples, np.nan), np.empty(0)
    dense = [index for index, layer in enumerate(chain) if isinstance(layer, Dense)]
    position = dense[max(recovery.layer, 0)]
    whole = int(found.sum()) == recovery.rank > 0
    tolerated = max(float(np.sqrt(jnp.finfo(layers.dtype).eps)), _noise_share(layers, recovery))
    unseen = DenseImages(recovery, images, deviation, np.nan, tolerated, nothing, nothing)
    if not np.any(found):
        return unseen
    if all(isinstance(layer, Flatten) for layer in chain[:position]):
        images[found] = recovery.inputs[found].reshape(-1, *image_shape)
        deviation = recovery.input_deviation
        # What is beyond tolerance was not called found.
        residual = float(np.max(recovery.residual)) if whole else np.nan
        return unseen._replace(deviation=deviation, residual=residual, tolerated=math.inf)
    if not whole:
        # What comes before is solved for all examples together.
        return unseen
    counts = count_equations(chain, parameters, image_shape, recovery.rank)
    before = {layer.name for layer in chain[:position] if isinstance(layer, Convolution | Dense)}
    singly = can_be_undone(chain[:position]) and all(count.determined for count in counts if count.layer in before)
    if not singly and determined_together(chain, parameters, image_shape, recovery.rank, position):
        with jax.enable_x64(True):
            task = _task(chain, parameters, gradients, layers, recovery, found, image_shape, position, noise)
            joint = invert_jointly(task)
        images[found], deviation[found] = joint.images, joint.error
        return unseen._replace(deviation=deviation, residual=joint.residual, joint=joint)
    if not can_be_undone(chain[:position]):
        return unseen
    with jax.enable_x64(True):
        task = _task(chain, parameters, gradients, layers, recovery, found, image_shape, position, noise)
        inverted, distance = _undo(task)
        images[found] = np.asarray(inverted.images)
        deviation[found] = np.sqrt(np.mean(np.asarray(inverted.deviation) ** 2, axis=(1, 2, 3)))
    condition, misfit = np.asarray(inverted.condition), np.asarray(inverted.misfit)
    return DenseImages(recovery, images, deviation, float(distance), tolerated, condition, misfit)


def _noise_share(layers: DenseLayers, recovery: DenseRecovery) -> float:
    """Of the layer's gradient whose share of noise is the largest: six deviations of it, relative."""
    shares = [
        TOLERANCE * recovery.noise * np.sqrt(gradient.size) / max(np.linalg.norm(gradient), 1e-300)
        for gradient in layers.kernel_gradients
    ]
    return float(max(shares))


def _task(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    layers: DenseLayers,
    recovery: DenseRecovery,
    found: np.ndarray,
    image_shape: tuple[int, int, int],
    position: int,
    noise: Mapping[str, Any] | None,
) -> JointTask:
    """What is known where the examples were told apart."""
    divisor = float(max(len(recovery.verdict), recovery.rank))
    inputs = recovery.inputs[found]
    return JointTask(
        chain,
        image_shape,
        position,
        parameters,
        gradients,
        jnp.asarray(inputs, jnp.float64),
        jnp.broadcast_to(jnp.asarray(recovery.input_deviation[found], jnp.float64)[:, None], inputs.shape),
        jnp.asarray(recovery.delta[found] @ layers.kernels[recovery.layer].T / divisor, jnp.float64),
        jnp.asarray(recovery.logit_gradient[found] / divisor, jnp.float64),
        unit_roundoff(layers.dtype),
        noise or without_noise(gradients),
    )


@jax.jit
def _undo(task: JointTask) -> tuple[ChainInversion, jax.Array]:
    inverted = invert_from(
        task.chain,
        task.parameters,
        task.gradients,
        task.inputs,
        task.deviation,
        task.delta,
        task.logit_gradient,
        task.image_shape,
        position=task.position,
        unit_roundoff=largest_noise_share(task.gradients, task.noise, task.unit_roundoff),
    )
    distance = gradient_distance(task.chain, task.parameters, task.gradients, inverted.images, task.logit_gradient)
    return inverted, distance
