"""Every example of a layer with two slopes: rounds of random starts, kept away from what is found, until all are found.

The deltas that are found are dual to the inputs of all other examples: beta_c^T S^-1 a_b = 0. So each one that is found
takes one dimension from the space in which the search looks for inputs, without any error of subtraction, and the last
one is alone in it. How soft the gates are at first, and how much a delta is trusted, is drawn as it succeeded before.
Where inputs are outputs of ReLU themselves, their zeros are a second way in (`sparse_inputs`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from softinv_jax.dense_layers.gate_fit import GateSolution, NextLayer, fit_gates, is_among, is_credible
from softinv_jax.dense_layers.gate_search import search_gates
from softinv_jax.dense_layers.single_rows import SingleRow
from softinv_jax.dense_layers.space import LayerSpace
from softinv_jax.dense_layers.sparse_inputs import search_sparse_inputs

__all__ = ["SHARPNESS", "TRUST", "left_over", "outputs_left", "search_all_gates", "whitened"]

STARTS = 64
SHARPNESS, TRUST = (0.5, 1.0, 20.0), (0.5, 1.0, 3.0)
# More steps where a round finds fewer than the one number, less where it finds more than the other.
STEPS = (60, 150, 400, 1000)
FEW, MANY = 2, 12
WAYS = (len(SHARPNESS), len(TRUST))
# Steps in turn without one example more: at least, at most, and between as many as this number of operations allows.
BARREN_STEPS = (1000, 10_000)
OPERATIONS = 2e12
MOST_STEPS = 20  # Times as many, in all.
ROUNDS_FOR_EACH = 4  # In turn without one example more, for each that is left.
# Of sparse inputs: in a round, and in turn without one example more, as many as this number allows of d B^2.
SPARSE_STARTS = 16
BARREN_STARTS = 2000
SPARSE_OPERATIONS = 5e8
# Share of delta's square outside of the column space, of a candidate; share of gates that two of one example agree in.
WORTH_A_FIT = 0.3
SAME_GATES = 0.985
# Of the median: rows that are less noisy than this are so because nothing is in them.
LEAST_NOISE = 1e-3


class Dual(Protocol):
    """An example whose deltas are known: its inputs' duals."""

    @property
    def coordinates(self) -> np.ndarray:
        """(B,) of its deltas."""
        ...


@dataclass
class _Tally:
    """How often each way of starting found an example, so that what works is drawn more often."""

    tried: np.ndarray = field(default_factory=lambda: np.full(WAYS, 2.0))
    found: np.ndarray = field(default_factory=lambda: np.full(WAYS, 0.2))

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        share = (self.found / self.tried) ** 2
        # A part of all starts goes to every way in any case.
        share = 0.8 * share / share.sum() + 0.2 / share.size
        return generator.choice(share.size, count, p=share.ravel())

    def enter(self, ways: np.ndarray, successes: list[int]) -> None:
        np.add.at(self.tried.reshape(-1), ways, 1)
        np.add.at(self.found.reshape(-1), ways[successes], 1)


def search_all_gates(
    space: LayerSpace,
    following: NextLayer,
    known: list[SingleRow],
    others: list[GateSolution],
    progress: Callable[[int], None],
    *,
    half_space: bool = True,
    sparse: bool = False,
    seed: int = 0,
) -> list[GateSolution]:
    """Search for the examples that are not known yet.

    Args:
      known: examples with their inputs, to which the others' deltas are dual. others: examples without.
      progress: called with the number found.
      half_space: whether a unit is open where the layer's output is positive.
      sparse: whether inputs are outputs of ReLU.

    Returns:
      Solutions, no two the same, at most as many as the rank leaves.
    """
    generator = np.random.default_rng(seed)
    examples = [row.solution for row in known] + others
    wanted = space.rank - len(examples)
    deltas, weight = whitened(space, following, known)
    found: list[GateSolution] = []
    tally, level, total = _Tally(), 0, 0
    barren_steps = barren_rounds = 0
    patience = _patience(len(space.left), space.rank, weight.shape[1])
    while len(found) < wanted and barren_steps < patience and total < MOST_STEPS * patience:
        # All starts are one where a single example is left, and nearly so where few are.
        if barren_rounds >= ROUNDS_FOR_EACH * (wanted - len(found)):
            break
        ways = tally.draw(generator, STARTS)
        sharp, own = np.unravel_index(ways, WAYS)
        outputs = outputs_left(space, examples + found)
        starts = generator.standard_normal((STARTS, space.rank)).astype(np.float32)
        gates, misfit = search_gates(
            deltas,
            weight,
            outputs,
            (starts @ outputs.T > 0).astype(np.float32),
            generator.standard_normal((STARTS, weight.shape[1])).astype(np.float32),
            np.asarray(SHARPNESS, np.float32)[sharp],
            np.asarray(TRUST, np.float32)[own],
            np.float32(half_space),
            np.int32(STEPS[level]),
            following.slopes,
        )
        successes = _enter(space, following, np.asarray(gates), np.asarray(misfit), examples, found, wanted)
        tally.enter(ways, successes)
        total += STEPS[level]
        barren_steps = 0 if successes else barren_steps + STEPS[level]
        barren_rounds = 0 if successes else barren_rounds + 1
        level = int(np.clip(level + (len(successes) < FEW) - (len(successes) > MANY), 0, len(STEPS) - 1))
        progress(len(examples) + len(found))
        if sparse and not successes:
            _search_by_zeros(space, following, examples, found, wanted, generator, progress)
            # By zeros everything was found that can be, once and for all.
            sparse = False
    return found


