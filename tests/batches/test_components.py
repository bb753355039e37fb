"""The pieces of a batch recovery against plain NumPy and against theorems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.batches.component import ITERATIONS, Divisor, solve_components, starting_weights, strongest_residual
from softinv_jax.batches.joint import fit_jointly
from softinv_jax.batches.proposals import propose_along_rays
from softinv_jax.batches.scalar_scan import OUTLIERS, SIZES, scan_rays
from softinv_jax.batches.subspace import BatchSubspace, batch_subspace, numerical_rank

# As in test_batch_recovery, so that compiled programs are shared.
CLASSES, FEATURES, SIZE = 40, 50, 4


def draw(seed: int, noise: float = 0.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES))
    features = rng.uniform(0, 1, (SIZE, FEATURES))
    labels = np.zeros((SIZE, CLASSES)) + 0.2 / CLASSES
    labels[np.arange(SIZE), 3 * np.arange(SIZE)] += 0.8
    logits = features @ weight.T
    prediction = np.exp(logits - logits.max(axis=1, keepdims=True))
    prediction /= prediction.sum(axis=1, keepdims=True)
    gradient = (prediction - labels).T @ features / SIZE
    gradient = gradient + noise * rng.standard_normal(gradient.shape)
    return weight, features, labels, prediction, gradient


def subspace_of(weight: np.ndarray, gradient: np.ndarray, rank: int | None = SIZE) -> tuple[BatchSubspace, np.ndarray]:
    arrays = jnp.asarray(weight), jnp.asarray(gradient)
    return batch_subspace(*arrays, rank, np.dtype(np.float64), has_bias=False)[:2]


@pytest.fixture(autouse=True)
def _float64() -> object:
    with jax.enable_x64(True):
        yield


def test_outer_products_are_dual() -> None:
    """Wedderburn: x_i^T G^+ g_j = B delta_ij, here with NumPy's pseudo-inverse."""
    _, features, labels, prediction, gradient = draw(0)
    overlap = features @ np.linalg.pinv(gradient, rcond=1e-10) @ (prediction - labels).T
    np.testing.assert_allclose(overlap, SIZE * np.eye(SIZE), atol=1e-8)


def test_truth_solves_the_equation() -> None:
    weight, features, labels, prediction, gradient = draw(1)
    subspace, right = subspace_of(weight, gradient)
    start = features @ right
    targets = np.array([[3 * k, -1] for k in range(SIZE)], np.int32)
    weights = starting_weights(subspace, jnp.asarray(start), jnp.asarray(targets))
    found = solve_components(subspace, jnp.asarray(start), jnp.asarray(targets), weights, Divisor(SIZE), 0)
    np.testing.assert_allclose(found.coordinates, start, rtol=1e-6)
    np.testing.assert_allclose(found.label, labels, atol=1e-8)
    np.testing.assert_allclose(found.dual @ subspace.left.T, prediction - labels, atol=1e-8)
    np.testing.assert_allclose(found.duality, 0, atol=1e-8)


def test_elimination_is_weighted_least_squares() -> None:
    """beta, c and the residual at a given point against numpy.linalg.lstsq on the classes not singled out."""
    weight, features, _, _, gradient = draw(2)
    subspace, right = subspace_of(weight, gradient)
    rng = np.random.default_rng(3)
    point = features[0] @ right * 1.2
    targets = np.array([[0, 7]], np.int32)
    own = jnp.asarray(rng.uniform(0.5, 2, (1, CLASSES)) / np.asarray(subspace.noise))
    found = solve_components(subspace, jnp.asarray(point[None]), jnp.asarray(targets), own, Divisor(SIZE), 0)
    clean = np.setdiff1d(np.arange(CLASSES), targets)
    logits = np.asarray(subspace.directions) @ point
    prediction = np.exp(logits - logits.max())
    prediction /= prediction.sum()
    design = np.concatenate([np.asarray(subspace.left), np.ones((CLASSES, 1))], axis=1) / found.deviation[0][:, None]
    target = prediction / found.deviation[0]
    design, target = np.asarray(design), np.asarray(target)
    norms = np.linalg.norm(design[clean], axis=0)
    solution, residual, *_ = np.linalg.lstsq(design[clean] / norms, target[clean], rcond=None)
    solution = solution / norms
    np.testing.assert_allclose(found.dual[0], solution[:SIZE], rtol=1e-6)
    np.testing.assert_allclose(found.level[0], solution[SIZE], rtol=1e-6)
    freedom = len(clean) - 1 - 2 * SIZE + 1
    np.testing.assert_allclose(found.misfit[0], np.sqrt(residual[0] / freedom), rtol=1e-6)


