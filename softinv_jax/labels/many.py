"""`recover_many`: thousands of gradients, the fast search for all and the thorough one for those that need it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import in_float64
from softinv_jax.labels import recovery
from softinv_jax.labels.features import FeatureSource, Held, feature_of
from softinv_jax.labels.lanes import Place, for_each, in_turn, join, place_on, put_rows, rows_of
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.recovery import LossName, Method
from softinv_jax.labels.thorough import read_one, search_thoroughly
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, check_finite, observe

__all__ = ["recover_many", "recover_one"]

# Gradients worked on at once on a CPU: few enough to stay in the cache between two reads, but enough that what all of
# them share (W in float64) is paid for once in a while only.
CHUNK_BYTES = 32 * 2**20
CHUNK_SAMPLES = 16
LARGEST_CHUNK_BYTES = 256 * 2**20
SMALLEST_CHUNK = 16
# float64 numbers that the fast search of one example holds at once, for each class.
NUMBERS_A_CLASS = 200


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
      observation: `weight_gradient` (N, C, d), NumPy or JAX; NumPy arrays are moved to the device chunk by chunk. The
        result refers to them: features are made of them when they are asked for.
      method, unknown_scale, label_format, loss, approximate: see `recover`.
      thorough: search all examples thoroughly at once. Otherwise only those the fast search leaves without a sharp
        unique label.
      devices: share the examples out among these devices of this process, `jax.local_devices()` for all of them;
        None: the default device. For several processes, and for more examples than memory holds, see
        `softinv_jax.streaming`.
      progress: called with (examples done, N) as work proceeds.

    Returns:
      A `Recovery` with a leading axis N: JAX arrays that never left the device where the gradients are JAX arrays, else
      NumPy arrays.

    Raises:
      ValueError: as `recover`, with the index of the first example concerned where a value is not finite.
    """
    given = observe(**vars(observation), check_values=False)
    check_finite("weight", given.weight)
    gradient = given.weight_gradient
    if gradient.ndim != 3:
        raise ValueError(f"recover_many takes weight_gradient (N, C, d), not {gradient.shape}; use recover for one")
    # Only the thorough search tries other losses, and fewer than three classes have no triples to be fast with.
    thorough = thorough or loss not in ("auto", "cross_entropy") or given.weight.shape[0] < 3
    stages = recovery.stages_for(given, method, unknown_scale, label_format, thorough, loss, approximate=approximate)
    place = place_on(devices, gradient)
    # The search computes in float64 anyway: converted here, W is converted once and not once a chunk.
    seen = replace(given, weight=place.share(_as_float64(given.weight)), bias=place.share(given.bias))
    if isinstance(gradient, jax.Array) and place.is_cpu:
        # A view, of which chunks are taken without copying.
        seen = replace(seen, weight_gradient=jax.device_get(gradient))
    fetch = (lambda tree: tree) if isinstance(gradient, jax.Array) else jax.device_get
    found = _search(seen, stages, place, fetch, progress or (lambda done, total: None))
    return _with_source(found, given)


@in_float64
def recover_one(observation: Observation, **options: Any) -> Recovery:
    """`recovery.recover` outside of `jit` and `vmap`: of all its branches only those are compiled that are needed."""
    observation = jax.tree.map(_on_device, observe(**vars(observation)))
    recovery.check_single(observation)
    stages = recovery.stages_for(observation, **options)
    if not stages.thorough or stages.method != "exact":
        return recovery.complete(observation, recovery.search(recovery.read(observation, stages), stages), stages)
    lifted = jax.tree.map(lambda array: array[None], observation)
    many = replace(lifted, weight=observation.weight.astype(jnp.float64), bias=observation.bias)
    ((_, found),) = search_thoroughly(
        many, np.arange(1), stages, place_on(None, many.weight_gradient), lambda done: None
    )
    return _first(observation, found)


def _on_device(array: Any) -> jax.Array:
    return array if isinstance(array, jax.Array) else jax.device_put(array)


@jax.jit
def _first(observation: Observation, found: Recovery) -> Recovery:
    one = jax.tree.map(lambda leaf: leaf[0], found)
    source = one.stored_feature
    assert isinstance(source, FeatureSource)
    return replace(one, stored_feature=feature_of(observation, source).astype(source.length.dtype))


def _as_float64(array: Any) -> jax.Array:
    if isinstance(array, jax.Array):
        return array.astype(jnp.float64)
    return jax.device_put(np.asarray(array, np.float64))


