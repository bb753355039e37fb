"""Least squares by products with the Jacobian alone, for outer methods that are glad of what a few steps give."""

from typing import Any

import jax
import lineax

__all__ = ["TruncatedLSMR", "random_signs"]


class TruncatedLSMR(lineax.LSMR):
    """LSMR that offers what it has when its steps run out; an outer method would give up otherwise."""

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        value, _, statistics = super().compute(state, vector, options)
        return value, lineax.RESULTS.successful, statistics


def random_signs(key: jax.Array, tree: Any) -> Any:
    """1 or -1 in the place of every number of a tree: E (J^T s)^2 over such s is the square of J's columns."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(own, leaf.shape, leaf.dtype) for own, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, signs)
