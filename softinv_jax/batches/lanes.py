"""How much is computed at once: all of it on an accelerator; on a CPU as much as its cache holds."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["group_sizes", "on_cpu", "over_gradients", "over_lanes", "workers"]

LANES_ON_CPU = 8
GROUP_ON_CPU = 8  # Gradients in one call,
GROUP = 128  # and on an accelerator, which does all of them in the time of one,
GROUP_BYTES = 8 << 30  # as far as its memory goes.
ARRAYS = 8  # Of C B numbers, that a start takes at the same time.


def on_cpu() -> bool:
    """Whether programs run on a CPU."""
    return jax.default_backend() == "cpu"


def workers() -> int:
    """Groups at a time: as many as a CPU has cores; two, so that an accelerator need not wait for the host."""
    return (os.cpu_count() or 1) if on_cpu() else 2


def group_sizes(number_of_classes: int, rank: int) -> tuple[int, int]:
    """How many gradients go into one call, and how many of those that are left after the first round."""
    if on_cpu():
        return GROUP_ON_CPU, GROUP_ON_CPU
    starts = 6 * (2 * rank + 4)
    most = GROUP_BYTES // (starts * number_of_classes * (rank + 2) * 8 * ARRAYS)
    # One size for both: another is compiled again.
    size = min(max(most, 1), GROUP)
    return size, size


def over_lanes(function: Callable[..., Any], inputs: Any) -> Any:
    """A function of one start, for all of them along the leading axis."""
    if on_cpu():
        return jax.lax.map(function, inputs, batch_size=LANES_ON_CPU)
    return jax.vmap(function)(inputs)


def over_gradients(function: Callable[..., Any], inputs: Any, is_wanted: jax.Array) -> Any:
    """A function of one gradient, for all of them along the leading axis; zeros for those not wanted, (N,) bool."""

    def one(each: tuple[Any, jax.Array]) -> Any:
        shapes = jax.eval_shape(function, each[0])
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(each[1], function, lambda _: nothing, each[0])

    if on_cpu():
        return jax.lax.map(one, (inputs, is_wanted))
    return jax.vmap(function)(inputs)