def _search(
    observation: Observation,
    stages: recovery.Stages,
    place: Place,
    fetch: Callable[[Any], Any],
    report: Callable[[int, int], None],
) -> Recovery:
    """Everyone, by the fast search first unless the thorough one is asked for; `fetch` says where results are kept."""
    examples = observation.weight_gradient.shape[0]
    if stages.thorough:
        _name_bad_value(observation)
        everyone = np.arange(examples)
        blocks = search_thoroughly(observation, everyone, stages, place, lambda done: report(done, examples))
        return _joined([_cut(fetch(part), count) for count, part in blocks])
    result, unsure = _search_fast(observation, stages, place, fetch, report)
    settled = examples - unsure.size
    careful = stages._replace(thorough=True)
    for count, part in search_thoroughly(
        observation, unsure, careful, place, lambda done: report(settled + done, examples)
    ):
        result, unsure = _merge(result, fetch(part), unsure[:count]), unsure[count:]
    return result


def _search_fast(
    observation: Observation,
    stages: recovery.Stages,
    place: Place,
    fetch: Callable[[Any], Any],
    report: Callable[[int, int], None],
) -> tuple[Recovery, np.ndarray]:
    """Every example by the fast search, chunk by chunk; and which of them that leaves unsettled."""
    examples = observation.weight_gradient.shape[0]
    chunks = _chunks(examples, _chunk_size(observation, place))

    def search(chunk: np.ndarray) -> tuple[Recovery, jax.Array, jax.Array]:
        found = _recover_chunk(rows_of(observation, chunk, place), stages, place)
        return fetch(found), *_look(found, stages.method)

    parts, unsettled, seen = [], [], 0
    for chunk, (part, unsure, finite) in zip(
        chunks, in_turn(search, chunks, place, program=(stages, chunks[0].size)), strict=True
    ):
        if not jax.device_get(finite):
            _name_bad_value(observation)
        # The last chunk has some of the one before in it, or its last example several times.
        first, last = seen - int(chunk[0]), min(chunk.size, examples - int(chunk[0]))
        unsettled.append(seen + np.flatnonzero(jax.device_get(unsure)[first:last]))
        parts.append(_cut(part, last, first))
        seen += last - first
        report(seen - sum(one.size for one in unsettled), examples)
    return _joined(parts), np.concatenate(unsettled)


def _recover_chunk(observation: Observation, stages: recovery.Stages, place: Place) -> Recovery:
    """The stages of `recover`, each compiled by itself: the search is the same whatever the size of the features."""
    head = observation.weight, observation.bias
    gradients = observation.weight_gradient, observation.bias_gradient, observation.noise
    readings = for_each(read_one, stages, place, head, gradients, tuned=True)
    dtype = np.dtype(observation.weight_gradient.dtype)
    return for_each(_search_one, (stages, dtype), place, None, readings, tuned=True)


def _search_one(options: tuple[recovery.Stages, np.dtype], _: None, reading: Reading) -> Recovery:
    stages, dtype = options
    return recovery.in_kept_dtype(recovery.search(reading, stages), dtype)


