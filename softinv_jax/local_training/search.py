"""From an update to the example behind it: guesses improved until they explain it, or until nothing helps."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.images.layer_chain import Chain
from softinv_jax.local_training.anderson import Anderson
from softinv_jax.local_training.defects import Guess, first_guess, improve
from softinv_jax.local_training.polish import misfit_of, polish_step, with_sum_one
from softinv_jax.observation.local_training import LocalTraining

__all__ = ["EXPLAINED", "Found", "Problem", "misfit_at", "moved_by", "search"]

# The client rounds every product of a sum: a few units, as in `images/exact`. Wrong images leave thousands.
EXPLAINED = 4.0
# The solver's steps for each layer: few at first, which keeps a poor guess tame, then more as the guess gets better.
FIRST_STEPS, LAST_STEPS, GROWTH = 40, 3000, 1.25
# Where Gauss-Newton has moved a guess that was stuck, the rise begins again.
AGAIN = (160,)
HOPELESS = 1e3  # Misfit of a guess beyond which that has not helped.
GUESSES = 10  # At each number of steps.
SETTLED = 1e-3  # Of the image: it no longer moves, and more steps of the solver are due.
NEAR = 500.0  # Misfit from which Gauss-Newton is tried.
POLISH_STEPS = 300  # Of the solver, for each step of Gauss-Newton; twice as many where they gain little.
POLISH_BUDGET = 2100  # Of them all.
LENGTHS = (1.0, 0.5, 0.2, 0.05)  # Of such a step, of which the best is taken.
GAIN = 0.3  # Of the misfit, by one step of Gauss-Newton.
LABEL_RANGE = (-0.2, 1.2)  # A step beyond is cut off there.


class Problem(NamedTuple):
    """What the observer is told. Trees by layer, float64 on the device; noise: of each entry of `observed`."""

    chain: Chain
    parameters: Mapping[str, Any]
    observed: Mapping[str, Any]
    noise: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    training: LocalTraining
    unit_roundoff: float


class Found(NamedTuple):
    """The best guess, its misfit (see `polish.misfit_of`), and how many were made."""

    guess: Guess
    misfit: float
    guesses: int


@partial(jax.jit, static_argnames=("chain", "training", "image_shape"))
def _first(chain: Chain, parameters: Any, observed: Any, image_shape: Any, training: LocalTraining) -> Guess:
    return first_guess(chain, parameters, observed, image_shape, training)


@partial(jax.jit, static_argnames=("chain", "training"))
def _improve(
    chain: Chain,
    parameters: Any,
    observed: Any,
    guess: Guess,
    training: LocalTraining,
    unit_roundoff: jax.Array,
    steps: jax.Array,
) -> Guess:
    return improve(chain, parameters, observed, guess, training, unit_roundoff=unit_roundoff, steps=steps)  # type: ignore[arg-type]


_misfit = jax.jit(misfit_of, static_argnames=("chain", "training"))
_polish = jax.jit(polish_step, static_argnames=("chain", "training"))


def search(problem: Problem) -> Found:
    """Solve one update; to be called with 64 bits enabled."""
    guess = _first(problem.chain, problem.parameters, problem.observed, problem.image_shape, problem.training)
    found = Found(guess, np.inf, 0)
    for steps in (FIRST_STEPS, *AGAIN):
        found = _rise(problem, found, float(steps))
        if found.misfit < EXPLAINED or found.misfit > HOPELESS:
            break
    return found


def _rise(problem: Problem, start: Found, steps: float) -> Found:
    """From a few steps of the solver to many, then Gauss-Newton."""
    guess, guesses = start.guess, start.guesses
    best, misfit, tried = guess, np.inf, NEAR
    while steps <= LAST_STEPS:
        guess, moved, made = _level(problem, guess, int(steps))
        guesses += made
        reached = misfit_at(problem, guess)
        if reached < misfit:
            best, misfit = guess, reached
        if misfit < tried:
            polished, after = _polished(problem, best)
            if after < EXPLAINED:
                return Found(polished, after, guesses)
            tried = misfit / 4
        steps *= GROWTH if moved > SETTLED else GROWTH**2
    return Found(*_polished(problem, best), guesses)


def _level(problem: Problem, guess: Guess, steps: int) -> tuple[Guess, float, int]:
    """Guesses with one number of steps; how far the last moved, of the image's size; and how many they were."""
    pixels = guess.image.size
    weight = np.sqrt(pixels) / 2 * max(float(jnp.std(guess.image)), 1e-3)
    mixing = Anderson()
    moved = np.inf
    for count in range(GUESSES):
        after = _improve(
            problem.chain,
            problem.parameters,
            problem.observed,
            guess,
            problem.training,
            problem.unit_roundoff,
            jnp.asarray(steps),
        )
        image, label = np.asarray(after.image), np.asarray(after.label)
        if not (np.all(np.isfinite(image)) and np.all(np.isfinite(label))):
            return guess, np.inf, count + 1
        here = np.concatenate([np.ravel(guess.image), weight * np.asarray(guess.label)])
        there = np.concatenate([image.ravel(), weight * np.clip(label, *LABEL_RANGE)])
        mixed = mixing.next(here, there - here)
        size = np.std(image)
        moved = float(np.sqrt(np.mean((image - guess.image) ** 2)) / (size if size > 0 else 1.0))
        label = mixed[pixels:] / weight
        label = label + (1 - label.sum()) / label.size
        guess = Guess(jnp.asarray(mixed[:pixels].reshape(image.shape)), jnp.asarray(label))
        if moved < SETTLED / 10:
            break
    return guess, moved, count + 1


def moved_by(guess: Guess, move: Guess, length: float = 1.0) -> Guess:
    """The guess after a step, its label's sum kept."""
    return with_sum_one(jax.tree.map(lambda value, change: value + length * change, guess, move))


def misfit_at(problem: Problem, guess: Guess) -> float:
    """See `polish.misfit_of`; infinite where it is not a number."""
    found = float(_misfit(problem.chain, problem.parameters, problem.observed, problem.noise, guess, problem.training))
    return found if np.isfinite(found) else np.inf


def _polished(problem: Problem, guess: Guess) -> tuple[Guess, float]:
    """Gauss-Newton until the update is explained, or it gains no more."""
    misfit, steps, left = misfit_at(problem, guess), POLISH_STEPS, POLISH_BUDGET
    while left >= steps:
        move = _polish(*problem[:4], guess, problem.training, jnp.asarray(steps))
        left -= steps
        trials = [moved_by(guess, move, length) for length in LENGTHS]
        reached = [misfit_at(problem, trial) for trial in trials]
        best = int(np.argmin(reached))
        gain = 1 - reached[best] / misfit
        if gain > 0:
            guess, misfit = trials[best], reached[best]
        if misfit < EXPLAINED:
            break
        if not gain >= GAIN:
            steps *= 2
    return guess, misfit