def _search_by_zeros(
    space: LayerSpace,
    following: NextLayer,
    examples: list[GateSolution],
    found: list[GateSolution],
    wanted: int,
    generator: np.random.Generator,
    progress: Callable[[int], None],
) -> None:
    """Add to `found` what the zeros of inputs show, until that ends."""
    features = space.right[:-1] if space.has_bias else space.right
    patience = min(BARREN_STARTS, SPARSE_OPERATIONS / (len(features) * space.rank**2))
    barren = 0
    while len(found) < wanted and barren < patience:
        basis = left_over(space, examples + found)
        inputs = search_sparse_inputs(features @ basis, SPARSE_STARTS, generator) @ basis.T
        gates = inputs @ space.directions.T > 0
        # Another example may differ from one that is found in a single unit.
        successes = _enter(space, following, gates, np.zeros(len(gates)), examples, found, wanted, same=1 - 1e-9)
        barren = 0 if successes else barren + SPARSE_STARTS
        progress(len(examples) + len(found))


def _patience(units: int, rank: int, unknowns: int) -> int:
    """How many steps in turn may find nothing."""
    operations = 2.0 * STARTS * units * (unknowns**2 + rank * unknowns + 8 * rank)
    return int(np.clip(OPERATIONS / operations, *BARREN_STEPS))


def whitened(space: LayerSpace, following: NextLayer, known: list[SingleRow]) -> tuple[jnp.ndarray, jnp.ndarray]:
    """(m, B) orthonormal columns or zeros that hold the deltas, and (m, n) the next layer's kernel, float32."""
    basis = np.eye(space.rank)
    if known:
        duals = np.stack([row.input_coordinates / space.singular_values for row in known], axis=1)
        basis[:, : space.rank - len(known)] = _orthogonal(duals)
        basis[:, space.rank - len(known) :] = 0
    noise = np.maximum(space.noise, LEAST_NOISE * np.median(space.noise))
    weight = following.weight / noise[:, None]
    # Units with no gradient say nothing of the deltas.
    weight = weight * np.any(space.left, axis=1)[:, None]
    weight = weight / np.sqrt(np.mean(weight**2))
    return jnp.asarray(space.left @ basis, jnp.float32), jnp.asarray(weight, jnp.float32)


def _orthogonal(vectors: np.ndarray) -> np.ndarray:
    """(B, B - k) orthonormal, to the k columns."""
    vectors = vectors / np.linalg.norm(vectors, axis=0)
    return np.asarray(np.linalg.qr(vectors, mode="complete")[0][:, vectors.shape[1] :])


def left_over(space: LayerSpace, examples: Sequence[Dual]) -> np.ndarray:
    """(B, B - k) orthonormal: of coordinates of inputs, what the deltas that are found leave to others."""
    if not examples:
        return np.eye(space.rank)
    return _orthogonal(np.stack([one.coordinates / space.singular_values for one in examples], axis=1))


def outputs_left(space: LayerSpace, examples: Sequence[Dual]) -> np.ndarray:
    """(m, B) orthonormal columns, or zeros: what the layer makes of inputs that can be the others', float32."""
    outputs = np.zeros(space.left.shape, np.float32)
    basis = left_over(space, examples)
    directions = space.directions @ basis
    # What a gate says does not depend on its unit's size.
    directions = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-300)
    outputs[:, : basis.shape[1]] = np.linalg.qr(directions)[0]
    return outputs


def _enter(
    space: LayerSpace,
    following: NextLayer,
    gates: np.ndarray,
    misfit: np.ndarray,
    examples: list[GateSolution],
    found: list[GateSolution],
    wanted: int,
    same: float = SAME_GATES,
) -> list[int]:
    """Fit the candidates, those first that agree best, and add what is new to `found`; returns their lanes.

    same: share of gates from which on a candidate is taken for one that is held.
    """
    held = [one.gates for one in examples + found]
    successes = []
    for lane in np.argsort(misfit):
        if len(found) >= wanted or not misfit[lane] < WORTH_A_FIT:
            break
        if held and np.max(np.mean(np.stack(held) == gates[lane], axis=1)) > same:
            continue
        solution = fit_gates(space, following, gates[lane])
        if not is_credible(solution, space.common) or is_among(solution, examples + found):
            continue
        found.append(solution)
        held.append(solution.gates)
        successes.append(int(lane))
    return successes