def _chunk_size(observation: Observation, place: Place) -> int:
    """Examples worked on at once; few different numbers where they are few, because each compiles its own program."""
    gradient = observation.weight_gradient
    examples, classes = -(-gradient.shape[0] // place.shares), gradient.shape[1]
    sample_bytes = gradient.dtype.itemsize * int(np.prod(gradient.shape[1:]))
    rounded = max(1 << (examples - 1).bit_length(), SMALLEST_CHUNK)
    if rounded * sample_bytes <= CHUNK_BYTES:
        return rounded * place.shares
    samples = max(CHUNK_BYTES // sample_bytes, min(CHUNK_SAMPLES, LARGEST_CHUNK_BYTES // sample_bytes), 1)
    if not place.is_cpu:
        # All of what is there already is taken as it is; else each chunk is a copy.
        whole = isinstance(gradient, jax.Array) and place.free_bytes // 2 >= 8 * NUMBERS_A_CLASS * classes * examples
        each = 8 * NUMBERS_A_CLASS * classes + 2 * sample_bytes
        samples = examples if whole else max(place.free_bytes // 4 // each, 1)
    # Even chunks: they overlap by no more than the number of chunks.
    return -(-examples // -(-examples // samples)) * place.shares


def _chunks(examples: int, size: int) -> list[np.ndarray]:
    """Indices of so many examples at a time, in a row; the last ones come twice where they do not fit."""
    if examples < size:
        return [np.minimum(np.arange(size), examples - 1)]
    return [np.arange(size) + min(start, examples - size) for start in range(0, examples, size)]


def _name_bad_value(observation: Observation) -> None:
    """Raise ValueError for the first entry that is not finite, if there is one."""
    check_finite("weight_gradient", observation.weight_gradient)
    if observation.bias is not None and observation.bias_gradient is not None:
        check_finite("bias", observation.bias)
        check_finite("bias_gradient", observation.bias_gradient)
    if observation.noise is not None:
        check_finite("noise", observation.noise)


@partial(jax.jit, static_argnums=1)
def _look(result: Recovery, method: Method) -> tuple[jax.Array, jax.Array]:
    """(N,) bool: a thorough search could add something; and () whether everything was finite."""
    finite = jnp.all(jnp.isfinite(result.evidence.rank_one_residual))
    if method != "exact":  # The baselines have none.
        return jnp.zeros(result.verdict.shape, bool), finite
    rounding = float(jnp.finfo(result.label.dtype).eps)
    # A hundred roundings of the dtype: where the single column read so far no longer fixes the label that well,
    # averaging over all of the gradient pays.
    sharp = jnp.max(result.evidence.label_deviation, axis=-1) < 100 * rounding
    # Residuals that independent roundings would show in one sample of 30,000 (chi-square, Wilson and Hilferty's
    # cube): the client may sum in another order than expected. However many the classes, the few with the largest
    # softmax entries carry most of the errors.
    freedom = jnp.clip(result.evidence.agreeing - 2, 1, 5)
    expected = result.evidence.misfit <= (1 - 2 / (9 * freedom) + 4 * jnp.sqrt(2 / (9 * freedom))) ** 3
    unique = result.verdict == Verdict.UNIQUE
    # Noise is for the likelihood, which uses every row and column.
    settled = unique & sharp & expected & result.evidence.is_noiseless
    return ~(settled | (result.verdict == Verdict.NO_SIGNAL)), finite


def _cut(part: Recovery, last: int, first: int = 0) -> Recovery:
    if isinstance(part.verdict, jax.Array):
        return part if (first, last) == (0, len(part.verdict)) else _rows_between(part, first, last)
    return jax.tree.map(lambda leaf: leaf[first:last], part)


@partial(jax.jit, static_argnums=(1, 2))
def _rows_between(part: Recovery, first: int, last: int) -> Recovery:
    return jax.tree.map(lambda leaf: leaf[first:last], part)


def _joined(parts: list[Recovery]) -> Recovery:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0].verdict, jax.Array):
        return join(parts)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _merge(result: Recovery, sharper: Recovery, indices: np.ndarray) -> Recovery:
    """The result with the sharper ones, of which the first belong to the indices, in their places."""
    if isinstance(result.verdict, jax.Array):
        beyond = np.full(len(sharper.verdict) - indices.size, len(result.verdict))
        return _put(result, jax.device_put(np.append(indices, beyond).astype(np.int32)), sharper)

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        old = np.array(old)
        old[indices] = new[: indices.size]
        return old

    return jax.tree.map(put, _widened(result, sharper, np), sharper)


@jax.jit
def _put(result: Recovery, indices: jax.Array, sharper: Recovery) -> Recovery:
    return put_rows(_widened(result, sharper, jnp), indices, sharper)


def _widened(result: Recovery, sharper: Recovery, arrays: Any) -> Recovery:
    """The result with room for what only the thorough search gives: more candidates, and a pull on the feature."""
    missing = sharper.candidates.scalar.shape[1] - result.candidates.scalar.shape[1]

    def widen(leaf: Any) -> Any:
        room = ((0, 0), (0, missing), *((0, 0),) * (leaf.ndim - 2))
        return arrays.pad(leaf, room, constant_values=np.nan)

    source = result.stored_feature
    assert isinstance(source, FeatureSource)
    if source.pull is None:
        source = replace(source, pull=arrays.zeros_like(source.coefficients))
    candidates = jax.tree.map(widen, result.candidates) if missing else result.candidates
    return replace(result, candidates=candidates, stored_feature=source)


def _with_source(found: Recovery, given: Observation) -> Recovery:
    """The recovery with the gradients that its features are made of, where these are."""
    gradient, source = given.weight_gradient, found.stored_feature
    assert isinstance(source, FeatureSource)
    example = np.arange(len(gradient), dtype=np.int32)
    if not isinstance(gradient, jax.Array):
        return replace(found, stored_feature=replace(source, example=example, held=Held(given)))
    if len(gradient.devices()) == 1 and found.verdict.devices() != gradient.devices():
        found = jax.device_put(found, next(iter(gradient.devices())))
    source = replace(found.stored_feature, example=jax.device_put(example), held=Held(given))  # type: ignore[type-var]
    return replace(found, stored_feature=source)
