"""Every example of a layer with two slopes: rounds of starts, kept away from what is found, until all are found.

What rounds are made of: where t begins (as a label's error would look, as one already found, or anything), how rigid it
is, whether all units are closed at first or those that a typical input closes, and the corner that a start is drawn
to. The first three are drawn as they succeeded before; the corner is orthogonal to the deltas already found, so that
these gain nothing by it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from softinv_jax.dense_layers.gate_fit import GateSolution, NextLayer, fit_gates, is_among, is_credible
from softinv_jax.dense_layers.gate_search import STEPS, search_gates
from softinv_jax.dense_layers.space import LayerSpace

__all__ = ["SingleRow", "search_all_gates"]

STARTS = 256
# Rounds, and so many in turn without one example more: at least, and where a round is little work, as many as this
# number of operations allows.
ROUNDS, BARREN_ROUNDS = (40, 600), (6, 80)
OPERATIONS = 1e12
RIGIDITIES = (0.3, 1.0, 10.0, 100.0)
KINDS = ("label", "confident", "found", "any")
BEGINNINGS = ("closed", "typical")
# How strongly a start is drawn to its corner, for each beginning; and of a typical input's gates, how many are turned.
PULLS = (0.2, 0.02)
TURNED = 0.1
WORTH_A_FIT = 0.5


@dataclass(frozen=True)
class SingleRow:
    """An example whose input is known because a row of the gradient is its own.

    Attributes:
      solution: as of the search. input_coordinates: (B,) a, on the scale that `constant . a = 1` gives.
      confirmed: whether another row says the same. One row alone may be a mixture of examples that open the same units.
    """

    solution: GateSolution
    input_coordinates: np.ndarray
    confirmed: bool


WAYS = (len(KINDS), len(RIGIDITIES), len(BEGINNINGS))


@dataclass
class _Tally:
    """How often each way of starting found an example, so that what works is drawn more often."""

    tried: np.ndarray = field(default_factory=lambda: np.full(WAYS, 4.0))
    found: np.ndarray = field(default_factory=lambda: np.ones(WAYS))

    def draw(self, generator: np.random.Generator, count: int, can_be_found: bool) -> np.ndarray:
        share = self.found / self.tried
        # A part of all starts goes to every way in any case.
        share = 0.8 * share / share.sum() + 0.2 / share.size
        if not can_be_found:
            share[KINDS.index("found")] = 0
        return generator.choice(share.size, count, p=(share / share.sum()).ravel())

    def enter(self, ways: np.ndarray, successes: np.ndarray) -> None:
        np.add.at(self.tried.reshape(-1), ways, 1)
        np.add.at(self.found.reshape(-1), ways[successes], 1)


def search_all_gates(
    space: LayerSpace,
    following: NextLayer,
    known: list[SingleRow],
    others: list[GateSolution],
    progress: Callable[[int], None],
    seed: int = 0,
) -> list[GateSolution]:
    """Search for the examples that are not known yet.

    Args:
      known: examples with their inputs, to which the others' deltas are dual. others: examples without.
      progress: called with the number found.

    Returns:
      Solutions, no two the same, at most as many as the rank leaves.
    """
    generator = np.random.default_rng(seed)
    wanted = space.rank - len(known) - len(others)
    remaining = _remaining(space, known)
    deltas = np.zeros((len(space.noise), space.rank), np.float32)
    deltas[:, : remaining.shape[1]] = np.linalg.qr(space.noise[:, None] * (space.left @ remaining))[0]
    outputs = np.linalg.qr(following.weight)[0].astype(np.float32)
    typical = _typical_gates(space)
    found: list[GateSolution] = []
    tally, barren = _Tally(), 0
    rounds, patience = _rounds(len(space.noise), space.rank + following.weight.shape[1])
    for _ in range(rounds):
        if len(found) >= wanted or barren >= patience:
            break
        ways = tally.draw(generator, STARTS, bool(found or known or others))
        kinds, stiff, begun = np.unravel_index(ways, WAYS)
        examples = [row.solution for row in known] + others + found
        starts, gates = _starts(generator, following, kinds, examples, typical)
        beginnings = np.where(begun[:, None] == BEGINNINGS.index("typical"), gates * starts, 0)
        taken = [space.noise * (space.left @ one.coordinates) for one in others + found]
        objectives = _objectives(generator, deltas, taken) * np.asarray(PULLS, np.float32)[begun][:, None]
        delta, target = search_gates(
            jnp.asarray(deltas),
            jnp.asarray(outputs),
            objectives,
            starts,
            beginnings.astype(np.float32),
            np.asarray(RIGIDITIES, np.float32)[stiff],
            following.slopes,
        )
        candidates = _candidates(np.asarray(delta), np.asarray(target), following.slopes)
        successes = []
        before = len(found)
        for lane, gates in candidates:
            if len(found) < wanted and _enter(space, following, gates, examples, found):
                successes.append(lane)
        tally.enter(ways, np.asarray(successes, int))
        barren = 0 if len(found) > before else barren + 1
        progress(space.rank - wanted + len(found))
    return found


def _rounds(units: int, unknowns: int) -> tuple[int, int]:
    """How many rounds at most, and how many in turn that find nothing."""
    affordable = OPERATIONS / (4.0 * STARTS * STEPS * units * unknowns)
    rounds = int(np.clip(affordable, *ROUNDS))
    return rounds, int(np.clip(affordable / 8, *BARREN_ROUNDS))


def _remaining(space: LayerSpace, known: list[SingleRow]) -> np.ndarray:
    """(B, B - k) orthonormal: the coordinates beta that are dual to the known inputs."""
    if not known:
        return np.eye(space.rank)
    duals = np.stack([row.input_coordinates / space.singular_values for row in known], axis=1)
    return np.linalg.qr(duals / np.linalg.norm(duals, axis=0), mode="complete")[0][:, len(known) :]


def _typical_gates(space: LayerSpace) -> np.ndarray:
    """(m,) which units the shortest input with a constant 1 opens: what inputs have in common; none without a bias."""
    if not space.has_bias:
        return np.zeros(len(space.noise), bool)
    return np.asarray(space.directions @ space.constant > 0)


def _starts(
    generator: np.random.Generator,
    following: NextLayer,
    kinds: np.ndarray,
    examples: list[GateSolution],
    typical: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(S, m) t of length one, and the slopes of gates that go with it: typical ones, or those of the example found."""
    count, size = len(kinds), len(following.basis)
    rows = np.arange(count)
    # Predictions as of a network that knows little, or is sure of something.
    sharpness = np.where(kinds == KINDS.index("confident"), generator.choice([2.0, 8.0, 30.0], count), 0.3)
    prediction = softmax(sharpness[:, None] * generator.standard_normal((count, size)), axis=1)
    label = np.zeros((count, size))
    share = np.where(generator.random(count) < 0.5, 1.0, generator.uniform(0.5, 1.0, count))
    label[rows, generator.integers(0, size, count)] += share
    label[rows, generator.integers(0, size, count)] += 1 - share
    combination = (prediction - label) @ following.basis
    anything = kinds == KINDS.index("any")
    combination[anything] = generator.standard_normal((int(anything.sum()), combination.shape[1]))
    again = np.flatnonzero(kinds == KINDS.index("found"))
    gates = np.broadcast_to(typical, (count, len(typical))).copy()
    if len(examples):
        chosen = generator.integers(0, len(examples), len(again))
        own = np.stack([one.combination for one in examples])[chosen]
        noise = generator.standard_normal(own.shape) * generator.choice([0.03, 0.1, 0.3], (len(own), 1))
        combination[again] = own + noise * np.sqrt(1 / own.shape[1])
        gates[again] = np.stack([one.gates for one in examples])[chosen]
    starts = combination @ following.weight.T
    starts = starts / np.maximum(np.linalg.norm(starts, axis=1, keepdims=True), 1e-300)
    low, high = following.slopes
    turned = gates ^ (generator.random(gates.shape) < TURNED)
    return starts.astype(np.float32), np.where(turned, high, low)


