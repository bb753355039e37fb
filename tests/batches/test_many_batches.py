"""Many gradients of batches at once: what each by itself gives, whatever the others are."""

import jax
import numpy as np
import pytest

from softinv_jax import Verdict, observe
from softinv_jax.batches import lockstep
from softinv_jax.batches.batch_recovery import BatchRecovery, recover_batch
from softinv_jax.batches.many_batches import recover_batches
from softinv_jax.labels.assumptions import Assumption

CLASSES, FEATURES, SIZE = 40, 96, 4


def labels_of(rng: np.random.Generator, family: str) -> np.ndarray:
    first, second = rng.choice(CLASSES, 2, replace=False)
    share = rng.uniform(0.1, 0.9) if "mixup" in family else 1.0
    strength = rng.uniform(0.05, 0.5) if "smooth" in family else 0.0
    label = np.full(CLASSES, strength / CLASSES)
    label[first] += (1 - strength) * share
    label[second] += (1 - strength) * (1 - share)
    return label


def gradient_of(weight: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    powers = np.exp(features @ weight.T)
    prediction = powers / powers.sum(axis=1, keepdims=True)
    return ((prediction - labels).T @ features / len(labels)).astype(np.float32)


def draw(count: int, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One head, features (N, B, d), labels (N, B, C) of all formats, and gradients (N, C, d)."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES)).astype(np.float32)
    features = (1 / (1 + np.exp(-rng.standard_normal((count, size, FEATURES))))).astype(np.float32)
    families = ["hard", "smoothing", "mixup", "smoothed mixup"]
    labels = np.array([[labels_of(rng, families[k % 4]) for k in range(size)] for _ in range(count)])
    gradients = np.array([gradient_of(weight, *each) for each in zip(features, labels, strict=True)])
    return weight, features, labels, gradients


def assert_alike(first: BatchRecovery, second: BatchRecovery) -> None:
    """The same examples, in whatever order, within their deviations; and the same verdicts."""
    assert sorted(first.verdict) == sorted(second.verdict)
    assert (first.rank, first.refuted, first.loss) == (second.rank, second.refuted, second.loss)
    distance = np.abs(first.label[:, None] - second.label[None]).max(axis=2)
    for row, other in enumerate(np.nanargmin(distance, axis=1)):
        assert first.verdict[row] == second.verdict[other]
        within = 6 * (first.label_deviation[row] + second.label_deviation[other]) + 1e-7
        assert np.all(np.abs(first.label[row] - second.label[other]) <= within)
        np.testing.assert_allclose(first.feature[row], second.feature[other], atol=1e-3)
    np.testing.assert_allclose(first.joint_misfit, second.joint_misfit, rtol=0.05)


def test_as_one_by_one() -> None:
    weight, _, labels, gradients = draw(10, 0)
    reports: list[tuple[int, int]] = []
    found = recover_batches(observe(weight, gradients), SIZE, progress=lambda *report: reports.append(report))
    assert reports == [(done, 10) for done in range(1, 11)]
    for own, truth, gradient in zip(found, labels, gradients, strict=True):
        assert_alike(own, recover_batch(observe(weight, gradient), SIZE))
        error = np.abs(own.label[:, None] - truth[None]).max(axis=2).min(axis=0)
        assert np.all(own.verdict == Verdict.UNIQUE)
        assert error.max() < 1e-5


def test_head_with_a_bias_and_size_from_the_rank() -> None:
    weight, features, labels, _ = draw(3, 1)
    bias = np.random.default_rng(1).uniform(-0.5, 0.5, CLASSES).astype(np.float32)
    wide, constant = np.concatenate([weight, bias[:, None]], axis=1), np.ones((3, SIZE, 1), np.float32)
    full = np.concatenate([features, constant], axis=2)
    gradients = np.array([gradient_of(wide, *each) for each in zip(full, labels, strict=True)])
    found = recover_batches(observe(weight, gradients[..., :-1], bias, gradients[..., -1]), "auto")
    for own, gradient in zip(found, gradients, strict=True):
        assert_alike(own, recover_batch(observe(weight, gradient[:, :-1], bias, gradient[:, -1]), "auto"))
        assert np.all(own.verdict == Verdict.UNIQUE)


def test_bad_ones_do_not_spoil_the_others() -> None:
    weight, features, labels, gradients = draw(6, 2)
    gradients[1] = 0
    twice = [0, 0, 1, 2]
    gradients[2] = gradient_of(weight, features[2][twice], labels[2][twice])
    gradients[3] = gradient_of(weight, features[3][:3], labels[3][:3])
    dense = np.random.default_rng(2).dirichlet(np.ones(CLASSES), SIZE)
    gradients[4] = gradient_of(weight, features[4], dense)
    found = recover_batches(observe(weight, gradients), SIZE)
    assert np.all(found[1].verdict == Verdict.NO_SIGNAL)
    assert found[2].refuted & Assumption.DISTINCT_EXAMPLES
    assert found[3].refuted & Assumption.BATCH_SIZE
    assert not np.any(found[4].verdict == Verdict.UNIQUE)
    for index in (0, 5):
        assert_alike(found[index], recover_batch(observe(weight, gradients[index]), SIZE))
        assert np.all(found[index].verdict == Verdict.UNIQUE)


def test_no_more_programs_for_more_gradients() -> None:
    weight, _, _, gradients = draw(21, 3)
    programs = (lockstep._solve_piece, lockstep._propose, lockstep._accept, lockstep.fit_all)
    recover_batches(observe(weight, gradients[:2]), SIZE)
    before = [program._cache_size() for program in programs]
    found = recover_batches(observe(weight, gradients), SIZE)
    assert all(np.all(own.verdict == Verdict.UNIQUE) for own in found)
    after = [program._cache_size() for program in programs]
    # Those that are left after the first round start along fewer rays or as many; nothing else differs.
    assert np.all(np.subtract(after, before) <= [0, 2, 2, 0])
    recover_batches(observe(weight, gradients[::-1]), SIZE)
    assert [program._cache_size() for program in programs] == after


def test_configuration_stays_as_it_is() -> None:
    weight, _, _, gradients = draw(2, 4)
    found = recover_batches(observe(weight, gradients), SIZE)
    assert found[0].label.dtype == np.float32
    assert not jax.config.jax_enable_x64


def test_refuses_one_gradient() -> None:
    weight, _, _, gradients = draw(1, 5)
    with pytest.raises(ValueError, match="takes weight_gradient \\(N, C, d\\)"):
        recover_batches(observe(weight, gradients[0]), SIZE)
    with pytest.raises(ValueError, match="batch_size"):
        recover_batches(observe(weight, gradients), CLASSES)
