"""Whole batches, end to end: what is put in comes out, and nothing else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from softinv_jax import Verdict, observe, recover
from softinv_jax.batches import batch_recovery
from softinv_jax.batches.batch_recovery import recover_batch

CLASSES, FEATURES = 40, 96


class Batch(NamedTuple):
    weight: np.ndarray
    bias: np.ndarray | None
    features: np.ndarray
    labels: np.ndarray
    weight_gradient: np.ndarray
    bias_gradient: np.ndarray | None


def one_label(rng: np.random.Generator, family: str, classes: int) -> np.ndarray:
    first, second = rng.choice(classes, 2, replace=False)
    share = rng.uniform(0.1, 0.9) if "mixup" in family else 1.0
    strength = rng.uniform(0.05, 0.5) if "smooth" in family else 0.0
    label = np.full(classes, strength / classes)
    label[first] += (1 - strength) * share
    label[second] += (1 - strength) * (1 - share)
    return label


def draw_batch(
    families: list[str], seed: int, *, bias: bool = False, signed: bool = False, classes: int = CLASSES
) -> Batch:
    """Gradients by jax.grad of the mean loss over the batch, in float32, as a client computes them."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (classes, FEATURES)).astype(np.float32)
    offset = rng.uniform(-0.5, 0.5, classes).astype(np.float32) if bias else None
    features = rng.standard_normal((len(families), FEATURES)).astype(np.float32)
    if not signed:
        features = (1 / (1 + np.exp(-features))).astype(np.float32)
    labels = np.array([one_label(rng, family, classes) for family in families], np.float32)

    def loss(weight: jax.Array, offset: jax.Array) -> jax.Array:
        logits = features @ weight.T + offset[None, :]
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))

    start = jnp.zeros(classes) if offset is None else jnp.asarray(offset)
    gradient = jax.grad(loss, argnums=(0, 1))(jnp.asarray(weight), start)
    bias_gradient = np.asarray(gradient[1]) if bias else None
    return Batch(weight, offset, features, labels, np.asarray(gradient[0]), bias_gradient)


def recovered(batch: Batch, size: int | str, **options: object) -> batch_recovery.BatchRecovery:
    observation = observe(batch.weight, batch.weight_gradient, batch.bias, batch.bias_gradient)
    return recover_batch(observation, size, **options)  # type: ignore[arg-type]


