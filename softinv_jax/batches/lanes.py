"""How much is computed at once: all of it on an accelerator; on a CPU as much as its cache holds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["over_gradients", "over_lanes"]

ON_CPU = 8


def over_lanes(function: Callable[..., Any], inputs: Any) -> Any:
    """A function of one start, for all of them along the leading axis."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(function, inputs, batch_size=ON_CPU)
    return jax.vmap(function)(inputs)


def over_gradients(function: Callable[..., Any], inputs: Any, is_wanted: jax.Array) -> Any:
    """A function of one gradient, for all of them along the leading axis; zeros for those not wanted, (N,) bool."""

    def one(each: tuple[Any, jax.Array]) -> Any:
        shapes = jax.eval_shape(function, each[0])
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.cond(each[1], function, lambda _: nothing, each[0])

    if jax.default_backend() == "cpu":
        return jax.lax.map(one, (inputs, is_wanted))
    return jax.vmap(function)(inputs)
