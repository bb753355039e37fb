"""Additive noise: errors at the Cramer-Rao bound, and that bound against finite differences."""

from collections.abc import Callable

import numpy as np
import pytest

from softinv_jax.measures.cramer_rao import label_bound

SAMPLES = 30


def targets_of(label: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.abs(label - np.median(label)) > 1e-9)


def noisy(sample: object, relative: float, seed: int) -> tuple[object, float]:
    """The gradient plus Gaussian noise of a share of its largest entry, rounded once more."""
    deviation = relative * np.abs(sample.gradient).max()
    noise = np.random.default_rng(1000 + seed).normal(size=sample.gradient.shape)
    sample.gradient[:] = sample.gradient.astype(np.float64) + deviation * noise
    return sample, deviation


@pytest.mark.parametrize("relative", [1e-4, 1e-3])
@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup", "smoothed_mixup"])
def test_error_is_at_most_half_above_the_bound(
    draw: Callable, recover_one: Callable, family: str, relative: float
) -> None:
    square, bound, feature_errors, recovered = 0.0, 0.0, [], 0
    for seed in range(SAMPLES):
        sample, deviation = noisy(draw(family, seed), relative, seed)
        found = recover_one(sample)
        assert not found.evidence.is_noiseless
        if found.verdict_name not in ("unique", "ambiguous"):
            continue
        recovered += 1
        targets = targets_of(sample.label)
        bound += np.trace(label_bound(sample.weight, sample.feature, sample.label, targets, deviation))
        square += ((found.label - sample.label) ** 2).sum()
        feature_errors.append(np.linalg.norm(found.feature - sample.feature) / np.linalg.norm(sample.feature))
    assert recovered >= SAMPLES - 3
    assert np.sqrt(square / bound) < 1.5
    # One entry's noise is spread over 32 features and ten rows.
    assert np.median(feature_errors) < 10 * relative
    assert np.max(feature_errors) < 50 * relative


@pytest.mark.parametrize("family", ["smoothing", "smoothed_mixup"])
def test_the_deviations_it_reports_are_those_of_its_errors(draw: Callable, recover_one: Callable, family: str) -> None:
    ratios = []
    for seed in range(SAMPLES):
        sample, _ = noisy(draw(family, seed), 1e-4, seed)
        found = recover_one(sample)
        target = sample.label.argmax()
        ratios.append((found.label - sample.label)[target] / found.evidence.label_deviation[target])
    assert 0.5 < np.sqrt(np.mean(np.square(ratios))) < 1.6


@pytest.mark.parametrize("unknown_scale", [False, True])
@pytest.mark.parametrize("family", ["hard", "mixup", "dirichlet", "teacher"])
def test_unique_under_noise_is_right(draw: Callable, recover_one: Callable, family: str, unknown_scale: bool) -> None:
    for relative in (1e-5, 1e-3, 1e-2, 0.1):
        for seed in range(15):
            sample, _ = noisy(draw(family, seed), relative, seed)
            found = recover_one(sample, unknown_scale=unknown_scale)
            if found.verdict_name == "unique":
                assert family in ("hard", "mixup")
                error = np.abs(found.label - sample.label).max()
                assert error < 1e-6 + 10 * found.evidence.label_deviation.max()


@pytest.mark.parametrize("unknown_scale", [False, True])
@pytest.mark.parametrize("family", ["hard", "mixup"])
def test_the_difference_of_two_models_is_read_as_a_gradient(
    draw: Callable, recover_one: Callable, family: str, unknown_scale: bool
) -> None:
    """W_after - W_before carries the rounding of the weights; the learning rate is known or not."""
    for seed in range(10):
        sample = draw(family, seed)
        rate = np.float32(0.01)
        moved = (sample.weight - rate * sample.gradient) - sample.weight
        sample.gradient[:] = moved if unknown_scale else -moved / rate
        found = recover_one(sample, unknown_scale=unknown_scale)
        assert found.verdict_name == "unique"
        assert np.abs(found.label - sample.label).max() < 1e-4
        if unknown_scale:
            np.testing.assert_allclose(found.scale, -0.01, rtol=1e-2)


@pytest.mark.parametrize("targets", [[0], [0, 3], [1, 2, 4]])
def test_the_bound_is_the_inverse_of_the_numerical_fisher_information(targets: list[int]) -> None:
    rng = np.random.default_rng(0)
    weight, feature, noise = rng.normal(size=(6, 4)), rng.uniform(size=4), 1e-3
    weights = rng.dirichlet(np.ones(len(targets))) * 0.8
    by_target = np.eye(6)[:, targets] - 1 / 6

    def gradient(parameters: np.ndarray) -> np.ndarray:
        x, shares = parameters[:4], parameters[4:]
        powers = np.exp(weight @ x)
        return np.outer(powers / powers.sum() - 1 / 6 - by_target @ shares, x).ravel()

    point, step = np.append(feature, weights), 1e-5
    shifts = step * np.eye(point.size)
    jacobian = np.stack([(gradient(point + s) - gradient(point - s)) / (2 * step) for s in shifts], axis=1)
    covariance = noise**2 * np.linalg.inv(jacobian.T @ jacobian)[4:, 4:]
    bound = label_bound(weight, feature, 1 / 6 + by_target @ weights, targets, noise)
    np.testing.assert_allclose(bound, by_target @ covariance @ by_target.T, rtol=1e-6, atol=1e-14)


def test_the_bound_rises_with_the_square_of_the_noise_and_with_what_is_unknown() -> None:
    rng = np.random.default_rng(0)
    weight, feature, label = rng.normal(size=(6, 4)), rng.uniform(size=4), np.eye(6)[0] * 0.7 + 0.05
    one, two = (label_bound(weight, feature, label, [0], noise) for noise in (1e-3, 2e-3))
    np.testing.assert_allclose(two, 4 * one, rtol=1e-12)
    more = label_bound(weight, feature, label, [0, 1], 1e-3)
    assert np.linalg.eigvalsh(more - one).min() > -1e-12 * np.abs(more).max()