def matched(found: batch_recovery.BatchRecovery, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Largest label error and relative feature error of every example, matched by assignment."""
    cost = np.abs(found.label[:, None, :] - batch.labels[None, :, :]).max(axis=2)
    rows, columns = linear_sum_assignment(np.nan_to_num(cost, nan=9.0))
    feature = np.linalg.norm(found.feature[rows] - batch.features[columns], axis=1)
    return cost[rows, columns], feature / np.linalg.norm(batch.features[columns], axis=1)


# One size wherever it does not matter, so that compiled programs are shared.
MIXED = ["hard", "smoothing", "mixup", "smoothed mixup"]


@pytest.mark.parametrize("seed", range(3))
def test_mixed_formats_none_told(seed: int) -> None:
    batch = draw_batch(MIXED, seed)
    found = recovered(batch, len(MIXED))
    label_error, feature_error = matched(found, batch)
    assert found.verdict.tolist() == [Verdict.UNIQUE] * len(MIXED)
    assert label_error.max() < 1e-5
    assert feature_error.max() < 1e-3
    assert found.joint_misfit < 3
    assert found.residual < 1e-5


def test_nearly_as_many_unknowns_as_one_equation_tells() -> None:
    """23 equations of 16 unknowns and a weight or two each: those found make the others easier."""
    batch = draw_batch(MIXED * 4, 3)
    found = recovered(batch, len(batch.labels))
    assert np.all(found.verdict == Verdict.UNIQUE)
    error, feature = matched(found, batch)
    assert error.max() < 1e-4
    assert feature.max() < 1e-3
    assert 0.1 < found.joint_misfit < 1.5


def test_signed_features() -> None:
    batch = draw_batch(MIXED, 3, signed=True)
    found = recovered(batch, len(MIXED))
    assert matched(found, batch)[0].max() < 1e-5


def test_head_with_a_bias() -> None:
    batch = draw_batch(MIXED, 4, bias=True)
    found = recovered(batch, len(MIXED))
    label_error, feature_error = matched(found, batch)
    assert found.verdict.tolist() == [Verdict.UNIQUE] * len(MIXED)
    assert label_error.max() < 1e-5
    assert feature_error.max() < 1e-3


def test_size_from_the_rank() -> None:
    batch = draw_batch(MIXED, 5)
    found = recovered(batch, "auto")
    assert found.rank == len(found.verdict) == 4
    assert matched(found, batch)[0].max() < 1e-5


def test_sum_in_place_of_mean() -> None:
    batch = draw_batch(MIXED, 6)
    summed = batch._replace(weight_gradient=4 * batch.weight_gradient)
    assert matched(recovered(summed, 4, reduction="sum"), batch)[0].max() < 1e-5


@pytest.mark.parametrize("factor", [0.003, -40.0])
@pytest.mark.parametrize("bias", [False, True])
def test_unknown_scale(factor: float, bias: bool) -> None:
    batch = draw_batch(MIXED, 12, bias=bias)
    given = {"weight_gradient": batch.weight_gradient * np.float32(factor)}
    if batch.bias_gradient is not None:
        given["bias_gradient"] = batch.bias_gradient * np.float32(factor)
    found = recovered(batch._replace(**given), 4, unknown_scale=True)
    label_error, feature_error = matched(found, batch)
    assert found.verdict.tolist() == [Verdict.UNIQUE] * 4
    assert label_error.max() < 1e-5
    assert feature_error.max() < 1e-3
    assert found.joint_misfit < 2
    assert abs(found.scale - factor) < 1e-5 * abs(factor) + 6 * found.scale_deviation


def test_unknown_scale_with_as_many_equations_as_unknowns() -> None:
    """Nothing, or what is right; and where labels are dense, nothing."""
    batch = draw_batch(["hard", "smoothing", "mixup"], 13, classes=10)
    found = recovered(batch, 3, unknown_scale=True)
    told = np.isfinite(found.label).all(axis=1)
    assert np.all(matched(found, batch)[0][told] < 1e-4)
    assert not told.any() or abs(found.scale - 1) < 1e-4
    dense = np.random.default_rng(0).dirichlet(np.ones(10), 3)
    prediction = np.asarray(jax.nn.softmax(batch.features @ batch.weight.T, axis=1))
    gradient = ((prediction - dense).T @ batch.features / 3).astype(np.float32)
    nothing = recovered(batch._replace(weight_gradient=gradient), 3, unknown_scale=True)
    assert nothing.verdict.tolist() == [Verdict.NOT_FOUND] * 3
    assert np.isnan(nothing.scale)
    assert np.all(np.isnan(nothing.label))


def test_repeated_classes() -> None:
    batch = draw_batch(["smoothing"] * 4, 7)
    labels = batch.labels.copy()
    labels[1] = labels[0][np.r_[:CLASSES]]
    strengths = (0.1, 0.4)
    for row, strength in enumerate(strengths):
        labels[row] = strength / CLASSES
        labels[row, 5] += 1 - strength
    prediction = np.asarray(jax.nn.softmax(batch.features @ batch.weight.T, axis=1))
    gradient = ((prediction - labels).T @ batch.features / 4).astype(np.float32)
    repeated = batch._replace(labels=labels, weight_gradient=gradient)
    found = recovered(repeated, 4)
    assert matched(found, repeated)[0].max() < 1e-5


def test_one_example_as_recover_finds_it() -> None:
    batch = draw_batch(["smoothed mixup"], 8, classes=10)
    single = recover(observe(batch.weight, batch.weight_gradient))
    found = recovered(batch, 1)
    np.testing.assert_allclose(found.label[0], single.label, atol=2e-6)
    np.testing.assert_allclose(found.feature[0], single.feature, rtol=1e-4)


@pytest.mark.parametrize(("families", "seed"), [(["mixup"] * 4, 2), (MIXED, 9)])
def test_few_classes(families: list[str], seed: int) -> None:
    """One equation has as many unknowns as classes that tell them; in the first batch, not all solutions are found."""
    batch = draw_batch(families, seed, classes=10)
    found = recovered(batch, 4)
    assert found.verdict.tolist() == [Verdict.UNIQUE] * 4
    assert np.all(matched(found, batch)[0] < 1e-5)


@pytest.mark.parametrize(("seed", "size"), [(0, 4), (1, 4), (2, 4), (3, 1)])
def test_dense_labels_are_never_invented(seed: int, size: int) -> None:
    classes = CLASSES if size > 1 else 10
    batch = draw_batch(["hard"] * size, seed, classes=classes)
    rng = np.random.default_rng(seed)
    labels = rng.dirichlet(np.ones(classes), size)
    prediction = np.asarray(jax.nn.softmax(batch.features @ batch.weight.T, axis=1))
    gradient = ((prediction - labels).T @ batch.features / size).astype(np.float32)
    found = recovered(batch._replace(weight_gradient=gradient), "auto")
    assert found.verdict.tolist() == [Verdict.NOT_FOUND] * size
    assert np.all(np.isnan(found.label))
    assert np.all(np.isnan(found.feature))


def test_noise_is_no_batch() -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES)).astype(np.float32)
    gradient = rng.standard_normal((CLASSES, FEATURES)).astype(np.float32)
    found = recover_batch(observe(weight, gradient), 4)
    assert not np.any(found.verdict == Verdict.UNIQUE)
    assert np.all(np.isnan(found.label))


def test_two_equal_examples_are_found_once_or_not_at_all() -> None:
    batch = draw_batch(MIXED, 10)
    features = np.concatenate([batch.features, batch.features[:1]])
    labels = np.concatenate([batch.labels, batch.labels[:1]])
    prediction = np.asarray(jax.nn.softmax(features @ batch.weight.T, axis=1))
    gradient = ((prediction - labels).T @ features / 5).astype(np.float32)
    found = recovered(batch._replace(weight_gradient=gradient), 5)
    assert found.rank == 4
    told = np.isfinite(found.label).all(axis=1)
    assert told.sum() >= 3
    error = np.abs(found.label[told][:, None, :] - batch.labels[None]).max(axis=2).min(axis=1)
    assert error.max() < 1e-5
    assert set(found.verdict[~told]) == {Verdict.NOT_FOUND}


def test_zero_gradient() -> None:
    batch = draw_batch(["hard"], 0)
    found = recovered(batch._replace(weight_gradient=np.zeros_like(batch.weight_gradient)), 3)
    assert found.verdict.tolist() == [Verdict.NO_SIGNAL] * 3
    assert np.all(np.isnan(found.label))
    unscaled = recovered(batch._replace(weight_gradient=np.zeros_like(batch.weight_gradient)), 3, unknown_scale=True)
    assert unscaled.verdict.tolist() == [Verdict.NO_SIGNAL] * 3


@pytest.mark.parametrize("size", [0, -1, 1.5, "many", True, CLASSES, FEATURES + 1])
def test_impossible_batch_sizes(size: object) -> None:
    batch = draw_batch(["hard"], 0)
    with pytest.raises(ValueError, match="batch_size"):
        recovered(batch, size)  # type: ignore[arg-type]


def test_bad_arrays() -> None:
    batch = draw_batch(["hard"], 0)
    broken = batch.weight_gradient.copy()
    broken[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"weight_gradient holds 1 entries .*\(2, 3\)"):
        recovered(batch._replace(weight_gradient=broken), 1)
    with pytest.raises(ValueError, match="takes one gradient"):
        recovered(batch._replace(weight_gradient=batch.weight_gradient[None]), 1)
    with pytest.raises(ValueError, match="reduction"):
        recovered(batch, 1, reduction="median")


def test_configuration_and_progress() -> None:
    batch = draw_batch(MIXED, 11)
    seen: list[tuple[int, int]] = []
    recovered(batch, 4, progress=lambda found, total: seen.append((found, total)))
    assert seen[-1] == (4, 4)
    assert not jax.config.jax_enable_x64
