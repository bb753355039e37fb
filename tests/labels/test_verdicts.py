"""Honest verdicts: nothing is called unique that is wrong, and what cannot be known is said to be so."""

from collections.abc import Callable

import numpy as np
import pytest

from softinv_jax import Recovery, verdict_names

OPTIONS = [(scale, thorough) for scale in (False, True) for thorough in (False, True)]
every_search = pytest.mark.parametrize(("unknown_scale", "thorough"), OPTIONS)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def lists_the_truth(found: Recovery, label: np.ndarray) -> bool:
    return bool(np.nanmin(np.abs(found.candidates.label - label).max(axis=1)) < 1e-4)


def test_verdict_names_are_lower_case() -> None:
    names = ["refuted", "not_found", "no_signal", "unidentifiable", "ambiguous", "conditional", "unique"]
    assert verdict_names(np.arange(-2, 5)).tolist() == names
    assert verdict_names(2) == "ambiguous"


@every_search
@pytest.mark.parametrize("family", ["dirichlet", "teacher"])
def test_dense_labels_are_unidentifiable(
    draw: Callable, recover_one: Callable, assert_honest: Callable, family: str, unknown_scale: bool, thorough: bool
) -> None:
    for seed in range(15):
        sample = draw(family, seed, kind=("sigmoid", "signed")[seed % 2])
        found = recover_one(sample, unknown_scale=unknown_scale, thorough=thorough)
        assert found.verdict_name == "unidentifiable"
        assert_honest(found, sample.label)


def test_dense_labels_with_a_bias_and_unknown_scale_are_not_unique(draw: Callable, recover_one: Callable) -> None:
    for seed in range(15):
        sample = draw("dirichlet", seed, has_bias=True, factor=-0.1)
        assert recover_one(sample, unknown_scale=True).verdict_name != "unique"


def feasible_hull(sample: object, orientation: float) -> tuple[float, float]:
    """Smallest and largest lambda on a fine grid for which y(lambda) is a valid label."""
    left, values, right = np.linalg.svd(sample.gradient.astype(np.float64))
    direction = orientation * (sample.weight.astype(np.float64) @ right[0])
    span = np.geomspace(1e-3, 1e3, 20_000) / np.ptp(direction)
    scalars = np.concatenate([-span[::-1], span])[:, None]
    label = softmax(scalars * direction) - orientation * values[0] * left[:, 0] / scalars
    valid = scalars[:, 0][(label.min(axis=1) >= -1e-7) & (label.max(axis=1) <= 1 + 1e-7)]
    return valid.min(), valid.max()


def test_interval_of_a_dense_label_is_the_feasible_hull_and_holds_the_truth(
    draw: Callable, recover_one: Callable
) -> None:
    for seed in range(15):
        sample = draw("teacher", seed)
        low, high = recover_one(sample).interval
        norm = np.linalg.norm(sample.feature)
        assert low <= norm <= high or low <= -norm <= high
        hulls = [feasible_hull(sample, orientation) for orientation in (1.0, -1.0)]
        # The direction's sign is a convention; ends beyond the grid are reported as infinite.
        matches = [
            all(
                np.isinf(end) or abs(end - edge) < 2e-3 * abs(edge) for end, edge in zip((low, high), hull, strict=True)
            )
            for hull in hulls
        ]
        assert any(matches), (low, high, hulls)


def test_interval_of_an_unknown_scale_is_the_whole_line(draw: Callable, recover_one: Callable) -> None:
    assert recover_one(draw("dirichlet", 0), unknown_scale=True).interval.tolist() == [-np.inf, np.inf]


def test_interval_is_given_only_where_nothing_else_is(draw: Callable, recover_one: Callable) -> None:
    assert np.isnan(recover_one(draw("hard", 0)).interval).all()


@every_search
def test_a_zero_gradient_has_no_signal(
    draw: Callable, recover_one: Callable, assert_honest: Callable, unknown_scale: bool, thorough: bool
) -> None:
    sample = draw("hard", 0, factor=0.0)
    found = recover_one(sample, unknown_scale=unknown_scale, thorough=thorough)
    assert found.verdict_name == "no_signal"
    assert_honest(found, sample.label)


def test_a_zero_gradient_with_a_bias_has_no_signal(draw: Callable, recover_one: Callable) -> None:
    sample = draw("hard", 0, has_bias=True, factor=0.0)
    assert recover_one(sample, unknown_scale=False).verdict_name == "no_signal"


@every_search
def test_pure_noise_is_no_signal(draw: Callable, recover_one: Callable, unknown_scale: bool, thorough: bool) -> None:
    verdicts = []
    for seed in range(30):
        sample = draw("hard", seed)
        sample.gradient[:] = np.random.default_rng(seed).normal(size=sample.gradient.shape)
        verdicts.append(str(recover_one(sample, unknown_scale=unknown_scale, thorough=thorough).verdict_name))
    assert set(verdicts) <= {"no_signal", "unidentifiable"}
    assert verdicts.count("no_signal") >= 20


@every_search
def test_a_random_outer_product_is_not_unique(
    draw: Callable, recover_one: Callable, unknown_scale: bool, thorough: bool
) -> None:
    for seed in range(20):
        sample = draw("hard", seed)
        rng = np.random.default_rng(seed)
        error = rng.normal(size=10)
        sample.gradient[:] = np.outer(error - error.mean(), rng.normal(size=32))
        found = recover_one(sample, unknown_scale=unknown_scale, thorough=thorough)
        assert found.verdict_name != "unique"


@pytest.mark.parametrize("number_of_classes", [3, 4])
@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup"])
def test_three_or_four_classes_are_right_or_honest(
    draw: Callable, recover_one: Callable, assert_honest: Callable, family: str, number_of_classes: int
) -> None:
    for seed in range(15):
        sample = draw(family, seed, number_of_classes=number_of_classes)
        found = recover_one(sample)
        assert found.verdict_name != "no_signal"
        assert_honest(found, sample.label)
        if found.verdict_name == "ambiguous":
            assert lists_the_truth(found, sample.label)


# Of a mixup with four classes one lambda alone is feasible: two zeros of its label hold it from both sides.
@pytest.mark.parametrize(("family", "number_of_classes"), [("hard", 3), ("smoothing", 3), ("mixup", 3), ("mixup", 4)])
def test_interval_of_few_classes_holds_the_truth(
    draw: Callable, recover_one: Callable, family: str, number_of_classes: int
) -> None:
    for seed in range(15):
        sample = draw(family, seed, number_of_classes=number_of_classes)
        found = recover_one(sample)
        low, high = found.interval
        # To the float32 rounding of the result: the truth is often the end itself.
        norm = np.linalg.norm(sample.feature) * np.array([1 - 1e-5, 1 + 1e-5])
        assert found.verdict_name == "unidentifiable"
        assert (low <= norm[1] and norm[0] <= high) or (low <= -norm[0] and -norm[1] <= high)


def test_five_classes_leave_mixup_ambiguous_with_the_truth_among_the_candidates(
    draw: Callable, recover_one: Callable
) -> None:
    for seed in range(15):
        sample = draw("mixup", seed, number_of_classes=5)
        found = recover_one(sample)
        assert found.verdict_name == "ambiguous"
        assert lists_the_truth(found, sample.label)
