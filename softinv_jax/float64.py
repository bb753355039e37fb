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

__all__ = ["argmax", "argmin", "argsort", "in_float64", "sort", "take_rows"]

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
    """int32 indices that sort the last axis in rising order, as far as 48 bits tell; stable, NaN last.

    By two float32 keys: XLA for TPUs, which emulates float64, cannot compare it in a sort (jax-ml/jax#11831).
    """
    positions = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    coarse = values.astype(jnp.float32)
    fine = jnp.where(jnp.isfinite(coarse), values - coarse.astype(values.dtype), 0.0).astype(jnp.float32)
    return jax.lax.sort((coarse, fine, positions), num_keys=2, is_stable=True)[2]


def sort(values: jax.Array) -> jax.Array:
    """(n,) values in rising order, as `argsort` has it."""
    return values[argsort(values)]


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
