"""iDLG, the hard-label baseline: the class whose row of the gradient has the odd sign.

Zhao, Mopuri, Bilen, 2020 (arXiv 2001.02610): with a hard label, p - y is negative for one class only.
"""

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmin

__all__ = ["odd_class"]


def odd_class(left: jax.Array, right_sum: jax.Array) -> jax.Array:
    """() int32 index of the most negative row.

    Args:
      left: (C,) u.
      right_sum: () sum of v. Features are taken to be non-negative, as after ReLU or a sigmoid, so that v is
        oriented to a positive sum.
    """
    return argmin(left * jnp.where(right_sum < 0, -1.0, 1.0))
