"""Several local steps on one example: image and label back, and no certainty where the observer was told wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_client import CHAIN, SHAPE, Client

from softinv_jax import Verdict, observe_update
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict
from softinv_jax.local_training import recovery, search
from softinv_jax.local_training.anderson import Anderson
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.local_training.recovery import invert_updates
from softinv_jax.observation.local_training import LocalTraining

RATE = 0.05


def attack(client: Client, steps: int, told: int, returned: object = None) -> ImageRecovery:
    after = client.train(steps, RATE) if returned is None else returned
    return invert_updates(
        CHAIN, [observe_update(client.parameters, after, learning_rate=RATE, local_steps=told)], SHAPE
    )


def test_image_and_label_of_three_steps(mixed: Client) -> None:
    found = attack(mixed, 3, 3)
    assert found.verdict.tolist() == [[ImageVerdict.EXACT]]
    assert found.label_verdict.tolist() == [[Verdict.UNIQUE]]
    assert np.abs(found.labels[0, 0] - mixed.label).max() < 1e-4
    error = np.sqrt(np.mean((found.images[0, 0] - mixed.image) ** 2))
    # One draw shows the size of the error, not more.
    assert error < 10 * found.expected_error[0, 0] < 0.1
    assert np.all(found.misfit < 4)


def test_the_example_itself_is_a_fixed_point(mixed: Client) -> None:
    """Run on the example, the client differs from the simple model by just what is taken off."""
    training = LocalTraining(3, RATE)
    with jax.enable_x64(True):
        parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), mixed.parameters)
        truth = Guess(jnp.asarray(mixed.image, jnp.float64), jnp.asarray(mixed.label, jnp.float64))
        observed = run_client(CHAIN, parameters, truth.image[None], truth.label[None], training).update
        # As compiled for the search, which the tests above have done.
        problem = Problem(CHAIN, SHAPE, training, parameters, observed, observed, 2.0**-24)
        found = search._improve(problem, truth, jnp.asarray(200))
    np.testing.assert_allclose(found.image, truth.image, atol=1e-5)
    np.testing.assert_allclose(found.label, truth.label, atol=1e-6)


def test_nothing_is_certain_where_the_error_is_not_known(mixed: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LARGEST", mixed.image.size)
    found = attack(mixed, 3, 3)
    assert found.verdict[0, 0] == ImageVerdict.APPROXIMATE
    assert found.label_verdict[0, 0] == Verdict.AMBIGUOUS
    assert np.isnan(found.expected_error[0, 0])


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
