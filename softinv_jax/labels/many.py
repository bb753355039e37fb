"""`recover_many`: thousands of gradients, the fast search for all and the thorough one for those that need it."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softinv_jax.float64 import in_float64
from softinv_jax.labels import recovery
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.recovery import LossName, Method
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, check_finite, observe

__all__ = ["recover_many"]

# Gradients worked on at once: few enough to stay in the cache between two reads, but enough that what all of them
# share (W in float64) is paid for once in a while only.
CHUNK_BYTES = 32 * 2**20
CHUNK_SAMPLES = 16
LARGEST_CHUNK_BYTES = 256 * 2**20
SMALLEST_CHUNK = 16


@in_float64
def recover_many(
    observation: Observation,
    *,
    method: Method = "exact",
    unknown_scale: bool = False,
    label_format: Literal["smoothing", "mixup"] | None = None,
    loss: LossName = "auto",
    approximate: bool = False,
    thorough: bool = False,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """Recover every example of an observation.

    Args:
      observation: `weight_gradient` (N, C, d), NumPy or JAX; NumPy arrays are moved to the device chunk by chunk.
      method, unknown_scale, label_format, loss, approximate: see `recover`.
      thorough: search all examples thoroughly at once. Otherwise only those the fast search leaves without a sharp
        unique label.
      devices: share the examples out among these devices of this process, `jax.local_devices()` for all of them;
        None: the default device. For several processes, and for more examples than memory holds, see
        `softinv_jax.streaming`.
      progress: called with (examples done, N) as work proceeds.

    Returns:
      A `Recovery` of NumPy arrays with a leading axis N.

    Raises:
      ValueError: as `recover`, with the index of the first example concerned where a value is not finite.
    """
    observation = observe(**vars(observation), check_values=False)
    check_finite("weight", observation.weight)
    gradient = observation.weight_gradient
    if gradient.ndim != 3:
        raise ValueError(f"recover_many takes weight_gradient (N, C, d), not {gradient.shape}; use recover for one")
    # Only the thorough search tries other losses, and fewer than three classes have no triples to be fast with.
    thorough = thorough or loss not in ("auto", "cross_entropy") or observation.weight.shape[0] < 3
    stages = recovery.stages_for(
        observation, method, unknown_scale, label_format, thorough, loss, approximate=approximate
    )
    place = _place(devices)
    # The search computes in float64 anyway: converted here, W is converted once and not once a chunk.
    observation = replace(observation, weight=jnp.asarray(observation.weight, jnp.float64))
    if isinstance(gradient, jax.Array) and all(device.platform == "cpu" for device in gradient.devices()):
        # A view, of which chunks are taken without copying.
        observation = replace(observation, weight_gradient=np.asarray(gradient))  # type: ignore[arg-type]
    report = progress or (lambda done, total: None)
    if thorough:
        _name_bad_value(observation)
        return _search_thoroughly(observation, np.arange(len(gradient)), stages, place, report, 0)
    result, done = _search_fast(observation, stages, place, report)
    unsure = np.flatnonzero(~_settled(result, method))
    if not unsure.size:
        return result
    return _merge(result, _search_thoroughly(observation, unsure, stages, place, report, done), unsure)


def _place(devices: Sequence[jax.Device] | None) -> "_Place":
    foreign = [str(device) for device in devices or () if device.process_index != jax.process_index()]
    if foreign:
        raise ValueError(
            f"devices {', '.join(foreign)} belong to another process; give some of jax.local_devices(), and share the"
            " examples between processes with softinv_jax.streaming.recover_stream"
        )
    return _Place(tuple(devices or ()))


def _search_fast(
    observation: Observation, stages: recovery.Stages, place: "_Place", report: Callable[[int, int], None]
) -> tuple[Recovery, int]:
    """Every example by the fast search, chunk by chunk; and how many of them that settles."""
    gradient = observation.weight_gradient
    examples = gradient.shape[0]
    share = _chunk_size(-(-examples // place.shares), gradient.dtype.itemsize * int(np.prod(gradient.shape[1:])))
    chunk = share * place.shares
    starts = range(0, examples, chunk)

    @in_float64  # Which is set for one thread only.
    def search(start: int) -> Recovery:
        part = _chunk(observation, np.arange(start, min(start + chunk, examples)), chunk, place)
        return jax.device_get(_recover_chunk(part, stages, place))

    done, parts = 0, []
    for start, part in zip(starts, _in_turn(search, starts, place), strict=True):
        parts.append(part)
        if not np.all(np.isfinite(part.evidence.rank_one_residual)):
            _name_bad_value(observation)
        done += int(np.count_nonzero(_settled(part, stages.method)[: examples - start]))
        report(done, examples)
    return _stack(parts, examples), done


def _search_thoroughly(
    observation: Observation,
    indices: np.ndarray,
    stages: recovery.Stages,
    place: "_Place",
    report: Callable[[int, int], None],
    done: int,
) -> Recovery:
    """The examples at `indices`, one a device at a time: only the branch it needs (consensus or likelihood), and one
    compiled program for any number of them. `done` are settled already.
    """
    starts = range(0, indices.size, place.shares)

    @in_float64
    def search(start: int) -> Recovery:
        part = _chunk(observation, indices[start : start + place.shares], place.shares, place)
        return jax.device_get(_recover_chunk(part, stages._replace(thorough=True), place))

    refined = []
    examples = observation.weight_gradient.shape[0]
    for part in _in_turn(search, starts, place):
        refined.append(part)
        done = min(done + place.shares, examples)
        report(done, examples)
    return _stack(refined, indices.size)


class _Place(NamedTuple):
    """Where chunks are worked on: these devices, or the default one for none."""

    devices: tuple[jax.Device, ...]

    @property
    def shares(self) -> int:
        return max(len(self.devices), 1)

    @property
    def mesh(self) -> Mesh:
        return Mesh(np.array(self.devices), ("examples",))

    def put(self, values: jax.Array) -> jax.Array:
        """(N, ...) to the devices, N / count examples each."""
        if not self.devices:
            return jax.device_put(values)
        return jax.device_put(values, NamedSharding(self.mesh, PartitionSpec("examples")))


def _recover_chunk(observation: Observation, stages: recovery.Stages, place: _Place) -> Recovery:
    """The stages of `recover`, each compiled by itself: the search is the same whatever the size of the features."""
    head = observation.weight, observation.bias
    gradients = observation.weight_gradient, observation.bias_gradient, observation.noise
    readings, rights = _for_each(_read, stages, place, head, gradients)
    found, pulls = _for_each(_search, stages, place, (), readings)
    return _for_each(_complete, stages, place, head, (gradients, rights, readings.right_norm, found, pulls))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _for_each(stage: Callable, stages: recovery.Stages, place: _Place, shared: Any, each: Any) -> Any:
    """stage(stages, shared, one) of every one along the leading axis of `each`."""

    def share(shared: Any, each: Any) -> Any:
        one = partial(stage, stages, shared)
        # Under vmap both branches of the thorough search would run.
        return jax.lax.map(one, each) if stages.thorough else jax.vmap(one)(each)

    if place.devices:
        # Examples know nothing of each other: every device runs the whole program on its share of them.
        examples, all_alike = PartitionSpec("examples"), PartitionSpec()
        share = jax.shard_map(
            share, mesh=place.mesh, in_specs=(all_alike, examples), out_specs=examples, check_vma=False
        )
    return share(shared, each)


def _read(stages: recovery.Stages, head: tuple, gradients: tuple) -> tuple:
    return recovery.read(_single(head, gradients), stages)


def _search(stages: recovery.Stages, _: tuple, reading: Reading) -> tuple:
    return recovery.search(reading, stages)


def _complete(stages: recovery.Stages, head: tuple, one: tuple) -> Recovery:
    gradients, *rest = one
    return recovery.complete(_single(head, gradients), *rest)


def _single(head: tuple, gradients: tuple) -> Observation:
    (weight, bias), (weight_gradient, bias_gradient, noise) = head, gradients
    return Observation(weight, weight_gradient, bias, bias_gradient, noise)


def _in_turn(search: Callable[[int], Recovery], starts: Sequence[int], place: _Place) -> Iterator[Recovery]:
    """The chunks' recoveries in order, a few at work at once.

    XLA on a CPU runs most of the search on one core: as many chunks as there are cores. On an accelerator the next
    chunk is copied while this one is worked on.
    """
    if not starts:
        return
    yield search(starts[0])  # Compiles, which two threads would do twice.
    platform = place.devices[0].platform if place.devices else jax.default_backend()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(cores // place.shares, 1) if platform == "cpu" else 2
    pool = ThreadPoolExecutor(min(workers, len(starts)))
    try:
        yield from pool.map(search, starts[1:])
    finally:
        pool.shutdown(cancel_futures=True)


def _chunk_size(examples: int, sample_bytes: int) -> int:
    """Examples worked on at once; few different numbers where they are few, because each compiles its own program."""
    rounded = max(1 << (examples - 1).bit_length(), SMALLEST_CHUNK)
    if rounded * sample_bytes <= CHUNK_BYTES:
        return rounded
    samples = max(CHUNK_BYTES // sample_bytes, min(CHUNK_SAMPLES, LARGEST_CHUNK_BYTES // sample_bytes), 1)
    # Even chunks: none is padded by more than the number of chunks.
    return -(-examples // -(-examples // samples))


def _chunk(observation: Observation, indices: np.ndarray, size: int, place: _Place) -> Observation:
    """The examples at `indices`, the last repeated up to `size` so that one compiled program serves all chunks."""
    padded = np.append(indices, np.full(size - indices.size, indices[-1]))
    contiguous = indices.size == size and indices[-1] - indices[0] == size - 1
    pick = slice(int(indices[0]), int(indices[-1]) + 1) if contiguous else padded

    def picked(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else place.put(array[pick])

    return Observation(
        observation.weight,
        place.put(observation.weight_gradient[pick]),
        observation.bias,
        picked(observation.bias_gradient),
        picked(observation.noise),
    )


def _name_bad_value(observation: Observation) -> None:
    """Raise ValueError for the first entry that is not finite, if there is one."""
    check_finite("weight_gradient", observation.weight_gradient)
    if observation.bias is not None and observation.bias_gradient is not None:
        check_finite("bias", observation.bias)
        check_finite("bias_gradient", observation.bias_gradient)
    if observation.noise is not None:
        check_finite("noise", observation.noise)


def _settled(result: Recovery, method: Method) -> np.ndarray:
    """(N,) bool: nothing a thorough search could add."""
    if method != "exact":  # The baselines have none.
        return np.ones(result.verdict.shape, bool)
    rounding = float(jnp.finfo(result.label.dtype).eps)
    # A hundred roundings of the dtype: where the single column read so far no longer fixes the label that well,
    # averaging over all of the gradient pays.
    sharp = np.max(result.evidence.label_deviation, axis=-1) < 100 * rounding
    # Residuals that independent roundings would show in one sample of 30,000 (chi-square, Wilson and Hilferty's
    # cube): the client may sum in another order than expected. However many the classes, the few with the largest
    # softmax entries carry most of the errors.
    freedom = np.clip(result.evidence.agreeing - 2, 1, 5)
    expected = result.evidence.misfit <= (1 - 2 / (9 * freedom) + 4 * np.sqrt(2 / (9 * freedom))) ** 3
    unique = result.verdict == Verdict.UNIQUE
    # Noise is for the likelihood, which uses every row and column.
    return (unique & sharp & expected & result.evidence.is_noiseless) | (result.verdict == Verdict.NO_SIGNAL)


def _stack(parts: list[Recovery], examples: int) -> Recovery:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:examples], *parts)


def _merge(result: Recovery, sharper: Recovery, indices: np.ndarray) -> Recovery:
    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        if old.ndim > 1 and old.shape[1:] != new.shape[1:]:  # More candidates are listed by the thorough search.
            padded = np.full((old.shape[0], *new.shape[1:]), np.nan, old.dtype)
            padded[tuple(slice(0, n) for n in old.shape)] = old
            old = padded
        old = np.array(old)
        old[indices] = new
        return old

    return jax.tree.map(put, result, sharper)
