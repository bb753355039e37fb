"""What examples found say about each other: where the others are, which of them is wrong, whether all explain it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.batches.candidates import complement, complements, is_plausible, solve, split
from softinv_jax.batches.component import Component, Divisor
from softinv_jax.batches.consistency import unrivalled, without_contradictions
from softinv_jax.batches.explanation import explains, fit_found
from softinv_jax.batches.joint import JointFit
from softinv_jax.batches.subspace import BatchSubspace, batch_subspace

CLASSES, FEATURES, SIZE, NOISE = 40, 50, 4, 1e-7  # As in test_components, so that compiled programs are shared.
TARGETS = np.array([[3 * k, -1] for k in range(SIZE)], np.int32)


@pytest.fixture(autouse=True)
def _float64() -> object:
    with jax.enable_x64(True):
        yield


def draw(seed: int, second: float = 0.0) -> tuple[BatchSubspace, np.ndarray, np.ndarray, np.ndarray]:
    """Subspace, and the true coordinates, duals and labels of its examples: smoothed, `second` on one more class."""
    rng = np.random.default_rng(seed)
    weight, features = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES)), rng.uniform(0, 1, (SIZE, FEATURES))
    labels = np.full((SIZE, CLASSES), 0.2 / CLASSES)
    labels[np.arange(SIZE), TARGETS[:, 0]] += 0.8 - second
    labels[np.arange(SIZE), TARGETS[:, 0] + 1] += second
    prediction = np.exp(features @ weight.T)
    prediction /= prediction.sum(axis=1, keepdims=True)
    gradient = (prediction - labels).T @ features / SIZE + NOISE * rng.standard_normal((CLASSES, FEATURES))
    subspace, right, _ = batch_subspace(
        jnp.asarray(weight), jnp.asarray(gradient), SIZE, np.dtype(np.float64), has_bias=False
    )
    duals = np.linalg.lstsq(np.asarray(subspace.left), (prediction - labels).T, rcond=None)[0].T
    return subspace, features @ right, duals, labels


def components(
    subspace: BatchSubspace, coordinates: np.ndarray, targets: np.ndarray, bases: np.ndarray | None = None
) -> list[Component]:
    return split(solve(subspace, coordinates, targets, Divisor(SIZE), bases=bases))


def test_what_is_dual_to_some_holds_the_others() -> None:
    """The theorem (Wedderburn): true features of the others lie in the complement of true duals."""
    subspace, coordinates, duals, _ = draw(0)
    values = np.asarray(subspace.singular_values)
    found = [
        replace(one, dual=dual) for one, dual in zip(components(subspace, coordinates, TARGETS), duals, strict=True)
    ]
    for count in range(SIZE):
        basis = complement(found[:count], values)
        used = basis[:, : SIZE - count]
        assert np.all(basis[:, SIZE - count :] == 0)
        np.testing.assert_allclose(used.T @ used, np.eye(SIZE - count), atol=1e-12)
        rest = coordinates[count:]
        np.testing.assert_allclose(rest @ used @ used.T, rest, atol=1e-4 * np.abs(rest).max())


def test_the_others_make_an_example_sharper() -> None:
    """Confined by the others, deviations are smaller, and still cover the errors."""
    standardised = []
    for seed in range(8):
        subspace, coordinates, _, labels = draw(seed)
        alone = components(subspace, coordinates, TARGETS)
        together = components(subspace, coordinates, TARGETS, complements(alone, np.asarray(subspace.singular_values)))
        for one, other, truth, label in zip(alone, together, coordinates, labels, strict=True):
            assert other.logit_deviation < one.logit_deviation
            assert np.linalg.norm(other.coordinates - truth) <= 1e-3 * np.linalg.norm(truth)
            standardised.append((other.label - label) / other.label_deviation)
    assert 0.5 < np.sqrt(np.mean(np.square(standardised))) < 1.5


def test_confined_is_least_squares_in_fewer_unknowns() -> None:
    """As if the subspace had had those columns only; and a basis of everything changes nothing."""
    subspace, coordinates, _, _ = draw(1)
    alone = components(subspace, coordinates, TARGETS)
    same = components(subspace, coordinates, TARGETS, np.eye(SIZE))
    np.testing.assert_allclose([one.coordinates for one in same], [one.coordinates for one in alone], rtol=1e-9)
    basis = complement(alone[1:2], np.asarray(subspace.singular_values))
    inside = split(solve(subspace.confined(jnp.asarray(basis)), coordinates[:1] @ basis, TARGETS[:1], Divisor(SIZE)))[0]
    confined = components(subspace, coordinates[:1], TARGETS[:1], basis)[0]
    np.testing.assert_allclose(confined.coordinates, basis @ inside.coordinates, rtol=1e-7)
    assert confined.freedom == alone[0].freedom + 1


@pytest.mark.parametrize("wrong", range(SIZE))
def test_a_wrong_one_is_told_by_the_others(wrong: int) -> None:
    subspace, coordinates, _, _ = draw(2)
    found = components(subspace, coordinates, TARGETS)
    kept, dropped = without_contradictions(subspace, found, Divisor(SIZE))
    assert len(kept) == SIZE
    assert not dropped
    found[wrong] = replace(found[wrong], dual=np.random.default_rng(3).standard_normal(SIZE))
    kept, dropped = without_contradictions(subspace, found, Divisor(SIZE))
    assert [id(one) for one in dropped] == [id(found[wrong])]
    assert len(kept) == SIZE - 1


def test_too_many_wrong_ones_are_left_as_they_are() -> None:
    subspace, coordinates, _, _ = draw(2)
    rng = np.random.default_rng(4)
    found = [replace(one, dual=rng.standard_normal(SIZE)) for one in components(subspace, coordinates, TARGETS)]
    kept, dropped = without_contradictions(subspace, found, Divisor(SIZE))
    assert [id(one) for one in kept] == [id(one) for one in found]
    assert not dropped


def test_the_best_choice_of_classes_is_taken() -> None:
    """Found with its second class only, an example is told with both; nothing else explains it as well."""
    subspace, coordinates, _, labels = draw(5, second=0.3)
    half = np.stack([TARGETS[:, 0] + 1, np.full(SIZE, -1)], axis=1)
    found = split(solve(subspace, coordinates, half, Divisor(SIZE), iterations=0))
    assert not any(map(is_plausible, found))
    sure, doubtful = unrivalled(subspace, found, np.array([np.eye(SIZE)] * SIZE), Divisor(SIZE))
    assert not doubtful
    assert len(sure) == SIZE
    for one, label in zip(sure, labels, strict=True):
        np.testing.assert_allclose(one.label, label, atol=1e-4)
    assert unrivalled(subspace, [], np.zeros((0, SIZE, SIZE)), Divisor(SIZE)) == ([], [])


def test_residuals_as_large_as_noise_explain() -> None:
    subspace, coordinates, _, _ = draw(6)
    found = components(subspace, coordinates, TARGETS)
    joint = fit_found(subspace, found, Divisor(SIZE))
    assert joint is not None
    assert explains(joint)
    assert explains(joint._replace(misfit=np.float64(1.4)))
    # Far more than noise; and next to nothing, where it is the noise that is expected which is too large.
    assert not explains(joint._replace(misfit=np.float64(3.5)))
    assert not explains(joint._replace(misfit=np.float64(1e-3)))
    # On its way: what it says of errors holds where it ends.
    assert joint.decrement < 1
    assert not explains(joint._replace(decrement=np.float64(30.0)))
    wrong = fit_found(subspace, [replace(found[0], targets=TARGETS[1]), *found[1:]], Divisor(SIZE))
    assert isinstance(wrong, JointFit)
    assert not explains(wrong)
