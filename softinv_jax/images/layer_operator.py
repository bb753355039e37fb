"""The matrix of a convolution's equations as a linear operator, and least squares with it.

Patches are gathered by a table of places, and summed by its inverse: one step of an accelerator each, and on a CPU
less work than slices.
"""

from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import equinox
import jax
import jax.numpy as jnp
import lineax
import numpy as np

from softinv_jax.convolution import Padding, output_size

__all__ = ["Geometry", "LayerMatrix", "solve_least_squares", "sum_patches", "take_patches"]


class Geometry(NamedTuple):
    """Static: how a kernel meets its input."""

    input_shape: tuple[int, int, int]
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding


class LayerMatrix(Protocol):
    """What of `layer_equations.ConvolutionEquations` makes up the matrix; shapes there."""

    @property
    def kernel(self) -> jax.Array: ...
    @property
    def delta(self) -> jax.Array: ...
    @property
    def forward_weight(self) -> jax.Array: ...
    @property
    def gradient_weight(self) -> jax.Array: ...
    @property
    def scale(self) -> jax.Array: ...


@lru_cache(maxsize=64)
def _places(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """The pixel under each tap, (P * taps,), H * W where that is padding; and the taps over each pixel.

    The second is (H * W, most taps over a pixel), filled up with P * taps.
    """
    sides = []
    for axis in range(2):
        size, kernel, stride, padding = (
            geometry.input_shape[axis],
            geometry.kernel_size[axis],
            geometry.strides[axis],
            geometry.padding[axis],
        )
        starts = np.arange(output_size(size, kernel, stride, padding)) * stride - padding[0]
        sides.append(starts[:, None] + np.arange(kernel)[None])
    (height, width, _), (rows, columns) = geometry.input_shape, sides
    row, column = rows[:, None, :, None], columns[None, :, None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixels = np.where(inside, row * width + column, height * width).ravel()
    order = np.argsort(pixels, kind="stable")
    counts = np.bincount(pixels, minlength=height * width + 1)[:-1]
    windows = np.full((height * width, max(int(counts.max()), 1)), pixels.size)
    owner = pixels[order][: counts.sum()]
    first = np.cumsum(counts) - counts
    windows[owner, np.arange(counts.sum()) - first[owner]] = order[: counts.sum()]
    return pixels.astype(np.int32), windows.astype(np.int32)


def take_patches(values: jax.Array, geometry: Geometry) -> jax.Array:
    """(B, H, W, c) -> (B, P, T): what each window sees."""
    examples, channels = values.shape[0], values.shape[-1]
    flat = jnp.pad(values.reshape(examples, -1, channels), ((0, 0), (0, 1), (0, 0)))
    taps = geometry.kernel_size[0] * geometry.kernel_size[1]
    return flat[:, _places(geometry)[0]].reshape(examples, -1, taps * channels)


def sum_patches(patches: jax.Array, geometry: Geometry) -> jax.Array:
    """(B, P, T) -> (B, H, W, c), the transpose of `take_patches`."""
    examples, channels = patches.shape[0], geometry.input_shape[2]
    flat = jnp.pad(patches.reshape(examples, -1, channels), ((0, 0), (0, 1), (0, 0)))
    return jnp.sum(flat[:, _places(geometry)[1]], axis=2).reshape(examples, *geometry.input_shape)


class _Operator(lineax.AbstractLinearOperator):
    """Weighted left-hand sides of scaled unknowns, or the transpose of that map.

    Written out, because the transpose that jax would derive scatters.
    """

    matrix: Any
    geometry: Geometry = equinox.field(static=True)
    transposed: bool = equinox.field(static=True, default=False)

    def mv(self, vector: Any) -> Any:
        matrix, geometry = self.matrix, self.geometry
        if self.transposed:
            forward, gradient = vector[0] * matrix.forward_weight, vector[1] * matrix.gradient_weight
            # Both halves as one product.
            left = jnp.concatenate([forward, matrix.delta], axis=-1)
            right = jnp.concatenate([matrix.kernel, gradient], axis=-1)
            return sum_patches(jnp.matmul(left, right.T), geometry) * matrix.scale
        patches = take_patches(vector * matrix.scale, geometry)
        forward = jnp.matmul(patches, matrix.kernel) * matrix.forward_weight
        gradient = jnp.einsum("bpt,bpc->tc", patches, matrix.delta) * matrix.gradient_weight
        return forward, gradient

    def as_matrix(self) -> Any:
        raise NotImplementedError("the matrix is never formed")

    def transpose(self) -> "_Operator":
        return _Operator(self.matrix, self.geometry, not self.transposed)

    def in_structure(self) -> Any:
        sides = (
            jax.eval_shape(lambda: self.matrix.scale),
            jax.eval_shape(lambda: (self.matrix.forward_weight, self.matrix.gradient_weight)),
        )
        return sides[self.transposed]

    def out_structure(self) -> Any:
        return self.transpose().in_structure()


@lineax.linearise.register(_Operator)
@lineax.conj.register(_Operator)
def _same(operator: _Operator) -> _Operator:
    return operator


# Nothing that lineax could make use of.
for _property in (
    *(lineax.is_symmetric, lineax.is_diagonal, lineax.is_tridiagonal, lineax.has_unit_diagonal),
    *(lineax.is_lower_triangular, lineax.is_upper_triangular),
    *(lineax.is_positive_semidefinite, lineax.is_negative_semidefinite),
):
    _property.register(_Operator, lambda operator: False)


def solve_least_squares(
    matrix: LayerMatrix,
    right: tuple[jax.Array, jax.Array],
    tolerance: float,
    geometry: Geometry,
    steps: int | jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Least squares by LSMR (Fong and Saunders 2011), from zero.

    Args:
      right: weighted right-hand sides, (B, P, c') and (T, c').
      tolerance: on the length of A^T r. geometry: static. steps: at most so many.

    Returns:
      (B, H, W, c) scaled unknowns; `norm_r`, `cond_A` and `num_steps`; and whether the tolerance was met.
    """
    solver = lineax.LSMR(rtol=0.0, atol=tolerance, max_steps=steps, conlim=1e15)
    solution = lineax.linear_solve(_Operator(matrix, geometry), right, solver, throw=False)
    stats = {name: solution.stats[name] for name in ("norm_r", "cond_A", "num_steps")}
    return solution.value, stats, solution.result == lineax.RESULTS.successful
