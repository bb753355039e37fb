"""One convolution's input from its output and its gradient: linear equations, weighted by how exactly each is known.

The input a of a convolution with kernel K and bias b solves, for output z and delta = dL/dz,

    conv(a, K) + b = z        (forward)        sum over examples and positions of delta * a = dL/dK   (gradient)

(R-GAP's recursion, Zhu and Blaschko, ICLR 2021). Both are linear in a and share the patches of a, so that neither
matrix is ever formed. Equations are divided by the standard deviations of their right-hand sides, unknowns scaled so
that every column of the matrix has length one.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.images.layer_operator import Geometry, solve_least_squares, sum_patches, take_patches

__all__ = ["ConvolutionEquations", "LayerSolution", "equations_of", "solve_layer"]

# The solver stops where what is left to correct is this far below what the noise adds.
BELOW_NOISE = 1e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvolutionEquations:
    """The equations of one convolution for B examples behind one gradient; P positions, T = kernel height * width * c.

    Attributes:
      kernel: (T, c'). delta: (B, P, c').
      forward_weight: (B, P, c') one over the deviation of z, zero where z is unknown. gradient_weight: (T, c').
      scale: (B, H, W, c) of the unknowns; zero where no equation has them.
      forward: (B, P, c') z - b and gradient: (T, c') dL/dK, the right-hand sides, not weighted.
    """

    kernel: jax.Array
    delta: jax.Array
    forward_weight: jax.Array
    gradient_weight: jax.Array
    scale: jax.Array
    forward: jax.Array
    gradient: jax.Array


class LayerSolution(NamedTuple):
    """What a layer's equations say of its input.

    value: (B, H, W, c). deviation: (B, H, W, c), standard deviation of its entries; zero where it rests on nothing.
    condition: () ratio of the largest to the smallest singular value met (of the scaled, weighted equations).
    misfit: () root mean square residual in standard deviations. steps: () int32 of the solver. converged: () bool.
    """

    value: jax.Array
    deviation: jax.Array
    condition: jax.Array
    misfit: jax.Array
    steps: jax.Array
    converged: jax.Array


def equations_of(
    kernel: jax.Array,
    delta: jax.Array,
    forward: jax.Array,
    forward_deviation: jax.Array,
    gradient: jax.Array,
    gradient_deviation: jax.Array,
    geometry: Geometry,
) -> ConvolutionEquations:
    """Weigh and scale.

    Args:
      kernel: (height, width, c, c'). delta, forward, forward_deviation: (B, H', W', c'), see the module; a deviation
        may be infinite. gradient, gradient_deviation: as kernel.
    """
    examples, channels = delta.shape[0], kernel.shape[-1]
    flat = kernel.reshape(-1, channels)
    delta, forward, forward_deviation = (
        array.reshape(examples, -1, channels) for array in (delta, forward, forward_deviation)
    )
    forward_weight = 1 / forward_deviation
    gradient_weight = 1 / gradient_deviation.reshape(-1, channels)
    square = jnp.matmul(forward_weight**2, (flat**2).T) + jnp.matmul(delta**2, (gradient_weight**2).T)
    column = sum_patches(square, geometry)
    scale = jnp.where(column > 0, jax.lax.rsqrt(jnp.where(column > 0, column, 1.0)), 0.0)
    known = jnp.isfinite(forward_deviation)
    return ConvolutionEquations(
        kernel=flat,
        delta=delta,
        forward_weight=forward_weight,
        gradient_weight=gradient_weight,
        scale=scale,
        forward=jnp.where(known, forward, 0.0),
        gradient=gradient.reshape(-1, channels),
    )


def solve_layer(
    equations: ConvolutionEquations,
    centre: jax.Array,
    noise: tuple[jax.Array, jax.Array],
    geometry: Geometry,
    steps: int | jax.Array,
) -> LayerSolution:
    """Least squares by LSMR, for the observation and for draws of its noise, which show how far it moves the solution.

    Equations that are not finite cost no step and give NaN: others that are solved together do not wait for them.

    Args:
      equations: from `equations_of`.
      centre: (B, H, W, c) what the input is taken to be where nothing is known of it.
      noise: standard normal draws in the form of the weighted right-hand sides, with a leading axis of draws.
      geometry: static. steps: at most so many.
    """
    sane = jnp.all(jnp.stack([jnp.all(jnp.isfinite(getattr(equations, part.name))) for part in fields(equations)]))
    equations = jax.tree.map(lambda array: jnp.where(sane, array, 0.0), equations)
    # With columns of length one the solution's own noise is A^T e, of length sqrt(size): stop far below it. For the
    # draws too: where they stop at a hundredth, the deviations come out two to three times too small.
    tolerance = BELOW_NOISE * equations.scale.size**0.5

    def solve(right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        return solve_least_squares(equations, right, tolerance, geometry, steps)

    patches = take_patches(centre, geometry)
    unweighted = (
        jnp.matmul(patches, equations.kernel),
        jnp.einsum("bpt,bpc->tc", patches, equations.delta),
    )
    observed = (
        (equations.forward - unweighted[0]) * equations.forward_weight,
        (equations.gradient - unweighted[1]) * equations.gradient_weight,
    )
    rights = jax.tree.map(lambda one, more: jnp.where(sane, jnp.concatenate([one[None], more]), 0.0), observed, noise)
    # One after the other: the draws take a third of the steps, and need not go through those of the observation.
    values, stats, converged = jax.lax.map(solve, rights)
    values = jnp.where(sane, values, jnp.nan)
    draws = values[1:]
    count = jnp.sum(equations.forward_weight > 0) + equations.gradient_weight.size
    freedom = jnp.maximum(count - jnp.sum(equations.scale > 0), 1)
    residual = stats["norm_r"][0]
    return LayerSolution(
        value=centre + equations.scale * values[0],
        deviation=equations.scale * jnp.sqrt(jnp.mean(draws**2, axis=0)),
        condition=stats["cond_A"][0],
        misfit=jnp.where(sane, residual / jnp.sqrt(freedom), jnp.nan),
        steps=jnp.asarray(stats["num_steps"][0], jnp.int32),
        converged=converged[0],
    )
