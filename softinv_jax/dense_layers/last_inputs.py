"""The last few examples of a layer with two slopes: their inputs lie in a space of few dimensions, by duality.

What is found tells the others' inputs apart from its own: beta_c^T S^-1 a_b = 0 for every delta beta_c that is found.
With one example missing, a_b is known; with a few, points of that small space are run forward, and some open nearly
the units that an example opens.
"""

import numpy as np

from softinv_jax.dense_layers.gate_fit import GateSolution, NextLayer, fit_gates, is_among, is_credible
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.space import LayerSpace

__all__ = ["find_last"]

# Dimensions, and points that are tried in them.
FEW = 6
POINTS = 60


def find_last(
    layers: DenseLayers, index: int, space: LayerSpace, following: NextLayer, found: list[GateSolution]
) -> list[GateSolution]:
    """Solutions beyond those found, as many as this comes to."""
    generator = np.random.default_rng(0)
    added: list[GateSolution] = []
    # Where nothing is found, nothing is told of the rest.
    while found and 0 < space.rank - len(found) - len(added) <= FEW:
        solution = _one_more(generator, layers, index, space, following, found + added)
        if solution is None:
            break
        added.append(solution)
    return added


def _one_more(
    generator: np.random.Generator,
    layers: DenseLayers,
    index: int,
    space: LayerSpace,
    following: NextLayer,
    found: list[GateSolution],
) -> GateSolution | None:
    duals = np.stack([one.coordinates / space.singular_values for one in found], axis=1)
    duals = duals / np.linalg.norm(duals, axis=0)
    basis = np.linalg.qr(duals, mode="complete")[0][:, len(found) :]
    dimensions = basis.shape[1]
    points = np.ones((1, 1)) if dimensions == 1 else generator.standard_normal((POINTS, dimensions))
    for point in points:
        coordinates = basis @ point
        constant = coordinates @ space.constant
        # Without a bias the sign is not known.
        signs = (1.0, -1.0) if not space.has_bias else (1 / constant if constant else 1.0,)
        for sign in signs:
            gates = layers.gates(index, space.directions @ (sign * coordinates))
            solution = fit_gates(space, following, gates)
            if is_credible(solution) and not is_among(solution, found):
                return solution
    return None