def test_strongest_residual_names_the_missing_class() -> None:
    weight, features, labels, prediction, _ = draw(4)
    labels = labels.copy()
    labels[0] = 0
    labels[0, [0, 20]] = 0.6, 0.4
    gradient = (prediction - labels).T @ features / SIZE
    subspace, right = subspace_of(weight, gradient)
    start = jnp.asarray((features[0] @ right)[None])
    weights = 1 / subspace.noise[None]
    found = solve_components(subspace, start, jnp.asarray([[0, -1]], jnp.int32), weights, Divisor(SIZE), 0)
    assert 20 in np.asarray(strongest_residual(subspace, found))[0]


def test_deviations_cover_the_errors() -> None:
    """Label errors of one example and of the joint fit under noise, in units of the deviations that are claimed."""
    single, together = [], []
    for seed in range(12):
        weight, features, labels, _, gradient = draw(seed, noise=1e-7)
        subspace, right = subspace_of(weight, gradient)
        start = jnp.asarray(features @ right)
        targets = jnp.asarray([[3 * k, -1] for k in range(SIZE)], jnp.int32)
        weights = jnp.ones((SIZE, CLASSES))
        rough = solve_components(subspace, start, targets, weights, Divisor(SIZE), ITERATIONS)
        found = solve_components(subspace, rough.coordinates, targets, 1 / rough.deviation, Divisor(SIZE), ITERATIONS)
        index = np.arange(SIZE), 3 * np.arange(SIZE)
        single.append((np.asarray(found.label) - labels)[index] / np.asarray(found.label_deviation)[index])
        excess = jnp.stack([found.label[index] - found.level, jnp.zeros(SIZE)], axis=1)
        joint = fit_jointly(subspace, found.coordinates, excess, targets, Divisor(SIZE))
        together.append((np.asarray(joint.label) - labels)[index] / np.asarray(joint.label_deviation)[index])
        assert 0.6 < joint.misfit < 1.4
    assert 0.4 < np.sqrt(np.mean(np.square(single))) < 1.6
    assert 0.4 < np.sqrt(np.mean(np.square(together))) < 1.6


def test_duality_deviation_is_what_noise_makes_of_duality() -> None:
    """x^T G^+ g at the true features, over draws of the noise, against the deviation that is claimed."""
    standardised = []
    for seed in range(12):
        weight, features, _, _, gradient = draw(seed, noise=1e-7)
        subspace, right = subspace_of(weight, gradient)
        start = jnp.asarray(features @ right)
        targets = jnp.asarray([[3 * k, -1] for k in range(SIZE)], jnp.int32)
        weights = starting_weights(subspace, start, targets)
        found = solve_components(subspace, start, targets, weights, Divisor(SIZE), 0)
        standardised.append(np.asarray(found.duality / found.duality_deviation))
    assert 0.3 < np.sqrt(np.mean(np.square(standardised))) < 1.6


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_numerical_rank(rank: int, noise: float) -> None:
    rng = np.random.default_rng(rank)
    matrix = rng.standard_normal((20, rank)) @ rng.standard_normal((rank, 60))
    matrix = (matrix + noise * rng.standard_normal(matrix.shape)).astype(np.float32)
    weight = jnp.zeros(matrix.shape)
    subspace, _, _ = batch_subspace(weight, jnp.asarray(matrix, jnp.float64), None, matrix.dtype, has_bias=False)
    assert subspace.singular_values.size == rank


def test_rank_of_zero_and_of_noise() -> None:
    assert numerical_rank(np.zeros(5), (5, 9)) == 0
    noise = np.random.default_rng(0).standard_normal((20, 60))
    assert numerical_rank(np.linalg.svd(noise, compute_uv=False), (20, 60)) == 20


def test_joint_fit_finds_back_to_the_truth() -> None:
    """From a point 2 % away the fit ends where it ends from the truth."""
    weight, features, labels, _, gradient = draw(5, noise=1e-7)
    subspace, right = subspace_of(weight, gradient)
    start = jnp.asarray(features @ right)
    targets = jnp.asarray([[3 * k, -1] for k in range(SIZE)], jnp.int32)
    exact = fit_jointly(subspace, start, jnp.full((SIZE, 2), 0.8), targets, Divisor(SIZE))
    moved = fit_jointly(subspace, 1.02 * start, jnp.full((SIZE, 2), 0.7), targets, Divisor(SIZE))
    np.testing.assert_allclose(moved.label, exact.label, atol=1e-7)
    np.testing.assert_allclose(exact.label, labels, atol=1e-5)


