"""The rounds of `confined_search` for many gradients at once: a few compiled programs, between which the host waits
for nothing.

`search_round`: starts along rays, solved among what is dual to the examples found already; then all of them polished,
each among what is dual to all others. `search_last`: one that is missing.
`fit_all`: all examples of each gradient fitted together. `are_unrivalled`: whether another choice of classes is about
as likely for any of them, asked once, in the end.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.candidates import cost, is_plausible
from softinv_jax.batches.component import (
    ITERATIONS,
    Component,
    Divisor,
    solve_components,
    starting_weights,
    strongest_residual,
)
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.joint import JointFit, fit_jointly
from softinv_jax.batches.lanes import on_cpu, over_gradients
from softinv_jax.batches.last_example import is_near
from softinv_jax.batches.rounds import POLISHING
from softinv_jax.batches.scalar_scan import scan_rays
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.float64 import argmax, argmin, argsort
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.linear_algebra import orthonormal_columns

__all__ = ["Found", "are_unrivalled", "fit_all", "nothing_found", "search_last", "search_round"]


class Found(NamedTuple):
    """Examples of one gradient in B places, or with a leading axis N.

    examples: (B,), nothing in particular where a place is not filled. is_filled: (B,) bool; those come first.
    """

    examples: Component
    is_filled: jax.Array


class _Lanes(NamedTuple):
    """Starts for `solve_components`, of one gradient or with a leading axis N; weights of 0: those at the start."""

    starts: jax.Array
    targets: jax.Array
    weights: jax.Array
    steps: jax.Array
    bases: jax.Array


def nothing_found(subspaces: BatchSubspace, divisor: Divisor) -> Found:
    """Zeros; NumPy, leading axis N."""
    count, number_of_classes, rank = subspaces.left.shape
    one = jax.tree.map(lambda leaf: leaf[0], subspaces)
    starts, targets = np.zeros((rank, rank)), np.zeros((rank, TARGETS), np.int32)
    weights = np.ones((rank, number_of_classes))
    shapes = jax.eval_shape(solve_components, one, starts, targets, weights, divisor)
    examples = jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape), leaf.dtype), shapes)
    return Found(examples, np.zeros((count, rank), bool))  # type: ignore[arg-type]


def search_round(
    subspaces: BatchSubspace, before: Found, is_wanted: jax.Array, divisor: Divisor, rows: int, *, brief: bool
) -> Found:
    """Search for what is missing.

    Args:
      subspaces: of N gradients of the same rank, with a leading axis.
      before: what was found of each.
      is_wanted: (N,) bool; the others only fill places. divisor: D of all of them.
      rows: how many rays to start along, those of the rows of most leverage. brief: only with the class that fits worst
        there as the second one, which is where most are found, also of those that have no second one.
    """
    lanes = _propose(subspaces, before, is_wanted, divisor, rows, brief)
    solved = _solve(subspaces, lanes, is_wanted, divisor)
    found, rough = _accept(subspaces, before, solved, lanes.steps > 0, is_wanted)
    return _polish(subspaces, found, _solve(subspaces, rough, is_wanted, divisor), is_wanted)


def search_last(
    subspaces: BatchSubspace,
    found: Found,
    starts: np.ndarray,
    targets: np.ndarray,
    is_wanted: jax.Array,
    divisor: Divisor,
) -> Found:
    """The last example, where all others are found, as `completed` searches for it.

    Args:
      starts: (N, n, B), zeros for none. targets: (N, n, TARGETS).
    """
    lanes = _to_search_last(subspaces, found, starts, targets, is_wanted)
    return _take_last(subspaces, found, _solve(subspaces, lanes, is_wanted, divisor), starts, is_wanted)


def are_unrivalled(subspaces: BatchSubspace, found: Found, is_wanted: jax.Array, divisor: Divisor) -> jax.Array:
    """(N,) bool, as `unrivalled` with all others found: no other choice of classes is about as good for any example."""
    bare = _alone(subspaces, found, is_wanted)
    choices = _choices(subspaces, found, _solve(subspaces, bare, is_wanted, divisor), bare, is_wanted)
    return _are_clear(found, _solve(subspaces, choices, is_wanted, divisor), is_wanted)


@jax.jit
def fit_all(
    subspaces: BatchSubspace, found: Found, is_wanted: jax.Array, divisor: Divisor
) -> tuple[Component, JointFit]:
    """All B examples of each gradient (N, B), and their joint fit."""

    def one(each: tuple[BatchSubspace, Found]) -> tuple[Component, JointFit]:
        subspace, own = each[0], each[1].examples
        singled = jnp.take_along_axis(own.label, jnp.maximum(own.targets, 0), axis=1)
        weights = jnp.where(own.targets >= 0, singled - own.level[:, None], 0.0)
        skipped = ~jnp.all(each[1].is_filled)
        return own, fit_jointly(subspace, own.coordinates, weights, own.targets, divisor, skipped=skipped)

    return over_gradients(one, (subspaces, found), is_wanted)


def _solve(subspaces: BatchSubspace, lanes: _Lanes, is_wanted: jax.Array, divisor: Divisor) -> Component:
    """(N, n) from all starts: some at a time, so that one program does for any number."""
    number = lanes.starts.shape[1]
    piece = (2 if on_cpu() else 5) * lanes.starts.shape[2]
    if number < piece:
        more = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, :1], piece - number, axis=1), lanes)
        more = more._replace(steps=jnp.zeros_like(more.steps))
        lanes = jax.tree.map(lambda own, extra: jnp.concatenate([own, extra], axis=1), lanes, more)
        solved = _solve_piece(subspaces, lanes, is_wanted, divisor)
        return jax.tree.map(lambda leaf: leaf[:, :number], solved)
    solved = []
    for first in range(0, number, piece):
        last = min(first + piece, number)
        own = jax.tree.map(lambda leaf, first=first, last=last: leaf[:, max(last - piece, 0) : last], lanes)
        fresh = jax.tree.map(
            lambda leaf, keep=last - first: leaf[:, -keep:], _solve_piece(subspaces, own, is_wanted, divisor)
        )
        solved.append(fresh)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *solved)


@jax.jit
def _solve_piece(subspaces: BatchSubspace, lanes: _Lanes, is_wanted: jax.Array, divisor: Divisor) -> Component:
    def one(each: tuple[BatchSubspace, _Lanes]) -> Component:
        subspace, own = each
        weights = starting_weights(subspace, own.starts, own.targets)
        weights = jnp.where(jnp.any(own.weights > 0), own.weights, weights)
        return solve_components(subspace, own.starts, own.targets, weights, divisor, own.steps, own.bases)

    return over_gradients(one, (subspaces, lanes), is_wanted)


@partial(jax.jit, static_argnames=("rows", "brief"))
def _propose(
    subspaces: BatchSubspace, before: Found, is_wanted: jax.Array, divisor: Divisor, rows: int, brief: bool
) -> _Lanes:
    def one(each: tuple[BatchSubspace, Found]) -> _Lanes:
        subspace, found = each
        basis = _complement(_duals(subspace, found))
        starts, targets, is_start = _starts(subspace, found, basis, divisor, rows, brief)
        return _lanes(subspace, starts, targets, jnp.where(is_start, ITERATIONS, 0), basis)

    return over_gradients(one, (subspaces, before), is_wanted)


@jax.jit
def _accept(
    subspaces: BatchSubspace, before: Found, solved: Component, is_start: jax.Array, is_wanted: jax.Array
) -> tuple[Found, _Lanes]:
    """With new examples; and, as `polish`: each among what is dual to all others, and without a second class."""

    def one(each: tuple[BatchSubspace, Found, Component, jax.Array]) -> tuple[Found, _Lanes]:
        subspace, known, solutions, valid = each
        found = _accepted(subspace, solutions, valid, known)
        examples = found.examples
        targets = jnp.concatenate([examples.targets, examples.targets.at[:, 1:].set(-1)])
        coordinates, weights = (jnp.concatenate([leaf] * 2) for leaf in (examples.coordinates, 1 / examples.deviation))
        steps = jnp.tile(jnp.where(found.is_filled, POLISHING, 0), 2)
        return found, _Lanes(coordinates, targets, weights, steps, jnp.concatenate([_complements(subspace, found)] * 2))

    return over_gradients(one, (subspaces, before, solved, is_start), is_wanted)


@jax.jit
def _choices(subspaces: BatchSubspace, new: Found, bare: Component, lanes: _Lanes, is_wanted: jax.Array) -> _Lanes:
    """As `unrivalled`: new ones with either class alone, or with one of those that would explain most of the rest."""

    def one(each: tuple[BatchSubspace, Found, Component, _Lanes]) -> _Lanes:
        subspace, found, described, own = each
        extra = strongest_residual(subspace, described)
        alone = own.targets[:, 0]
        choices = jnp.concatenate([own.targets, *(jnp.stack([alone, other], axis=1) for other in extra.T)])
        times = len(choices) // len(found.is_filled)
        steps = jnp.tile(jnp.where(found.is_filled, ITERATIONS, 0), times)
        starts, bases = (jnp.concatenate([leaf] * (times // 2)) for leaf in (own.starts, own.bases))
        return _Lanes(starts, choices, jnp.zeros((len(starts), len(subspace.left))), steps, bases)

    return over_gradients(one, (subspaces, new, bare, lanes), is_wanted)


@jax.jit
def _alone(subspaces: BatchSubspace, found: Found, is_wanted: jax.Array) -> _Lanes:
    def one(each: tuple[BatchSubspace, Found]) -> _Lanes:
        return _single(each[0], each[1].examples, _complements(*each))

    return over_gradients(one, (subspaces, found), is_wanted)


@jax.jit
def _are_clear(found: Found, solved: Component, is_wanted: jax.Array) -> jax.Array:
    def one(each: tuple[Found, Component]) -> jax.Array:
        examples = each[0].examples
        options = _options(_parts(each[1], len(examples.misfit)))
        prices = jnp.where(is_plausible(options), cost(options), jnp.inf)
        best = jnp.minimum(jnp.min(prices, axis=0), cost(examples))
        reach = TOLERANCE * jnp.max(options.label_deviation + examples.label_deviation[None], axis=-1)
        apart = jnp.max(jnp.abs(options.label - examples.label[None]), axis=-1) > reach
        return ~jnp.any((prices <= best[None, :] + TOLERANCE**2) & apart)

    return over_gradients(one, (found, solved), is_wanted)


@jax.jit
def _polish(subspaces: BatchSubspace, found: Found, solved: Component, is_wanted: jax.Array) -> Found:
    def one(each: tuple[BatchSubspace, Found, Component]) -> Found:
        subspace, own, polished = each
        return _each_once(subspace, Found(_best_polished(own.examples, polished), own.is_filled))

    return over_gradients(one, (subspaces, found, solved), is_wanted)


@jax.jit
def _to_search_last(
    subspaces: BatchSubspace, found: Found, starts: jax.Array, targets: jax.Array, is_wanted: jax.Array
) -> _Lanes:
    def one(each: tuple[BatchSubspace, Found, jax.Array, jax.Array]) -> _Lanes:
        subspace, own, points, classes = each
        basis = _complement(_duals(subspace, own))
        steps = jnp.where(jnp.any(points != 0, axis=1), ITERATIONS, 0)
        return _lanes(subspace, points, classes, steps, basis)

    return over_gradients(one, (subspaces, found, starts, targets), is_wanted)


@jax.jit
def _take_last(
    subspaces: BatchSubspace, found: Found, solved: Component, starts: jax.Array, is_wanted: jax.Array
) -> Found:
    def one(each: tuple[BatchSubspace, Found, Component, jax.Array]) -> Found:
        subspace, own, solutions, points = each
        again = jnp.any(_same(subspace, solutions, own.examples) & own.is_filled[None, :], axis=1)
        worthy = is_near(solutions) & jnp.any(points != 0, axis=1) & ~again
        prices = jnp.where(worthy, cost(solutions), jnp.inf)
        best, place = argmin(prices), argmin(own.is_filled.astype(jnp.float32))
        examples = jax.tree.map(lambda old, new: old.at[place].set(new[best]), own.examples, solutions)
        return Found(examples, own.is_filled.at[place].set(jnp.isfinite(prices[best])))

    return over_gradients(one, (subspaces, found, solved, starts), is_wanted)


def _lanes(
    subspace: BatchSubspace, starts: jax.Array, targets: jax.Array, steps: jax.Array, basis: jax.Array
) -> _Lanes:
    weights = jnp.zeros((len(starts), len(subspace.left)))
    return _Lanes(starts, targets, weights, steps, jnp.broadcast_to(basis, (len(starts), *basis.shape)))


def _single(subspace: BatchSubspace, examples: Component, bases: jax.Array) -> _Lanes:
    """Each example with the first of its classes alone, and with the second; no steps."""
    first, second = examples.targets[:, 0], examples.targets[:, 1]
    alone = jnp.concatenate([first, jnp.where(second < 0, first, second)])
    targets = jnp.stack([alone, jnp.full_like(alone, -1)], axis=1)
    starts, bases = (jnp.concatenate([leaf] * 2) for leaf in (examples.coordinates, bases))
    weights, steps = jnp.zeros((len(starts), len(subspace.left))), jnp.zeros((len(starts),), jnp.int32)
    return _Lanes(starts, targets, weights, steps, bases)


def _complements(subspace: BatchSubspace, found: Found) -> jax.Array:
    """(B, B, B) for each, the `_complement` of all others."""
    duals, others = _duals(subspace, found), ~jnp.eye(len(found.is_filled), dtype=bool)
    return jax.vmap(lambda kept: _complement(jnp.where(kept[:, None], duals, 0.0)))(others)


def _duals(subspace: BatchSubspace, found: Found) -> jax.Array:
    """(B, B) unit vectors that the coordinates of all others are orthogonal to, zeros for what is not there."""
    duals = found.examples.dual / subspace.singular_values[None, :]
    size = jnp.sqrt(jnp.sum(duals**2, axis=1, keepdims=True))
    return jnp.where(found.is_filled[:, None], duals / jnp.maximum(size, 1e-300), 0.0)


def _complement(duals: jax.Array) -> jax.Array:
    """As `complement`: of what is left, the longest column is the next."""
    rank = len(duals)
    count = jnp.sum(jnp.any(duals != 0, axis=1))
    taken = orthonormal_columns(duals.T)[0]

    def add(number: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        basis, left = state
        column = left[:, argmax(jnp.sum(left**2, axis=0))]
        column = column - taken @ (taken.T @ column) - basis @ (basis.T @ column)
        column = column / jnp.maximum(jnp.sqrt(jnp.sum(column**2)), 1e-300)
        column = jnp.where(number < rank - count, column, 0.0)
        return basis.at[:, number].set(column), left - jnp.outer(column, column @ left)

    start = jnp.zeros((rank, rank)), jnp.eye(rank) - taken @ taken.T
    return jax.lax.fori_loop(0, rank, add, start)[0]


def _remainder(subspace: BatchSubspace, found: Found) -> jax.Array:
    """(C, B) as `without`."""
    observed = subspace.left * subspace.singular_values[None, :]
    duals, is_there = _duals(subspace, found), found.is_filled
    coordinates = jnp.where(is_there[:, None], found.examples.coordinates, 0.0)
    columns, triangle = orthonormal_columns(coordinates @ duals.T + jnp.diag(jnp.where(is_there, 0.0, 1.0)))
    return observed - (observed @ duals.T) @ (triangle @ (columns.T @ coordinates))


def _starts(
    subspace: BatchSubspace, found: Found, basis: jax.Array, divisor: Divisor, rows: int, brief: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `propose_along_rays`: (n, B), (n, TARGETS), and which of them are starts at all; those first."""
    missing = jnp.sum(~found.is_filled)
    rank, remainder = len(found.is_filled), _remainder(subspace, found)
    leverage = jnp.sum(orthonormal_columns(remainder @ basis)[0] ** 2, axis=1)
    likely = argsort(-leverage)[:rows]
    points, misfits, valid = scan_rays(subspace, -divisor.value * remainder[likely], likely)
    valid = valid & (jnp.arange(len(likely)) < 2 * missing + 4)[:, None]
    alone = jnp.full((*valid.shape, 1), -1, jnp.int32)
    second = misfits[:, :, :1] if brief else jnp.concatenate([alone, misfits], axis=2)
    first = jnp.broadcast_to(likely[:, None, None], second.shape)
    targets = jnp.stack([first, second], axis=-1).reshape(-1, TARGETS)
    starts = jnp.broadcast_to(points[:, :, None], (*second.shape, rank)).reshape(-1, rank)
    valid = jnp.broadcast_to(valid[..., None], second.shape).ravel()
    order = argsort(jnp.where(valid, 0.0, 1.0))
    return starts[order], targets[order], valid[order]


