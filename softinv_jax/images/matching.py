"""Gradient matching: images found by making the gradient of a dummy example resemble the observed one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softinv_jax.images.descent import Descent, best_guess, descend, make_optimiser, start_descent
from softinv_jax.images.distances import norm
from softinv_jax.images.matching_input import check_matching_input
from softinv_jax.images.objective import (
    ApplyFunction,
    Guess,
    MatchingSettings,
    Model,
    Target,
    guessed_label,
    kept_leaves,
    mean_loss_gradient,
    objective,
)

__all__ = ["Matching", "match_gradient", "match_gradients"]

# Steps between two calls of `progress`; also how many losses are kept on the device.
CHUNK = 100
# Softmax cannot give an entry of zero, and hardly moves one that is nearly zero.
SMALLEST_START = 1e-4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matching:
    """An image that matches an observed gradient; from `match_gradients`, every array has a leading axis N.

    Attributes:
      image: (H, W, channels) or (B, H, W, channels), of the best restart, normalised as the model takes it.
      label: (C,) or (B, C), as given or as optimised.
      loss: () smallest value of the objective over all steps of all restarts; infinite if all were NaN.
      gradient_residual: () |gradient of the image - observed| / |observed|, over all layers whatever was matched.
      restart: () int32, the restart that reached it.
      restart_losses: (R,) smallest loss of each restart.
      loss_trace: (steps,) losses of that restart, each before its step.
    """

    image: jax.Array
    label: jax.Array
    loss: jax.Array
    gradient_residual: jax.Array
    restart: jax.Array
    restart_losses: jax.Array
    loss_trace: jax.Array


class _Problem(NamedTuple):
    """All that a program is compiled for besides the shapes of its arrays."""

    apply_fn: Model
    features_fn: ApplyFunction | None
    settings: MatchingSettings
    kept: tuple[bool, ...]
    image_shape: tuple[int, ...]
    own_parameters: bool

    @property
    def examples(self) -> tuple[Any, Target, int | None]:
        """Axes of examples: of descents, targets and parameters."""
        return 0, _EXAMPLES, 0 if self.own_parameters else None

    def objective(self, target: Target, parameters: Any) -> Callable[[Guess], jax.Array]:
        return lambda guess: objective(
            guess, target, parameters, self.apply_fn, self.features_fn, self.settings, self.kept
        )


def match_gradient(
    apply_fn: Model,
    parameters: Any,
    gradient: Any,
    image_shape: tuple[int, ...],
    key: jax.Array,
    *,
    label: ArrayLike | None = None,
    feature: ArrayLike | None = None,
    start: ArrayLike | None = None,
    **options: Any,
) -> Matching:
    """Match one observed gradient.

    Args:
      apply_fn: the model, (parameters, image (H, W, channels)) -> logits (C,). One program is compiled for each
        function object: keep one and not a fresh lambda.
      parameters: pytree of floating arrays.
      gradient: pytree like the parameters: of the loss of one example, or of the mean loss of a batch of B.
      image_shape: (H, W, channels), or (B, H, W, channels) for a batch.
      key: random key; starts are N(0, 1) noise.
      label: (C,) or (B, C): fixed, or where it is optimised its start; None to start it from noise.
      feature: (d,) or (B, d), the head's input in the order of the label, for methods `f` and `gf`.
      start: (as `image_shape`) where the first restart begins, for example an exact or partial inversion.
      options: see `match_gradients`.

    Returns:
      A `Matching`.

    Raises:
      ValueError: see `match_gradients`.
    """
    lead = partial(jax.tree.map, lambda leaf: np.asarray(leaf)[None])
    found = match_gradients(
        apply_fn,
        parameters,
        lead(gradient),
        image_shape,
        key,
        labels=lead(label),
        features=lead(feature),
        starts=lead(start),
        **options,
    )
    return jax.tree.map(lambda leaf: leaf[0], found)


def match_gradients(
    apply_fn: Model,
    parameters: Any,
    gradients: Any,
    image_shape: tuple[int, ...],
    key: jax.Array,
    *,
    labels: ArrayLike | None = None,
    features: ArrayLike | None = None,
    starts: ArrayLike | None = None,
    features_fn: ApplyFunction | None = None,
    settings: MatchingSettings | None = None,
    head: str | None = None,
    restarts: int = 1,
    low: ArrayLike = -np.inf,
    high: ArrayLike = np.inf,
    own_parameters: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Matching:
    """Match N observed gradients at once, each by itself; memory grows with N times `restarts`.

    Args:
      apply_fn, parameters, image_shape, key: see `match_gradient`.
      gradients: pytree like the parameters, every leaf with a leading axis N.
      labels, features, starts: as in `match_gradient`, with a leading axis N.
      features_fn: (parameters, image) -> the head's input (d,), for methods `f` and `gf`.
      settings: a `MatchingSettings`; None for the defaults.
      head: name of the last dense layer for method `f`, where several could be it.
      restarts: R, optimisations of each gradient; the one with the smallest loss is returned.
      low, high: () or (channels,), box of allowed pixel values: (0 - mean) / deviation and (1 - mean) / deviation
        for images in [0, 1] that were normalised. The whole real line if not given.
      own_parameters: the gradients are of N different models: every leaf of `parameters` has a leading axis N too.
      progress: called with (steps done, steps in all) between chunks of steps.

    Returns:
      A `Matching` with a leading axis N.

    Raises:
      ValueError: gradients that do not fit the parameters, shapes that do not fit each other, NaN or infinite
        entries, a gradient of zeros, features missing for methods `f` and `gf`, no label where it is to be held
        fixed, an empty box, or parameters that should be N and are not.
    """
    settings = settings or MatchingSettings()
    first = jax.tree.map(lambda leaf: leaf[0], parameters) if own_parameters else parameters
    target, starts = check_matching_input(
        apply_fn, first, gradients, tuple(image_shape), labels, features, starts, features_fn, settings, low, high
    )
    examples = target.label.shape[0]
    if own_parameters and any(np.shape(leaf)[0] != examples for leaf in jax.tree.leaves(parameters)):
        raise ValueError(f"own_parameters=True, but not every array of the parameters has a leading axis of {examples}")
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 1:
        raise ValueError(f"restarts must be a positive integer, not {restarts!r}")
    kept = kept_leaves(first, settings.method, head)
    problem = _Problem(apply_fn, features_fn, settings, kept, tuple(image_shape), own_parameters)
    keys = jax.random.split(key, (examples, restarts))
    descents = _start(keys, target, starts, problem, draws_label=labels is None)
    traces, done = [], 0
    while done < settings.steps:
        count = min(CHUNK, settings.steps - done)
        descents, losses = _advance(descents, target, parameters, count, problem)
        traces.append(np.asarray(losses)[..., :count])
        done += count
        if progress is not None:
            progress(done, settings.steps)
    found = _finish(descents, target, parameters, problem)
    trace = np.concatenate(traces, axis=-1)[np.arange(len(found.restart)), np.asarray(found.restart)]
    return replace(found, loss_trace=jnp.asarray(trace))


# Over examples, each with its target, and over restarts, which share it. Bounds of pixels are shared by all.
_EXAMPLES: Any = Target(gradient=0, label=0, feature=0, low=None, high=None)  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("problem", "draws_label"))
def _start(
    keys: jax.Array, target: Target, starts: jax.Array | None, problem: _Problem, *, draws_label: bool
) -> Descent:
    optimiser = make_optimiser(problem.settings)

    def one(key: jax.Array, is_first: jax.Array, target: Target, start: jax.Array | None) -> Descent:
        key_image, key_label = jax.random.split(key)
        image = jax.random.normal(key_image, problem.image_shape, target.low.dtype)
        if start is not None:
            image = jnp.where(is_first, start, image)
        box_shape = (1,) * (image.ndim - 1) + (-1,)
        image = jnp.clip(image, target.low.reshape(box_shape), target.high.reshape(box_shape))
        logits = None
        if draws_label:
            logits = jax.random.normal(key_label, target.label.shape, image.dtype)
        elif problem.settings.optimise_label:
            logits = jnp.log(jnp.maximum(target.label, SMALLEST_START))
        return start_descent(Guess(image, logits), optimiser)

    over_restarts = jax.vmap(one, in_axes=(0, 0, None, None))
    first = jnp.arange(keys.shape[1]) == 0
    return jax.vmap(over_restarts, in_axes=(0, None, _EXAMPLES, 0))(keys, first, target, starts)


@partial(jax.jit, static_argnames="problem")
def _advance(
    descents: Descent, target: Target, parameters: Any, count: jax.Array, problem: _Problem
) -> tuple[Descent, jax.Array]:
    """`count` <= CHUNK steps of all; losses (N, R, CHUNK)."""
    optimiser = make_optimiser(problem.settings)

    def one(descent: Descent, target: Target, parameters: Any) -> tuple[Descent, jax.Array]:
        loss_of = problem.objective(target, parameters)

        def step(index: jax.Array, state: tuple[Descent, jax.Array]) -> tuple[Descent, jax.Array]:
            descent, losses = state
            descent, loss = descend(descent, target, loss_of, optimiser)
            return descent, losses.at[index].set(loss)

        losses = jnp.full((CHUNK,), jnp.nan, descent.best_loss.dtype)
        return jax.lax.fori_loop(0, count, step, (descent, losses))

    over_restarts = jax.vmap(one, in_axes=(0, None, None))
    return jax.vmap(over_restarts, in_axes=problem.examples)(descents, target, parameters)


@partial(jax.jit, static_argnames="problem")
def _finish(descents: Descent, target: Target, parameters: Any, problem: _Problem) -> Matching:
    def one(descent: Descent, target: Target, parameters: Any) -> tuple[Guess, jax.Array]:
        # The guess after the last step has not been evaluated yet.
        return best_guess(descent, problem.objective(target, parameters)(descent.guess))

    def choose(descents: Descent, target: Target, parameters: Any) -> Matching:
        guesses, losses = jax.vmap(one, in_axes=(0, None, None))(descents, target, parameters)
        restart = jnp.argmin(losses).astype(jnp.int32)
        best = jax.tree.map(lambda leaf: leaf[restart], guesses)
        label = guessed_label(best, target)
        gradient = mean_loss_gradient(problem.apply_fn, parameters, best.image, label)
        difference = jax.tree.map(jnp.subtract, gradient, target.gradient)
        residual = norm(difference) / norm(target.gradient)
        return Matching(best.image, label, losses[restart], residual, restart, losses, jnp.zeros(()))

    return jax.vmap(choose, in_axes=problem.examples)(descents, target, parameters)
