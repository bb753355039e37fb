"""From an update to the example behind it: guesses improved until they explain it, or until nothing helps."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import in_float64
from softinv_jax.images.verdicts import EXPLAINED
from softinv_jax.local_training import defects
from softinv_jax.local_training.anderson import Anderson
from softinv_jax.local_training.polish import label_step, misfit_of, polish_step, summing_to_one
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.matrix_free import descend

__all__ = ["first_guess", "misfit_at", "moved_by", "newton_step", "search", "search_from", "search_labels"]

# The solver's steps for each layer: few at first, which keeps a poor guess tame, then more as the guess gets better.
FIRST_STEPS, LAST_STEPS, GROWTH = 40, 3000, 1.25
GUESSES = 10  # At each number of steps.
SETTLED = 1e-3  # Of the image: it no longer moves, and more steps of the solver are due.
# Of each improvement that much is tried: where the simple model is far off, less of it is better.
SHARES = (1.0, 0.5, 0.25, 0.1, 0.03)
# Before them, steps of Gauss-Newton and of its solver: they lead out of where the simple model does not.
NEWTON, NEWTON_STEPS = 3, 100
NEAR = 100.0  # Misfit from which Gauss-Newton alone goes on.
POLISH_STEPS = 300  # Of the solver, for each step of Gauss-Newton; twice as many where they gain little.
POLISH_BUDGET = 2100  # Of them all.
LENGTHS = (1.0, 0.5, 0.2, 0.05)  # Of such a step, of which the best is taken.
GAIN = 0.3  # Of the misfit, by one step of Gauss-Newton.
# Where the misfit has not come down to this share in so many numbers of steps, it will not.
PATIENCE, STALLED = 6, 0.7
LABEL_RANGE = (-0.2, 1.2)  # A step beyond is cut off there.


_first, _improve, _misfit, _polish, _polish_labels = (
    jax.jit(step) for step in (defects.first_guess, defects.improve, misfit_of, polish_step, label_step)
)


@in_float64
def first_guess(problem: Problem) -> Guess:
    """See `defects.first_guess`."""
    return _first(problem)


@in_float64
def search_from(problem: Problem, guess: Guess) -> tuple[Guess, float]:
    """Gauss-Newton on all of the update, from a guess that is near: what the average gradient gives of a few steps."""
    return descend(partial(_moved, problem, _polish), guess, misfit_at(problem, guess), EXPLAINED / 2)


@in_float64
def search_labels(problem: Problem, guess: Guess) -> tuple[Guess, float]:
    """The same for images that are known, and labels that are roughly: first these alone."""
    step = partial(_moved, problem, _polish_labels)
    guess, misfit = descend(step, guess, misfit_at(problem, guess), EXPLAINED / 2)
    return search_from(problem, guess) if misfit < NEAR else (guess, misfit)


@in_float64
def search(problem: Problem) -> tuple[Guess, float]:
    """The best guess of an update of one example, and its misfit (see `polish.misfit_of`)."""
    guess = _first(problem)
    misfit, steps, tried = misfit_at(problem, guess), float(FIRST_STEPS), NEAR
    misfits: list[float] = []
    while steps <= LAST_STEPS:
        guess, misfit, moved = _level(problem, guess, misfit, int(steps))
        misfits.append(misfit)
        if len(misfits) > PATIENCE and misfit > STALLED * misfits[-1 - PATIENCE]:
            break
        if misfit < tried:
            polished, after = _polished(problem, guess, misfit)
            if after < EXPLAINED:
                return polished, after
            tried = misfit / 4
        steps *= GROWTH if moved > SETTLED else GROWTH**2
    return _polished(problem, guess, misfit)


def _level(problem: Problem, guess: Guess, misfit: float, steps: int) -> tuple[Guess, float, float]:
    """Guesses with one number of steps: the last, its misfit, and how far it is from the next."""
    for _ in range(NEWTON):
        guess, misfit = newton_step(problem, guess, misfit, NEWTON_STEPS)
    weight = np.sqrt(guess.images.size) / 2 * max(float(jnp.std(guess.images)), 1e-3)
    mixing, moved, count = Anderson(), np.inf, 0
    while count < GUESSES and moved > SETTLED / 10:
        count += 1
        after = _improve(problem, guess, jnp.asarray(steps))
        here, there = _vector(guess, weight), _vector(after, weight)
        if not np.all(np.isfinite(there)):
            return guess, misfit, np.inf
        moved = float(np.linalg.norm(after.images - guess.images) / max(float(jnp.linalg.norm(after.images)), 1e-300))
        targets = (mixing.next(here, there - here), there)
        trials = [_guess(here + share * (target - here), weight, guess) for target in targets for share in SHARES]
        # The best of them, though it be worse than the last: that may lead out of a valley.
        guess, misfit = _best(problem, trials)
    return guess, misfit, moved


def _vector(guess: Guess, weight: float) -> np.ndarray:
    """Image and label in one; the label's errors weigh as much as those of the image that come with them."""
    labels = np.clip(np.asarray(guess.labels), *LABEL_RANGE)
    return np.concatenate([np.ravel(guess.images), weight * np.ravel(labels)])


def _guess(vector: np.ndarray, weight: float, like: Guess) -> Guess:
    pixels = like.images.size
    images, labels = vector[:pixels].reshape(like.images.shape), vector[pixels:].reshape(like.labels.shape) / weight
    return summing_to_one(Guess(jnp.asarray(images), jnp.asarray(labels)))


def _best(problem: Problem, trials: list[Guess]) -> tuple[Guess, float]:
    misfits = [misfit_at(problem, trial) for trial in trials]
    best = int(np.argmin(misfits))
    return trials[best], misfits[best]


def _moved(
    problem: Problem, step: Callable[[Problem, Guess, jax.Array], Guess], guess: Guess, steps: int
) -> tuple[Guess, float]:
    """A step of Gauss-Newton, by `polish_step` or one like it."""
    move = step(problem, guess, jnp.asarray(steps))
    return _best(problem, [moved_by(guess, move, length) for length in LENGTHS])


def newton_step(problem: Problem, guess: Guess, misfit: float, steps: int) -> tuple[Guess, float]:
    """A step of Gauss-Newton with so many of LSMR, if it helps."""
    after, reached = _moved(problem, _polish, guess, steps)
    return (after, reached) if reached < misfit else (guess, misfit)


def _polished(problem: Problem, guess: Guess, misfit: float) -> tuple[Guess, float]:
    """Gauss-Newton until the update is explained, or it gains no more."""
    steps, left = POLISH_STEPS, POLISH_BUDGET
    while left >= steps and misfit >= EXPLAINED:
        left -= steps
        before = misfit
        guess, misfit = newton_step(problem, guess, misfit, steps)
        if not misfit <= (1 - GAIN) * before:
            steps *= 2
    return guess, misfit


def moved_by(guess: Guess, move: Guess, length: float = 1.0) -> Guess:
    """The guess after a step, its label's sum kept."""
    return summing_to_one(jax.tree.map(lambda value, change: value + length * change, guess, move))


def misfit_at(problem: Problem, guess: Guess) -> float:
    """See `polish.misfit_of`; infinite where it is not a number."""
    found = float(_misfit(problem, guess))
    return found if np.isfinite(found) else np.inf