def _same(subspace: BatchSubspace, features: Component, others: Component) -> jax.Array:
    """(n, m) bool, as `is_same`."""
    scaled = features.coordinates / subspace.singular_values[None, :]
    own = jnp.sum(scaled * features.dual, axis=1)
    return jnp.abs(scaled @ others.dual.T) > 0.5 * jnp.abs(own)[:, None]


def _accepted(subspace: BatchSubspace, solved: Component, is_start: jax.Array, before: Found) -> Found:
    """As `accepted`: behind those found the likeliest, each different from all others."""
    rank = subspace.singular_values.size
    count = jnp.sum(before.is_filled)
    known = jnp.any(_same(subspace, solved, before.examples) & before.is_filled[None, :], axis=1)
    prices = jnp.where(is_start & is_plausible(solved) & ~known, cost(solved), jnp.inf)

    def take(place: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, left = state
        best = argmin(left)
        taken = jax.tree.map(lambda leaf: leaf[best][None], solved)
        again = _same(subspace, solved, taken)[:, 0] | (jnp.arange(len(left)) == best)
        wanted = (place >= count) & jnp.isfinite(left[best])
        return chosen.at[place].set(jnp.where(wanted, best, -1)), jnp.where(again & wanted, jnp.inf, left)

    chosen, _ = jax.lax.fori_loop(0, rank, take, (jnp.full((rank,), -1, jnp.int32), prices))
    is_new = chosen >= 0

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *[1] * (old.ndim - 1)), new[chosen], old)

    return Found(jax.tree.map(merge, before.examples, solved), before.is_filled | is_new)


