"""Levenberg-Marquardt against SciPy's, in a valley of known depth, and with a fast J^T J against the Jacobian's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares

from softinv_jax.batches import joint
from softinv_jax.batches.component import Divisor
from softinv_jax.batches.least_squares import minimise
from softinv_jax.batches.subspace import batch_subspace


@pytest.fixture(autouse=True)
def _float64() -> object:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("thorough", [False, True])
def test_as_scipy(thorough: bool) -> None:
    """Two decays and a level, noisy; deviations come from J^T J."""
    rng = np.random.default_rng(0)
    times = np.linspace(0, 4, 60)
    truth = np.array([1.0, 3.0, 2.0, 0.5, 0.2])

    def model(point: jax.Array) -> jax.Array:
        return point[0] * jnp.exp(-point[1] * times) + point[2] * jnp.exp(-point[3] * times) + point[4]

    data = np.asarray(model(jnp.asarray(truth))) + 0.01 * rng.standard_normal(times.size)

    def residuals(point: jax.Array) -> jax.Array:
        return model(point) - data

    start = 1.2 * truth
    peer = least_squares(lambda point: np.asarray(residuals(jnp.asarray(point))), start, xtol=1e-12, ftol=1e-12)
    point, equations = minimise(residuals, None, jnp.asarray(start), 200, 1e-3, jnp.linalg.solve, thorough=thorough)
    deviation = 0.01 * np.sqrt(np.diag(np.linalg.inv(peer.jac.T @ peer.jac)))
    assert np.all(np.abs(point - peer.x) < 0.05 * deviation)
    np.testing.assert_allclose(equations.loss, 2 * peer.cost, rtol=1e-4)
    np.testing.assert_allclose(equations.normal, peer.jac.T @ peer.jac, rtol=1e-2)
    np.testing.assert_allclose(equations.toward, jax.grad(lambda at: jnp.sum(residuals(at) ** 2))(point) / 2, atol=1e-9)


def test_a_curved_valley_is_followed_to_its_end() -> None:
    """y = x^2 held a thousand times as tight as x = 1: steps straight along it leave it soon."""

    def residuals(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 1e3 * (point[1] - point[0] ** 2), 1 - point[0]

    start = jnp.array([-2.0, 4.0])
    with_bends, equations = minimise(residuals, None, start, 300, 1e-6, jnp.linalg.solve, thorough=True)
    np.testing.assert_allclose(with_bends, [1.0, 1.0], atol=1e-3)
    gain = equations.toward @ jnp.linalg.solve(equations.normal, equations.toward)
    assert gain <= 1e-6
    straight = minimise(residuals, None, start, 300, 1e-6, jnp.linalg.solve, thorough=False)[0]
    assert straight[0] < 0


@pytest.mark.parametrize(("bias", "own"), [(False, False), (True, False), (True, True)])
def test_blocks_of_the_joint_fit_are_its_jacobian(bias: bool, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, features, size = 12, 20, 3
    rng = np.random.default_rng(1)
    weight = rng.uniform(-0.5, 0.5, (classes, features))
    inputs = rng.uniform(0, 1, (size, features))
    inputs[:, -1] = 1.0
    prediction = np.asarray(jax.nn.softmax(inputs @ weight.T, axis=1))
    labels = np.eye(classes)[[1, 4, 4]]
    gradient = (prediction - labels).T @ inputs / size + 1e-6 * rng.standard_normal((classes, features))
    arrays = jnp.asarray(weight), jnp.asarray(gradient)
    subspace, right, *_ = batch_subspace(*arrays, size, np.dtype(np.float64), has_bias=bias)
    targets = jnp.asarray([[1, 2], [4, -1], [4, -1]], jnp.int32)
    start = jnp.asarray(inputs @ right), jnp.asarray([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), targets, Divisor(size, 0.01)
    fast = joint.fit_jointly(subspace, *start, own_divisors=own)
    monkeypatch.setattr(joint, "minimise", lambda values, _, *rest, **options: minimise(values, None, *rest, **options))
    slow = joint.fit_jointly.__wrapped__(subspace, *start, own_divisors=own)
    np.testing.assert_allclose(fast.coordinates_deviation, slow.coordinates_deviation, rtol=1e-4)
    np.testing.assert_allclose(fast.label_deviation, slow.label_deviation, rtol=1e-4)
    np.testing.assert_allclose(fast.divisors_deviation, slow.divisors_deviation, rtol=1e-4)
    np.testing.assert_allclose(fast.label, slow.label, atol=1e-9)
