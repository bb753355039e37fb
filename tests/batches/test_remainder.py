"""What some examples of a batch leave of its gradient: fitted beside a rest of low rank, and found in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.batches.candidates import solve, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.growth import explains, grow, simplified
from softinv_jax.batches.joint import JointFit, fit_jointly
from softinv_jax.batches.remainder import deflate, gather
from softinv_jax.batches.subspace import BatchSubspace, batch_subspace

CLASSES, FEATURES, SIZE, NOISE = 40, 50, 4, 1e-7  # As in test_components, so that compiled programs are shared.
TARGETS = np.array([[3 * k, -1] for k in range(SIZE)], np.int32)


@pytest.fixture(autouse=True)
def _float64() -> object:
    with jax.enable_x64(True):
        yield


def draw(seed: int) -> tuple[BatchSubspace, np.ndarray, np.ndarray]:
    """Subspace, and the true coordinates and smoothed labels of its examples."""
    rng = np.random.default_rng(seed)
    weight, features = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES)), rng.uniform(0, 1, (SIZE, FEATURES))
    labels = np.full((SIZE, CLASSES), 0.2 / CLASSES)
    labels[np.arange(SIZE), TARGETS[:, 0]] += 0.8
    prediction = np.exp(features @ weight.T)
    prediction /= prediction.sum(axis=1, keepdims=True)
    gradient = (prediction - labels).T @ features / SIZE + NOISE * rng.standard_normal((CLASSES, FEATURES))
    subspace, right, _ = batch_subspace(
        jnp.asarray(weight), jnp.asarray(gradient), SIZE, np.dtype(np.float64), has_bias=False
    )
    return subspace, features @ right, labels


def fit_some(subspace: BatchSubspace, coordinates: np.ndarray, targets: np.ndarray) -> JointFit:
    missing = SIZE - len(coordinates)
    padded = np.pad(coordinates, ((0, missing), (0, 0)))
    weights = np.pad(np.tile([0.7, 0.0], (len(coordinates), 1)), ((0, missing), (0, 0)))
    targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-1)
    arrays = map(jnp.asarray, (padded, weights, targets))
    return jax.tree.map(np.asarray, fit_jointly(subspace, *arrays, Divisor(SIZE), missing))


def components(subspace: BatchSubspace, coordinates: np.ndarray, targets: np.ndarray) -> list[Component]:
    return split(solve(subspace, coordinates, targets, Divisor(SIZE)))


@pytest.mark.parametrize("count", [2, 3])
def test_some_are_fitted_beside_whatever_the_others_are(count: int) -> None:
    """Labels within their deviations, residuals as large as the noise, from starts 1 % off."""
    standardised = []
    for seed in range(8):
        subspace, truth, labels = draw(seed)
        start = truth[:count] * (1 + 0.01 * np.random.default_rng(seed).standard_normal((count, SIZE)))
        fit = fit_some(subspace, start, TARGETS[:count])
        assert 0.5 < fit.misfit < 1.5
        own = np.arange(count), TARGETS[:count, 0]
        standardised.append((fit.label[own] - labels[own]) / fit.label_deviation[own])
        np.testing.assert_allclose(fit.label[:count], labels[:count], atol=1e-4)
    assert 0.4 < np.sqrt(np.mean(np.square(standardised))) < 1.6


def test_a_wrong_one_among_them_shows() -> None:
    subspace, truth, _ = draw(0)
    targets = TARGETS[:3].copy()
    targets[2, 0] = 20
    assert explains(fit_some(subspace, truth[:3], TARGETS[:3]))
    assert not explains(fit_some(subspace, truth[:3], targets))


@pytest.mark.parametrize("count", [2, 3])
def test_the_row_space_of_what_is_left_is_that_of_the_others(count: int) -> None:
    subspace, truth, _ = draw(1)
    fit = fit_some(subspace, truth[:count], TARGETS[:count])
    fit = fit._replace(coordinates=fit.coordinates[:count], label=fit.label[:count])
    confined, basis, remainder = deflate(subspace, fit)
    assert basis.shape == (SIZE, SIZE - count)
    assert remainder.shape == (CLASSES, SIZE - count)
    others = truth[count:]
    np.testing.assert_allclose(others @ basis @ basis.T, others, atol=1e-3 * np.abs(others).max())
    # Logits and duality are the same in either coordinates.
    inside = np.pad(others @ basis, ((0, 0), (0, count)))
    np.testing.assert_allclose(inside @ confined.directions.T, others @ subspace.directions.T, atol=1e-2)
    np.testing.assert_allclose(inside @ confined.coupling, others @ basis @ basis.T @ subspace.coupling, rtol=1e-9)


def test_the_rest_is_found_from_some() -> None:
    subspace, truth, labels = draw(2)
    known, found = gather(subspace, None, components(subspace, truth[:2], TARGETS[:2]), Divisor(SIZE))
    assert known is not None
    assert len(known.examples) == len(found) == SIZE
    order = np.argsort(known.start.targets[:, 0])
    np.testing.assert_allclose(known.fit.label[order], labels, atol=1e-4)


def test_what_does_not_go_with_the_others_is_left_out() -> None:
    subspace, truth, _ = draw(3)
    right = components(subspace, truth[:2], TARGETS[:2])
    known = grow(subspace, None, right, Divisor(SIZE))
    assert known is not None
    (wrong,) = split(solve(subspace, 1.5 * truth[2:3], np.array([[30, -1]]), Divisor(SIZE), None, 0))
    assert grow(subspace, known, [wrong], Divisor(SIZE)) is known


def test_a_second_class_without_weight_goes() -> None:
    subspace, truth, labels = draw(4)
    targets = TARGETS[:3].copy()
    targets[1, 1] = 20
    known = grow(subspace, None, components(subspace, truth[:3], targets), Divisor(SIZE))
    assert known is not None
    assert 20 in known.start.targets
    simpler = simplified(subspace, known, Divisor(SIZE))
    np.testing.assert_array_equal(np.sort(simpler.start.targets[:, 0]), TARGETS[:3, 0])
    assert (simpler.start.targets[:, 1] == -1).all()
    np.testing.assert_allclose(simpler.fit.label[:3], labels[:3], atol=1e-4)


def test_there_are_never_more_than_the_batch_has() -> None:
    subspace, truth, _ = draw(5)
    right = components(subspace, truth[:2], TARGETS[:2])
    wrong = split(solve(subspace, 1.5 * truth[2:], np.array([[30, -1], [31, -1]]), Divisor(SIZE), None, 0))
    known, found = gather(subspace, None, [*right, *wrong], Divisor(SIZE))
    assert known is not None
    assert len(found) == SIZE
    np.testing.assert_array_equal(np.sort(known.start.targets[:, 0]), TARGETS[:, 0])
