"""Whatever the arrays: the public entry points give a sound answer or a ValueError, never anything else."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

import softinv_jax
from softinv_jax import Verdict, observe, observe_head, observe_update, observe_update_head

CLASSES, FEATURES, EXAMPLES = 10, 32, 24  # what other tests compile anyway
CASES = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FAMILIES = ("hard", "smoothing", "mixup", "smoothed_mixup", "three_way_mixup", "dirichlet", "uniform", "one_zero")

dtypes = st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.bool_, np.complex64, np.dtype("U3"), object])
shapes = hypothesis_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def arrays(dtype: Any, shape: tuple[int, ...]) -> st.SearchStrategy:
    if np.dtype(dtype) == object:
        return st.just(np.full(shape, None))
    return hypothesis_numpy.arrays(dtype, shape)


any_array = st.tuples(dtypes, shapes).flatmap(lambda pair: arrays(*pair))
# Mostly of shapes that fit each other, or nothing but nonsense would be tried.
fitting = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda sizes: st.tuples(
        arrays(np.float32, sizes[:2]),
        arrays(np.float32, sizes[:2]) | arrays(np.float64, (sizes[2], *sizes[:2])),
        st.none() | arrays(np.float32, sizes[:1]),
        st.none() | arrays(np.float32, sizes[:1]) | arrays(np.float32, (sizes[2], sizes[0])),
        st.none() | arrays(np.float32, sizes[:1]),
    )
)
nonsense = st.tuples(any_array, any_array, st.none() | any_array, st.none() | any_array, st.none() | any_array)


@CASES
@given(fitting | nonsense)
def test_observe_checks_or_raises(given_arrays: tuple) -> None:
    try:
        observation = observe(*given_arrays)
    except ValueError as error:
        assert any(name in str(error) for name in ("weight", "bias", "noise"))
        return
    classes, features = observation.weight.shape
    assert classes >= 3
    gradient = np.asarray(observation.weight_gradient)
    assert gradient.shape[-2:] == (classes, features)
    assert (observation.bias is None) == (observation.bias_gradient is None)
    for array in vars(observation).values():
        assert array is None or np.isfinite(array).all()


layer = st.dictionaries(
    st.sampled_from(["kernel", "weight", "bias", "scale"]),
    hypothesis_numpy.arrays(np.float32, hypothesis_numpy.array_shapes(min_dims=1, max_dims=4, max_side=4)),
    max_size=3,
)
tree = st.dictionaries(st.sampled_from(["head", "fc", "conv", "body"]), layer, max_size=3)


@CASES
@given(tree, tree, st.booleans(), st.sampled_from([None, "head", "fc"]))
def test_observe_head_finds_a_head_or_raises(parameters: dict, gradients: dict, same: bool, name: str | None) -> None:
    try:
        observation = observe_head(parameters, parameters if same else gradients, name=name)
    except ValueError:
        return
    assert observation.weight.shape[0] >= 3


@CASES
@given(
    tree,
    tree,
    st.booleans(),
    st.none() | st.floats(),
    st.integers(-1, 4),
    st.floats(-0.5, 1.5),
    st.floats(-0.5, 1.5),
    st.booleans(),
)
def test_observe_update_gives_finite_gradients_or_raises(
    before: dict,
    after: dict,
    same: bool,
    rate: float | None,
    local_steps: int,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    try:
        update = observe_update(
            before,
            before if same else after,
            learning_rate=rate,
            local_steps=local_steps,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
    except ValueError:
        return
    assert update.exact == (local_steps == 1)
    for name, held in update.gradients.items():
        for part, gradient in held.items():
            assert gradient.shape == before[name][part].shape
            assert np.isfinite(gradient).all()
            assert np.all(update.rounding[name][part] > 0)
    try:
        observation = observe_update_head(update)
    except ValueError:
        return
    assert observation.noise.shape == observation.weight.shape[:1]


@CASES
@given(
    st.sampled_from(FAMILIES),
    st.integers(0, 10**6),
    st.sampled_from(["sigmoid", "signed", "relu"]),
    st.floats(-30, 8),
    st.floats(0, 1),
)
def test_recover_is_honest_about_any_client(
    draw: Callable,
    recover_one: Callable,
    assert_honest: Callable,
    family: str,
    seed: int,
    kind: str,
    size: float,
    noise: float,
) -> None:
    """A gradient of any label, times any factor that the observer takes to be 1, plus noise of any size."""
    sample = draw(family, seed, kind=kind, factor=1.0)
    disturbance = np.random.default_rng(seed).normal(size=sample.gradient.shape)
    relative = 0.0 if noise < 0.5 else 10.0 ** (-8 + 8 * (noise - 0.5))
    sample.gradient[:] = sample.gradient + relative * np.abs(sample.gradient).max() * disturbance
    found = recover_one(sample)
    assert_honest(found, sample.label)
    check_form(found)
    # At another scale than the one it is told, anything may be found but nonsense.
    with np.errstate(all="ignore"):
        sample.gradient[:] = sample.gradient * np.float32(10.0**size)
    if np.isfinite(sample.gradient).all():
        check_form(recover_one(sample))


@CASES
@given(
    hypothesis_numpy.arrays(np.float32, (CLASSES, FEATURES), elements=st.floats(-(2.0**40), 2.0**40, width=32)),
    hypothesis_numpy.arrays(np.float32, (CLASSES, FEATURES), elements=st.floats(width=32, allow_nan=False)),
)
def test_recover_of_any_arrays_has_the_form_of_a_recovery(
    draw: Callable, recover_one: Callable, weight: np.ndarray, gradient: np.ndarray
) -> None:
    if not np.isfinite(gradient).all():
        with pytest.raises(ValueError, match="weight_gradient holds"):
            observe(weight, gradient)
        return
    sample = draw("hard", 0)
    sample.weight[:], sample.gradient[:] = weight, gradient
    check_form(recover_one(sample))


def check_form(found: softinv_jax.Recovery) -> None:
    """What any recovery promises, whatever it was made of."""
    verdict = Verdict(int(found.verdict))
    assert np.isfinite(found.label).all() == (verdict >= Verdict.AMBIGUOUS)
    assert np.isfinite(found.feature).all() == (verdict >= Verdict.AMBIGUOUS)
    if verdict >= Verdict.AMBIGUOUS:
        assert abs(found.label.sum() - 1) < 1e-4


@settings(CASES, max_examples=8)
@given(
    st.lists(st.sampled_from(FAMILIES), min_size=EXAMPLES, max_size=EXAMPLES), st.integers(0, 10**6), st.floats(0, 1)
)
def test_recover_many_is_honest(
    draw: Callable, client: Callable, assert_honest: Callable, families: list[str], seed: int, noise: float
) -> None:
    drawn = [draw(family, seed + index) for index, family in enumerate(families)]
    gradients = np.stack([client(drawn[0].weight, one.feature, one.label).gradient for one in drawn])
    disturbance = np.random.default_rng(seed).normal(size=gradients.shape)
    relative = 0.0 if noise < 0.5 else 10.0 ** (-8 + 6 * (noise - 0.5))
    gradients = (gradients + relative * np.abs(gradients).max() * disturbance).astype(np.float32)
    found = softinv_jax.recover_many(observe(drawn[0].weight, gradients))
    for index, one in enumerate(drawn):
        assert_honest(jax.tree.map(lambda leaf, index=index: leaf[index], found), one.label)
