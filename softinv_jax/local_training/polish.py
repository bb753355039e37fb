"""Gauss-Newton on the whole update: every equation weighed by its rounding."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
from jax.flatten_util import ravel_pytree

from softinv_jax.images.layer_chain import Chain
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.defects import Guess
from softinv_jax.observation.local_training import LocalTraining
from softinv_jax.truncated_lsmr import TruncatedLSMR

__all__ = ["misfit_of", "normal_matrix", "polish_step", "steepest", "with_sum_one"]

PROBES = 8  # Random signs, for the lengths of the Jacobian's columns.
LEAST_COLUMN = 1e-3  # Of the longest: what hardly shows in the update is not blown up.
COLUMNS = 8  # Of the normal matrix, made at once.
ACCURACY = 1e-10  # Of the inner solver: it ends with its number of steps.


def misfit_of(
    chain: Chain,
    parameters: Mapping[str, Any],
    observed: Mapping[str, Any],
    noise: Mapping[str, Any],
    guess: Guess,
    training: LocalTraining,
) -> jax.Array:
    """() root mean square of (update of the guess - observed) over its noise: about 1 where the guess explains it.

    Args:
      chain, training: static. observed, noise: trees like the parameters, `noise` positive.
    """
    leaves = jax.tree.leaves(_residual(chain, parameters, observed, noise, guess, training))
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def polish_step(
    chain: Chain,
    parameters: Mapping[str, Any],
    observed: Mapping[str, Any],
    noise: Mapping[str, Any],
    guess: Guess,
    training: LocalTraining,
    inner_steps: int | jax.Array,
) -> Guess:
    """How one step of Gauss-Newton moves a guess: by LSMR, which needs products with the Jacobian only.

    Arguments as for `misfit_of`; inner_steps: of LSMR.
    """
    values, push, pull, _ = _linearised(chain, parameters, observed, noise, guess, training)
    scale = _column_scale(pull, values)
    operator = lineax.FunctionLinearOperator(
        lambda move: push(jax.tree.map(jnp.multiply, move, scale)), jax.eval_shape(lambda: guess)
    )
    solver = TruncatedLSMR(rtol=ACCURACY, atol=0.0, max_steps=inner_steps, conlim=np.inf)
    found = lineax.linear_solve(operator, jax.tree.map(jnp.negative, values), solver, throw=False)
    return jax.tree.map(jnp.multiply, found.value, scale)


def normal_matrix(
    chain: Chain,
    parameters: Mapping[str, Any],
    observed: Mapping[str, Any],
    noise: Mapping[str, Any],
    guess: Guess,
    training: LocalTraining,
) -> jax.Array:
    """(n, n) J^T J for the n entries of image and label, the label's sum held at 1. Arguments as for `misfit_of`."""
    _, push, pull, unravel = _linearised(chain, parameters, observed, noise, guess, training)
    size = guess.image.size + guess.label.size

    def column(number: jax.Array) -> jax.Array:
        (back,) = pull(push(unravel(jnp.zeros(size).at[number].set(1.0))))
        return ravel_pytree(back)[0]

    return jax.lax.map(column, jnp.arange(size), batch_size=COLUMNS)


def steepest(
    chain: Chain,
    parameters: Mapping[str, Any],
    observed: Mapping[str, Any],
    noise: Mapping[str, Any],
    guess: Guess,
    training: LocalTraining,
) -> Guess:
    """J^T residual, in the form of a guess. Arguments as for `misfit_of`."""
    values, _, pull, _ = _linearised(chain, parameters, observed, noise, guess, training)
    return pull(values)[0]


def _linearised(
    chain: Chain,
    parameters: Mapping[str, Any],
    observed: Mapping[str, Any],
    noise: Mapping[str, Any],
    guess: Guess,
    training: LocalTraining,
) -> tuple[Any, Callable, Callable, Callable]:
    """The residuals; products with the Jacobian and its transpose; and what makes a guess of a vector."""

    def residual(point: Guess) -> Any:
        return _residual(chain, parameters, observed, noise, with_sum_one(point), training)

    values, push = jax.linearize(residual, guess)
    return values, push, jax.linear_transpose(push, guess), ravel_pytree(guess)[1]


def _residual(
    chain: Chain,
    parameters: Mapping[str, Any],
    observed: Mapping[str, Any],
    noise: Mapping[str, Any],
    guess: Guess,
    training: LocalTraining,
) -> Any:
    own = run_client(chain, parameters, guess.image[None], guess.label[None], training).update
    return jax.tree.map(lambda one, other, unit: (one - other) / unit, own, observed, noise)


def with_sum_one(guess: Guess) -> Guess:
    """The guess, what its label lacks spread over all classes."""
    return guess._replace(label=guess.label + (1 - jnp.sum(guess.label)) / guess.label.size)


def _column_scale(pull: Any, values: Any) -> Guess:
    """One over the length of each column of the Jacobian: E (J^T s)^2 over random signs s."""
    leaves, structure = jax.tree.flatten(values)

    def one(key: jax.Array) -> Guess:
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(own, leaf.shape, leaf.dtype) for own, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.map(jnp.square, pull(jax.tree.unflatten(structure, signs))[0])

    squares = jax.tree.map(
        lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(one, jax.random.split(jax.random.key(0), PROBES))
    )
    return jax.tree.map(lambda square: jax.lax.rsqrt(square + LEAST_COLUMN**2 * jnp.max(square) + 1e-300), squares)
