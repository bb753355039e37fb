"""Which triples of classes to solve, and the scalar each one stands for.

The plan is made of rounds of disjoint triples: whatever one or two classes a label singles out, each round of
three leaves at least one triple clean. Classes are taken by the rank of their logit direction, because a triple is
only as sharp as the softmax entries of its classes are large, and these lie at one end of the ranking (at the other
end when lambda is negative).
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import argmin, argsort, take_rows
from softinv_jax.labels.monotone_triple import log_ratio_slope, solve_log_ratio
from softinv_jax.labels.scalar_equation import ScalarEquation, Unknowns, either, label_deviation, probabilities

__all__ = ["Hypotheses", "TriplePlan", "plan_triples", "solve_hypotheses"]

ENDS = 12  # Classes taken from each end of the ranking when there are too many to take all.
MIDDLE = 8
ALL_RANKED = 2 * ENDS + MIDDLE


@dataclass(frozen=True)
class TriplePlan:
    """Static choice of triples.

    Attributes:
      triples: (H, 3) positions in the ranked list of classes.
      exhaustive: every triple of classes is in the plan.
    """

    triples: np.ndarray
    exhaustive: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """One row per triple; NaN scalars where a triple has no solution. (H,) float64.

    Attributes:
      classes: (H, 3) int32, the triples themselves.
      scalar: lambda. factor: kappa. level: the value y takes on the triple.
      scalar_deviation, factor_deviation, level_deviation: their standard deviations.
      prediction, label, deviation: (H, C) softmax and y at that lambda and kappa, and the deviations of y's entries
        before their errors.
    """

    classes: jax.Array
    scalar: jax.Array
    factor: jax.Array
    level: jax.Array
    scalar_deviation: jax.Array
    factor_deviation: jax.Array
    level_deviation: jax.Array
    prediction: jax.Array
    label: jax.Array
    deviation: jax.Array


def plan_triples(number_of_classes: int, count: int) -> TriplePlan:
    """About `count` triples for C classes: all of them where there are no more than that."""
    ranked = min(number_of_classes, ALL_RANKED)
    if math.comb(number_of_classes, 3) <= count:
        return TriplePlan(np.array(list(itertools.combinations(range(ranked), 3))).reshape(-1, 3), True)
    rng = np.random.default_rng(0)  # A fixed design, not a random attack.
    rows: list[np.ndarray] = []
    while len(rows) < count:
        if number_of_classes <= ALL_RANKED:
            order = rng.permutation(ranked)
            rows += [np.sort(order[3 * i : 3 * i + 3]) for i in range(ranked // 3)]
            continue
        for end in (np.arange(ENDS), ranked - 1 - np.arange(ENDS)):
            sharp = rng.permutation(end)[:6].reshape(3, 2)
            rest = rng.permutation(np.setdiff1d(np.arange(ranked), end))[:3]
            rows += [np.sort(np.append(pair, third)) for pair, third in zip(sharp, rest, strict=True)]
    return TriplePlan(np.unique(np.array(rows[:count]), axis=0), False)


def _ranked_classes(direction: jax.Array) -> jax.Array:
    """Class indices by falling logit direction: all of them, or both ends and an even spread between."""
    number_of_classes = direction.size
    if number_of_classes <= ALL_RANKED:
        return argsort(-direction)
    # float32 is enough to pick classes, and several times faster to select in.
    coarse = direction.astype(jnp.float32)
    top = jax.lax.top_k(coarse, ENDS)[1]
    bottom = jax.lax.top_k(-coarse, ENDS)[1]
    spread = jnp.asarray(np.linspace(0, number_of_classes - 1, MIDDLE).astype(np.int32))
    return jnp.concatenate([top, spread, bottom[::-1]])


def _falling(direction: jax.Array, members: jax.Array) -> jax.Array:
    """(H, 3) classes with falling direction in each row; the spread classes can lie anywhere."""
    if direction.size <= ALL_RANKED:  # The ranking is complete, and the plan's rows rise in it.
        return members
    return take_rows(members, argsort(-direction[members]))


def solve_hypotheses(equation: ScalarEquation, triples: np.ndarray | jax.Array, unknowns: Unknowns) -> Hypotheses:
    """Solve every triple for lambda and kappa, with first-order standard deviations.

    Args:
      equation: the scalar equation.
      triples: (H, 3) of a plan.
      unknowns: at least one of the two is true, or all triples say the same.
    """
    classes = _falling(equation.direction, _ranked_classes(equation.direction)[triples])
    root = _solve_triples(equation, classes)
    known = jnp.broadcast_to(equation.known_scalar, root.scalar.shape)
    scalar = either(unknowns.scalar, root.scalar, known)
    every_prediction = probabilities(equation, scalar)
    prediction, left = take_rows(every_prediction, classes), equation.left[classes]
    upper_step, lower_step = prediction[:, 0] - prediction[:, 1], prediction[:, 1] - prediction[:, 2]
    span = left[:, 0] - left[:, 2]
    slope = (upper_step + lower_step) / jnp.where(span == 0, jnp.nan, span)
    factor = either(unknowns.scale, slope, 1 / scalar)
    every_label = every_prediction - factor[:, None] * equation.left[None, :]
    label = take_rows(every_label, classes)
    every_deviation = label_deviation(equation, scalar, factor, every_prediction, every_label)
    deviation = take_rows(every_deviation, classes)

    upper_error = jnp.hypot(deviation[:, 0], deviation[:, 1]) / jnp.abs(upper_step)
    lower_error = jnp.hypot(deviation[:, 1], deviation[:, 2]) / jnp.abs(lower_step)
    target_deviation = jnp.hypot(upper_error, lower_error)
    zero = jnp.zeros_like(scalar)
    # A triple whose own differences drown in their errors says nothing about lambda.
    clear = jnp.where(target_deviation < 0.5, scalar, jnp.nan)
    ends = jnp.hypot(deviation[:, 0], deviation[:, 2])
    factor_deviation = jnp.abs(factor) * ends / jnp.abs(upper_step + lower_step)
    sharpest = argmin(deviation)[:, None]
    return Hypotheses(
        classes=classes,
        scalar=either(unknowns.scalar, clear, scalar),
        factor=factor,
        level=take_rows(label, sharpest)[:, 0],
        scalar_deviation=either(unknowns.scalar, target_deviation / log_ratio_slope(scalar, *root.gaps), zero),
        factor_deviation=either(unknowns.scale, factor_deviation, zero),  # With a known scale lambda carries it.
        level_deviation=take_rows(deviation, sharpest)[:, 0],
        prediction=every_prediction,
        label=every_label,
        deviation=every_deviation,
    )


class _Root(NamedTuple):
    """(H,) lambda, NaN where a triple has none, and the gaps between its logit directions."""

    scalar: jax.Array
    gaps: tuple[jax.Array, jax.Array]


def _solve_triples(equation: ScalarEquation, classes: jax.Array) -> _Root:
    direction, left = equation.direction[classes], equation.left[classes]
    upper_gap, lower_gap = direction[:, 0] - direction[:, 1], direction[:, 1] - direction[:, 2]
    upper, lower = left[:, 0] - left[:, 1], left[:, 1] - left[:, 2]
    solvable = (upper_gap > 0) & (lower_gap > 0) & (upper * lower > 0)
    gaps = jnp.where(solvable, upper_gap, 1.0), jnp.where(solvable, lower_gap, 1.0)
    target = jnp.log(jnp.where(solvable, upper, 1.0) / jnp.where(solvable, lower, 1.0))
    return _Root(jnp.where(solvable, solve_log_ratio(target, *gaps), jnp.nan), gaps)
