"""Inputs meant to mislead: equal rows, fitted samples, extreme sizes, two samples in one. Never unique and wrong."""

from collections.abc import Callable

import numpy as np
import pytest

OPTIONS = [(scale, thorough) for scale in (False, True) for thorough in (False, True)]
every_search = pytest.mark.parametrize(("unknown_scale", "thorough"), OPTIONS)


EQUAL_ROWS = {
    "two": [0, 0, 2, 3, 4, 5, 6, 7, 8, 9],
    "pairs": [0, 0, 2, 2, 4, 4, 6, 6, 8, 8],
    "half": [0, 0, 0, 0, 0, 5, 6, 7, 8, 9],
    "all but two": [0, 1, 2, 2, 2, 2, 2, 2, 2, 2],
    "all": [0] * 10,
}


@every_search
@pytest.mark.parametrize("equal", EQUAL_ROWS)
@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup", "dirichlet"])
def test_equal_rows_of_the_weight(
    draw: Callable,
    client: Callable,
    recover_one: Callable,
    assert_honest: Callable,
    family: str,
    equal: str,
    unknown_scale: bool,
    thorough: bool,
) -> None:
    for seed in range(25):
        drawn = draw(family, seed)
        sample = client(drawn.weight[EQUAL_ROWS[equal]], drawn.feature, drawn.label)
        found = recover_one(sample, unknown_scale=unknown_scale, thorough=thorough)
        assert_honest(found, sample.label)
        if equal == "all":
            assert found.verdict_name == "unidentifiable"
        if equal == "two" and family != "dirichlet":
            assert found.verdict_name == "unique"


@every_search
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-5])
def test_rows_of_the_weight_that_hardly_differ(
    draw: Callable,
    client: Callable,
    recover_one: Callable,
    assert_honest: Callable,
    spread: float,
    unknown_scale: bool,
    thorough: bool,
) -> None:
    for seed in range(15):
        drawn = draw("smoothing", seed)
        weight = drawn.weight[:1] + spread * np.random.default_rng(seed).normal(size=drawn.weight.shape)
        sample = client(weight.astype(np.float32), drawn.feature, drawn.label)
        assert_honest(recover_one(sample, unknown_scale=unknown_scale, thorough=thorough), sample.label)


def fitted(drawn: object, client: Callable, doubt: float) -> object:
    """The sample after the head was fitted to it: its target's probability is 1 - doubt."""
    weight = drawn.weight.astype(np.float64)
    target, logits = drawn.label.argmax(), weight @ drawn.feature
    rest = np.log(np.exp(np.delete(logits, target)).sum())
    wanted = rest + np.log((1 - doubt) / doubt)
    weight[target] += (wanted - logits[target]) * drawn.feature / (drawn.feature @ drawn.feature)
    return client(weight.astype(np.float32), drawn.feature, drawn.label)


@every_search
@pytest.mark.parametrize("doubt", [1e-3, 1e-6, 1e-9, 1e-20, 1e-42])
@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup"])
def test_a_sample_fitted_to_machine_precision(
    draw: Callable,
    client: Callable,
    recover_one: Callable,
    assert_honest: Callable,
    family: str,
    doubt: float,
    unknown_scale: bool,
    thorough: bool,
) -> None:
    for seed in range(15):
        sample = fitted(draw(family, seed), client, doubt)
        found = recover_one(sample, unknown_scale=unknown_scale, thorough=thorough)
        assert_honest(found, sample.label)
        if family == "hard" and doubt >= 1e-20:
            assert found.verdict_name == "unique"


def test_a_confident_smoothed_sample_does_not_tell_its_scalar(
    draw: Callable, client: Callable, recover_one: Callable
) -> None:
    for seed in range(10):
        sample = fitted(draw("smoothing", seed), client, 1e-20)
        assert recover_one(sample).verdict_name == "unidentifiable"


@every_search
@pytest.mark.parametrize("size", [1e-6, 1e-3, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("family", ["hard", "smoothing", "smoothed_mixup"])
def test_features_of_any_size(
    draw: Callable,
    client: Callable,
    recover_one: Callable,
    assert_honest: Callable,
    family: str,
    size: float,
    unknown_scale: bool,
    thorough: bool,
) -> None:
    for seed in range(15):
        drawn = draw(family, seed, kind="signed")
        sample = client(drawn.weight, size * drawn.feature, drawn.label)
        assert_honest(recover_one(sample, unknown_scale=unknown_scale, thorough=thorough), sample.label)


@every_search
@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup"])
def test_the_average_gradient_of_two_samples_is_not_taken_for_one(
    draw: Callable,
    client: Callable,
    recover_one: Callable,
    assert_honest: Callable,
    family: str,
    unknown_scale: bool,
    thorough: bool,
) -> None:
    for seed in range(15):
        first, other = draw(family, seed), draw(family, seed + 100)
        second = client(first.weight, other.feature, other.label)
        first.gradient[:] = (first.gradient + second.gradient) / 2
        found = recover_one(first, unknown_scale=unknown_scale, thorough=thorough)
        assert not found.evidence.is_noiseless
        # Two samples of one class and much the same feature may pass for one with their mean label.
        assert_honest(found, (first.label + second.label) / 2)


@every_search
@pytest.mark.parametrize("family", ["uniform", "one_zero"])
def test_uniform_labels_and_labels_with_one_zero_are_right(
    draw: Callable, recover_one: Callable, assert_honest: Callable, family: str, unknown_scale: bool, thorough: bool
) -> None:
    for seed in range(10):
        sample = draw(family, seed)
        found = recover_one(sample, unknown_scale=unknown_scale, thorough=thorough)
        assert found.verdict_name == "unique"
        assert_honest(found, sample.label)


@pytest.mark.parametrize("factor", [1e-36, 1e-30, 1e30, 1e37])
def test_scales_at_the_ends_of_float32(
    draw: Callable, recover_one: Callable, assert_honest: Callable, factor: float
) -> None:
    for seed in range(10):
        sample = draw("smoothing", seed, factor=factor)
        assert_honest(recover_one(sample, unknown_scale=True), sample.label)


@pytest.mark.parametrize("unknown_scale", [False, True])
@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup", "dirichlet"])
def test_half_precision_gradients(
    draw: Callable, recover_one: Callable, assert_honest: Callable, family: str, unknown_scale: bool
) -> None:
    for seed in range(10):
        # Stored in sixteen bits, uploaded in thirty-two: more rounding than float32 can explain.
        sample = draw(family, seed)
        sample.gradient[:] = sample.gradient.astype(np.float16)
        assert_honest(recover_one(sample, unknown_scale=unknown_scale), sample.label)


def test_a_feature_beyond_float32_is_not_recovered(client: Callable, recover_one: Callable) -> None:
    rng = np.random.default_rng(0)
    weight = rng.choice([-1, 1], (10, 32)) * rng.uniform(2e-38, 5e-38, (10, 32))
    weight[:, 0] *= np.linspace(0.6, 1.6, 10)
    feature = rng.uniform(1e36, 1e37, 32)
    feature[0] = 5e38
    label = np.full(10, 0.02)
    label[3] = 0.82
    # The gradient, known up to its scale, says what the feature is: more than float32 holds.
    found = recover_one(client(weight.astype(np.float32), feature, label, factor=1e-39), unknown_scale=True)
    assert found.verdict_name == "unidentifiable"
    assert np.isnan(found.label).all()
    assert np.isnan(found.feature).all()
