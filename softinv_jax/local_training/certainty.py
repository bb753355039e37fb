"""The last steps to the solution, and the error that the update's noise leaves on it.

The solver of `polish` sees well-determined directions first. Where it ends, the others are as the guess before had
them, and nothing shows by how much they are wrong. Up to `LARGEST` unknowns the normal equations are solved in full:
what is left is the noise, and its size is known. Beyond, errors are drawn and solved for like the images themselves:
what the solver leaves undetermined shows in them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree

from softinv_jax.float64 import in_float64
from softinv_jax.local_training.polish import drawn_errors, normal_matrix, steepest
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.local_training.search import misfit_at, moved_by, newton_step

__all__ = ["LARGEST", "Certain", "settle"]

LARGEST = 8000  # Unknowns: beyond, the matrix is not formed.
STEPS = 8
CONVERGED = 1e-3  # Of the misfit, by one step.
SOLVER_STEPS, ACCURACY = 8000, 1e-11  # Of LSMR, where the normal equations are not formed.
SETTLED = 1e-2  # Of the misfit, by one step of those, which are long.
LABEL_MARGIN = 3.0
# Added to the scaled matrix with ones on its diagonal: first what keeps steps short, in the end next to nothing.
RIDGES = (1e-7, 1e-10, 1e-14)


class Certain(NamedTuple):
    """The solution, its misfit, and what error noise of the stated size leaves on each example.

    image_error: (B,) root mean square. label_error: (B,) of the entry where it is largest.
    """

    guess: Guess
    misfit: float
    image_error: np.ndarray
    label_error: np.ndarray


@in_float64
def settle(problem: Problem, guess: Guess) -> Certain:
    """Go on from a guess that explains the update."""
    if guess.images.size + guess.labels.size <= LARGEST:
        return _settle_in_full(problem, guess)
    misfit = misfit_at(problem, guess)
    for _ in range(STEPS):
        before = misfit
        guess, misfit = newton_step(problem, guess, misfit, SOLVER_STEPS)
        if not misfit < (1 - SETTLED) * before:
            break
    drawn, size = _draw(problem, guess, jnp.asarray(SOLVER_STEPS), ACCURACY), max(misfit, 1.0)
    examples = len(guess.labels)
    images, labels = (np.asarray(part).reshape(examples, -1) for part in drawn)
    # One draw of a label's few entries: the largest of them, and a margin.
    return Certain(
        guess,
        misfit,
        size * np.sqrt(np.mean(images**2, axis=1)),
        size * LABEL_MARGIN * np.max(np.abs(labels), axis=1),
    )


def _settle_in_full(problem: Problem, guess: Guess) -> Certain:
    matrix, scale = _normal_matrix(problem, guess)
    misfit, unravel = misfit_at(problem, guess), ravel_pytree(guess)[1]
    for ridge in RIDGES:
        factor = _factor(matrix, ridge)
        for _ in range(STEPS):
            right = np.asarray(ravel_pytree(_steepest(problem, guess))[0])
            move = -scale * scipy.linalg.cho_solve(factor, scale * right)
            after = moved_by(guess, unravel(jnp.asarray(move)))
            reached = misfit_at(problem, after)
            gain = 1 - reached / misfit
            if gain > 0:
                guess, misfit = after, reached
            if not gain > CONVERGED:
                break
    variance = scale**2 * _diagonal_of_inverse(factor)
    # Where the update fits worse than its noise says, that is too small.
    size = max(misfit, 1.0)
    pixels, examples = guess.images.size, len(guess.labels)
    return Certain(
        guess,
        misfit,
        size * np.sqrt(np.mean(variance[:pixels].reshape(examples, -1), axis=1)),
        size * np.sqrt(np.max(variance[pixels:].reshape(examples, -1), axis=1)),
    )


def _normal_matrix(problem: Problem, guess: Guess) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) J^T J scaled to ones on the diagonal, the label's sum, which is known, added; and the (n,) scale."""
    matrix = np.array(_columns(problem, guess))
    matrix = (matrix + matrix.T) / 2
    diagonal = np.diagonal(matrix)
    classes = guess.labels.shape[1]
    for first in range(guess.images.size, len(matrix), classes):
        label = slice(first, first + classes)
        matrix[label, label] += diagonal.max() / classes
    diagonal = np.diagonal(matrix)
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    return matrix * scale[:, None] * scale[None, :], scale


def _factor(matrix: np.ndarray, ridge: float) -> tuple[np.ndarray, bool]:
    """Cholesky's, with the least ridge at or above the one given that lets it be made."""
    while True:
        try:
            return scipy.linalg.cho_factor(matrix + ridge * np.eye(len(matrix)), lower=True)
        except np.linalg.LinAlgError:
            ridge *= 10


def _diagonal_of_inverse(factor: tuple[np.ndarray, bool]) -> np.ndarray:
    inverse, _ = scipy.linalg.lapack.dtrtri(factor[0], lower=1)
    return np.sum(np.tril(inverse) ** 2, axis=0)


_steepest, _columns = jax.jit(steepest), jax.jit(normal_matrix)
_draw = jax.jit(drawn_errors)
