"""Rows of the gradient in which one example alone is active: its input, and a certificate for it.

Row j of the gradient is sum_b delta_bj h_b. Where one example alone has the unit open, it is a multiple of its input,
and the bias gradient that multiple. Run forward, the input says which units are open, and `gate_fit` whether any g
explains them: one row is enough, and no label format is assumed. What is found is taken out by duality, S - beta a^T
/ D with D = beta^T S^-1 a (Wedderburn 1934), which lowers the rank exactly; then other rows have a single example left.
(Shariati and Meybodi 2026 peel by subtraction, with hard labels.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from softinv_jax.dense_layers.gate_fit import GateSolution, NextLayer, fit_gates, is_among, is_credible
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.space import LayerSpace

__all__ = ["SingleRow", "peel"]

# So many rows in turn that are no example's: those after them hold more.
FAILURES = 64
# Of two rows' cosine: looked at already.
SAME_ROW = 1 - 1e-9
# Of two rows, how far from multiples of each other, in deviations.
CONFIRMED = 3.0
# Share of a delta outside of the column space that a few wrong gates can make.
MENDABLE = 0.2
# A row that is nothing but what others leave of rounding, in deviations of its entries.
LEAST_ROW = 30.0


@dataclass(frozen=True)
class SingleRow:
    """An example whose input is known because a row of the gradient is its own.

    Attributes:
      solution: its delta. input_coordinates: (B,) a, on the scale that `constant . a = 1` gives.
      confirmed: whether another row says the same. One row alone may be a mixture of examples that open the same units.
    """

    solution: GateSolution
    input_coordinates: np.ndarray
    confirmed: bool


def peel(layers: DenseLayers, index: int, space: LayerSpace, following: NextLayer) -> list[SingleRow]:
    """Examples with a row of their own, and those that have one once these are taken out.

    Args:
      layers, index: the layer, whose activation has two slopes. space, following: of it.
    """
    known: list[SingleRow] = []
    if following.slopes[0] != 0:
        return known  # No unit is ever closed.
    core = np.diag(space.singular_values)
    seen = np.zeros((len(space.noise), space.rank))
    while len(known) < space.rank:
        before, failures = len(known), 0
        for unit, coordinates in _row_inputs(space, core):
            if failures >= FAILURES or len(known) >= space.rank:
                break
            if _parallel(coordinates, seen[unit]) or any(
                _parallel(coordinates, row.input_coordinates) for row in known
            ):
                continue
            seen[unit] = coordinates
            row = _certify(layers, index, space, following, unit, coordinates, core)
            if row is not None and not is_among(row.solution, [other.solution for other in known]):
                known.append(row)
                failures = 0
            else:
                failures += 1
        if len(known) == before:
            break
        core = _without(space, known)
    return known


def _row_inputs(space: LayerSpace, core: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Units, and what their rows would be if each were one example's: its input's coordinates (B,).

    With a bias scaled by the constant 1; without, of the sign that opens the unit and of the row's own length. Rows
    with little in them come first: there few examples are. core: (B, B) S, or what is left of it.
    """
    rows = space.left @ core
    size = np.linalg.norm(rows, axis=1)
    for unit in np.argsort(space.noise * size):
        if size[unit] < LEAST_ROW * np.sqrt(space.rank):
            continue
        coordinates = rows[unit]
        if space.has_bias:
            constant = coordinates @ space.constant
            if abs(constant) < LEAST_ROW * np.linalg.norm(space.constant):
                continue  # A sum that cancels is of several examples.
            coordinates = coordinates / constant
        opening = space.directions[unit] @ coordinates
        if opening > 0 or not space.has_bias:
            yield int(unit), coordinates if opening > 0 else -coordinates


def _parallel(first: np.ndarray, second: np.ndarray) -> bool:
    return float(abs(first @ second)) > SAME_ROW * float(np.linalg.norm(first) * np.linalg.norm(second)) > 0


def _certify(
    layers: DenseLayers,
    index: int,
    space: LayerSpace,
    following: NextLayer,
    unit: int,
    coordinates: np.ndarray,
    core: np.ndarray,
) -> SingleRow | None:
    gates = layers.gates(index, space.directions @ coordinates)
    if not gates[unit]:
        return None
    solution = fit_gates(space, following, gates, rounds=1)
    if not is_credible(solution, space.common):
        if not solution.misfit < MENDABLE * solution.spread:
            return None
        # A gate or two are wrong where the row itself is rounded much.
        solution = fit_gates(space, following, gates)
        if not is_credible(solution, space.common) or np.count_nonzero(solution.gates != gates) > len(gates) / 50:
            return None
    divisor = solution.coordinates @ (coordinates / space.singular_values)
    if abs(divisor) < 1e-12 * np.linalg.norm(solution.coordinates) * np.linalg.norm(
        coordinates / space.singular_values
    ):
        return None
    return SingleRow(solution, coordinates, _is_confirmed(space, core, unit, coordinates))


def _is_confirmed(space: LayerSpace, core: np.ndarray, unit: int, coordinates: np.ndarray) -> bool:
    """Whether another row is a multiple of this one: a row of two examples that open the same units is not."""
    rows = space.left @ core
    direction = coordinates / np.linalg.norm(coordinates)
    along = rows @ direction
    rest = np.linalg.norm(rows - along[:, None] * direction, axis=1)
    noise = space.common * np.sqrt(space.rank)
    parallel = (rest < CONFIRMED * noise) & (np.abs(along) > LEAST_ROW * CONFIRMED * noise)
    parallel[unit] = False
    return bool(np.any(parallel))


def _without(space: LayerSpace, known: list[SingleRow]) -> np.ndarray:
    """(B, B) S less the known examples: S - X M^-1 Y^T with X their beta, Y their a, and M = Y^T S^-1 X."""
    deltas = np.stack([row.solution.coordinates for row in known], axis=1)
    inputs = np.stack([row.input_coordinates for row in known], axis=1)
    deltas = deltas / np.linalg.norm(deltas, axis=0)
    inputs = inputs / np.linalg.norm(inputs, axis=0)
    pairing = inputs.T @ (deltas / space.singular_values[:, None])
    return np.diag(space.singular_values) - deltas @ np.linalg.solve(pairing, inputs.T)
