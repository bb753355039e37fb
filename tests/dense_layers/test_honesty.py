"""What must not be claimed: examples that are there twice, scales and batch sizes told wrong, other activations."""

import dataclasses

import numpy as np
import pytest

from softinv_jax import Assumption, Verdict
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.recovery import recover_dense

WIDTHS, BATCH = (96, 128, 10), 8


def _batch(seed: int, labels: str = "hard") -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(0.1, 1, (BATCH, WIDTHS[0]))
    if labels == "dense":
        return inputs, generator.dirichlet(np.ones(10), BATCH)
    return inputs, np.eye(10)[generator.integers(0, 10, BATCH)]


@pytest.mark.parametrize("size", [BATCH, "auto"])
@pytest.mark.parametrize("same_label", [True, False])
def test_an_image_that_is_there_twice_comes_once_with_the_mean_label(
    dense_client, assert_dense_honest, same_label, size
) -> None:
    inputs, labels = _batch(0)
    inputs[1] = inputs[0]
    labels[1] = labels[0] if same_label else np.roll(labels[0], 1)
    client = dense_client(WIDTHS, BATCH, 0, inputs=inputs, labels=labels)
    found = recover_dense(client.layers, size)
    assert found.rank == BATCH - 1
    labels[0] = labels[:2].mean(axis=0)
    given, _ = assert_dense_honest(found, inputs[[0, *range(2, BATCH)]], labels[[0, *range(2, BATCH)]])
    assert given == BATCH - 1
    assert found.refuted & Assumption.DISTINCT_EXAMPLES
    twice = int(np.argmin(np.linalg.norm(found.inputs[: BATCH - 1] - inputs[0], axis=1)))
    assert found.verdict[twice] == Verdict.CONDITIONAL
    assert np.all(np.delete(found.verdict[: BATCH - 1], twice) == Verdict.UNIQUE)


@pytest.mark.parametrize("told", [6, 12])
@pytest.mark.parametrize("labels", ["hard", "dense"])
def test_a_wrong_batch_size_makes_no_wrong_label(dense_client, assert_dense_honest, labels, told) -> None:
    inputs, truth = _batch(1, labels)
    client = dense_client(WIDTHS, BATCH, 1, inputs=inputs, labels=truth)
    found = recover_dense(client.layers, told)
    assert_dense_honest(found, inputs, truth)
    if told < BATCH:
        assert found.refuted & Assumption.BATCH_SIZE
    else:
        assert found.refuted & (Assumption.SCALE | Assumption.LABEL_RANGE)


@pytest.mark.parametrize("factor", [0.013, 3.0])
@pytest.mark.parametrize("told", [True, False])
def test_a_factor_is_found_or_nothing_is_claimed(dense_client, assert_dense_honest, told, factor) -> None:
    inputs, truth = _batch(2)
    client = dense_client(WIDTHS, BATCH, 2, inputs=inputs, labels=truth, factor=factor)
    found = recover_dense(client.layers, BATCH, unknown_scale=not told)
    assert_dense_honest(found, inputs, truth)
    assert np.all(found.verdict >= Verdict.AMBIGUOUS)
    np.testing.assert_allclose(found.scale, factor, rtol=1e-5)
    assert bool(found.refuted & Assumption.SCALE) == told


def test_dense_labels_at_an_unknown_scale_are_not_told(dense_client, assert_dense_honest) -> None:
    inputs, truth = _batch(3, "dense")
    client = dense_client(WIDTHS, BATCH, 3, inputs=inputs, labels=truth, factor=0.013)
    found = recover_dense(client.layers, BATCH, unknown_scale=True)
    given, _ = assert_dense_honest(found, inputs, truth)
    assert given == BATCH  # The images are known at any scale.
    assert not np.any(found.verdict >= Verdict.CONDITIONAL)


