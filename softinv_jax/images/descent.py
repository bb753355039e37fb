"""The optimisation of one guess: its state, its optimiser, and one step of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from softinv_jax.images.objective import Guess, MatchingSettings, Target

__all__ = ["Descent", "best_guess", "descend", "make_optimiser", "start_descent"]

DECAY_AT = (3 / 8, 5 / 8, 7 / 8)
LONGEST_LINE_SEARCH = 10


class Descent(NamedTuple):
    """Where an optimisation is: the next guess, the optimiser's state, and the best guess so far with its loss ()."""

    guess: Guess
    optimiser_state: Any
    best: Guess
    best_loss: jax.Array


def make_optimiser(settings: MatchingSettings) -> optax.GradientTransformationExtraArgs:
    """The optimiser that settings name, with its learning rate schedule."""
    if settings.optimiser == "lbfgs":
        line_search = optax.scale_by_zoom_linesearch(LONGEST_LINE_SEARCH, max_learning_rate=settings.learning_rate)
        return optax.lbfgs(linesearch=line_search)
    decay = {round(share * settings.steps): 0.1 for share in DECAY_AT}
    adam = optax.adam(optax.piecewise_constant_schedule(settings.learning_rate, decay))
    if settings.optimiser == "signed_adam":
        adam = optax.chain(optax.scale_by_sign(), adam)
    return optax.with_extra_args_support(adam)


def start_descent(guess: Guess, optimiser: optax.GradientTransformationExtraArgs) -> Descent:
    """The state before the first step; nothing has been evaluated, so the best loss is infinite."""
    infinite = jnp.full((), jnp.inf, guess.image.dtype)
    return Descent(guess, optimiser.init(guess), guess, infinite)


def best_guess(descent: Descent, loss: jax.Array) -> tuple[Guess, jax.Array]:
    """The better of the next guess, whose loss () is given, and the best so far; a NaN is never better."""
    better = loss < descent.best_loss
    guess = jax.tree.map(lambda new, old: jnp.where(better, new, old), descent.guess, descent.best)
    return guess, jnp.where(better, loss, descent.best_loss)


def descend(
    descent: Descent,
    target: Target,
    loss_of: Callable[[Guess], jax.Array],
    optimiser: optax.GradientTransformationExtraArgs,
) -> tuple[Descent, jax.Array]:
    """One step, clipped to the box of allowed pixels; also the loss () before it."""
    loss, slope = jax.value_and_grad(loss_of)(descent.guess)
    best, best_loss = best_guess(descent, loss)
    updates, state = optimiser.update(
        slope, descent.optimiser_state, descent.guess, value=loss, grad=slope, value_fn=loss_of
    )
    guess: Guess = optax.apply_updates(descent.guess, updates)
    image = jnp.clip(guess.image, _per_pixel(target.low, guess.image), _per_pixel(target.high, guess.image))
    return Descent(guess._replace(image=image), state, best, best_loss), loss


def _per_pixel(bound: jax.Array, image: jax.Array) -> jax.Array:
    return bound.reshape((1,) * (image.ndim - 1) + (-1,))