def _objectives(generator: np.random.Generator, deltas: np.ndarray, found: list[np.ndarray]) -> np.ndarray:
    """(S, B) unit vectors orthogonal to what is found."""
    objectives = generator.standard_normal((STARTS, deltas.shape[1]))
    objectives[:, ~np.any(deltas, axis=0)] = 0
    if found:
        taken = np.linalg.qr(deltas.T @ np.stack(found, axis=1))[0]
        rest = objectives - (objectives @ taken) @ taken.T
        # Where nothing is left but rounding, a direction as good as any.
        objectives = np.where(np.linalg.norm(rest, axis=1, keepdims=True) > 1e-3, rest, objectives)
    return (objectives / np.linalg.norm(objectives, axis=1, keepdims=True)).astype(np.float32)


def _candidates(delta: np.ndarray, target: np.ndarray, slopes: tuple[float, float]) -> list[tuple[int, np.ndarray]]:
    """Lanes and their open units, those first that agree best; those that agree in nothing left out."""
    low, high = slopes
    gates = delta * target > (low + high) / 2 * target**2
    agreed = np.where(gates, high, low) * target
    norm = np.linalg.norm(agreed, axis=1)
    error = np.linalg.norm(delta - agreed, axis=1) / np.maximum(norm, 1e-30)
    error = np.where(np.isfinite(error) & (norm > 1e-6), error, np.inf)
    order = [lane for lane in np.argsort(error) if error[lane] < WORTH_A_FIT]
    # Lanes that came to the same units are one candidate.
    distinct = {gates[lane].tobytes(): int(lane) for lane in reversed(order)}
    return [(lane, gates[lane]) for lane in reversed(list(distinct.values()))]


def _enter(
    space: LayerSpace,
    following: NextLayer,
    gates: np.ndarray,
    examples: list[GateSolution],
    found: list[GateSolution],
) -> bool:
    """Fit a candidate; whether it is an example that is new."""
    solution = fit_gates(space, following, gates)
    if not is_credible(solution) or is_among(solution, examples + found):
        return False
    found.append(solution)
    return True
