"""The paper's variance search and iDLG's sign rule, and what `recover` refuses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax import LabelKind, Observation, recover
from softinv_jax.labels.hard_label import odd_class
from softinv_jax.labels.scalar_equation import ScalarEquation
from softinv_jax.labels.variance import variance_loss

VARIANCE = {"method": "variance", "thorough": False}


def head_equation(sample: object) -> tuple[ScalarEquation, np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(sample.gradient.astype(np.float64))
    direction, left = sample.weight.astype(np.float64) @ right[0], values[0] * left[:, 0]
    zeros = np.zeros(direction.size)
    arrays = (direction, zeros, left, zeros, zeros, zeros + 1, np.array(2.0**-24), np.zeros(()), np.array(np.nan))
    return ScalarEquation(*map(jnp.asarray, arrays)), direction, left


@pytest.mark.parametrize("excluded", [1, 2])
def test_variance_loss_is_the_papers(draw: Callable, excluded: int) -> None:
    with jax.enable_x64(True):
        equation, direction, left = head_equation(draw("mixup", 0))
        for scalar in (-5.0, -0.3, 0.7, 3.0, 20.0):
            powers = np.exp(scalar * direction)
            label = np.sort(powers / powers.sum() - left / scalar)
            expected = np.var(label[: label.size - excluded])
            np.testing.assert_allclose(variance_loss(equation, jnp.asarray(scalar), excluded), expected, rtol=1e-10)


@pytest.mark.parametrize(("family", "told"), [("hard", "smoothing"), ("smoothing", "smoothing"), ("mixup", "mixup")])
def test_variance_search_recovers_what_it_is_told_the_format_of(
    draw: Callable, recover_one: Callable, family: str, told: str
) -> None:
    for seed in range(15):
        sample = draw(family, seed)
        found = recover_one(sample, label_format=told, **VARIANCE)
        assert np.abs(found.label - sample.label).max() < 1e-3
        assert np.linalg.norm(found.feature - sample.feature) < 1e-2 * np.linalg.norm(sample.feature)


def test_variance_search_does_not_call_a_dense_label_unique(draw: Callable, recover_one: Callable) -> None:
    for seed in range(10):
        found = recover_one(draw("dirichlet", seed), label_format="mixup", **VARIANCE)
        assert found.verdict_name == "unidentifiable"


def test_variance_search_told_the_wrong_format_is_not_unique_and_wrong(draw: Callable, recover_one: Callable) -> None:
    for seed in range(10):
        sample = draw("mixup", seed)
        found = recover_one(sample, label_format="smoothing", **VARIANCE)
        if found.verdict_name == "unique":
            assert np.abs(found.label - sample.label).max() < 1e-3


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
def test_idlg_names_the_class_of_a_hard_label(draw: Callable, recover_one: Callable, kind: str, has_bias: bool) -> None:
    for seed in range(15):
        sample = draw("hard", seed, kind=kind, has_bias=has_bias)
        found = recover_one(sample, method="idlg", thorough=False)
        assert found.label.tolist() == sample.label.tolist()
        assert found.format.kind == LabelKind.HARD
        # The format is assumed, not shown.
        assert found.verdict_name == "ambiguous"


def test_idlg_of_a_zero_gradient_has_no_signal(draw: Callable, recover_one: Callable) -> None:
    found = recover_one(draw("hard", 0, factor=0.0), method="idlg", thorough=False)
    assert found.verdict_name == "no_signal"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_odd_class_does_not_depend_on_the_direction_of_the_singular_pair(sign: float) -> None:
    left = jnp.array([0.2, 0.3, -0.9, 0.4])
    assert int(odd_class(sign * left, jnp.asarray(sign * 5.0))) == 2


@pytest.mark.parametrize("orientation", [1.0, -1.0])
def test_odd_class_needs_no_orientation_for_a_hard_label(orientation: float) -> None:
    left = jnp.asarray([0.1, 0.3, -0.9, 0.5])
    assert int(odd_class(left, jnp.asarray(orientation))) == 2
    assert int(odd_class(-left, jnp.asarray(orientation))) == 2


SMALL = Observation(np.ones((4, 3), np.float32), np.ones((4, 3), np.float32))
WITH_BIAS = Observation(SMALL.weight, SMALL.weight_gradient, np.zeros(4, np.float32), np.ones(4, np.float32))
REFUSED = {
    "unknown method": (SMALL, {"method": "magic"}, "method must be one of exact, variance, idlg, not 'magic'"),
    "variance without a format": (SMALL, {"method": "variance"}, "needs label_format, .* not None"),
    "variance of an unknown format": (
        SMALL,
        {"method": "variance", "label_format": "hard"},
        "needs label_format, one of .*smoothing.*mixup.*, not 'hard'",
    ),
    "variance with a bias": (
        WITH_BIAS,
        {"method": "variance", "label_format": "mixup"},
        "needs a bias-free head and a known scale",
    ),
    "variance of an unknown scale": (
        SMALL,
        {"method": "variance", "label_format": "mixup", "unknown_scale": True},
        "needs a bias-free head and a known scale",
    ),
    "a format for the exact method": (SMALL, {"label_format": "mixup"}, "label_format is for method 'variance'"),
    "a batch": (Observation(SMALL.weight, np.ones((2, 4, 3), np.float32)), {}, r"one example, .* \(2, 4, 3\)"),
    "a bad array": (Observation(SMALL.weight, SMALL.weight_gradient * np.nan), {}, "weight_gradient holds 12"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recover_says_what_it_refuses(case: str) -> None:
    observation, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        recover(observation, **options)


def test_called_by_itself_it_is_the_compiled_recovery(draw: Callable, recover_one: Callable) -> None:
    sample = draw("hard", 0, kind="relu")
    expected = recover_one(sample, method="idlg", thorough=False)
    found = recover(sample.observation, method="idlg", thorough=False)
    assert found.label.dtype == jnp.float32
    assert not jax.config.jax_enable_x64
    for eager, compiled in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(eager, compiled, rtol=1e-5, atol=1e-7)
