"""Triples of classes and the scalars they stand for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.labels.hypotheses import Hypotheses, plan_triples, solve_hypotheses
from softinv_jax.labels.scalar_equation import ScalarEquation, Unknowns

LAMBDA_ONLY = Unknowns(scalar=True, scale=False)


def equation(direction: np.ndarray, left: np.ndarray) -> ScalarEquation:
    zeros = jnp.zeros(direction.size)
    return ScalarEquation(
        direction=jnp.asarray(direction),
        offset=zeros,
        left=jnp.asarray(left),
        left_deviation=zeros,
        direction_deviation=zeros,
        weight_norm=zeros + 1,
        roundoff=jnp.asarray(2.0**-53),
        logit_error=jnp.zeros(()),
        known_scalar=jnp.asarray(jnp.nan),
    )


def solve(direction: np.ndarray, left: np.ndarray, unknowns: Unknowns = LAMBDA_ONLY) -> Hypotheses:
    with jax.enable_x64(True):
        plan = plan_triples(direction.size, 1000)
        return jax.device_get(solve_hypotheses(equation(direction, left), plan.triples, unknowns))


def hard_example(seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, float]:
    """Directions, u and lambda of a hard label of class 0 among six."""
    rng = np.random.default_rng(seed)
    direction, scalar = rng.normal(size=6), rng.uniform(0.5, 3.0)
    prediction = np.exp(scalar * direction)
    prediction /= prediction.sum()
    return direction, scale * scalar * (prediction - np.eye(6)[0]), scalar


def test_triples_of_equal_label_give_the_true_scalar() -> None:
    direction, left, scalar = hard_example(0)
    found = solve(direction, left)
    clean = ~(found.classes == 0).any(axis=1)
    assert clean.sum() == 10
    np.testing.assert_allclose(found.scalar[clean], scalar, rtol=1e-12)
    np.testing.assert_allclose(found.level[clean], 0, atol=1e-15)


def test_triples_with_the_target_give_another_scalar_or_none() -> None:
    direction, left, scalar = hard_example(0)
    found = solve(direction, left)
    mixed = (found.classes == 0).any(axis=1)
    assert not np.any(np.abs(found.scalar[mixed] - scalar) < 1e-3 * scalar)


@pytest.mark.parametrize("scale", [-3.0, 1e-3])
def test_unknown_scale_is_found_with_the_scalar(scale: float) -> None:
    direction, left, scalar = hard_example(1, scale)
    found = solve(direction, left, Unknowns(scalar=True, scale=True))
    clean = ~(found.classes == 0).any(axis=1)
    np.testing.assert_allclose(found.scalar[clean], scalar, rtol=1e-12)
    np.testing.assert_allclose(found.factor[clean], 1 / (scale * scalar), rtol=1e-12)


def test_a_negative_ratio_has_no_hypothesis() -> None:
    # u rises, then falls along z: no lambda orders three exponentials so.
    found = solve(np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0, 0.0]))
    assert np.isnan(found.scalar).all()


@pytest.mark.parametrize("direction", [[2.0, 2.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
def test_coinciding_logits_have_no_hypothesis(direction: list[float]) -> None:
    assert np.isnan(solve(np.array(direction), np.array([0.3, 0.1, -0.4])).scalar).all()


def test_equal_rows_of_the_gradient_have_no_hypothesis() -> None:
    assert np.isnan(solve(np.array([3.0, 2.0, 1.0]), np.array([0.5, 0.5, -1.0])).scalar).all()


@pytest.mark.parametrize("number_of_classes", [3, 4, 10, 12])
def test_few_classes_are_planned_exhaustively(number_of_classes: int) -> None:
    plan = plan_triples(number_of_classes, 256)
    expected = set(itertools.combinations(range(number_of_classes), 3))
    assert plan.exhaustive
    assert set(map(tuple, plan.triples.tolist())) == expected


@pytest.mark.parametrize("number_of_classes", [13, 32, 33, 1000])
@pytest.mark.parametrize("count", [24, 256])
def test_a_plan_is_of_distinct_triples_of_distinct_classes(number_of_classes: int, count: int) -> None:
    plan = plan_triples(number_of_classes, count)
    assert not plan.exhaustive
    assert count / 2 < len(plan.triples) <= count
    assert len(np.unique(plan.triples, axis=0)) == len(plan.triples)
    assert all(len(set(row)) == 3 for row in plan.triples.tolist())
    assert plan.triples.min() >= 0
    assert plan.triples.max() < number_of_classes


@pytest.mark.parametrize("number_of_classes", [7, 10, 33, 1000])
def test_whatever_two_classes_are_singled_out_two_triples_stay_clean(number_of_classes: int) -> None:
    plan = plan_triples(number_of_classes, 24)
    for pair in itertools.combinations(range(plan.triples.max() + 1), 2):
        assert np.sum(~np.isin(plan.triples, pair).any(axis=1)) >= 2
