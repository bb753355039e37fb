"""From a model's parameters before and after a client's local training to the gradient behind them.

One step of stochastic gradient descent from a fresh optimiser is `after = before - learning_rate * f * (g + w before)`,
with weight decay w and a factor f that is 1 but for Nesterov momentum: the gradient g follows exactly, up to the
rounding of `after`. Several steps add gradients taken at parameters that move: what comes out is their average, which
the recoveries can only take for the gradient at `before`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.observation.head import Observation, find_head, observe_head
from softinv_jax.observation.local_training import LocalTraining

__all__ = ["ObservedUpdate", "observe_update", "observe_update_head"]


@dataclass(frozen=True)
class ObservedUpdate:
    """What one round of local training says about the client's gradient. Arrays are NumPy's.

    Attributes:
      parameters: `before`, the model the client was sent.
      gradients: the same tree, each array in the dtype of `after`; for an unknown learning rate, times that rate.
      rounding: the same tree, float64: standard deviation of each entry's error from the rounding of `after`.
      scale_known: whether the learning rate was given. If not, recover with `unknown_scale=True`.
      exact: one local step. Otherwise the average over steps stands for the gradient.
      statement: what was assumed and what that is worth, in one sentence or two.
      training: what the client is taken to have done; a rate of 1 where it is not known.
    """

    parameters: Any
    gradients: Any
    rounding: Any
    scale_known: bool
    exact: bool
    statement: str
    training: LocalTraining = field(default_factory=LocalTraining)


def observe_update(
    before: Any,
    after: Any,
    *,
    learning_rate: float | Sequence[float] | None = None,
    local_steps: int = 1,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    proximal: float = 0.0,
    minibatch_size: int | None = None,
) -> ObservedUpdate:
    """The gradient behind a client's update, for a client that runs plain or momentum gradient descent.

    The optimiser is that of `torch.optim.SGD` and of `optax.sgd`, and starts from zero: a first step from zero has no
    momentum yet, and Nesterov's form multiplies it by 1 + momentum. Adaptive optimisers (Adam) send no gradient.

    Args:
      before: pytree of floating arrays: the parameters the client was sent.
      after: the same tree: those it sent back. (A client that sends the difference instead, `after - before`, has sent
        `-learning_rate` times its gradient, which needs no conversion but the division, and loses no digits here.)
      learning_rate: positive, or one for each local step; None where it is not known. The gradient is then known up to
        that factor.
      local_steps: K, 1 or more. For K > 1 the result is the average gradient of the K steps.
      momentum, dampening, nesterov: of the optimiser.
      weight_decay: added to the gradient, times the parameters, before momentum; needs the learning rate.
      proximal: FedProx's mu. A first step does not feel it.
      minibatch_size: examples in each step, where a step is not on all of the client's.

    Returns:
      An `ObservedUpdate`.

    Raises:
      ValueError: naming the array or option: trees, shapes or dtypes that differ or are not floating, entries that are
        not finite, or an option out of range.
    """
    rates = 1.0 if learning_rate is None else learning_rate
    training = LocalTraining(
        steps=local_steps,
        learning_rate=rates,  # type: ignore[arg-type]
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        proximal=proximal,
        minibatch_size=minibatch_size,
    )
    if weight_decay and learning_rate is None:
        raise ValueError("weight_decay needs learning_rate: without it, its share of the update cannot be told")
    names, old, new, structure = _leaves(before, after)
    divisor, shrinkage = training.total_weight(), training.shrinkage()
    gradients, rounding = [], []
    for name, start, end in zip(names, old, new, strict=True):
        dtype = end.dtype
        difference = shrinkage * start.astype(np.float64) - end.astype(np.float64)
        with np.errstate(over="ignore"):  # told below
            quotient = (difference / divisor).astype(dtype)
        if not np.all(np.isfinite(quotient.astype(np.float64))):
            raise ValueError(
                f"the gradient of {name} exceeds the range of {dtype} at learning_rate = {learning_rate}; check the"
                " rate, or convert both sets of parameters to float32"
            )
        gradients.append(quotient)
        rounding.append(_rounding_deviation(end) * np.sqrt(local_steps) / divisor)
    return ObservedUpdate(
        parameters=jax.tree.unflatten(structure, old),
        gradients=jax.tree.unflatten(structure, gradients),
        rounding=jax.tree.unflatten(structure, rounding),
        scale_known=learning_rate is not None,
        exact=local_steps == 1,
        statement=_statement(learning_rate is not None, training),
        training=training,
    )


def observe_update_head(
    update: ObservedUpdate, *, name: str | None = None, number_of_classes: int | None = None
) -> Observation:
    """The observation of the head of an update, with the noise that rounding is known to have left on it.

    Args:
      update: of a tree of layers as `observe_head` takes it.
      name, number_of_classes: see `find_head`.

    Raises:
      ValueError: from `observe_head`.
    """
    path = find_head(update.parameters, name=name, number_of_classes=number_of_classes)
    observation = observe_head(update.parameters, update.gradients, name=path)
    rounding = observe_head(update.parameters, update.rounding, name=path)
    noise = _row_noise(np.asarray(observation.weight_gradient, np.float64), np.asarray(rounding.weight_gradient))
    if rounding.bias_gradient is not None:
        # One entry of a row, but the one that the length of the feature is read from.
        noise = np.maximum(noise, np.asarray(rounding.bias_gradient))
    return replace(observation, noise=noise)  # type: ignore[arg-type]  # NumPy until it is moved to the device


def _row_noise(gradient: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """(C,) deviation per entry to expect of each row (C, d), rounded with the deviations (C, d).

    Errors of entries that extend over several spacings of the grid are as good as independent. Those of a smaller step
    follow it: of a Gaussian step of deviation s, rounded to a grid of spacing D, a share 2 exp(-2 (pi s / D)^2) is lost
    (Widrow and Kollar, Quantization Noise, 2008), in all columns alike, so that no average over columns removes it.
    """
    size = np.sqrt(np.mean(gradient**2, axis=-1, keepdims=True))
    lost = np.minimum(2 * np.exp(-2 * (np.pi * size / (np.sqrt(12) * rounding)) ** 2), 1.0)
    common = np.mean(lost * np.hypot(size, rounding), axis=-1)
    return np.sqrt(np.mean(rounding**2, axis=-1) + gradient.shape[-1] * common**2)


def _leaves(before: Any, after: Any) -> tuple[list[str], list[np.ndarray], list[np.ndarray], Any]:
    """Names and arrays of the two trees, checked against each other, and their structure."""
    given, structure = jax.tree.flatten_with_path(before)
    returned, other = jax.tree.flatten_with_path(after)
    if not given:
        raise ValueError("before holds no arrays; give the parameters the client was sent")
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in given]
    if structure != other:  # type: ignore[operator]
        theirs = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in returned]
        differing = sorted(set(names) ^ set(theirs))
        raise ValueError(
            "before and after must be the same tree of arrays, but they differ in"
            f" {', '.join(differing[:6]) or 'the containers'}"
        )
    old, new = [], []
    for name, (_, first), (_, last) in zip(names, given, returned, strict=True):
        start, end = np.asarray(first), np.asarray(last)
        for side, array in (("before", start), ("after", end)):
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"{name} of {side} must be floating, not {array.dtype}; leave out what is not trained")
            if not np.all(np.isfinite(array.astype(np.float64))):
                raise ValueError(f"{name} of {side} holds entries that are not finite")
        if start.shape != end.shape:
            raise ValueError(f"{name} has shape {start.shape} before and {end.shape} after")
        old.append(start)
        new.append(end)
    return names, old, new, structure


def _rounding_deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation of the error of rounding to these values, which is uniform over their dtype's spacing."""
    limits = jnp.finfo(values.dtype)
    _, exponent = np.frexp(values.astype(np.float64))
    spacing = np.maximum(float(limits.eps) * np.ldexp(1.0, exponent - 1), float(limits.smallest_subnormal))
    return spacing / np.sqrt(12)


def _statement(rate_known: bool, training: LocalTraining) -> str:
    scale = "a known learning rate" if rate_known else "an unknown learning rate (gradient times it)"
    optimiser = f"momentum {training.momentum:g} from zero" if training.momentum else "no momentum"
    decay = f", weight decay {training.weight_decay:g}" if training.weight_decay else ""
    decay += f", minibatches of {training.minibatch_size}" if training.minibatch_size is not None else ""
    if training.steps == 1:
        return f"Exact up to the rounding of the parameters: one local step, {scale}, {optimiser}{decay}."
    return (
        f"Approximate: the average gradient of {training.steps} local steps, {scale}, {optimiser}{decay}, stands for"
        " the gradient at the parameters sent. No stated error covers what the steps change; no label is called unique."
    )
