"""The recovery against a slow twin that shares no code with it: scipy's root search on every triple, and counting."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import brentq

AGREE = 2e-6
"""Entries of one level differ by the float32 rounding of the gradient only, six times that of an entry near one."""


def label_at(scalar: float, weight: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y(lambda) and x = lambda v from the singular value decomposition."""
    left, values, right = np.linalg.svd(gradient.astype(np.float64))
    direction = weight.astype(np.float64) @ right[0]
    powers = np.exp(scalar * direction - np.max(scalar * direction))
    return powers / powers.sum() - values[0] * left[:, 0] / scalar, scalar * right[0]


def triple_roots(weight: np.ndarray, gradient: np.ndarray) -> list[float]:
    """The lambda of every triple: the ratio of differences of u, matched by that of the exponentials."""
    left, _, right = np.linalg.svd(gradient.astype(np.float64))
    direction, left = weight.astype(np.float64) @ right[0], left[:, 0]
    limit = 300 / np.ptp(direction)
    roots = []
    for triple in itertools.combinations(np.argsort(-direction), 3):
        top, middle, bottom = direction[list(triple)]
        upper, lower = -np.diff(left[list(triple)])
        if upper * lower <= 0:
            continue

        def excess(scalar: float, gaps=(top - middle, middle - bottom), target=upper / lower) -> float:
            if scalar == 0:
                return np.log(gaps[0] / gaps[1]) - np.log(target)
            ratio = np.expm1(scalar * gaps[0]) / -np.expm1(-scalar * gaps[1])
            return np.log(ratio) - np.log(target)

        if excess(-limit) < 0 < excess(limit):
            roots.append(brentq(excess, -limit, limit, rtol=1e-12))
    return roots


def recover_naively(weight: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label and feature at the root at which the most entries of y agree, of these the least spread."""

    def disagreement(scalar: float) -> tuple[int, float]:
        label, _ = label_at(scalar, weight, gradient)
        if label.min() < -1e-4 or label.max() > 1 + 1e-4:
            return 0, 0.0
        near = np.abs(label[:, None] - label[None, :]) < AGREE
        level = np.argmax(near.sum(axis=1))
        return -int(near[level].sum()), float(np.std(label[near[level]]))

    best = min(triple_roots(weight, gradient), key=disagreement)
    return label_at(best, weight, gradient)


def recover_on_a_grid(weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Feature at the lambda of a fine grid on which the label's mid entries spread least, refined by halving it."""
    left, values, right = np.linalg.svd(gradient.astype(np.float64))
    direction, left = weight.astype(np.float64) @ right[0], values[0] * left[:, 0]

    def spread(scalars: np.ndarray) -> np.ndarray:
        logits = scalars[:, None] * direction
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        label = powers / powers.sum(axis=1, keepdims=True) - left / scalars[:, None]
        kept = np.sort(label, axis=1)[:, :-2]
        return np.where((label > -1e-3).all(axis=1), np.ptp(kept, axis=1), np.inf)

    span = np.geomspace(0.05, 50, 4000) / np.ptp(direction)
    grid = np.concatenate([-span[::-1], span])
    for _ in range(6):
        best = np.argmin(spread(grid))
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)], 401)
    return grid[np.argmin(spread(grid))] * right[0]


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "signed"])
@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup", "smoothed_mixup", "three_way_mixup"])
def test_counting_over_all_triples_finds_the_same(
    draw: Callable, recover_one: Callable, family: str, kind: str, thorough: bool
) -> None:
    for seed in range(3):
        sample = draw(family, seed, kind=kind)
        label, feature = recover_naively(sample.weight, sample.gradient)
        found = recover_one(sample, thorough=thorough)
        np.testing.assert_allclose(found.label, label, atol=1e-4)
        np.testing.assert_allclose(found.feature, feature, atol=1e-3 * np.linalg.norm(feature))


@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup"])
def test_a_grid_over_lambda_finds_the_same(draw: Callable, recover_one: Callable, family: str) -> None:
    for seed in range(3):
        sample = draw(family, seed)
        feature = recover_on_a_grid(sample.weight, sample.gradient)
        found = recover_one(sample)
        np.testing.assert_allclose(found.feature, feature, atol=1e-3 * np.linalg.norm(feature))


@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup", "smoothed_mixup", "dirichlet"])
def test_fast_and_thorough_search_agree(draw: Callable, recover_one: Callable, family: str) -> None:
    for seed in range(20):
        sample = draw(family, seed, kind="signed")
        fast, thorough = recover_one(sample, thorough=False), recover_one(sample, thorough=True)
        assert fast.verdict == thorough.verdict
        np.testing.assert_allclose(fast.label, thorough.label, atol=1e-6)
        np.testing.assert_allclose(fast.feature, thorough.feature, rtol=1e-4, atol=1e-6)
