"""Inputs that are outputs of ReLU: non-negative vectors with many zeros in the row space of a layer's gradient.

What enters a dense layer after a ReLU is h = V a >= 0, and zero wherever the layer before is closed: for about half of
all units, where B - 1 independent zeros determine a already. So every example is a vertex of the cone V a >= 0 at which
many more of its faces meet than at others. A linear programme ends at a vertex; weights 1 / (h + epsilon) from the
last one lead to sparser ones (Candes, Wakin and Boyd 2008). No label, no next layer and no gate is needed.
"""

import numpy as np
from scipy.optimize import linprog

__all__ = ["search_sparse_inputs"]

REWEIGHTINGS = 12
# Of the mean entry: what counts as small when weights are made anew; and what is taken for zero.
SMALL, ZERO = 0.3, 1e-4
SAME = 1e-7
# Of the largest: rows of V that are zero for all examples.
LEAST_ROW = 1e-6


def search_sparse_inputs(right: np.ndarray, starts: int, generator: np.random.Generator) -> np.ndarray:
    """Vertices of {a : right @ a >= 0} with more zeros than their position needs, from random starts.

    Args:
      right: (d, r) of full rank; rows of zeros say nothing.

    Returns:
      (k, r), k <= starts, of any length; one example may be among them several times.
    """
    basis, turn = np.linalg.qr(right)
    sizes = np.linalg.norm(basis, axis=1)
    basis = basis[sizes > LEAST_ROW * np.max(sizes, initial=0)]
    found = []
    for _ in range(starts):
        coordinates = _sparsest(basis, generator.standard_normal(len(basis)) ** 2)
        if coordinates is not None:
            found.append(np.linalg.solve(turn, coordinates))
    return np.array(found).reshape(-1, right.shape[1])


def _sparsest(basis: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
    """(r,) where reweighted linear programmes from these weights end, if that is no vertex as all others."""
    number, rank = basis.shape
    last = np.zeros(number)
    for _ in range(REWEIGHTINGS):
        solution = linprog(
            weights @ basis,
            A_ub=-basis,
            b_ub=np.zeros(number),
            A_eq=basis.sum(axis=0)[None],
            b_eq=[float(number)],
            bounds=(None, None),
            method="highs",
        )
        if solution.x is None:
            return None
        values = np.maximum(basis @ solution.x, 0)
        if np.max(np.abs(values - last)) < SAME * number:
            break
        last, weights = values, 1 / (values + SMALL)
    return np.asarray(solution.x) if np.count_nonzero(values < ZERO) > rank else None