def _each_once(subspace: BatchSubspace, found: Found) -> Found:
    """Without those that are the same as one before; all that are left come first."""
    same = _same(subspace, found.examples, found.examples) & found.is_filled[None, :]
    is_filled = found.is_filled & ~jnp.any(jnp.tril(same, -1), axis=1)
    order = argsort(jnp.where(is_filled, 0.0, 1.0))
    return jax.tree.map(lambda leaf: leaf[order], Found(found.examples, is_filled))


def _best_polished(found: Component, solved: Component) -> Component:
    """As it was only where none of the others is a solution."""
    options = _options([found, *_parts(solved, len(found.misfit))])
    prices = jnp.where(is_plausible(options), cost(options), jnp.inf)
    prices = prices.at[0].set(jnp.where(jnp.any(jnp.isfinite(prices[1:]), axis=0), jnp.inf, 0.0))
    return _pick(options, argmin(prices.T))


def _parts(stacked: Component, count: int) -> list[Component]:
    """`count` at a time."""
    number = len(stacked.misfit) // count
    return [jax.tree.map(lambda leaf, k=k: leaf[k * count : (k + 1) * count], stacked) for k in range(number)]


def _options(each: list[Component]) -> Component:
    """Leading axes: the options, the examples."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _pick(options: Component, chosen: jax.Array) -> Component:
    """One option (n,) for each example."""
    return jax.tree.map(lambda leaf: leaf[chosen, jnp.arange(len(chosen))], options)
