"""`recover` and `recover_many`: what gradients of a last layer give away, of one example or a batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.batch_recovery import BatchLoss, BatchRecovery, Reduction, recover_batch
from softinv_jax.batches.class_counts import ClassCounts, count_classes
from softinv_jax.batches.many_batches import recover_batches
from softinv_jax.labels import many, recovery
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, observe

__all__ = ["BatchSize", "as_approximate", "recover", "recover_many"]

BatchSize = int | Literal["auto"]


@overload
def recover(  # type: ignore[overload-overlap]
    observation: Observation, *, batch_size: Literal[1] = 1, **options: Any
) -> Recovery: ...
@overload
def recover(
    observation: Observation,
    *,
    batch_size: BatchSize,
    reduction: Reduction = "mean",
    unknown_scale: bool = False,
    loss: BatchLoss = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> BatchRecovery | ClassCounts: ...
def recover(
    observation: Observation, *, batch_size: BatchSize = 1, **options: Any
) -> Recovery | BatchRecovery | ClassCounts:
    """Recover the soft labels and last-layer features behind one gradient of a last layer.

    >>> import numpy as np
    >>> import softinv_jax
    >>> rng = np.random.default_rng(0)
    >>> weight, feature = rng.uniform(-0.5, 0.5, (10, 32)), rng.uniform(0, 1, 32)
    >>> label = np.full(10, 0.02) + 0.8 * np.eye(10)[3]
    >>> powers = np.exp(weight @ feature)
    >>> gradient = np.outer(powers / powers.sum() - label, feature)
    >>> observation = softinv_jax.observe(weight.astype(np.float32), gradient.astype(np.float32))
    >>> recovery = softinv_jax.recover(observation)
    >>> str(recovery.verdict_name), int(np.argmax(recovery.label)), round(float(recovery.format.smoothing), 4)
    ('unique', 3, 0.2)

    Args:
      observation: `weight_gradient` (C, d); see `observe`.
      batch_size: how many examples the gradient is the mean of. 1 is pure and works under `jax.jit` and `jax.vmap`;
        larger ones, or `auto` (the gradient's numerical rank), search on the host.
      options: for one example `method`, `unknown_scale`, `label_format`, `loss`, `approximate` and `thorough`, as
        `softinv_jax.labels.recovery.recover` describes them; for a batch `reduction`, `unknown_scale`, `loss` and
        `progress`, as `softinv_jax.batches.batch_recovery.recover_batch` does.

    Returns:
      A `Recovery`; a `BatchRecovery` for another batch size than 1; `ClassCounts`, the mean label and counts of
      classes, for as many examples as classes or more, which nothing tells apart.

    Raises:
      ValueError: for arrays `observe` refuses, and what the two functions refuse.
    """
    if _is_one(batch_size):
        one = recovery.recover if _is_traced() else many.recover_one
        return one(observation, **options)
    options = _batch_options(options)
    if _is_too_large(observation, batch_size):
        return _count(observation, batch_size, options)
    return recover_batch(observation, batch_size, **options)


@overload
def recover_many(  # type: ignore[overload-overlap]
    observation: Observation, *, batch_size: Literal[1] = 1, **options: Any
) -> Recovery: ...
@overload
def recover_many(
    observation: Observation,
    *,
    batch_size: BatchSize,
    reduction: Reduction = "mean",
    unknown_scale: bool = False,
    loss: BatchLoss = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[BatchRecovery] | list[ClassCounts]: ...
def recover_many(
    observation: Observation, *, batch_size: BatchSize = 1, **options: Any
) -> Recovery | list[BatchRecovery] | list[ClassCounts]:
    """Recover what is behind N gradients (N, C, d), each of `batch_size` examples.

    >>> import numpy as np
    >>> import softinv_jax
    >>> rng = np.random.default_rng(0)
    >>> weight, feature = rng.uniform(-0.5, 0.5, (10, 32)), rng.uniform(0, 1, 32)
    >>> label = np.full(10, 0.02) + 0.8 * np.eye(10)[3]
    >>> powers = np.exp(weight @ feature)
    >>> gradient = np.outer(powers / powers.sum() - label, feature)
    >>> gradients = np.stack([gradient, 3 * gradient, 0 * gradient]).astype(np.float32)
    >>> observation = softinv_jax.observe(weight.astype(np.float32), gradients)
    >>> found = softinv_jax.recover_many(observation, unknown_scale=True)
    >>> found.verdict_name.tolist(), found.scale[:2].round(3).tolist()
    (['unique', 'unique', 'no_signal'], [1.0, 3.0])

    Args:
      observation: `weight_gradient` (N, C, d). JAX arrays stay on their device, and so do the results; see
        docs/accelerators.md.
      batch_size: of each gradient; see `recover`.
      options: as for `recover`, and `progress`, called with (gradients done, N).

    Returns:
      A `Recovery` with a leading axis N, of NumPy arrays for NumPy gradients and of JAX arrays for JAX ones, or a list
      of N `BatchRecovery`.

    Raises:
      ValueError: as `recover`.
    """
    if _is_one(batch_size):
        return many.recover_many(observation, **options)
    options = _batch_options(options)
    observation = observe(**vars(observation))
    gradients = observation.weight_gradient
    if gradients.ndim != 3:
        raise ValueError(f"recover_many takes weight_gradient (N, C, d), not {gradients.shape}; use recover for one")
    report = options.pop("progress", None) or (lambda done, total: None)
    first = Observation(observation.weight, gradients[0], observation.bias, None, None)
    if not _is_too_large(first, batch_size):
        return recover_batches(observation, batch_size, progress=report, **options)
    counts = []
    for index, gradient in enumerate(gradients):
        bias_gradient = None if observation.bias_gradient is None else observation.bias_gradient[index]
        noise = None if observation.noise is None else observation.noise[index]
        one = Observation(observation.weight, gradient, observation.bias, bias_gradient, noise)
        counts.append(_count(one, batch_size, options))
        report(index + 1, len(gradients))
    return counts


Result = TypeVar("Result", Recovery, BatchRecovery)


def as_approximate(recovery: Result) -> Result:
    """The same recovery of a gradient that was not observed exactly: `unique` becomes `ambiguous`.

    What several local steps change is no noise, and no deviation covers it.
    """
    sure = (recovery.verdict == Verdict.UNIQUE) | (recovery.verdict == Verdict.CONDITIONAL)
    verdict = np.where(sure, np.int32(Verdict.AMBIGUOUS), recovery.verdict)
    return replace(recovery, verdict=verdict)  # type: ignore[arg-type]


def _is_too_large(observation: Observation, batch_size: BatchSize) -> bool:
    """Whether a batch has as many examples as classes, or more than features: its gradient tells no two apart."""
    if not isinstance(batch_size, int | np.integer) or isinstance(batch_size, bool):
        return False
    shape = np.shape(observation.weight)
    return len(shape) == 2 and bool(batch_size >= min(shape[0], shape[1] + 1))


def _count(observation: Observation, batch_size: BatchSize, options: dict[str, Any]) -> ClassCounts:
    if options.get("unknown_scale"):
        raise ValueError(
            f"batch_size = {batch_size} is as large as the number of classes, so that only the mean label can be known,"
            " and that only at a known scale; give the learning rate and the reduction"
        )
    counts = count_classes(observation, int(batch_size), reduction=options.get("reduction", "mean"))
    if options.get("progress"):
        options["progress"](int(batch_size), int(batch_size))
    return counts


def _is_traced() -> bool:
    """Whether this runs inside `jit` or `vmap`, where everything is one pure program."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _is_one(batch_size: BatchSize) -> bool:
    return isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size == 1


def _batch_options(options: dict[str, Any]) -> dict[str, Any]:
    refused = sorted(set(options) - {"reduction", "unknown_scale", "loss", "progress"})
    if refused:
        raise ValueError(
            f"{' and '.join(refused)} {'is' if len(refused) == 1 else 'are'} for batch_size=1 only; a batch takes"
            " reduction, unknown_scale, loss and progress"
        )
    return options
