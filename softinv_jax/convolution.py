"""Two-dimensional convolution and pooling, channels last, over image patches.

On a CPU, XLA's own convolution is about ten times slower inside a loop, under vmap when differentiated twice, and in
float64, which is what attacks do all the time.
"""

from functools import reduce

import jax
import jax.numpy as jnp

__all__ = ["Padding", "average_pool", "convolve", "extract_patches", "max_pool", "output_size"]

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Zeros added above and below, left and right."""


def output_size(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> int:
    """Rows or columns of the result: (size + padding - kernel) // stride + 1; below 1 where the kernel does not fit."""
    return (size + sum(padding) - kernel) // stride + 1


def extract_patches(
    images: jax.Array, kernel_size: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Map images (..., H, W, c) to patches (..., H', W', kernel_height * kernel_width * c).

    The last axis runs over (row offset, column offset, channel), as a kernel (height, width, c, c') flattened to
    (height * width * c, c') does.
    """
    border = [(0, 0)] * (images.ndim - 3) + [*padding, (0, 0)]
    patches = jnp.pad(images, border)
    # Columns first, then rows.
    for axis, size, stride in (
        (images.ndim - 2, kernel_size[1], strides[1]),
        (images.ndim - 3, kernel_size[0], strides[0]),
    ):
        last_start = patches.shape[axis] - size
        shifted = [
            jax.lax.slice_in_dim(patches, offset, offset + last_start + 1, stride, axis) for offset in range(size)
        ]
        patches = jnp.concatenate(shifted, axis=-1)
    return patches


def convolve(images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    """Map images (..., H, W, c) with a kernel (height, width, c, c') to (..., H', W', c')."""
    height, width, _, channels = kernel.shape
    patches = extract_patches(images, (height, width), strides, padding)
    return jnp.matmul(patches, kernel.reshape(-1, channels), precision="highest")


def max_pool(images: jax.Array, size: tuple[int, int], strides: tuple[int, int], padding: Padding) -> jax.Array:
    """Largest value of each window, (..., H, W, c) to (..., H', W', c); of equal ones the first has the gradient."""
    border = [(0, 0)] * (images.ndim - 3) + [*padding, (0, 0)]
    bordered = jnp.pad(images, border, constant_values=-jnp.inf)
    # Differentiated, jnp.max would share the gradient among equal values; PyTorch gives it to the first.
    return reduce(lambda best, other: jnp.where(other > best, other, best), _window_values(bordered, size, strides))


def average_pool(images: jax.Array, size: tuple[int, int], strides: tuple[int, int], padding: Padding) -> jax.Array:
    """Mean of each window, (..., H, W, c) to (..., H', W', c); zeros of the padding count."""
    border = [(0, 0)] * (images.ndim - 3) + [*padding, (0, 0)]
    return reduce(jnp.add, _window_values(jnp.pad(images, border), size, strides)) / (size[0] * size[1])


def _window_values(images: jax.Array, size: tuple[int, int], strides: tuple[int, int]) -> list[jax.Array]:
    """For each place in a window, by rows: what stands there in every window."""
    channels = images.shape[-1]
    patches = extract_patches(images, size, strides, ((0, 0), (0, 0)))
    return [patches[..., place * channels : (place + 1) * channels] for place in range(size[0] * size[1])]
