"""Many examples at once: on which devices, in groups of what size, and how single ones are picked out and put back.

A group is worked on by one compiled program, an example a lane. All groups have one size, the last filled up by
repeating an example, so that one program serves any number of them.
"""

import functools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softinv_jax.compilation import compiler_options
from softinv_jax.float64 import in_float64
from softinv_jax.observation.head import Observation

__all__ = ["Place", "for_each", "groups_of", "in_turn", "join", "place_on", "put_rows", "rows_of", "take_rows"]

Result = TypeVar("Result")

# Of an accelerator that does not tell how much memory is free.
UNTOLD_BYTES = 4 * 2**30
IN_FLIGHT = 3


def _mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    return Mesh(np.array(devices), ("examples",))


class Place(NamedTuple):
    """Where groups are worked on.

    Attributes:
      devices: shared out among these; none: on the one device `first`.
    """

    devices: tuple[jax.Device, ...]
    first: jax.Device

    @property
    def shares(self) -> int:
        return max(len(self.devices), 1)

    @property
    def is_cpu(self) -> bool:
        return self.first.platform == "cpu"

    @property
    def free_bytes(self) -> int:
        """Of one accelerator's memory."""
        told = self.first.memory_stats() or {}
        if "bytes_limit" not in told:
            return UNTOLD_BYTES
        return max(told["bytes_limit"] - told.get("bytes_in_use", 0), 2**28)

    def put(self, values: Any) -> jax.Array:
        """(N, ...) to the devices, N / count examples each."""
        if not self.devices:
            return values if isinstance(values, jax.Array) else jax.device_put(values)
        return jax.device_put(values, NamedSharding(_mesh(self.devices), PartitionSpec("examples")))

    def share(self, values: Any) -> Any:
        """The same to all of the devices; NumPy arrays, and what is there already, as they are."""
        if not isinstance(values, jax.Array):
            return values
        if self.devices:
            return jax.device_put(values, NamedSharding(_mesh(self.devices), PartitionSpec()))
        return values if values.devices() == {self.first} else jax.device_put(values, self.first)


def place_on(devices: Sequence[jax.Device] | None, gradient: Any) -> Place:
    """These devices; or those that hold the gradient; or, for a NumPy array, the default one.

    Raises:
      ValueError: naming devices of another process.
    """
    foreign = [str(device) for device in devices or () if device.process_index != jax.process_index()]
    if foreign:
        raise ValueError(
            f"devices {', '.join(foreign)} belong to another process; give some of jax.local_devices(), and share the"
            " examples between processes with softinv_jax.streaming.recover_stream"
        )
    if devices:
        return Place(tuple(devices), devices[0])
    held = gradient if isinstance(gradient, jax.Array) else jax.device_put(np.zeros(0, np.float32))
    own = sorted(held.devices(), key=lambda device: device.id)
    return Place(tuple(own) if len(own) > 1 else (), own[0])


def for_each(stage: Callable, options: Any, place: Place, shared: Any, each: Any, *, tuned: bool = False) -> Any:
    """stage(options, shared, one) of every one along the leading axis of `each`, by one compiled program."""
    return _compiled(place.first.platform, tuned)(stage, options, place.devices, shared, each)


@functools.cache
def _compiled(platform: str, tuned: bool) -> Callable:
    options = compiler_options(platform, tuned=tuned)
    return jax.jit(_for_each, static_argnums=(0, 1, 2), compiler_options=options)


def _for_each(stage: Callable, options: Any, devices: tuple[jax.Device, ...], shared: Any, each: Any) -> Any:
    def share(shared: Any, each: Any) -> Any:
        one = partial(stage, options, shared)
        if jax.tree.leaves(each)[0].shape[0] == 1:
            # XLA multiplies a matrix faster than a batch of one matrix.
            return jax.tree.map(lambda leaf: leaf[None], one(jax.tree.map(lambda leaf: leaf[0], each)))
        return jax.vmap(one)(each)

    if devices:
        # Examples know nothing of each other: every device runs the whole program on its share of them.
        examples, all_alike = PartitionSpec("examples"), PartitionSpec()
        share = jax.shard_map(
            share,
            mesh=_mesh(devices),
            in_specs=(all_alike, examples),
            out_specs=examples,
            check_vma=False,
        )
    return share(shared, each)


def groups_of(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """The indices in groups of one size, the last repeated to fill up."""
    groups = [indices[start : start + size] for start in range(0, indices.size, size)]
    return [np.append(group, np.full(size - group.size, group[-1])) for group in groups]


# Programs that need not be compiled again, as far as is known: two threads at once would do it twice.
_COMPILED: set[Hashable] = set()


def in_turn(
    work: Callable[[Any], Result], groups: Sequence[Any], place: Place, *, program: Hashable
) -> Iterator[Result]:
    """What `work` makes of each group by the same program, in order, a few at work at once.

    XLA on a CPU runs most of a search on one core: as many groups as there are cores. An accelerator is given the next
    groups while it works on one.
    """
    if not groups:
        return
    work = in_float64(work)  # Which is set for one thread only.
    if not place.is_cpu:
        waiting: list[Result] = []
        for group in groups:
            waiting.append(work(group))
            if len(waiting) > IN_FLIGHT:
                yield jax.block_until_ready(waiting.pop(0))
        yield from map(jax.block_until_ready, waiting)
        return
    if program not in _COMPILED:
        yield jax.block_until_ready(work(groups[0]))
        _COMPILED.add(program)
        groups = groups[1:]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(max(min(cores // place.shares, len(groups)), 1))
    try:
        yield from pool.map(lambda group: jax.block_until_ready(work(group)), groups)
    finally:
        pool.shutdown(cancel_futures=True)


def rows_of(observation: Observation, indices: np.ndarray, place: Place) -> Observation:
    """The examples at `indices`, on the devices."""
    first, size = int(indices[0]), indices.size
    in_a_row = bool(np.array_equal(indices, np.arange(first, first + size)))

    def picked(array: Any) -> Any:
        if array is None or (in_a_row and size == len(array)):
            return None if array is None else place.put(array)
        if not isinstance(array, jax.Array):
            return place.put(array[first : first + size] if in_a_row else array[indices])
        if in_a_row:
            return place.put(_slice(array, jax.device_put(np.int32(first)), size))
        return place.put(take_rows(array, jax.device_put(indices.astype(np.int32))))

    return Observation(
        observation.weight,
        picked(observation.weight_gradient),
        observation.bias,
        picked(observation.bias_gradient),
        picked(observation.noise),
    )


@partial(jax.jit, static_argnums=2)
def _slice(array: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, first, size)


@jax.jit
def take_rows(tree: Any, indices: jax.Array) -> Any:
    """The rows at `indices` of every leaf."""
    return jax.tree.map(lambda leaf: leaf.at[indices].get(mode="promise_in_bounds"), tree)


@jax.jit
def put_rows(tree: Any, indices: jax.Array, rows: Any) -> Any:
    """The tree with `rows` at `indices`; indices beyond the end are left out."""
    return jax.tree.map(lambda leaf, new: leaf.at[indices].set(new, mode="drop"), tree, rows)


@jax.jit
def join(parts: list[Any]) -> Any:
    """One tree of several, along the leading axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
