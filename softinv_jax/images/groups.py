"""Exact inversion of many gradients: groups, each of them one program, two of which are under way at a time.

On a CPU one inversion keeps one core busy, so that a group is one gradient. An accelerator spends its time on starting
small products: there a group goes through all layers together, each solver running until its slowest member is done.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.compilation import compiler_options
from softinv_jax.images.exact import gradient_distance, invert_chain
from softinv_jax.images.layer_chain import Chain, Convolution, chain_inputs, layer_parameters

__all__ = ["Inverted", "group_size", "invert_groups"]

# More save little, and wait for a slower slowest.
LARGEST_GROUP = 256
# Of an accelerator's memory, for what one group needs while it is solved.
GROUP_BYTES = 4 << 30
# Arrays of the size of all patches that one step of the solver may hold.
PATCH_ARRAYS = 4


class Inverted(NamedTuple):
    """Of G gradients of B examples each, with L layers.

    images: (G, B, H, W, channels), in the parameters' dtype. residual: (G,) see `exact.gradient_distance`.
    deviation: (G, B) root mean square over each image. condition, misfit: (G, L), see `exact.ChainInversion`.
    """

    images: np.ndarray
    residual: np.ndarray
    deviation: np.ndarray
    condition: np.ndarray
    misfit: np.ndarray


@functools.cache
def _compiled(platform: str) -> Callable[..., tuple[jax.Array, ...]]:
    static = ("chain", "image_shape", "unit_roundoff", "together")
    return jax.jit(_invert_group, static_argnames=static, compiler_options=compiler_options(platform))


def _invert_group(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    features: jax.Array,
    image_shape: tuple[int, int, int],
    *,
    unit_roundoff: float,
    together: bool,
) -> tuple[jax.Array, ...]:
    dtype = layer_parameters(parameters, chain[-1].name)["kernel"].dtype  # type: ignore[union-attr]

    def one(example: tuple[Mapping[str, Any], jax.Array]) -> tuple[jax.Array, ...]:
        gradient, feature = example
        found = invert_chain(chain, parameters, gradient, feature, image_shape, unit_roundoff=unit_roundoff)
        images = found.images.astype(dtype)
        distance = gradient_distance(chain, parameters, gradient, images, found.logit_gradient.astype(dtype))
        deviation = jnp.sqrt(jnp.mean(found.deviation**2, axis=(1, 2, 3)))
        return images, distance, deviation, found.condition, found.misfit

    examples = (gradients, features)
    return jax.vmap(one)(examples) if together else jax.lax.map(one, examples)


def group_size(
    chain: Chain, parameters: Mapping[str, Any], image_shape: tuple[int, int, int], batch_size: int, platform: str
) -> int:
    """Gradients in one program: one on a CPU; elsewhere as many as fit in `GROUP_BYTES`, at most `LARGEST_GROUP`."""
    if platform == "cpu":
        return 1
    shapes = chain_inputs(chain, parameters, image_shape)
    patches = 0
    for layer, after in zip(chain, shapes[1:], strict=True):
        if isinstance(layer, Convolution):
            kernel = layer_parameters(parameters, layer.name)["kernel"].shape
            patches = max(patches, after[0] * after[1] * kernel[0] * kernel[1] * kernel[2])
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
    needed = gradient + PATCH_ARRAYS * patches * batch_size * np.dtype(np.float64).itemsize
    return int(np.clip(GROUP_BYTES // needed, 1, LARGEST_GROUP))


def invert_groups(
    chain: Chain,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    features: np.ndarray,
    chosen: Sequence[int],
    image_shape: tuple[int, int, int],
    *,
    unit_roundoff: float,
    size: int,
    together: bool,
) -> Iterator[tuple[list[int], Inverted]]:
    """Invert the gradients with the numbers `chosen`, at most `size` at a time; yields the numbers of each group.

    Args:
      chain, parameters, image_shape: see `inversion.invert`.
      gradients: by layer, with a leading axis N; arrays on a device stay there. features: (N, B, d).
      unit_roundoff: of the gradients' dtype.
      together: whether the members of a group go through each layer at once or one after the other.
    """
    with jax.enable_x64(True):  # Copied once, not once a group.
        parameters = jax.tree.map(jnp.asarray, parameters)
    platform = next(iter(jax.tree.leaves(parameters)[0].devices())).platform

    def one(group: list[int]) -> tuple[list[int], Inverted]:
        # The last group is filled up, for one program: what has NaN for a feature takes no step.
        rows = np.array(group + [group[0]] * (size - len(group)))
        with jax.enable_x64(True):
            own = jax.tree.map(lambda leaf: leaf[rows], gradients)
            inputs = features[rows].astype(np.float64)
            inputs[len(group) :] = np.nan
            found = _compiled(platform)(
                chain, parameters, own, inputs, image_shape, unit_roundoff=unit_roundoff, together=together
            )
            return group, Inverted(*(array[: len(group)] for array in jax.device_get(found)))

    # Few programs, and few places left empty.
    size = min(size, 1 << (len(chosen) - 1).bit_length()) if len(chosen) else size
    groups = [[int(index) for index in chosen[start : start + size]] for start in range(0, len(chosen), size)]
    workers = min(os.cpu_count() or 1 if size == 1 else 2, max(len(groups), 1))
    with ThreadPoolExecutor(max_workers=workers) as pool:
        yield from pool.map(one, groups)
