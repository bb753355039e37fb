"""The linear unknowns of one example's equation, eliminated (variable projection, Golub and Pereyra 1973).

With g = U beta, the label p - U beta is c on every class that it does not single out: at a given softmax p, weighted
least squares gives beta and c.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.linear_algebra import orthonormal_columns

__all__ = ["TARGETS", "Eliminator", "eliminate_linear", "singled_out"]

TARGETS = 2  # Classes a label singles out, at most.


class Eliminator(NamedTuple):
    """Orthonormal columns of the weighted (U, 1), classes singled out left aside, and what undoes their mixing."""

    weights: jax.Array
    columns: jax.Array
    inverse: jax.Array

    def residual(self, values: jax.Array) -> jax.Array:
        """(C, n) -> (C, n) weighted, less the best U beta + c 1."""
        weighted = self.weights[:, None] * values
        return weighted - self.columns @ (self.columns.T @ weighted)

    def share(self) -> jax.Array:
        """(C,) how much of a residual of its own each class keeps: what is left is absorbed (its leverage)."""
        return jnp.maximum(1 - jnp.sum(self.columns**2, axis=1), 1e-9)

    def solution(self, values: jax.Array) -> jax.Array:
        """(C, n) -> (B + 1, n) that best beta, and c in the last row."""
        return self.inverse @ (self.columns.T @ (self.weights[:, None] * values))


def singled_out(targets: jax.Array, number_of_classes: int) -> jax.Array:
    """(C,) bool."""
    return jnp.any(jnp.arange(number_of_classes)[:, None] == targets[None, :], axis=1)


def eliminate_linear(subspace: BatchSubspace, targets: jax.Array, weights: jax.Array) -> Eliminator:
    """For the classes assumed to be singled out, (TARGETS,), and weights (C,) of the residuals."""
    number_of_classes = subspace.left.shape[0]
    weights = jnp.where(singled_out(targets, number_of_classes), 0.0, weights)
    design = jnp.concatenate([subspace.left, jnp.ones((number_of_classes, 1))], axis=1)
    return Eliminator(weights, *orthonormal_columns(weights[:, None] * design))
