"""Rows of the gradient that hold one example, and what is left when examples are taken out by duality."""

import numpy as np
import pytest

from softinv_jax.dense_layers.choice import choose_layers
from softinv_jax.dense_layers.single_rows import _without, peel


def _rare_units(dense_client, seed: int, batch: int = 8, units: int = 150):
    """Biases so low that a unit is seldom open: many rows of one example."""
    client = dense_client((40, units, 5), batch, seed)
    kernels, biases = list(client.layers.kernels), list(client.layers.biases)
    inputs, labels = client.hidden[0].astype(np.float64), client.labels
    biases[0] = biases[0] - 1.2 * np.linalg.norm(kernels[0], axis=0) * np.sqrt(1.0)
    outputs = inputs @ kernels[0] + biases[0]
    hidden = np.maximum(outputs, 0)
    logits = hidden @ kernels[1] + biases[1]
    prediction = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    head = prediction - labels
    first = (head @ kernels[1].T) * (outputs > 0)
    arrays = [inputs.T @ first / batch, hidden.T @ head / batch], [first.mean(axis=0), head.mean(axis=0)]
    rounded = [[one.astype(np.float32).astype(np.float64) for one in part] for part in arrays]
    return client.replaced(*rounded, biases=biases), inputs, first


@pytest.mark.parametrize("seed", range(4))
def test_what_is_peeled_is_an_example(dense_client, seed) -> None:
    layers, inputs, deltas = _rare_units(dense_client, seed)
    chosen = next(choose_layers(layers, None))
    assert chosen.space.rank == 8
    rows = peel(layers, 0, chosen.space, chosen.following)
    alone = np.count_nonzero(np.any(np.abs(deltas[:, (deltas != 0).sum(axis=0) == 1]) > 0, axis=1))
    assert len(rows) >= alone > 0
    places = []
    for row in rows:
        found = (chosen.space.right @ row.input_coordinates)[:-1]
        distance = np.linalg.norm(inputs - found, axis=1) / np.linalg.norm(inputs, axis=1)
        # One row alone may be two examples' that open the same units: it is not confirmed by another.
        assert distance.min() < 1e-4 or not row.confirmed
        if distance.min() < 1e-4:
            places.append(int(distance.argmin()))
    assert len(set(places)) == len(places) > 0


def test_one_row_is_confirmed_by_another(dense_client) -> None:
    layers, inputs, deltas = _rare_units(dense_client, 0)
    chosen = next(choose_layers(layers, None))
    alone = (deltas[:, (deltas != 0).sum(axis=0) == 1] != 0).sum(axis=1)
    for row in peel(layers, 0, chosen.space, chosen.following):
        place = np.argmin(np.linalg.norm(inputs - (chosen.space.right @ row.input_coordinates)[:-1], axis=1))
        if alone[place] >= 2:
            assert row.confirmed


def test_dense_activity_gives_no_rows(dense_client) -> None:
    """Half of all units open: no row is one example's, and no mixture is taken for one."""
    client = dense_client((60, 80, 5), 24, 1)
    chosen = next(choose_layers(client.layers, None))
    assert peel(client.layers, 0, chosen.space, chosen.following) == []
    leaky = dense_client((60, 80, 5), 4, 1, activation="leaky_relu")
    chosen = next(choose_layers(leaky.layers, None))
    assert peel(leaky.layers, 0, chosen.space, chosen.following) == []


def test_duality_takes_out_one_example_exactly(dense_client) -> None:
    layers, inputs, deltas = _rare_units(dense_client, 2)
    chosen = next(choose_layers(layers, None))
    space = chosen.space
    known = peel(layers, 0, space, chosen.following)[:3]
    assert len(known) == 3
    core = _without(space, known)
    values = np.linalg.svd(core, compute_uv=False)
    assert values[4] > 1e6 * values[5]
    places = [
        int(np.argmin(np.linalg.norm(inputs - (space.right @ row.input_coordinates)[:-1], axis=1))) for row in known
    ]
    others = [place for place in range(8) if place not in places]
    left = (space.noise[:, None] * space.left) @ core @ space.right.T
    rest = deltas[others].T @ np.concatenate([inputs[others], np.ones((5, 1))], axis=1) / 8
    assert np.linalg.norm(left - rest) < 1e-5 * np.linalg.norm(rest)
