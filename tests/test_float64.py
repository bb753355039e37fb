"""float64 index searches against NumPy, and the configuration they must leave alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.float64 import argmax, argmin, argsort, in_float64, take_rows

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(6, 9))
ROWS[1, 3] = ROWS[1, 7] = ROWS[1].max() + 1  # a tie
ROWS[2, 4] = ROWS[2].min() - 1e-12 * abs(ROWS[2].min())  # a tie in float32


def under_user_jit(function: Callable) -> Callable:
    return jax.jit(jax.vmap(in_float64(function)))


@pytest.fixture(params=[False, True], ids=["32-bit", "x64"])
def user_setting(request: pytest.FixtureRequest) -> object:
    with jax.enable_x64(request.param):
        yield request.param


@pytest.mark.parametrize(("ours", "reference"), [(argmax, np.argmax), (argmin, np.argmin)])
def test_index_of_the_extreme_is_that_of_numpy(ours: Callable, reference: Callable) -> None:
    with jax.enable_x64(True):
        np.testing.assert_array_equal(ours(jnp.asarray(ROWS)), reference(ROWS, axis=-1))


def test_argsort_is_the_stable_one_of_numpy() -> None:
    with jax.enable_x64(True):
        np.testing.assert_array_equal(argsort(jnp.asarray(ROWS)), np.argsort(ROWS, axis=-1, kind="stable"))


def test_argmax_and_argmin_pass_over_nan() -> None:
    values = jnp.array([jnp.nan, 2.0, -1.0, jnp.nan, 5.0])
    assert (int(argmax(values)), int(argmin(values))) == (4, 2)


def test_argmax_of_nothing_but_nan_is_an_index_in_range() -> None:
    assert 0 <= int(argmax(jnp.full((4,), jnp.nan))) < 4


def test_argmax_finds_infinities() -> None:
    values = jnp.array([-jnp.inf, 1.0, jnp.inf, 2.0])
    assert (int(argmax(values)), int(argmin(values))) == (2, 0)


def test_argsort_puts_nan_last() -> None:
    values = jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.inf])
    np.testing.assert_array_equal(argsort(values), [2, 1, 3, 0])


def test_take_rows_is_take_along_axis() -> None:
    indices = RNG.integers(0, 9, (6, 3)).astype(np.int32)
    with jax.enable_x64(True):
        taken = take_rows(jnp.asarray(ROWS), jnp.asarray(indices))
    np.testing.assert_array_equal(taken, np.take_along_axis(ROWS, indices, axis=1))


@pytest.mark.parametrize("ours", [argmax, argmin, argsort])
def test_searches_run_inside_the_users_own_jit_and_vmap(ours: Callable, user_setting: bool) -> None:
    def search(row: jax.Array) -> jax.Array:
        return ours(row.astype(jnp.float64))

    values = ROWS.astype(np.float32)
    reference = {"argmax": np.argmax, "argmin": np.argmin}.get(
        ours.__name__, lambda a, axis: np.argsort(a, axis=axis, kind="stable")
    )
    found = under_user_jit(search)(values)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, reference(values, axis=-1))


def test_float64_is_used_inside_and_float32_comes_out(user_setting: bool) -> None:
    @under_user_jit
    def lost_in_float32(row: jax.Array) -> jax.Array:
        wide = row.astype(jnp.float64)
        return ((wide + 1e-12) - wide).sum().astype(jnp.float32)

    result = lost_in_float32(np.ones((2, 4), np.float32))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, 4e-12, rtol=1e-3)


def test_the_users_setting_is_untouched(user_setting: bool) -> None:
    in_float64(lambda: jnp.zeros(3) + 1)()
    assert jax.config.jax_enable_x64 == user_setting
    assert jnp.zeros(1).dtype == (jnp.float64 if user_setting else jnp.float32)


def test_the_users_setting_is_untouched_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        in_float64(lambda: 1 / 0)()
    assert jnp.zeros(1).dtype == jnp.float32
