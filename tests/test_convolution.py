"""Convolution over patches against XLA's own and SciPy's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from softinv_jax import convolution
from softinv_jax.convolution import Padding, output_size

# Compiled as a whole: operation by operation takes longer to compile.
convolve = partial(jax.jit, static_argnums=(2, 3))(convolution.convolve)
extract_patches = partial(jax.jit, static_argnums=(1, 2, 3))(convolution.extract_patches)

NONE: Padding = ((0, 0), (0, 0))
GEOMETRIES = [
    # image size, kernel size, strides, padding
    ((8, 8), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((9, 7), (3, 2), (1, 2), ((2, 0), (1, 3))),
    ((12, 10), (5, 4), (3, 2), ((0, 1), (2, 1))),
    ((7, 11), (1, 5), (2, 3), NONE),
    ((5, 6), (5, 6), (1, 1), NONE),
    ((4, 4), (2, 2), (3, 3), NONE),  # pixels in no patch
]


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("size", "kernel_size", "strides", "padding"), GEOMETRIES)
def test_convolve_agrees_with_xla(
    size: tuple[int, int], kernel_size: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> None:
    images, kernel = draw(2, *size, 3), draw(*kernel_size, 3, 4)
    expected = jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    found = convolve(jnp.asarray(images), jnp.asarray(kernel), strides, padding)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    sizes = [output_size(size[axis], kernel_size[axis], strides[axis], padding[axis]) for axis in range(2)]
    assert found.shape == (2, *sizes, 4)


def test_convolve_agrees_with_scipy() -> None:
    image, kernel = draw(9, 7, 2), draw(3, 4, 2, 5)
    expected = [
        sum(correlate2d(image[..., entering], kernel[..., entering, leaving], "valid") for entering in range(2))
        for leaving in range(5)
    ]
    found = convolve(jnp.asarray(image), jnp.asarray(kernel), (1, 1), NONE)
    np.testing.assert_allclose(found, np.stack(expected, -1), atol=1e-5)


@pytest.mark.parametrize(("size", "kernel_size", "strides", "padding"), GEOMETRIES)
def test_patches_run_over_row_column_channel(
    size: tuple[int, int], kernel_size: tuple[int, int], strides: tuple[int, int], padding: Padding
) -> None:
    image = draw(*size, 3)
    patches = extract_patches(jnp.asarray(image), kernel_size, strides, padding)
    padded = np.pad(image, [*padding, (0, 0)])
    for row in range(patches.shape[0]):
        for column in range(patches.shape[1]):
            top, left = row * strides[0], column * strides[1]
            patch = padded[top : top + kernel_size[0], left : left + kernel_size[1]]
            assert patch.shape == (*kernel_size, 3)
            np.testing.assert_array_equal(patches[row, column], patch.ravel())


def test_leading_axes_are_kept() -> None:
    images = jnp.asarray(draw(2, 3, 6, 5, 2))
    patches = extract_patches(images, (2, 3), (2, 1), ((1, 0), (0, 0)))
    assert patches.shape == (2, 3, 3, 3, 12)
    np.testing.assert_array_equal(patches[1, 2], extract_patches(images[1, 2], (2, 3), (2, 1), ((1, 0), (0, 0))))


def test_output_size_below_one_where_the_kernel_does_not_fit() -> None:
    assert output_size(4, 5, 1, (0, 0)) == 0
    assert output_size(4, 5, 1, (0, 1)) == 1
    assert output_size(3, 8, 2, (1, 1)) < 1
