"""Least squares by products with the Jacobian alone: one step of Gauss-Newton, and how sure its solution is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np

__all__ = [
    "INNER_STEPS",
    "TruncatedLSMR",
    "descend",
    "expected_errors",
    "gauss_newton_move",
    "random_signs",
    "root_mean_square",
]

PROBES = 8  # Random signs, for the lengths of the Jacobian's columns.
LEAST_COLUMN = 1e-3  # Of the longest: what hardly shows in the residual is not blown up.
# Of LSMR, for each step of Gauss-Newton: few at first, more where they gain little.
INNER_STEPS = (100, 200, 400, 800, 1600, 3000)
GAIN = 0.3  # Of the misfit, by one step; less is little.
MOVES = 40


class TruncatedLSMR(lineax.LSMR):
    """LSMR that offers what it has when its steps run out; an outer method would give up otherwise."""

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        value, _, statistics = super().compute(state, vector, options)
        return value, lineax.RESULTS.successful, statistics


def random_signs(key: jax.Array, tree: Any) -> Any:
    """1 or -1 in the place of every number of a tree: E (J^T s)^2 over such s is the square of J's columns."""
    return _drawn(key, tree, lambda own, leaf: jax.random.rademacher(own, leaf.shape, leaf.dtype))


def root_mean_square(tree: Any) -> jax.Array:
    """() of all numbers of a tree."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def gauss_newton_move(
    residual: Callable[[Any], Any], point: Any, steps: int | jax.Array, accuracy: float = 1e-10
) -> Any:
    """What one step of Gauss-Newton adds to a point, by LSMR in unknowns scaled to columns of one length; pure.

    Args:
      residual: from a tree of unknowns to a tree of numbers, each in units of its deviation.
      point: where it is linearised.
      steps: of LSMR, at most: few of them leave the directions out that the residual hardly sees.
      accuracy: of LSMR, relative.
    """
    values, push = jax.linearize(residual, point)
    return _least_squares(push, point, values, jax.tree.map(jnp.negative, values), steps, accuracy)


def descend(
    step: Callable[[Any, int], tuple[Any, float]], point: Any, misfit: float, until: float
) -> tuple[Any, float]:
    """Steps of Gauss-Newton, each of them with more of LSMR where the last one gained little.

    Args:
      step: from a point and LSMR's steps to the next point and its misfit.
      point, misfit: to begin with. until: a misfit that is small enough.

    Returns:
      The last point whose misfit is finite, and its misfit.
    """
    level = 0
    for _ in range(MOVES):
        after, found = step(point, INNER_STEPS[level])
        if not np.isfinite(found):
            break
        gain = 1 - found / misfit if np.isfinite(misfit) else 1.0
        point, misfit = after, found
        level += gain < GAIN
        if misfit < until or level == len(INNER_STEPS):
            break
    return point, misfit


def expected_errors(
    residual: Callable[[Any], Any], point: Any, sizes: Any, key: jax.Array, steps: int | jax.Array, accuracy: float
) -> Any:
    """One draw of the error of a solution; pure.

    Unknowns drawn at random, and noise of deviation one, make a right-hand side; what LSMR gives for it differs from
    what was drawn by the noise's part, and by whatever the equations or the solver's steps leave undetermined.

    Args:
      residual, point, steps, accuracy: as of `gauss_newton_move`.
      sizes: tree like the point, () each: deviation of the unknowns drawn.
    """
    values, push = jax.linearize(residual, point)
    drawn = jax.tree.map(jnp.multiply, _normal(key, point), sizes)
    right = jax.tree.map(jnp.add, push(drawn), _normal(jax.random.fold_in(key, 1), values))
    found = _least_squares(push, point, values, right, steps, accuracy)
    return jax.tree.map(jnp.subtract, found, drawn)


def _least_squares(push: Callable, point: Any, values: Any, right: Any, steps: int | jax.Array, accuracy: float) -> Any:
    pull = jax.linear_transpose(push, point)
    scale = _column_scale(pull, values)
    operator = lineax.FunctionLinearOperator(
        lambda move: push(jax.tree.map(jnp.multiply, move, scale)), jax.eval_shape(lambda: point)
    )
    solver = TruncatedLSMR(rtol=accuracy, atol=0.0, max_steps=steps, conlim=np.inf)
    found = lineax.linear_solve(operator, right, solver, throw=False)
    return jax.tree.map(jnp.multiply, found.value, scale)


def _column_scale(pull: Callable, values: Any) -> Any:
    """One over the length of each column of the Jacobian: E (J^T s)^2 over random signs s."""

    def one(key: jax.Array) -> Any:
        return jax.tree.map(jnp.square, pull(random_signs(key, values))[0])

    squares = jax.tree.map(
        lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(one, jax.random.split(jax.random.key(0), PROBES))
    )
    return jax.tree.map(lambda square: jax.lax.rsqrt(square + LEAST_COLUMN**2 * jnp.max(square) + 1e-300), squares)


def _normal(key: jax.Array, tree: Any) -> Any:
    """A standard normal number in the place of every one. In float32: a TPU draws no float64."""
    return _drawn(key, tree, lambda own, leaf: jax.random.normal(own, leaf.shape, jnp.float32).astype(leaf.dtype))


def _drawn(key: jax.Array, tree: Any, draw: Callable[[jax.Array, jax.Array], jax.Array]) -> Any:
    """Each leaf with a key of its own."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [draw(own, leaf) for own, leaf in zip(keys, leaves, strict=True)])
