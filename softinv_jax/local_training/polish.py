"""Gauss-Newton on the whole update: every equation weighed by its rounding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from softinv_jax.images.refinement import with_sum_one
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.matrix_free import expected_errors, gauss_newton_move, root_mean_square

__all__ = ["drawn_errors", "label_step", "misfit_of", "normal_matrix", "polish_step", "steepest", "summing_to_one"]

COLUMNS = 8  # Of the normal matrix, made at once.


def misfit_of(problem: Problem, guess: Guess) -> jax.Array:
    """() root mean square of (update of the guess - observed) over its noise: about 1 where the guess explains it."""
    return root_mean_square(_residual(problem, guess))


def polish_step(problem: Problem, guess: Guess, inner_steps: int | jax.Array) -> Guess:
    """How one step of Gauss-Newton moves a guess: by LSMR, which needs so many products with the Jacobian."""
    return gauss_newton_move(lambda point: _residual(problem, summing_to_one(point)), guess, inner_steps)


def label_step(problem: Problem, guess: Guess, inner_steps: int | jax.Array) -> Guess:
    """The same for the labels alone, where the images are known."""

    def residual(labels: jax.Array) -> Any:
        return _residual(problem, summing_to_one(guess._replace(labels=labels)))

    return Guess(jnp.zeros_like(guess.images), gauss_newton_move(residual, guess.labels, inner_steps))


def drawn_errors(problem: Problem, guess: Guess, inner_steps: int | jax.Array, accuracy: float) -> Guess:
    """One draw of a guess's errors, see `matrix_free.expected_errors`."""
    size = jnp.std(guess.images)
    drawn = expected_errors(
        lambda point: _residual(problem, summing_to_one(point)),
        guess,
        Guess(jnp.where(size > 0, size, 1.0), jnp.ones(())),
        jax.random.key(1),
        inner_steps,
        accuracy,
    )
    # Of a label's sum nothing is to be found.
    return drawn._replace(labels=drawn.labels - jnp.mean(drawn.labels, axis=-1, keepdims=True))


def normal_matrix(problem: Problem, guess: Guess) -> jax.Array:
    """(n, n) J^T J for the n entries of images and labels, the labels' sums held at 1."""
    _, push, pull, unravel = _linearised(problem, guess)
    size = guess.images.size + guess.labels.size

    def column(number: jax.Array) -> jax.Array:
        (back,) = pull(push(unravel(jnp.zeros(size).at[number].set(1.0))))
        return ravel_pytree(back)[0]

    return jax.lax.map(column, jnp.arange(size), batch_size=COLUMNS)


def steepest(problem: Problem, guess: Guess) -> Guess:
    """J^T residual, in the form of a guess."""
    values, _, pull, _ = _linearised(problem, guess)
    return pull(values)[0]


def _linearised(problem: Problem, guess: Guess) -> tuple[Any, Callable, Callable, Callable]:
    """The residuals; products with the Jacobian and its transpose; and what makes a guess of a vector."""

    def residual(point: Guess) -> Any:
        return _residual(problem, summing_to_one(point))

    values, push = jax.linearize(residual, guess)
    return values, push, jax.linear_transpose(push, guess), ravel_pytree(guess)[1]


def _residual(problem: Problem, guess: Guess) -> Any:
    own = run_client(problem.chain, problem.parameters, guess.images, guess.labels, problem.training).update
    return jax.tree.map(lambda one, other, unit: (one - other) / unit, own, problem.observed, problem.noise)


def summing_to_one(guess: Guess) -> Guess:
    """The guess with `refinement.with_sum_one` of its labels."""
    return guess._replace(labels=with_sum_one(guess.labels))
