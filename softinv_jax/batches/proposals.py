"""Where to start looking for the examples of a batch, and which classes each might single out.

G = (1/D) N X^T with N = (g_1 ... g_B). The row of G at a class that only example b singles out is nearly -w/D times
x_b, whatever the sign of the features. Two such rows of one example are nearly parallel, but so are all rows where
features resemble each other; the rows of U are not: U = N times a B x B matrix that makes its columns orthonormal, and
the columns of N nearly are, so that the rows of U cluster by example.
"""

import itertools
from functools import partial

import numpy as np

from softinv_jax.batches.candidates import in_pieces
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.scalar_scan import scan_rays
from softinv_jax.batches.subspace import BatchSubspace

__all__ = ["propose", "propose_along_rays"]

ALL_PAIRS, FEW_PAIRS = 700, 100
SPLITS = 3  # The strongest classes, and as many directions.
SPLIT_SHARES = (-0.2, -0.05, 0.05, 0.2)  # How far apart two examples of one class may lie, relative to their size.


def propose(
    remainder: np.ndarray, remaining: int, divisor: float, stretch: float, *, separately: bool, thorough: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Starts from what the examples found so far leave of the gradient.

    Args:
      remainder: (C, B) the gradient in the coordinates of its row space, less the examples found.
      remaining: how many examples are still to be found.
      divisor: D. stretch: factor on the starts, for weights of less than 1.
      separately: start a pair of classes from either row by itself, not from their sum: one may be shared with another
        example, or have p > y.
      thorough: start from all pairs of classes up to ALL_PAIRS, or only to FEW_PAIRS; beyond, from those most alike.

    Returns:
      Starts (n, B), and the classes assumed to be singled out, (n, TARGETS), -1 for none.
    """
    likely, direction, right = _likely(remainder, remaining)
    count = len(likely)
    pairs = list(itertools.combinations(range(count), 2))
    alike = np.array([direction[i] @ direction[j] for i, j in pairs])
    order = np.argsort(-alike)[: len(pairs) if len(pairs) <= (ALL_PAIRS if thorough else FEW_PAIRS) else 4 * remaining]
    chosen: list[tuple[int, ...]] = [(likely[i],) for i in range(count)]
    chosen += [(likely[pairs[k][0]], likely[pairs[k][1]]) for k in order]
    # Two examples of one class: its row is the sum of both, and they differ along the other singular vectors.
    splits = []
    for k in likely[:SPLITS]:
        half = -divisor * remainder[k] / 2
        for other in right[1 : min(remaining, SPLITS + 1)]:
            splits += [(k, half + share * np.linalg.norm(half) * other) for share in SPLIT_SHARES]
    rows = [(classes, [k]) for classes in chosen for k in classes]
    if not separately:
        rows = [(classes, list(classes)) for classes in chosen]
    targets = np.full((len(rows), TARGETS), -1, np.int32)
    starts = np.empty((len(rows), remainder.shape[1]))
    for row, (classes, added) in enumerate(rows):
        targets[row, : len(classes)] = classes
        starts[row] = -divisor * stretch * remainder[added].sum(axis=0)
    if splits:
        targets = np.concatenate([targets, [(k, *(-1,) * (TARGETS - 1)) for k, _ in splits]]).astype(np.int32)
        starts = np.concatenate([starts, [start for _, start in splits]])
    return starts, targets


def propose_along_rays(
    subspace: BatchSubspace, remainder: np.ndarray, remaining: int, divisor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Starts along single rows, of sizes that fit there, with the row's class alone or one more that does not fit.

    For equations with many more classes than unknowns. A second class can have far too little weight to show among the
    rows of U.

    Args:
      subspace: of the batch.
      remainder, remaining, divisor: as for `propose`.

    Returns:
      Starts (n, B), and the classes assumed to be singled out, (n, TARGETS), -1 for none.
    """
    likely = _likely(remainder, remaining)[0].astype(np.int32)
    points, misfits, valid = in_pieces(partial(scan_rays, subspace), -divisor * remainder[likely], likely)
    first = np.repeat(likely, valid.shape[1]).reshape(valid.shape)[valid]
    second = np.concatenate([np.full((len(first), 1), -1, np.int32), misfits[valid]], axis=1)
    targets = np.stack([np.broadcast_to(first[:, None], second.shape), second], axis=2)
    return np.repeat(points[valid], second.shape[1], axis=0), targets.reshape(-1, TARGETS)


def _likely(remainder: np.ndarray, remaining: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) classes by falling leverage on what remains, the unit vectors of their rows of U (n, r), and V^T."""
    left, _, right = np.linalg.svd(remainder, full_matrices=False)
    left = left[:, :remaining]
    leverage = np.sum(left**2, axis=1)
    likely = np.argsort(-leverage)[: 2 * remaining + 4]
    return likely, left[likely] / np.sqrt(np.maximum(leverage[likely], 1e-300))[:, None], right
