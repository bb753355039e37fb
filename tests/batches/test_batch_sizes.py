"""Batches that are not what was told: another size, one image twice, a factor on each example, no softmax at all."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from softinv_jax import Verdict, observe
from softinv_jax.batches.batch_recovery import recover_batch
from softinv_jax.batches.candidates import cliques, overlaps
from softinv_jax.batches.factor_search import whole_multiples
from softinv_jax.labels.assumptions import Assumption, Loss
from tests.batches.test_batch_recovery import CLASSES, MIXED, Batch, draw_batch, matched, recovered

CASES = Path(os.environ.get("SOFTINV_CASES_DIR", "no such folder"))


def with_gradient(batch: Batch, factors: np.ndarray | None = None) -> Batch:
    """The mean gradient by NumPy in float64, rounded once; each example times its factor, if any."""
    logits = batch.features.astype(np.float64) @ batch.weight.T + (0 if batch.bias is None else batch.bias)
    prediction = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = prediction / prediction.sum(axis=1, keepdims=True) - batch.labels
    error = error * (1 if factors is None else factors[:, None]) / len(batch.labels)
    bias_gradient = None if batch.bias is None else error.sum(axis=0).astype(np.float32)
    return batch._replace(weight_gradient=(error.T @ batch.features).astype(np.float32), bias_gradient=bias_gradient)


@pytest.mark.parametrize("told", [3, 6])
def test_another_size_than_was_told(told: int) -> None:
    """The rank shows four, and four explain the gradient with the divisor that goes with them."""
    batch = draw_batch(MIXED, 20)
    found = recovered(batch, told)
    assert found.rank == 4
    assert found.refuted == Assumption.BATCH_SIZE
    assert found.verdict.tolist() == [Verdict.UNIQUE] * 4
    assert matched(found, batch)[0].max() < 1e-5


def test_twelve_told_of_eight() -> None:
    batch = draw_batch(MIXED * 2, 21)
    found = recovered(batch, 12)
    assert found.rank == 8
    assert found.refuted == Assumption.BATCH_SIZE
    assert found.verdict.tolist() == [Verdict.UNIQUE] * 8
    assert matched(found, batch)[0].max() < 1e-5


def test_nothing_is_refuted_where_all_is_as_told() -> None:
    batch = draw_batch(MIXED, 22)
    for size in (4, "auto"):
        found = recovered(batch, size)
        assert found.refuted == 0
        assert found.loss == Loss.CROSS_ENTROPY
        np.testing.assert_array_equal(found.factor, 1)


def twice(seed: int, *, other_class: int | None) -> tuple[Batch, np.ndarray]:
    """Three hard examples, the first there twice, once with another class; and the three distinct ones' labels."""
    batch = draw_batch(["hard"] * 3, seed, bias=True)
    again = batch.labels[:1] if other_class is None else np.eye(CLASSES, dtype=np.float32)[[other_class]]
    features, labels = np.concatenate([batch.features, batch.features[:1]]), np.concatenate([batch.labels, again])
    distinct = np.concatenate([(batch.labels[:1] + again) / 2, batch.labels[1:]])
    return with_gradient(batch._replace(features=features, labels=labels)), distinct


@pytest.mark.parametrize("other_class", [None, 7])
def test_one_image_twice(other_class: int | None) -> None:
    """All others are found, and the double one with the mean of its labels and twice the share."""
    batch, distinct = twice(23, other_class=other_class)
    found = recovered(batch, 4)
    assert found.rank == 3
    assert found.refuted & Assumption.DISTINCT_EXAMPLES
    told = np.flatnonzero(np.isfinite(found.label).all(axis=1))
    error = np.abs(found.label[told, None] - distinct[None]).max(axis=2)
    assert sorted(error.argmin(axis=1)) == [0, 1, 2]
    assert error.min(axis=1).max() < 1e-4
    double = told[np.argmin(error[:, 0])]
    single = [row for row in told if row != double]
    np.testing.assert_allclose(found.factor[double], 2, rtol=1e-3)
    np.testing.assert_allclose(found.factor[single], 1, rtol=1e-3)


