"""Several local steps on one example: image and label back, and no certainty where the observer was told wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_client import CHAIN, SHAPE, Client, chain_of

from softinv_jax import Verdict, observe_update
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict
from softinv_jax.local_training import certainty, search
from softinv_jax.local_training.anderson import Anderson
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.local_training.recovery import invert_updates
from softinv_jax.observation.local_training import LocalTraining

RATE = 0.05


def attack(client: Client, steps: int, told: int, returned: object = None, rate: float = RATE) -> ImageRecovery:
    after = client.train(steps, rate) if returned is None else returned
    update = observe_update(client.parameters, after, learning_rate=rate, local_steps=told)
    return invert_updates(client.chain, [update], SHAPE, batch_size=client.image.size // np.prod(SHAPE).item())


def test_image_and_label_of_three_steps(mixed: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attack(mixed, 3, 3)
    assert found.verdict.tolist() == [[ImageVerdict.EXACT]]
    assert found.label_verdict.tolist() == [[Verdict.UNIQUE]]
    assert np.abs(found.labels[0, 0] - mixed.label).max() < 1e-4
    error = np.sqrt(np.mean((found.images[0, 0] - mixed.image) ** 2))
    # One draw shows the size of the error, not more.
    assert error < 10 * found.expected_error[0, 0] < 0.1
    assert np.all(found.misfit < 4)
    # Drawn, as where the normal equations would be too large, the error is as large as by them.
    monkeypatch.setattr(certainty, "LARGEST", mixed.image.size)
    drawn = attack(mixed, 3, 3)
    assert drawn.verdict.tolist() == found.verdict.tolist()
    assert 0.1 < drawn.expected_error[0, 0] / found.expected_error[0, 0] < 10
    assert np.sqrt(np.mean((drawn.images[0, 0] - mixed.image) ** 2)) < 10 * drawn.expected_error[0, 0]


def test_the_example_itself_is_a_fixed_point(mixed: Client) -> None:
    """Run on the example, the client differs from the simple model by just what is taken off."""
    training = LocalTraining(3, RATE)
    with jax.enable_x64(True):
        parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), mixed.parameters)
        truth = Guess(jnp.asarray(mixed.image[None], jnp.float64), jnp.asarray(mixed.label[None], jnp.float64))
        observed = run_client(CHAIN, parameters, truth.images, truth.labels, training).update
        # As compiled for the search, which the tests above have done.
        problem = Problem(CHAIN, SHAPE, training, parameters, observed, observed, 2.0**-24)
        found = search._improve(problem, truth, jnp.asarray(200))
    np.testing.assert_allclose(found.images, truth.images, atol=1e-5)
    np.testing.assert_allclose(found.labels, truth.labels, atol=1e-6)


def test_two_images_in_two_steps_through_gelu(mixed: Client) -> None:
    images = np.stack([mixed.image, mixed.image[::-1, :, ::-1]])
    labels = (np.eye(10)[[3, 0]] * 0.7 + np.eye(10)[[1, 8]] * 0.3).astype(np.float32)
    # Weights as small as PyTorch's: the head tells two examples apart only where it hardly moves.
    parameters = jax.tree.map(lambda leaf: leaf * np.float32(0.3), mixed.parameters)
    parameters["head"] = {"kernel": np.random.default_rng(3).uniform(-0.07, 0.07, (192, 10)).astype(np.float32)}
    client = Client(parameters, images, labels, chain_of("gelu"))
    found = attack(client, 2, 2, rate=0.01)
    assert np.all(found.verdict == ImageVerdict.EXACT)
    assert np.all(found.label_verdict == Verdict.UNIQUE)
    order = np.argsort(found.labels[0, :, 0])  # The other has that class.
    assert np.abs(found.labels[0, order] - labels).max() < 1e-4
    error = np.sqrt(np.mean((found.images[0, order] - images) ** 2, axis=(1, 2, 3)))
    assert np.all(error < 6 * found.expected_error[0, order])
    with pytest.raises(ValueError, match="batch_size = 5"):
        attack(Client(mixed.parameters, np.stack([mixed.image] * 5), np.eye(5, dtype=np.float32), CHAIN), 1, 2)


def test_a_wrong_number_of_steps_is_found_out(mixed: Client) -> None:
    found = attack(mixed, 3, 2)
    assert found.verdict[0, 0] == ImageVerdict.INCONSISTENT
    assert found.label_verdict[0, 0] < Verdict.UNIQUE
    assert np.isnan(found.expected_error[0, 0])


def test_another_loss_is_found_out(mixed: Client) -> None:
    """A label of another sum: a loss that is not cross-entropy with a distribution."""
    own = Client(mixed.parameters, mixed.image, 2 * mixed.label)
    found = attack(own, 3, 3)
    assert found.verdict[0, 0] != ImageVerdict.EXACT
    assert found.label_verdict[0, 0] < Verdict.UNIQUE


def test_what_is_missing_is_named(mixed: Client) -> None:
    returned = mixed.train(2, RATE)
    with pytest.raises(ValueError, match="learning_rate"):
        invert_updates(CHAIN, [observe_update(mixed.parameters, returned, local_steps=2)], SHAPE)
    with pytest.raises(ValueError, match="zero everywhere"):
        attack(mixed, 2, 2, mixed.parameters)
    with pytest.raises(ValueError, match="at least one"):
        invert_updates(CHAIN, [], SHAPE)


def test_anderson_solves_linear_maps_that_diverge() -> None:
    """Two of the map's eigenvalues lie outside the unit circle; as many differences as there are unknowns solve it."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    matrix = basis @ np.diag([1.8, -2.0, 0.5, 0.2, 0.1]) @ basis.T
    fixed = rng.normal(size=5)
    mixing, point = Anderson(), np.zeros(5)
    for _ in range(8):
        point = mixing.next(point, matrix @ (point - fixed) + fixed - point)
    np.testing.assert_allclose(point, fixed, atol=1e-6)
