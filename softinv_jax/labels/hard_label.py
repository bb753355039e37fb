"""iDLG, the hard-label baseline: the class whose row of the gradient has the odd sign.

Zhao, Mopuri, Bilen, 2020 (arXiv 2001.02610): with a hard label, p - y is negative for one class only.
"""

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmin

__all__ = ["odd_class"]


def odd_class(left: jax.Array, orientation: jax.Array) -> jax.Array:
    """() int32 index of the row of the odd sign.

    Args:
      left: (C,) u.
      orientation: () decides where u has several entries of either sign, as for a soft label: u is turned by its sign,
        and the most negative row taken. The sum of v says it for non-negative features, as after ReLU or a sigmoid;
        the entry of v that belongs to a bias for all.
    """
    positive, negative = jnp.sum(left > 0), jnp.sum(left < 0)
    sign = jnp.where(orientation < 0, -1.0, 1.0)
    sign = jnp.where((negative == 1) & (positive > 1), 1.0, sign)
    sign = jnp.where((positive == 1) & (negative > 1), -1.0, sign)
    return argmin(left * sign)