def test_a_factor_for_each_example() -> None:
    """Class weights: hard labels are unique, with the factor of each."""
    factors = np.array([0.6, 1.1, 1.7])
    batch = with_gradient(draw_batch(["hard"] * 3, 24, bias=True), factors)
    found = recovered(batch, 3)
    assert found.loss == Loss.WEIGHTED_CROSS_ENTROPY
    assert found.verdict.tolist() == [Verdict.UNIQUE] * 3
    assert found.refuted == Assumption.SCALE
    # By feature: two examples may have one class.
    own = np.linalg.norm(found.feature[:, None] - batch.features[None], axis=2).argmin(axis=1)
    assert sorted(own) == [0, 1, 2]
    np.testing.assert_allclose(found.label, batch.labels[own], atol=1e-4)
    np.testing.assert_allclose(found.factor, factors[own], rtol=1e-3)


def test_plain_cross_entropy_told_gives_no_factors() -> None:
    batch = with_gradient(draw_batch(["hard"] * 3, 24, bias=True), np.array([0.6, 1.1, 1.7]))
    found = recovered(batch, 3, loss="cross_entropy")
    assert found.loss == Loss.CROSS_ENTROPY
    assert not np.any(found.verdict == Verdict.UNIQUE)
    with pytest.raises(ValueError, match="loss of a batch must be one of"):
        recovered(batch, 3, loss="hinge")


@pytest.mark.parametrize("bias", [False, True])
def test_sigmoids_are_no_softmax(bias: bool) -> None:
    """Binary cross-entropy: the rows do not add up to zero, and nothing is told."""
    batch = draw_batch(["hard"] * 3, 25, bias=bias)
    offset = 0 if batch.bias is None else batch.bias
    error = (np.asarray(jax.nn.sigmoid(batch.features @ batch.weight.T + offset)) - batch.labels) / CLASSES / 3
    given = batch._replace(weight_gradient=(error.T @ batch.features).astype(np.float32))
    if bias:
        given = given._replace(bias_gradient=error.sum(axis=0).astype(np.float32))
    found = recovered(given, 3)
    assert found.refuted & Assumption.SOFTMAX
    assert found.verdict.tolist() == [Verdict.REFUTED] * 3
    assert np.all(np.isnan(found.label))


def test_a_row_that_was_dropped() -> None:
    batch = draw_batch(MIXED, 26)
    pruned = batch.weight_gradient.copy()
    pruned[np.argmax(np.linalg.norm(pruned, axis=1))] = 0
    found = recovered(batch._replace(weight_gradient=pruned), 4)
    assert found.refuted & Assumption.ALL_ENTRIES
    assert not np.any(found.verdict >= Verdict.AMBIGUOUS)


@pytest.mark.parametrize(
    ("divisors", "deviation", "size", "expected"),
    [
        ([2.0, 4.0, 4.0], 1e-6, 4, [2, 1, 1]),
        ([4.0, 4.0, 4.0], 1e-6, 4, None),  # They add up to 3.
        ([2.7, 3.1, 4.0], 1e-6, 4, None),
        ([2.0, 4.0, -4.0], 1e-6, 4, None),
        ([2.01, 4.0, 4.0], 1e-6, 4, None),  # Far off by its own deviation.
    ],
)
def test_whole_multiples(divisors: list[float], deviation: float, size: int, expected: list[int] | None) -> None:
    found = whole_multiples(np.array(divisors), np.full(len(divisors), deviation), size)
    assert (None if found is None else found.tolist()) == expected


def test_no_plausible_solution_gives_no_sets() -> None:
    joined = overlaps([], np.ones(2)) > 0
    assert joined.shape == (0, 0)
    assert list(cliques(joined, 2)) == []


@pytest.mark.skipif(not CASES.is_dir(), reason="SOFTINV_CASES_DIR names no folder with heads of PyTorch updates")
@pytest.mark.parametrize("name", ["batch4", "batch4_norm", "weighted4"])
def test_batches_of_pytorch(name: str) -> None:
    """All four of an untrained PyTorch network's batch, told B = 4: classes, and weights where there are some."""
    case = np.load(CASES / f"{name}.npz")
    given = observe(case["weight"], case["weight_gradient"], case["bias"], case["bias_gradient"])
    found = recover_batch(given, 4)
    assert np.isfinite(found.label).all()
    assert sorted(found.label.argmax(axis=1)) == sorted(case["true_classes"].ravel())
    if name == "weighted4":
        assert found.loss == Loss.WEIGHTED_CROSS_ENTROPY
        np.testing.assert_allclose(found.factor, np.linspace(0.5, 2, 10)[found.label.argmax(axis=1)], rtol=0.05)
