"""float64 where the conditioning asks for it, whatever the user's configuration.

Inside `jax.enable_x64(True)` a traced function computes in float64 even when the caller's own `jit` or `vmap` runs
with 32-bit defaults. jax lowers the program only after the context has ended, though, and the lowering of index
searches (argmax, argsort, take_along_axis) then assumes 32-bit types. The few of them that the recovery needs are
therefore written here with explicit 32-bit indices.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["argmax", "argmin", "argsort", "in_float64", "take_rows"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_float64(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let `function` create and combine float64 arrays; the configuration outside it stays as it is."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return wrapped


def argsort(values: jax.Array) -> jax.Array:
    """int32 indices that sort the last axis in rising order; stable, NaN last."""
    positions = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jax.lax.sort((values, positions), num_keys=1, is_stable=True)[1]


def argmax(values: jax.Array) -> jax.Array:
    """int32 index of the first largest entry along the last axis; NaN is never chosen before a number."""
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    positions = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    largest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.min(jnp.where(values == largest, positions, jnp.int32(values.shape[-1] - 1)), axis=-1)


def argmin(values: jax.Array) -> jax.Array:
    """int32 index of the first smallest entry along the last axis."""
    return argmax(-values)


def take_rows(values: jax.Array, indices: jax.Array) -> jax.Array:
    """values[h, indices[h, k]] for values (H, C) and int32 indices (H, K)."""
    rows = jax.lax.broadcasted_iota(jnp.int32, indices.shape, 0)
    return values.at[rows, indices].get(mode="promise_in_bounds")
