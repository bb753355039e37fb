"""What is left beyond one outer product, against matrices of which it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.observation.leftover import count_examples, describe_leftover, is_one_size

SHAPES = [(4, 32), (10, 84), (30, 20)]


describe = jax.jit(lambda *arrays: describe_leftover(*arrays, None, has_bias=False))
count = jax.jit(count_examples)


def leftover_of(gradient: np.ndarray, rounding: float = 2.0**-24) -> dict[str, bool]:
    left, values, right = np.linalg.svd(gradient, full_matrices=False)
    with jax.enable_x64(True):
        arrays = (jnp.asarray(a) for a in (gradient, left[:, 0] * values[0], right[0]))
        found = describe(*arrays, jnp.asarray(rounding))
        return {
            name: bool(getattr(found, name))
            for name in ("stands_out", "rows_alike", "deleted", "few_digits", "on_grid")
        }


def examples(rng: np.random.Generator, shape: tuple[int, int], number: int) -> np.ndarray:
    """Mean of outer products with dL/dz that adds up to zero, features nearly parallel."""
    error = rng.dirichlet(np.ones(shape[0]), number) - np.eye(shape[0])[rng.integers(shape[0], size=number)]
    features = 1 + rng.uniform(size=shape[1]) + 0.02 * rng.normal(size=(number, shape[1]))
    return error.T @ features / number


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_has_no_structure(shape: tuple[int, int]) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        one = examples(rng, shape, 1)
        rows = 10.0 ** rng.uniform(-2, 0, shape[0])  # One size in each row, but not the same.
        found = leftover_of(one + 1e-3 * rows[:, None] * rng.normal(size=shape))
        assert not any(found.values()), (seed, found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [2, 4, 40])
def test_more_examples_have(shape: tuple[int, int], number: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = leftover_of(examples(rng, shape, number) + 1e-8 * rng.normal(size=shape))
        assert found["stands_out"] or found["rows_alike"], seed


@pytest.mark.parametrize("digits", [7, 10])
def test_rounding_to_half_precision_is_no_example(digits: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mantissa, exponent = np.frexp(examples(rng, (10, 84), 1))
        scale = 2.0 ** (digits + 1)
        found = leftover_of(np.ldexp(np.round(mantissa * scale) / scale, exponent), 2.0 ** -(digits + 1))
        assert found == {
            "stands_out": False,
            "rows_alike": False,
            "deleted": False,
            "few_digits": True,
            "on_grid": False,
        }


def test_deleted_entries_are_seen() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        gradient = examples(rng, (10, 84), 1) * np.exp(rng.normal(size=84))
        gradient[np.abs(gradient) < np.median(np.abs(gradient))] = 0
        found = leftover_of(gradient)
        assert any(found.values()), seed


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_examples_are_counted(number: int, noise: float) -> None:
    rng = np.random.default_rng(number)
    gradient = examples(rng, (10, 84), number).astype(np.float32).astype(float)
    gradient = gradient + noise * rng.normal(size=gradient.shape)
    with jax.enable_x64(True):
        assert count(jnp.asarray(gradient), jnp.asarray(2.0**-24)) == number


def test_signs_have_one_size() -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        gradient = examples(rng, (10, 84), 1)
        assert is_one_size(jnp.asarray(np.sign(gradient)))
        assert is_one_size(jnp.asarray(gradient / (np.abs(gradient) + 1e-8)))
        assert not is_one_size(jnp.asarray(gradient))
        assert not is_one_size(jnp.asarray(rng.normal(size=(10, 84))))


@pytest.mark.parametrize("missing", [0, 1])
def test_quantised_entries_lie_on_a_grid(missing: int) -> None:
    """Also where no entry is as small as one step."""
    for seed in range(20):
        gradient = examples(np.random.default_rng(seed), (10, 84), 1)
        step = np.abs(gradient).max() / 127
        levels = np.round(gradient / step)
        levels[np.abs(levels) <= missing] = 0
        assert leftover_of((levels * step).astype(np.float32).astype(float))["on_grid"], seed
        assert not leftover_of(gradient)["on_grid"], seed
