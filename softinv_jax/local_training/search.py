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
    misfit, guesses, steps, tried = misfit_at(problem, guess), 0, float(FIRST_STEPS), NEAR
    misfits: list[float] = []
    while steps <= LAST_STEPS:
        guess, misfit, moved, made = _level(problem, guess, misfit, int(steps))
        guesses += made
        misfits.append(misfit)
        if len(misfits) > PATIENCE and misfit > STALLED * misfits[-1 - PATIENCE]:
            break
        if misfit < tried:
            polished, after = _polished(problem, guess, misfit)
            if after < EXPLAINED:
                return Found(polished, after, guesses)
            tried = misfit / 4
        steps *= GROWTH if moved > SETTLED else GROWTH**2
    return Found(*_polished(problem, guess, misfit), guesses)


def _level(problem: Problem, guess: Guess, misfit: float, steps: int) -> tuple[Guess, float, float, int]:
    """Guesses with one number of steps: the last, its misfit, how far it is from the next, and how many they were."""
    for _ in range(NEWTON):
        guess, misfit = _newton(problem, guess, misfit, NEWTON_STEPS)
    weight = np.sqrt(guess.image.size) / 2 * max(float(jnp.std(guess.image)), 1e-3)
    mixing, moved, count = Anderson(), np.inf, 0
    while count < GUESSES and moved > SETTLED / 10:
        count += 1
        after = _improve(
            problem.chain,
            problem.parameters,
            problem.observed,
            guess,
            problem.training,
            problem.unit_roundoff,
            jnp.asarray(steps),
        )
        here, there = _vector(guess, weight), _vector(after, weight)
        if not np.all(np.isfinite(there)):
            return guess, misfit, np.inf, count
        moved = float(np.linalg.norm(after.image - guess.image) / max(float(jnp.linalg.norm(after.image)), 1e-300))
        targets = (mixing.next(here, there - here), there)
        trials = [_guess(here + share * (target - here), weight, guess) for target in targets for share in SHARES]
        # The best of them, though it be worse than the last: that may lead out of a valley.
        guess, misfit = _best(problem, trials)
    return guess, misfit, moved, count


def _vector(guess: Guess, weight: float) -> np.ndarray:
    """Image and label in one; the label's errors weigh as much as those of the image that come with them."""
    label = np.clip(np.asarray(guess.label), *LABEL_RANGE)
    return np.concatenate([np.ravel(guess.image), weight * label])


def _guess(vector: np.ndarray, weight: float, like: Guess) -> Guess:
    pixels = like.image.size
    image, label = vector[:pixels].reshape(like.image.shape), vector[pixels:] / weight
    return with_sum_one(Guess(jnp.asarray(image), jnp.asarray(label)))


def _best(problem: Problem, trials: list[Guess]) -> tuple[Guess, float]:
    misfits = [misfit_at(problem, trial) for trial in trials]
    best = int(np.argmin(misfits))
    return trials[best], misfits[best]


def _newton(problem: Problem, guess: Guess, misfit: float, steps: int) -> tuple[Guess, float]:
    """A step of Gauss-Newton, if it helps."""
    move = _polish(*problem[:4], guess, problem.training, jnp.asarray(steps))
    after, reached = _best(problem, [moved_by(guess, move, length) for length in LENGTHS])
    return (after, reached) if reached < misfit else (guess, misfit)


def _polished(problem: Problem, guess: Guess, misfit: float) -> tuple[Guess, float]:
    """Gauss-Newton until the update is explained, or it gains no more."""
    steps, left = POLISH_STEPS, POLISH_BUDGET
    while left >= steps and misfit >= EXPLAINED:
        left -= steps
        before = misfit
        guess, misfit = _newton(problem, guess, misfit, steps)
        if not misfit <= (1 - GAIN) * before:
            steps *= 2
    return guess, misfit


def moved_by(guess: Guess, move: Guess, length: float = 1.0) -> Guess:
    """The guess after a step, its label's sum kept."""
    return with_sum_one(jax.tree.map(lambda value, change: value + length * change, guess, move))


def misfit_at(problem: Problem, guess: Guess) -> float:
    """See `polish.misfit_of`; infinite where it is not a number."""
    found = float(_misfit(problem.chain, problem.parameters, problem.observed, problem.noise, guess, problem.training))
    return found if np.isfinite(found) else np.inf
