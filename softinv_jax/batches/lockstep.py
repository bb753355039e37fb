"""The rounds of `confined_search` for many gradients at once: a few compiled programs, between which the host waits
for nothing.

`search_round`: starts along rays, solved among what is dual to the examples that are sure already, each with the best
choice of its classes. `fit_all`: the examples of each gradient polished, each among what is dual to all others, and
fitted together.
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
from softinv_jax.batches.lanes import over_gradients
from softinv_jax.batches.rounds import POLISHING
from softinv_jax.batches.scalar_scan import scan_rays
from softinv_jax.batches.subspace import BatchSubspace
from softinv_jax.float64 import argmax, argmin, argsort
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.linear_algebra import orthonormal_columns

__all__ = ["Found", "fit_all", "nothing_found", "search_round"]


class Found(NamedTuple):
    """Examples of one gradient in B places, or with a leading axis N; those that are sure come first.

    examples: (B,), or nothing in particular where a place is not filled. is_filled: (B,) bool. is_sure: (B,) bool, whether no other choice of classes is about as likely.
    """

    examples: Component
    is_filled: jax.Array
    is_sure: jax.Array


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
    return Found(examples, *[np.zeros((count, rank), bool)] * 2)


def search_round(
    subspaces: BatchSubspace, before: Found, is_wanted: jax.Array, divisor: Divisor, rows: int
) -> Found:
    """Search for what is missing.

    Args:
      subspaces: of N gradients of the same rank, with a leading axis.
      before: what was found of each; what is not sure is searched for again.
      is_wanted: (N,) bool; the others only fill places. divisor: D of all of them.
      rows: how many rays to start along, those of the rows of most leverage.
    """
    lanes = _propose(subspaces, before, is_wanted, divisor, rows)
    solved = _solve(subspaces, lanes, is_wanted, divisor)
    new, bare = _accept(subspaces, before, solved, lanes.steps > 0, is_wanted)
    choices = _choices(subspaces, new, _solve(subspaces, bare, is_wanted, divisor), bare, is_wanted)
    return _decide(subspaces, before, new, _solve(subspaces, choices, is_wanted, divisor), is_wanted)


def fit_all(
    subspaces: BatchSubspace, found: Found, is_wanted: jax.Array, divisor: Divisor
) -> tuple[Component, JointFit, jax.Array]:
    """All B examples of each gradient, polished (N, B), their joint fit, and whether there are B different ones (N,)."""
    lanes = _to_polish(subspaces, found.examples, is_wanted)
    solved = _solve(subspaces, lanes, is_wanted, divisor)
    return _fit(subspaces, found, solved, is_wanted, divisor)


def _solve(subspaces: BatchSubspace, lanes: _Lanes, is_wanted: jax.Array, divisor: Divisor) -> Component:
    """(N, n) from all starts: on a CPU some at a time, so that one program does for any number."""
    number = lanes.starts.shape[1]
    piece = 2 * lanes.starts.shape[2] if jax.default_backend() == "cpu" else number
    solved = []
    for first in range(0, number, piece):
        last = min(first + piece, number)
        own = jax.tree.map(lambda leaf, first=first, last=last: leaf[:, max(last - piece, 0) : last], lanes)
        fresh = jax.tree.map(lambda leaf, keep=last - first: leaf[:, -keep:], _solve_piece(subspaces, own, is_wanted, divisor))
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


@partial(jax.jit, static_argnames="rows")
def _propose(
    subspaces: BatchSubspace, before: Found, is_wanted: jax.Array, divisor: Divisor, rows: int
) -> _Lanes:
    def one(each: tuple[BatchSubspace, Found]) -> _Lanes:
        subspace, found = each
        basis = _basis(subspace, found)
        starts, targets, is_start = _starts(subspace, found, basis, divisor, rows)
        return _lanes(subspace, starts, targets, jnp.where(is_start, ITERATIONS, 0), basis)

    return over_gradients(one, (subspaces, before), is_wanted)


@jax.jit
def _accept(
    subspaces: BatchSubspace, before: Found, solved: Component, is_start: jax.Array, is_wanted: jax.Array
) -> tuple[Found, _Lanes]:
    """New examples behind the sure ones, with `is_filled` for the new; and each with one class alone."""

    def one(each: tuple[BatchSubspace, Found, Component, jax.Array]) -> tuple[Found, _Lanes]:
        subspace, found, solutions, valid = each
        examples, is_new = _accepted(subspace, solutions, valid, found)
        first, second = examples.targets[:, 0], examples.targets[:, 1]
        alone = jnp.concatenate([first, jnp.where(second < 0, first, second)])
        single = jnp.stack([alone, jnp.full_like(alone, -1)], axis=1)
        twice = jnp.concatenate([examples.coordinates] * 2)
        steps = jnp.zeros((len(twice),), jnp.int32)
        return Found(examples, is_new, found.is_sure), _lanes(subspace, twice, single, steps, _basis(subspace, found))

    return over_gradients(one, (subspaces, before, solved, is_start), is_wanted)


@jax.jit
def _choices(
    subspaces: BatchSubspace, new: Found, bare: Component, lanes: _Lanes, is_wanted: jax.Array
) -> _Lanes:
    """As `unrivalled`: new ones with either class alone, or with one of those that would explain most of the rest."""

    def one(each: tuple[BatchSubspace, Found, Component, _Lanes]) -> _Lanes:
        subspace, found, described, own = each
        extra = strongest_residual(subspace, described)
        alone = own.targets[:, 0]
        choices = jnp.concatenate([own.targets, *(jnp.stack([alone, other], axis=1) for other in extra.T)])
        times = len(choices) // len(found.is_filled)
        steps = jnp.tile(jnp.where(found.is_filled, ITERATIONS, 0), times)
        return _lanes(subspace, jnp.concatenate([own.starts] * (times // 2)), choices, steps, own.bases[0])

    return over_gradients(one, (subspaces, new, bare, lanes), is_wanted)


@jax.jit
def _decide(
    subspaces: BatchSubspace, before: Found, new: Found, solved: Component, is_wanted: jax.Array
) -> Found:
    def one(each: tuple[BatchSubspace, Found, Found, Component]) -> Found:
        subspace, known, added, choices = each
        sure, is_new = known.is_sure, added.is_filled
        examples, is_clear = _best_choice(added.examples, is_new, choices)
        again = jnp.any(jnp.tril(_same(subspace, examples, examples), -1) & (sure | is_new)[None, :], axis=1)
        is_new = is_new & ~again
        is_filled, is_sure = sure | is_new, sure | (is_new & is_clear)
        order = argsort(2.0 - is_filled - is_sure)
        return jax.tree.map(lambda leaf: leaf[order], Found(examples, is_filled, is_sure))

    return over_gradients(one, (subspaces, before, new, solved), is_wanted)


@jax.jit
def _to_polish(subspaces: BatchSubspace, examples: Component, is_wanted: jax.Array) -> _Lanes:
    """As `polish`: each among what is dual to all others, and the same without a second class."""

    def one(each: tuple[BatchSubspace, Component]) -> _Lanes:
        subspace, found = each
        targets = jnp.concatenate([found.targets, found.targets.at[:, 1:].set(-1)])
        coordinates, weights = (jnp.concatenate([leaf] * 2) for leaf in (found.coordinates, 1 / found.deviation))
        bases = jnp.concatenate([_complements(subspace, found)] * 2)
        return _Lanes(coordinates, targets, weights, jnp.full((len(targets),), POLISHING, jnp.int32), bases)

    return over_gradients(one, (subspaces, examples), is_wanted)


@jax.jit
def _fit(
    subspaces: BatchSubspace, found: Found, solved: Component, is_wanted: jax.Array, divisor: Divisor
) -> tuple[Component, JointFit, jax.Array]:
    def one(each: tuple[BatchSubspace, Found, Component]) -> tuple[Component, JointFit, jax.Array]:
        subspace, own, polished = each
        better = _best_polished(own.examples, polished)
        different = ~jnp.any(_same(subspace, better, better) & ~jnp.eye(len(own.is_filled), dtype=bool))
        whole = different & jnp.all(own.is_filled)
        singled = jnp.take_along_axis(better.label, jnp.maximum(better.targets, 0), axis=1)
        weights = jnp.where(better.targets >= 0, singled - better.level[:, None], 0.0)
        joint = fit_jointly(subspace, better.coordinates, weights, better.targets, divisor, skipped=~whole)
        return better, joint, whole

    return over_gradients(one, (subspaces, found, solved), is_wanted)


def _lanes(
    subspace: BatchSubspace, starts: jax.Array, targets: jax.Array, steps: jax.Array, basis: jax.Array
) -> _Lanes:
    weights = jnp.zeros((len(starts), len(subspace.left)))
    return _Lanes(starts, targets, weights, steps, jnp.broadcast_to(basis, (len(starts), *basis.shape)))


def _basis(subspace: BatchSubspace, found: Found) -> jax.Array:
    """(B, B) of what is dual to the sure ones."""
    return _complement(_duals(subspace, found.examples, found.is_sure), jnp.sum(found.is_sure))


def _duals(subspace: BatchSubspace, examples: Component, is_there: jax.Array) -> jax.Array:
    """(B, B) unit vectors that the coordinates of all others are orthogonal to, zeros for what is not there."""
    duals = examples.dual / subspace.singular_values[None, :]
    size = jnp.sqrt(jnp.sum(duals**2, axis=1, keepdims=True))
    return jnp.where(is_there[:, None], duals / jnp.maximum(size, 1e-300), 0.0)


def _complement(duals: jax.Array, count: jax.Array) -> jax.Array:
    """As `complement`: of what is left, the longest column is the next."""
    rank = len(duals)
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


def _remainder(subspace: BatchSubspace, examples: Component, is_there: jax.Array) -> jax.Array:
    """(C, B) as `without`."""
    observed = subspace.left * subspace.singular_values[None, :]
    duals = _duals(subspace, examples, is_there)
    coordinates = jnp.where(is_there[:, None], examples.coordinates, 0.0)
    columns, triangle = orthonormal_columns(coordinates @ duals.T + jnp.diag(jnp.where(is_there, 0.0, 1.0)))
    return observed - (observed @ duals.T) @ (triangle @ (columns.T @ coordinates))


def _starts(
    subspace: BatchSubspace, found: Found, basis: jax.Array, divisor: Divisor, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `propose_along_rays`: (n, B), (n, TARGETS), and which of them are starts at all; those first."""
    rank, is_there = subspace.singular_values.size, found.is_sure
    remainder = _remainder(subspace, found.examples, is_there)
    leverage = jnp.sum(orthonormal_columns(remainder @ basis)[0] ** 2, axis=1)
    likely = argsort(-leverage)[:rows]
    points, misfits, valid = scan_rays(subspace, -divisor.value * remainder[likely], likely)
    valid = valid & (jnp.arange(len(likely)) < 2 * (rank - jnp.sum(is_there)) + 4)[:, None]
    alone = jnp.full((*valid.shape, 1), -1, jnp.int32)
    second = jnp.concatenate([alone, misfits], axis=2)
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