def test_rows_known_better_than_others_reveal_what_absolute_noise_hides() -> None:
    """A direction below the rounding of the largest row, but far above that of its own rows, belongs to the rank."""
    rng = np.random.default_rng(6)
    sizes = np.r_[1.0, np.full(CLASSES - 1, 1e-6)]
    matrix = (sizes[:, None] * rng.standard_normal((CLASSES, 3))) @ rng.standard_normal((3, FEATURES))
    matrix = matrix.astype(np.float32)
    assert np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[2] < 1e-4
    subspace, _, _ = batch_subspace(
        jnp.zeros(matrix.shape), jnp.asarray(matrix, jnp.float64), None, matrix.dtype, has_bias=False
    )
    assert subspace.singular_values.size == 3


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_joint_fit_expects_the_rounding_of_a_float32_client(seed: int, ordered: bool) -> None:
    """At the truth its residual is that of the noise it assumes, also where partial sums of a logit are large."""
    classes, features, size = 10, 768, 2
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (classes, features)).astype(np.float32) / (10 if ordered else 1)
    if ordered:
        weight = np.sort(weight, axis=1)
    feature = rng.uniform(0.3, 0.7, (size, features)).astype(np.float32)
    strength = rng.uniform(0.05, 0.5, size)
    labels = np.repeat(strength[:, None] / classes, classes, axis=1)
    labels[np.arange(size), [3, 7]] += 1 - strength
    labels = labels.astype(np.float32)

    # Summed one by one, the order that the joint fit expects: a processor's own product may sum in a better one.
    logits = np.cumsum(weight[None] * feature[:, None, :], axis=2, dtype=np.float32)[..., -1]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = (powers / powers.sum(axis=1, keepdims=True) - labels) / np.float32(size)
    assert error.dtype == np.float32
    gradient = (error.T @ feature).astype(np.float64)
    subspace, right, _ = batch_subspace(
        jnp.asarray(weight, jnp.float64), jnp.asarray(gradient), size, np.dtype(np.float32), has_bias=False
    )
    start = jnp.asarray(feature.astype(np.float64) @ right)
    targets = jnp.asarray([[3, -1], [7, -1]], jnp.int32)
    weights = jnp.asarray(np.stack([1 - strength, np.zeros(size)], axis=1))
    fit = fit_jointly(subspace, start, weights, targets, Divisor(size))
    assert 0.2 < float(fit.misfit) < 2
    np.testing.assert_allclose(fit.label, labels, atol=1e-5)


def test_a_ray_tells_the_size_and_a_second_class_of_little_weight() -> None:
    """A row of a mixed label is -0.97 x / B: the scan against least squares of NumPy at each size, and the truth."""
    rng = np.random.default_rng(1)
    classes, size = 60, 4
    weight, features = rng.uniform(-0.5, 0.5, (classes, FEATURES)), rng.uniform(0, 1, (size, FEATURES))
    labels = np.eye(classes)[[5, 20, 40, 50]]
    labels[0, [5, 33]] = 0.97, 0.03
    logits = features @ weight.T
    prediction = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    subspace, right = subspace_of(weight, (prediction - labels).T @ features / size, size)
    rows = np.asarray(subspace.left) * np.asarray(subspace.singular_values)
    points, worst, valid = scan_rays(subspace, -size * jnp.asarray(rows[[5]]), jnp.array([5], jnp.int32))
    true = features[0] @ right
    # Neighbouring sizes are 5 % apart, and the other examples' softmax of this class bends the ray.
    (near,) = np.flatnonzero(
        valid[0] & (np.linalg.norm(np.asarray(points[0]) - true, axis=1) < 0.1 * np.linalg.norm(true))
    )
    assert worst[0, near, 0] == 33
    starts, targets = propose_along_rays(subspace, rows, size, size)
    own = starts[(targets == [5, 33]).all(axis=1)]
    assert np.linalg.norm(own - true, axis=1).min() < 0.1 * np.linalg.norm(true)

    def loss(factor: float) -> float:
        logits = -factor * size * np.asarray(subspace.directions) @ rows[5]
        prediction = np.exp(logits - logits.max())
        prediction /= prediction.sum()
        others = np.delete(np.arange(classes), 5)
        weights = 1 / np.asarray(subspace.noise)[others]
        design = weights[:, None] * np.column_stack([np.asarray(subspace.left)[others], np.ones(len(others))])
        design = design / np.linalg.norm(design, axis=0)
        target = weights * prediction[others]
        residual = target - design @ np.linalg.lstsq(design, target)[0]
        level = np.linalg.lstsq(weights[:, None], target)[0]
        leverage = np.sum(np.linalg.qr(design)[0] ** 2, axis=1)
        relative = np.sort(np.abs(residual) / np.sqrt(1 - leverage))[:-OUTLIERS]
        return float(np.linalg.norm(relative) / np.linalg.norm(target - weights * level))

    best = np.linalg.norm(points[0, near]) / np.linalg.norm(size * rows[5])
    index = np.argmin(np.abs(SIZES - best))
    np.testing.assert_allclose(SIZES[index], best, rtol=1e-9)
    assert loss(SIZES[index]) < min(loss(SIZES[index - 1]), loss(SIZES[index + 1]))
