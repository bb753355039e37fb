"""Gauss-Newton on the whole update: every equation weighed by its rounding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
from jax.flatten_util import ravel_pytree

from softinv_jax.images.distances import norm
from softinv_jax.images.refinement import with_sum_one
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.matrix_free import TruncatedLSMR, random_signs

__all__ = ["misfit_of", "normal_matrix", "polish_step", "steepest", "summing_to_one"]

PROBES = 8  # Random signs, for the lengths of the Jacobian's columns.
LEAST_COLUMN = 1e-3  # Of the longest: what hardly shows in the update is not blown up.
COLUMNS = 8  # Of the normal matrix, made at once.
ACCURACY = 1e-10  # Of the inner solver: it ends with its number of steps.


def misfit_of(problem: Problem, guess: Guess) -> jax.Array:
    """() root mean square of (update of the guess - observed) over its noise: about 1 where the guess explains it."""
    residual = _residual(problem, guess)
    return norm(residual) / np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(residual)))


def polish_step(problem: Problem, guess: Guess, inner_steps: int | jax.Array) -> Guess:
    """How one step of Gauss-Newton moves a guess: by LSMR, which needs so many products with the Jacobian."""
    values, push, pull, _ = _linearised(problem, guess)
    scale = _column_scale(pull, values)
    operator = lineax.FunctionLinearOperator(
        lambda move: push(jax.tree.map(jnp.multiply, move, scale)), jax.eval_shape(lambda: guess)
    )
    solver = TruncatedLSMR(rtol=ACCURACY, atol=0.0, max_steps=inner_steps, conlim=np.inf)
    found = lineax.linear_solve(operator, jax.tree.map(jnp.negative, values), solver, throw=False)
    return jax.tree.map(jnp.multiply, found.value, scale)


def normal_matrix(problem: Problem, guess: Guess) -> jax.Array:
    """(n, n) J^T J for the n entries of image and label, the label's sum held at 1."""
    _, push, pull, unravel = _linearised(problem, guess)
    size = guess.image.size + guess.label.size

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
    own = run_client(problem.chain, problem.parameters, guess.image[None], guess.label[None], problem.training).update
    return jax.tree.map(lambda one, other, unit: (one - other) / unit, own, problem.observed, problem.noise)


def summing_to_one(guess: Guess) -> Guess:
    """The guess with `refinement.with_sum_one` of its label."""
    return guess._replace(label=with_sum_one(guess.label))


def _column_scale(pull: Any, values: Any) -> Guess:
    """One over the length of each column of the Jacobian: E (J^T s)^2 over random signs s."""

    def one(key: jax.Array) -> Guess:
        return jax.tree.map(jnp.square, pull(random_signs(key, values))[0])

    squares = jax.tree.map(
        lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(one, jax.random.split(jax.random.key(0), PROBES))
    )
    return jax.tree.map(lambda square: jax.lax.rsqrt(square + LEAST_COLUMN**2 * jnp.max(square) + 1e-300), squares)
