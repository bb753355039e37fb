"""`recover`, `recover_many`, `recover_update`: what gradients of a last layer give away, of one example or a batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery, Reduction, recover_batch
from softinv_jax.labels import many, recovery
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, observe, stack_observations
from softinv_jax.observation.updates import ObservedUpdate, observe_update_head

__all__ = ["BatchSize", "as_approximate", "recover", "recover_many", "recover_update"]

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
    progress: Callable[[int, int], None] | None = None,
) -> BatchRecovery: ...
def recover(observation: Observation, *, batch_size: BatchSize = 1, **options: Any) -> Recovery | BatchRecovery:
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
      options: for one example `method`, `unknown_scale`, `label_format` and `thorough`, as
        `softinv_jax.labels.recovery.recover` describes them; for a batch `reduction`,
        `unknown_scale` and `progress`, as `softinv_jax.batches.batch_recovery.recover_batch` does.

    Returns:
      A `Recovery`, or a `BatchRecovery` for another batch size than 1.

    Raises:
      ValueError: for arrays `observe` refuses, and what the two functions refuse.
    """
    if _is_one(batch_size):
        return recovery.recover(observation, **options)
    return recover_batch(observation, batch_size, **_batch_options(options))


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
    progress: Callable[[int, int], None] | None = None,
) -> list[BatchRecovery]: ...
def recover_many(
    observation: Observation, *, batch_size: BatchSize = 1, **options: Any
) -> Recovery | list[BatchRecovery]:
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
      observation: `weight_gradient` (N, C, d).
      batch_size: of each gradient; see `recover`.
      options: as for `recover`, and `progress`, called with (gradients done, N).

    Returns:
      A `Recovery` with a leading axis N, or a list of N `BatchRecovery`.

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
    recoveries = []
    for index, gradient in enumerate(gradients):
        bias_gradient = None if observation.bias_gradient is None else observation.bias_gradient[index]
        noise = None if observation.noise is None else observation.noise[index]
        one = Observation(observation.weight, gradient, observation.bias, bias_gradient, noise)
        recoveries.append(recover_batch(one, batch_size, **options))
        report(index + 1, len(gradients))
    return recoveries


def recover_update(
    update: ObservedUpdate, *, batch_size: BatchSize = 1, head: str | None = None
) -> Recovery | BatchRecovery:
    """Recover what the head gives away in a client's update of a whole model; docs/frameworks.md has examples.

    Args:
      update: see `observe_update`.
      batch_size: examples behind the update; see `recover`.
      head: name of the last dense layer, where shapes and names do not tell it; see `find_head`.

    Returns:
      A `Recovery` of NumPy arrays, or a `BatchRecovery` for another batch size than 1, whose `scale`
      includes the learning rate where that is not known. Where the update is not exact, nothing is `unique`.

    Raises:
      ValueError: as `recover`, and for a head that is not found.
    """
    observation = observe_update_head(update, name=head)
    if not _is_one(batch_size):
        batch = recover_batch(observation, batch_size, unknown_scale=not update.scale_known)
        return batch if update.exact else as_approximate(batch)
    # Rounding of the parameters is noise, which only the thorough search can deal with.
    found = many.recover_many(stack_observations([observation]), unknown_scale=not update.scale_known, thorough=True)
    one = jax.tree.map(lambda leaf: leaf[0], found)
    return one if update.exact else as_approximate(one)


Result = TypeVar("Result", Recovery, BatchRecovery)


def as_approximate(recovery: Result) -> Result:
    """The same recovery of a gradient that was not observed exactly: `unique` becomes `ambiguous`.

    What several local steps change is no noise, and no deviation covers it.
    """
    verdict = np.where(recovery.verdict == Verdict.UNIQUE, np.int32(Verdict.AMBIGUOUS), recovery.verdict)
    return replace(recovery, verdict=verdict)  # type: ignore[arg-type]


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
