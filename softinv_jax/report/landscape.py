"""The paper's variance loss of one example, evaluated on a grid of scalars to draw it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softinv_jax.labels.scalar_equation import ScalarEquation
from softinv_jax.labels.variance import variance_loss

__all__ = ["variance_landscape"]


def variance_landscape(
    weight: ArrayLike, weight_gradient: ArrayLike, feature: ArrayLike, scalars: ArrayLike, excluded: int
) -> np.ndarray:
    """Variance of all but the `excluded` largest entries of the label that each scalar would give.

    Args:
      weight: (C, d), a head without bias. weight_gradient: (C, d) of one example.
      feature: (d,), of which only the direction is used: lambda is measured along it.
      scalars: (M,) lambda, not zero.
      excluded: 1 as the paper does for smoothing, 2 as for mixup.

    Returns:
      (M,) float64.
    """
    direction = np.asarray(feature, np.float64)
    direction = direction / np.linalg.norm(direction)
    with jax.enable_x64(True):
        logits = jnp.asarray(np.asarray(weight, np.float64) @ direction)
        zeros, zero = jnp.zeros_like(logits), jnp.zeros(())
        equation = ScalarEquation(
            direction=logits,
            offset=zeros,
            left=jnp.asarray(np.asarray(weight_gradient, np.float64) @ direction),
            left_deviation=zeros,
            direction_deviation=zeros,
            weight_norm=zeros,
            roundoff=zero,
            logit_error=zero,
            known_scalar=zero,
        )
        grid = jnp.asarray(np.asarray(scalars, np.float64))
        losses = jax.jit(jax.vmap(lambda scalar: variance_loss(equation, scalar, excluded)))(grid)
        return np.asarray(losses)