def _accepted(
    subspace: BatchSubspace, solved: Component, is_start: jax.Array, before: Found
) -> tuple[Component, jax.Array]:
    """As `accepted`: behind the sure ones the likeliest, each different from all others; and which places are new."""
    rank = subspace.singular_values.size
    count = jnp.sum(before.is_sure)
    known = jnp.any(_same(subspace, solved, before.examples) & before.is_sure[None, :], axis=1)
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

    return jax.tree.map(merge, before.examples, solved), is_new


def _best_choice(examples: Component, is_new: jax.Array, solved: Component) -> tuple[Component, jax.Array]:
    """Each new one with the best choice of its classes, and whether no other is about as good."""
    options = _options([examples, *_parts(solved, len(is_new))])
    prices = jnp.where(is_plausible(options) & is_new[None, :], cost(options), jnp.inf).at[0].set(cost(examples))
    best = _pick(options, argmin(prices.T))
    reach = TOLERANCE * jnp.max(options.label_deviation + best.label_deviation[None], axis=-1)
    apart = jnp.max(jnp.abs(options.label - best.label[None]), axis=-1) > reach
    return best, ~jnp.any((prices <= cost(best)[None, :] + TOLERANCE**2) & apart, axis=0)


def _best_polished(found: Component, solved: Component) -> Component:
    """As it was only where none of the others is a solution."""
    options = _options([found, *_parts(solved, len(found.misfit))])
    prices = jnp.where(is_plausible(options), cost(options), jnp.inf)
    prices = prices.at[0].set(jnp.where(jnp.any(jnp.isfinite(prices[1:]), axis=0), jnp.inf, 0.0))
    return _pick(options, argmin(prices.T))


def _complements(subspace: BatchSubspace, found: Component) -> jax.Array:
    """As `complements` with all found: one column each, of the inverse of all duals."""
    duals = _duals(subspace, found, jnp.ones((len(found.misfit),), bool))
    columns, triangle = orthonormal_columns(duals.T)
    inverse = columns @ triangle.T
    inverse = inverse / jnp.sqrt(jnp.sum(inverse**2, axis=0, keepdims=True))
    return jnp.zeros((len(duals), *inverse.shape)).at[:, :, 0].set(inverse.T)


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
