"""The search for the examples of a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from softinv_jax.batches.assembly import search_assembling
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.confined_search import search_confined
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["is_confined", "search_batch"]


def search_batch(
    subspace: BatchSubspace, divisor: Divisor, progress: Callable[[int, int], None], total: int
) -> tuple[list[Component], JointFit | None]:
    """Find the examples of a batch.

    Args:
      subspace: of the batch.
      divisor: D.
      progress: called with (examples found, total).
      total: the batch size.

    Returns:
      What was found, and the joint fit that is consistent with all of it; None where examples are missing, or the fit
      would be too large.
    """
    search = search_confined if is_confined(subspace) else search_assembling
    return search(jax.tree.map(jnp.asarray, subspace), divisor, progress, total)


def is_confined(subspace: BatchSubspace) -> bool:
    """Whether one example's own equation, less its B + B unknowns, has any to spare for telling right from wrong."""
    number_of_classes, rank = subspace.left.shape
    return number_of_classes - 1 - rank > rank + TARGETS
