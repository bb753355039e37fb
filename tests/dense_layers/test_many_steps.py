"""Inputs of the first dense layer from an update of many steps: all of them or none, and none that is not there."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax import Assumption, BatchRecovery, Verdict, observe_update, recover_update
from softinv_jax.dense_layers.layers import DenseLayers, dense_layers
from softinv_jax.dense_layers.many_steps import recover_over_steps
from softinv_jax.dense_layers.recovery import DenseRecovery
from softinv_jax.dense_layers.space import LayerSpace, layer_space
from softinv_jax.dense_layers.summed_deltas import balance, certify, refine


def seen(run: Any, steps: int, rate: float | None = 0.02, **told: Any) -> tuple[DenseLayers, float, bool]:
    update = observe_update(run.sent, run.returned, learning_rate=rate, local_steps=steps, **{"momentum": 0.9, **told})
    names = list(run.sent)
    held, given = (
        [(tree[name]["kernel"], tree[name].get("bias")) for name in names]
        for tree in (update.parameters, update.gradients)
    )
    activations = ["relu"] * (len(names) - 1)
    layers = dense_layers(*zip(*held, strict=True), *zip(*given, strict=True), activations)
    return layers, float(update.training.weights().sum()), update.scale_known


def attack(run: Any, steps: int, batch_size: Any = None, **options: Any) -> DenseRecovery:
    layers, moved, known = seen(run, steps, **options)
    return recover_over_steps(layers, moved, batch_size or len(run.inputs), scale_known=known)


def matched(found: DenseRecovery, run: Any) -> np.ndarray:
    """Which example each row is; every example once, within six of its deviations."""
    distance = np.sqrt(np.mean((found.inputs[:, None] - run.inputs) ** 2, axis=2))
    place = np.argmin(distance, axis=1)
    assert sorted(place) == list(range(len(run.inputs)))
    rounded = np.finfo(np.float32).eps * np.sqrt(np.mean(run.inputs[place] ** 2, axis=1))
    assert np.all(distance.min(axis=1) < 6 * found.input_deviation + rounded)
    assert np.all(found.input_deviation < 1e-3)
    return place


@pytest.mark.parametrize(
    ("examples", "steps", "minibatch", "widths"),
    [(6, 4, None, (48, 120, 5)), (6, 9, 2, (48, 120, 5)), (12, 8, 3, (48, 160, 4)), (6, 6, 3, (48, 120, 40, 5))],
)
def test_every_input_of_epochs_of_minibatches(dense_run, examples, steps, minibatch, widths) -> None:
    run = dense_run(examples, steps, minibatch, widths=widths)
    found = attack(run, steps)
    place = matched(found, run)
    assert np.all(found.verdict == Verdict.AMBIGUOUS)
    assert np.mean(np.argmax(found.label, axis=1) == np.argmax(run.labels[place], axis=1)) > 0.8


def test_neither_rate_nor_number_need_be_told(dense_run) -> None:
    run = dense_run(6, 9, 2)
    found = attack(run, 9, "auto", rate=None)
    matched(found, run)
    assert np.all(found.verdict == Verdict.UNIDENTIFIABLE)
    assert np.isnan(found.label).all()
    # Nor K and momentum.
    matched(attack(run, 2, "auto", rate=None, momentum=0.0), run)


def test_one_example(dense_run) -> None:
    run = dense_run(1, 5)
    matched(attack(run, 5), run)


def test_weight_decay_is_taken_off_if_told(dense_run) -> None:
    run = dense_run(4, 6, 2, weight_decay=0.01)
    matched(attack(run, 6, weight_decay=0.01), run)
    assert np.isnan(attack(run, 6).inputs).all()


@pytest.mark.parametrize(
    "options",
    [
        {"adaptive": True, "rate": 0.001},
        # Of one example each step of Adam is an outer product, too: that of the input's signs.
        {"adaptive": True, "rate": 0.001, "examples": 1},
        {"activation": "tanh"},
        {"bias": False},
        {"widths": (48, 120, 2), "steps": 1},
    ],
)
def test_nothing_that_is_not_there(dense_run, options) -> None:
    """Adam, other activations, no bias; and two classes, where all deltas are alike and mixtures are sparse, too."""
    run = dense_run(**{"examples": 5, "steps": 6, **options})
    found = attack(run, options.get("steps", 6))
    if np.isfinite(found.inputs).any():
        matched(found, run)
    assert options == {"widths": (48, 120, 2), "steps": 1} or np.isnan(found.inputs).all()


def test_another_number_than_told(dense_run) -> None:
    run = dense_run(6, 4)
    for told in (1, 5):
        fewer = attack(run, 4, told)
        matched(fewer, run)
        assert fewer.refuted == Assumption.BATCH_SIZE
    more = attack(run, 4, 8)
    assert more.rank == 6
    assert len(more.inputs) == 8
    assert np.sum(more.verdict == Verdict.NOT_FOUND) == 2


@pytest.mark.parametrize("batch_size", [0, -1, True, 1.5])
def test_batch_sizes_that_cannot_be(dense_run, batch_size) -> None:
    with pytest.raises(ValueError, match="batch_size must be"):
        attack(dense_run(2, 2), 2, batch_size=batch_size or "none")


def test_no_update_is_no_example(dense_run) -> None:
    run = dense_run(3, 2, rate=0.0)
    layers, moved, _ = seen(run, 2)
    assert np.all(recover_over_steps(layers, moved, 3).verdict == Verdict.NO_SIGNAL)


@pytest.fixture(scope="module")
def space(dense_run) -> tuple[LayerSpace, np.ndarray]:
    """Of an update, and (B, B) the true coordinates of the summed deltas."""
    run = dense_run(6, 9, 2)
    layers, _, _ = seen(run, 9)
    found = layer_space(
        layers.kernels[0], layers.biases[0], layers.kernel_gradients[0], layers.bias_gradients[0], layers.dtype, None
    )
    inputs = np.concatenate([run.inputs, np.ones((6, 1))], axis=1).astype(np.float64)
    gradient = np.concatenate([layers.kernel_gradients[0], layers.bias_gradients[0][None]])
    summed = np.linalg.lstsq(inputs.T, gradient, rcond=None)[0].T
    return found, (found.left.T @ (summed / found.noise[:, None])).T


def test_the_truth_is_certified_and_mixtures_are_not(space) -> None:
    found, truth = space
    balanced = balance(found)
    for coordinates in truth:
        one = certify(found, balanced, np.linalg.solve(balanced.turn, coordinates))
        assert one is not None
        assert abs(one.coordinates @ coordinates) > (1 - 1e-9) * np.linalg.norm(coordinates)
        # Its own errors are of the size that is stated.
        other = coordinates / np.linalg.norm(coordinates)
        error = np.linalg.norm(one.coordinates - other * np.sign(one.coordinates @ other))
        assert error < 6 * np.linalg.norm(one.errors)
    for first, second in [(0, 1), (2, 5), (3, 4)]:
        mixture = truth[first] / np.linalg.norm(truth[first]) + 0.3 * truth[second] / np.linalg.norm(truth[second])
        one = certify(found, balanced, np.linalg.solve(balanced.turn, mixture))
        # It goes to one of the two, or nowhere.
        if one is not None:
            cosines = np.abs(truth @ one.coordinates) / np.linalg.norm(truth, axis=1)
            assert cosines.max() > 1 - 1e-9


def test_refining_goes_where_the_zeros_are(space) -> None:
    """From three in four of the true zeros; by reweighted least squares, as in NumPy."""
    found, truth = space
    balanced, rng = balance(found), np.random.default_rng(0)
    values = found.left @ truth.T
    zeros = (np.abs(values) < 1e-5 * np.abs(values).max(axis=0)).T & balanced.live
    guess = zeros * (rng.random(zeros.shape) < 0.75)
    starts = rng.standard_normal((len(truth), found.rank))
    directions = refine(
        jnp.asarray(balanced.rows, jnp.float32), jnp.asarray(guess, jnp.float32), jnp.asarray(starts, jnp.float32)
    )
    for direction, own, coordinates in zip(np.asarray(directions), guess, truth, strict=True):
        reached = balanced.turn @ direction
        cosine = abs(reached @ coordinates) / np.linalg.norm(reached) / np.linalg.norm(coordinates)
        naive = np.linalg.svd(balanced.rows[own])[2][-1] if np.count_nonzero(own) >= found.rank else direction
        assert cosine > 1 - 1e-5
        assert abs(naive @ direction) > (1 - 1e-5) * np.linalg.norm(direction)


def test_recover_update_tells_the_examples_apart(dense_run) -> None:
    run = dense_run(8, 8, 2)
    update = observe_update(run.sent, run.returned, learning_rate=0.02, local_steps=8, momentum=0.9, minibatch_size=2)
    found = recover_update(update, batch_size=8)
    assert isinstance(found, BatchRecovery)
    assert np.all(found.verdict == Verdict.AMBIGUOUS)
    assert sorted(np.argmax(found.label, axis=1)) == sorted(np.argmax(run.labels, axis=1))
    # The likeliest class is shown.
    assert found.targets[:, 0].tolist() == np.argmax(found.label, axis=1).tolist()
    assert "minibatches of 2" in update.statement
