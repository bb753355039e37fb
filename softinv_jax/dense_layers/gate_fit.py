"""One example of a layer with two slopes: given which units are open, everything is linear, and the fit says how well.

With D the slopes of the units, delta = D W g must lie in the column space of R U: in units of noise, P delta = 0 with P
the projector off U. g is the direction in which P R^-1 D W is smallest. What noise leaves of P delta has deviation
|S^-1 beta| in every entry, beta = U^T R^-1 delta; a wrong gate leaves as much as the unit's whole delta.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softinv_jax.dense_layers.space import LayerSpace

__all__ = [
    "CREDIBLE_MISFIT",
    "SEPARATION",
    "GateSolution",
    "NextLayer",
    "fit_gates",
    "is_among",
    "is_credible",
    "next_layer",
    "surprise",
]

ROUNDS = 12
# Root mean square of many residuals that are noise; and where rounding, whose size is known but roughly, is far below
# anything that an accident leaves.
CREDIBLE_MISFIT = 1.5
CREDIBLE_ROUNDING = 12.0
FAR_ABOVE_NOISE = 1e4
# The next best must be so much worse than noise, and than the precision: then g is known to a fraction of itself.
SEPARATION = 50.0
LEAST_SEPARATION = 1e-4
TOLD = 6.0
# Nats; and how nearly parallel two solutions' deltas are that are one.
CREDIBLE_SURPRISE = 40.0
SAME = 1 - 1e-7


@dataclass(frozen=True)
class NextLayer:
    """What comes after the layer whose deltas are sought.

    Attributes:
      weight: (m, n) W Q: the next layer's kernel on a basis of what its deltas can be. basis: (outputs, n) Q.
      kernel: (m, outputs) W. slopes: the activation's two.
      own: of the next layer's gradient, if that holds as many examples: then Q spans its column space; else Q is 1.
    """

    weight: np.ndarray
    basis: np.ndarray
    kernel: np.ndarray
    slopes: tuple[float, float]
    own: LayerSpace | None = None


@dataclass(frozen=True)
class GateSolution:
    """One example, of unknown scale and sign.

    Attributes:
      gates: (m,) bool, the open units. told: (m,) bool, where what arrives at the unit stands out of noise.
        combination: (n,) g on the basis of `NextLayer`, of length one.
      coordinates: (B,) beta = U^T R^-1 delta. misfit: of P delta, in deviations. freedom: equations less unknowns.
      spread: root mean square of delta over the deviation. delta_deviation: of an entry of delta, in units of R: from
        the client's own rounding of W g, and from the error of g.
      combination_deviation: (n,) standard deviation of the combination.
      next_misfit: that of the next best g. Where it is small too, examples open the same units, and any mixture of them
        explains the equations as well.
    """

    gates: np.ndarray
    told: np.ndarray
    combination: np.ndarray
    coordinates: np.ndarray
    misfit: float
    freedom: int
    spread: float
    delta_deviation: float
    combination_deviation: np.ndarray
    next_misfit: float


def next_layer(kernel: np.ndarray, own: LayerSpace | None, slopes: tuple[float, float]) -> NextLayer:
    """kernel: (m, outputs) of the next layer. own: of its gradient, where that tells as many examples apart."""
    basis = np.eye(kernel.shape[1]) if own is None else own.noise[:, None] * own.left
    return NextLayer(kernel @ basis, basis, kernel, slopes, own)


def fit_gates(space: LayerSpace, following: NextLayer, gates: np.ndarray, rounds: int = ROUNDS) -> GateSolution:
    """Solve with the open units given, and let the solution open and close units, until nothing changes.

    gates: (m,) bool. rounds: at most; 1 takes the gates as they are.
    """
    low, high = following.slopes
    best: GateSolution | None = None
    for _ in range(rounds):
        solution, delta, targets = _solve(space, following, gates)
        if best is not None and solution.misfit >= best.misfit:
            break
        best = solution
        opened = delta * targets > (low + high) / 2 * targets**2
        if np.array_equal(opened, gates):
            break
        gates = opened
    assert best is not None
    return best


def _solve(space: LayerSpace, following: NextLayer, gates: np.ndarray) -> tuple[GateSolution, np.ndarray, np.ndarray]:
    low, high = following.slopes
    slopes = np.where(gates, high, low)
    weight = following.weight / space.noise[:, None]
    masked = slopes[:, None] * weight
    held = space.left.T @ masked
    gram = masked.T @ masked
    # Where hardly a unit is open, nothing is determined: kept away from by the trace.
    scale = np.linalg.cholesky(gram + (1e-12 * np.trace(gram) or 1.0) * np.eye(len(gram)))
    inverse = np.linalg.inv(scale)
    values, vectors = np.linalg.eigh(inverse @ (gram - held.T @ held) @ inverse.T)
    vectors = inverse.T @ vectors
    size = max(float(np.linalg.norm(vectors[:, 0])), 1e-300)
    combination = vectors[:, 0] / size
    delta = masked @ combination
    coordinates = space.left.T @ delta
    inside = space.left @ coordinates
    rounded = _rounded(space, following, slopes, combination)
    noise = float(np.hypot(np.linalg.norm(coordinates / space.singular_values), rounded))
    # Units whose derivative is zero whatever the gate is say nothing.
    told = np.abs(weight @ combination) > TOLD * noise
    freedom = int(np.count_nonzero(told)) - space.rank - len(combination) + 1
    misfit = float(np.linalg.norm(delta - inside) / max(noise * np.sqrt(max(freedom, 1)), 1e-300))
    spread = float(np.sqrt(np.mean(delta**2)) / max(noise, 1e-300))
    # Along the other eigenvectors, each with its own eigenvalue.
    others = vectors[:, 1:] / np.sqrt(np.maximum(values[1:], 1e-30))
    deviation = noise * np.linalg.norm(others, axis=1)
    # Each of them has deltas of length one.
    moved = noise * float(np.sqrt(np.sum(1 / np.maximum(values[1:], 1e-30)) / len(weight)))
    own = float(np.hypot(rounded, moved))
    second = _next_misfit(space, masked, values, vectors, noise / float(np.linalg.norm(delta) or 1.0), freedom)
    solution = GateSolution(gates, told, combination, coordinates, misfit, freedom, spread, own, deviation, second)
    return solution, inside, weight @ combination


def _next_misfit(
    space: LayerSpace, masked: np.ndarray, values: np.ndarray, vectors: np.ndarray, noise: float, freedom: int
) -> float:
    """Of the next best g, in deviations of the best; noise: of a delta of length one.

    But of its own, where it is a solution by itself: an example that opens the same units and resembles this one stands
    out of noise by little, and is noisier.
    """
    if len(values) == 1:
        return np.inf
    residual = float(np.sqrt(max(values[1], 0.0) / max(freedom, 1)))
    coordinates = space.left.T @ (masked @ vectors[:, 1])
    own = residual / max(float(np.linalg.norm(coordinates / space.singular_values)), noise, 1e-300)
    return own if own < CREDIBLE_MISFIT else residual / max(noise, 1e-300)


def _rounded(space: LayerSpace, following: NextLayer, slopes: np.ndarray, combination: np.ndarray) -> float:
    """Deviation of an entry of delta, in units of R, that is none of this layer's gradient."""
    # The client rounds every product of W g itself.
    weight = slopes[:, None] * following.weight / space.noise[:, None]
    rounded = space.roundoff * float(np.sqrt(np.mean(weight**2 @ combination**2)))
    if following.own is None:
        return rounded
    # What noise leaves of g outside of the column space, as of delta.
    outside = following.own.common * float(np.linalg.norm(combination / following.own.singular_values))
    kernel = slopes[:, None] * following.kernel * following.own.noise / space.noise[:, None]
    return float(np.hypot(rounded, outside * np.linalg.norm(kernel) / np.sqrt(len(kernel))))


def surprise(solution: GateSolution) -> float:
    """Nats by which an accident falls short of it: every equation beyond the unknowns, less the choice of the gates."""
    chance = np.log(max(solution.spread, 1.0) / max(solution.misfit, 1.0))
    return solution.freedom * float(chance) - len(solution.gates) * float(np.log(2))


def is_credible(solution: GateSolution, common: float) -> bool:
    """Whether it explains its equations to noise, no accident would, and nothing near it does; common: of the space."""
    separation = max(SEPARATION, LEAST_SEPARATION * solution.spread)
    alone = solution.next_misfit > separation
    limit = CREDIBLE_ROUNDING if solution.spread > FAR_ABOVE_NOISE else CREDIBLE_MISFIT * common
    return alone and solution.misfit < limit and surprise(solution) > CREDIBLE_SURPRISE


def is_among(solution: GateSolution, others: Sequence[GateSolution]) -> bool:
    """Whether one of the others is the same example."""
    if not others:
        return False
    coordinates = np.stack([one.coordinates for one in others])
    cosines = np.abs(coordinates @ solution.coordinates) / np.linalg.norm(coordinates, axis=1)
    return bool(np.max(cosines) > SAME * np.linalg.norm(solution.coordinates))
