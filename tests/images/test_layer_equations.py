"""A convolution's equations against a dense matrix, built entry by entry in NumPy."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.images import layer_equations
from softinv_jax.images.layer_equations import LayerSolution, equations_of
from softinv_jax.images.layer_operator import Geometry, sum_patches

EXAMPLES, CHANNELS = 2, 6
GEOMETRIES = [
    Geometry((5, 4, 2), (3, 2), (1, 1), ((1, 1), (0, 1))),
    Geometry((6, 5, 2), (3, 3), (2, 1), ((1, 0), (2, 1))),
]
# Machine code that is quickly made; it runs only a few times.
QUICK = {"xla_backend_optimization_level": 0}
solve_layer = partial(jax.jit, static_argnums=(3, 4), compiler_options=QUICK)(layer_equations.solve_layer)


def positions(geometry: Geometry) -> list[list[tuple[int, int, int]]]:
    """For each output position, (tap, row, column) of the pixels in its window that are not padding."""
    (height, width, _), (rows, columns) = geometry.input_shape, geometry.kernel_size
    (above, below), (left, right) = geometry.padding
    found = []
    for top in range(-above, height + below - rows + 1, geometry.strides[0]):
        for start in range(-left, width + right - columns + 1, geometry.strides[1]):
            window = [
                (i * columns + j, top + i, start + j)
                for i in range(rows)
                for j in range(columns)
                if 0 <= top + i < height and 0 <= start + j < width
            ]
            found.append(window)
    return found


class Problem(NamedTuple):
    """The arguments of `equations_of` but the geometry, the true input, and the weighted equations, dense."""

    kernel: np.ndarray
    delta: np.ndarray
    forward: np.ndarray
    forward_deviation: np.ndarray
    gradient: np.ndarray
    gradient_deviation: np.ndarray
    truth: np.ndarray
    matrix: np.ndarray
    right: np.ndarray


def make_problem(geometry: Geometry, seed: int = 0, noise: float = 1.0) -> Problem:
    """Equations of a random input, with noise of `noise` times the deviations; a third of the outputs is unknown."""
    rng = np.random.default_rng(seed)
    windows, channels = positions(geometry), geometry.input_shape[2]
    (height, width, _), taps = geometry.input_shape, geometry.kernel_size[0] * geometry.kernel_size[1]
    kernel = rng.normal(size=(taps, channels, CHANNELS))
    delta = rng.normal(size=(EXAMPLES, len(windows), CHANNELS))
    truth = rng.normal(size=(EXAMPLES, height, width, channels))
    forward_deviation = 10.0 ** rng.uniform(-2.5, -1.5, size=delta.shape)
    forward_deviation[rng.uniform(size=delta.shape) < 1 / 3] = np.inf
    gradient_deviation = 10.0 ** rng.uniform(-2.5, -1.5, size=kernel.shape)

    forward_rows = np.zeros((EXAMPLES, len(windows), CHANNELS, *truth.shape))
    gradient_rows = np.zeros((taps, channels, CHANNELS, *truth.shape))
    for example in range(EXAMPLES):
        for position, window in enumerate(windows):
            for tap, row, column in window:
                for channel in range(channels):
                    for leaving in range(CHANNELS):
                        unknown = (example, row, column, channel)
                        forward_rows[(example, position, leaving, *unknown)] += kernel[tap, channel, leaving]
                        gradient_rows[(tap, channel, leaving, *unknown)] += delta[example, position, leaving]
    rows = np.concatenate([forward_rows.reshape(-1, truth.size), gradient_rows.reshape(-1, truth.size)])
    deviation = np.concatenate([forward_deviation.ravel(), gradient_deviation.ravel()])
    known = np.isfinite(deviation)
    exact = rows @ truth.ravel()
    values = exact + noise * np.where(known, deviation, 7.0) * rng.normal(size=deviation.size)
    shape, size = (EXAMPLES, *output_shape(geometry), CHANNELS), delta.size
    square = (*geometry.kernel_size, channels, CHANNELS)
    return Problem(
        kernel.reshape(square),
        delta.reshape(shape),
        values[:size].reshape(shape),
        forward_deviation.reshape(shape),
        values[size:].reshape(square),
        gradient_deviation.reshape(square),
        truth,
        rows[known] / deviation[known, None],
        values[known] / deviation[known],
    )


def output_shape(geometry: Geometry) -> tuple[int, int]:
    (height, width, _), (rows, columns) = geometry.input_shape, geometry.kernel_size
    (above, below), (left, right) = geometry.padding
    return (
        len(range(-above, height + below - rows + 1, geometry.strides[0])),
        len(range(-left, width + right - columns + 1, geometry.strides[1])),
    )


def solve(problem: Problem, geometry: Geometry, draws: int = 1, centre: float = 0.0) -> LayerSolution:
    """In float64, with `draws` of the noise."""
    rng = np.random.default_rng(1)
    known = np.isfinite(problem.forward_deviation).reshape(EXAMPLES, -1, CHANNELS)
    noise = (
        rng.normal(size=(draws, *known.shape)) * known,
        rng.normal(size=(draws, geometry.kernel_size[0] * geometry.kernel_size[1] * geometry.input_shape[2], CHANNELS)),
    )
    with jax.enable_x64(True):
        equations = equations_of(*map(jnp.asarray, problem[:6]), geometry)
        return jax.device_get(solve_layer(equations, np.full_like(problem.truth, centre), noise, geometry, 3000))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_agrees_with_dense_least_squares(geometry: Geometry) -> None:
    problem = make_problem(geometry)
    expected, residual, rank, _ = np.linalg.lstsq(problem.matrix, problem.right)
    assert rank == problem.truth.size  # or there would be nothing to agree on
    deviation = np.sqrt(np.diag(np.linalg.inv(problem.matrix.T @ problem.matrix)))
    found = solve(problem, geometry, centre=0.3)
    assert found.converged
    error = found.value.ravel() - expected
    assert np.all(np.abs(error) < 0.05 * deviation)
    # The solver stops where A^T r is a thousand times below A^T of the noise, columns scaled to length one.
    scaled = problem.matrix / np.linalg.norm(problem.matrix, axis=0)
    left = np.linalg.norm(scaled.T @ (problem.matrix @ error))
    assert left < 1.01e-3 * np.sqrt(problem.truth.size)
    freedom = len(problem.right) - problem.truth.size
    np.testing.assert_allclose(found.misfit, np.sqrt(residual[0] / freedom), rtol=1e-3)
    # The noise has the deviations the equations are weighted by.
    assert 0.5 < found.misfit < 1.5
    assert np.sqrt(np.mean(((found.value - problem.truth).ravel() / deviation) ** 2)) < 2


def test_exact_equations_give_the_input() -> None:
    problem = make_problem(GEOMETRIES[0], noise=0.0)
    found = solve(problem, GEOMETRIES[0])
    deviation = np.sqrt(np.diag(np.linalg.inv(problem.matrix.T @ problem.matrix)))
    assert np.all(np.abs((found.value - problem.truth).ravel()) < 0.05 * deviation)
    assert found.misfit < 0.05


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_scaled_columns_have_length_one(geometry: Geometry) -> None:
    problem = make_problem(geometry)
    with jax.enable_x64(True):
        scale = np.asarray(equations_of(*map(jnp.asarray, problem[:6]), geometry).scale)
    np.testing.assert_allclose(np.linalg.norm(problem.matrix * scale.ravel(), axis=0), 1.0, rtol=1e-12)


def test_condition_is_that_of_the_scaled_matrix() -> None:
    problem = make_problem(GEOMETRIES[0])
    scaled = problem.matrix / np.linalg.norm(problem.matrix, axis=0)
    truth = np.linalg.cond(scaled)
    # Only what the solver met: at most the truth (to rounding), of its order.
    assert truth / 5 < solve(problem, GEOMETRIES[0]).condition < truth * 1.5


def test_deviation_is_that_of_the_inverse_normal_matrix() -> None:
    geometry = GEOMETRIES[0]
    problem, draws = make_problem(geometry), 2000
    found = solve(problem, geometry, draws)
    expected = np.sqrt(np.diag(np.linalg.inv(problem.matrix.T @ problem.matrix)))
    # A standard deviation from n draws has relative deviation 1 / sqrt(2 n); five of them for 80 entries.
    np.testing.assert_allclose(found.deviation.ravel(), expected, rtol=5 / np.sqrt(2 * draws) + 0.01)


def test_pixels_in_no_equation_stay_at_the_centre() -> None:
    geometry = Geometry((5, 5, 2), (2, 2), (3, 3), ((0, 0), (0, 0)))  # rows and columns 2 are in no window
    problem = make_problem(geometry)
    found = solve(problem, geometry, centre=0.25)
    untouched = np.zeros((EXAMPLES, 5, 5, 2), bool)
    untouched[:, 2], untouched[:, :, 2] = True, True
    np.testing.assert_array_equal(found.value[untouched], 0.25)
    np.testing.assert_array_equal(found.deviation[untouched], 0.0)
    assert np.all(found.deviation[~untouched] > 0)


@pytest.mark.parametrize("geometry", [*GEOMETRIES, Geometry((5, 5, 2), (2, 2), (3, 3), ((0, 0), (0, 0)))])
def test_sum_patches_is_the_transpose_of_taking_patches(geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(EXAMPLES, *geometry.input_shape))
    windows, channels = positions(geometry), geometry.input_shape[2]
    patches = rng.normal(size=(EXAMPLES, len(windows), geometry.kernel_size[0] * geometry.kernel_size[1], channels))
    inner = sum(
        patches[:, position, tap, :] * image[:, row, column, :]
        for position, window in enumerate(windows)
        for tap, row, column in window
    ).sum()
    with jax.enable_x64(True):
        summed = sum_patches(jnp.asarray(patches.reshape(EXAMPLES, len(windows), -1)), geometry)
    assert summed.shape == image.shape
    np.testing.assert_allclose(np.sum(np.asarray(summed) * image), inner, rtol=1e-12)