def test_a_conditional_label_says_what_it_rests_on(dense_client) -> None:
    inputs, truth = _batch(4, "dense")
    client = dense_client(WIDTHS, BATCH, 4, inputs=inputs, labels=truth)
    found = recover_dense(client.layers, BATCH)
    assert np.all(found.verdict == Verdict.CONDITIONAL)
    assert np.all(found.rests_on == Assumption.LOSS | Assumption.SCALE)
    hard = recover_dense(dense_client(WIDTHS, BATCH, 4).layers, BATCH)
    assert np.all(hard.verdict == Verdict.UNIQUE)
    assert not np.any(hard.rests_on)


def test_without_a_bias_an_unknown_length_is_said_to_be_unknown(dense_client) -> None:
    inputs, truth = _batch(5, "dense")
    client = dense_client((96, 128, 10), BATCH, 5, inputs=inputs, labels=truth, bias=False)
    found = recover_dense(client.layers, BATCH)
    assert not np.any(found.verdict >= Verdict.CONDITIONAL)
    given = np.isfinite(found.inputs).all(axis=1)
    assert given.sum() == BATCH
    size = np.sqrt(np.mean(found.inputs**2, axis=1))
    assert np.all(found.input_deviation > 0.5 * size)
    directions = found.inputs / np.linalg.norm(found.inputs, axis=1, keepdims=True)
    true = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
    assert np.all(np.max(directions @ true.T, axis=1) > 1 - 1e-6)


@pytest.mark.parametrize("told", ["gelu", "leaky_relu", "sigmoid", "hard_tanh"])
def test_another_activation_gives_no_wrong_claim(dense_client, assert_dense_honest, told) -> None:
    inputs, truth = _batch(6)
    client = dense_client((96, 64, 10), 4, 6, inputs=inputs[:4], labels=truth[:4])
    layers = DenseLayers(
        client.layers.kernels,
        client.layers.biases,
        client.layers.kernel_gradients,
        client.layers.bias_gradients,
        (told,),
        client.layers.dtype,
    )
    assert_dense_honest(recover_dense(layers, 4), inputs[:4], truth[:4])


def test_an_example_with_next_to_no_gradient_loses_no_other(dense_client, assert_dense_honest) -> None:
    """A label that is predicted to 1e-7: its share of the gradient is smaller than the rounding of the others'."""
    inputs, truth = _batch(7)
    client = dense_client(WIDTHS, BATCH, 7, inputs=inputs, labels=truth)
    prediction = client.layers.predictions(0, inputs)
    for share in (1e-4, 1e-7):
        truth[0] = (1 - share) * prediction[0] + share * np.eye(10)[3]
        weak = dense_client(WIDTHS, BATCH, 7, inputs=inputs, labels=truth)
        found = recover_dense(weak.layers, BATCH)
        given, place = assert_dense_honest(found, inputs, truth)
        assert given >= BATCH - 1
        assert set(place[place >= 0]) >= set(range(1, BATCH))


def test_float64_gradients_without_biases_are_honest_too(dense_client, assert_dense_honest) -> None:
    inputs, truth = _batch(8)
    client = dense_client(WIDTHS, BATCH, 8, inputs=inputs, labels=truth, bias=False, dtype=np.float64)
    found = recover_dense(client.layers, BATCH)
    assert_dense_honest(found, inputs, truth)
    assert np.all(found.verdict >= Verdict.CONDITIONAL)
    assert np.nanmax(found.label_deviation) < 1e-8


def test_the_result_does_not_depend_on_the_order_of_the_batch(dense_client) -> None:
    inputs, truth = _batch(9)
    order = np.random.default_rng(0).permutation(BATCH)
    one, other = (
        recover_dense(dense_client(WIDTHS, BATCH, 9, inputs=inputs[rows], labels=truth[rows]).layers, BATCH)
        for rows in (np.arange(BATCH), order)
    )
    for result in (one, other):
        assert np.all(result.verdict == Verdict.UNIQUE)
    first, second = (result.inputs[np.argsort(result.inputs[:, 0])] for result in (one, other))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert dataclasses.asdict(one).keys() == dataclasses.asdict(other).keys()
