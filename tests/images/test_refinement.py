"""The second-order polish: from far and from near to the last digit, and what it refuses."""

from typing import Any

import jax
import numpy as np
import pytest
from small_client import SHAPE, Client, apply_fn, gradient_of, make_client

from softinv_jax.images.refinement import Refinement, refine, refine_image
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict


@pytest.fixture(scope="module")
def client_data() -> Client:
    return make_client()


def polished(client: Client, image: np.ndarray, **options: Any) -> Refinement:
    gradient = jax.tree.map(lambda leaf: leaf[0], client.gradients)
    return refine_image(apply_fn, client.parameters, gradient, image, options.pop("label", client.labels[0]), **options)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_from_noise_to_the_last_digit(client_data: Client, seed: int) -> None:
    found = polished(client_data, noise(seed))
    assert found.converged
    assert found.misfit < 3
    assert found.start_misfit > 1e4
    assert found.image.dtype == np.float32
    # Normalised pixels have deviation 1, so this is 65 dB and more.
    np.testing.assert_allclose(found.image, client_data.images[0], atol=2e-3)


def test_agrees_with_scipy(client_data: Client) -> None:
    """The same equations by SciPy's dense trust region method, in float64."""
    from scipy.optimize import least_squares  # noqa: PLC0415

    start = client_data.images[0] + 0.1 * noise(0)
    observed = [np.asarray(leaf[0], np.float64) for leaf in jax.tree.leaves(client_data.gradients)]
    with jax.enable_x64(True):
        parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), client_data.parameters)
        label = np.asarray(client_data.labels[:1], np.float64)

        @jax.jit
        def residual(pixels: jax.Array) -> jax.Array:
            dummy = jax.tree.leaves(gradient_of(parameters, pixels.reshape(1, *SHAPE), label))
            weights = [1 / (np.finfo(np.float32).eps * np.abs(leaf).max()) for leaf in observed]
            parts = [w * (one - other).ravel() for w, one, other in zip(weights, dummy, observed, strict=True)]
            return jax.numpy.concatenate(parts)

        jacobian = jax.jit(jax.jacfwd(residual))
        truth = least_squares(residual, start.ravel().astype(np.float64), jacobian, xtol=1e-12, ftol=1e-12)
        misfit = np.sqrt(np.mean(residual(truth.x) ** 2))
    found = polished(client_data, start)
    np.testing.assert_allclose(found.misfit, misfit, rtol=0.05)
    np.testing.assert_allclose(found.image.ravel(), truth.x, atol=1e-3)


def test_the_label_is_solved_for(client_data: Client) -> None:
    found = polished(client_data, noise(0), label=np.full(5, 0.2, np.float32), optimise_label=True)
    np.testing.assert_allclose(found.label, client_data.labels[0], atol=1e-3)
    np.testing.assert_allclose(found.image, client_data.images[0], atol=5e-3)


def test_a_batch_improves(client_data: Client) -> None:
    gradient = gradient_of(client_data.parameters, client_data.images, client_data.labels)
    start = client_data.images + 0.01 * np.stack([noise(seed) for seed in range(3)])
    found = refine_image(apply_fn, client_data.parameters, gradient, start, client_data.labels)
    assert found.misfit < found.start_misfit / 100
    assert found.image.shape == start.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((6, 6))}, r"image must have shape .* not \(6, 6\)"),
        ({"image": np.full(SHAPE, np.nan)}, "image holds 108 entries"),
        ({"label": np.zeros(4)}, r"label must have shape \(5,\), not \(4,\)"),
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"inner_steps": 1.5}, "inner_steps must be a positive integer, not 1.5"),
    ],
)
def test_input_that_is_refused(client_data: Client, options: dict, message: str) -> None:
    given = {"image": np.zeros(SHAPE, np.float32)} | options
    with pytest.raises(ValueError, match=message):
        polished(client_data, **given)


def test_a_gradient_of_zeros_is_refused(client_data: Client) -> None:
    gradient = jax.tree.map(lambda leaf: np.zeros_like(leaf[0]), client_data.gradients)
    with pytest.raises(ValueError, match="zero everywhere"):
        refine_image(apply_fn, client_data.parameters, gradient, np.zeros(SHAPE), client_data.labels[0])


def test_recoveries_are_polished_and_what_is_not_found_stays(client_data: Client) -> None:
    """Three gradients: one image that is off, one that is not there, one of many."""
    images = (client_data.images + 0.05 * noise(1))[:, None].astype(np.float32)
    images[1] = np.nan
    verdict = np.array([[ImageVerdict.INCONSISTENT], [ImageVerdict.NOT_FOUND], [ImageVerdict.UNDETERMINED]], np.int32)
    empty = np.empty((3, 0))
    given = ImageRecovery(
        images=images,
        labels=client_data.labels[:, None],
        features=client_data.features[:, None],
        label_verdict=np.full((3, 1), 3, np.int32),
        verdict=verdict,
        residual=np.array([0.1, np.nan, 0.1]),
        expected_error=np.full((3, 1), 0.05),
        condition=empty,
        misfit=empty,
        layers=(),
    )
    done: list[tuple[int, int]] = []
    found = refine(
        apply_fn, client_data.parameters, client_data.gradients, given, progress=lambda *state: done.append(state)
    )
    np.testing.assert_allclose(found.images[0, 0], client_data.images[0], atol=2e-3)
    assert found.residual[0] < 1e-5
    assert found.verdict[:, 0].tolist() == [ImageVerdict.APPROXIMATE, ImageVerdict.NOT_FOUND, ImageVerdict.UNDETERMINED]
    assert np.all(np.isnan(found.images[1]))
    np.testing.assert_array_equal(found.images[2], images[2])
    assert done == [(1, 3), (2, 3), (3, 3)]
