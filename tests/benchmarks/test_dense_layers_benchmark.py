"""The benchmark of dense layers: its gradients, its judge, its peers, and the script at its smallest."""

import json
import sys
from importlib import import_module as module
from pathlib import Path

import numpy as np
import pytest

WIDTHS = [48, 40, 10]


def make(size: int, family: str = "hard", seed: int = 0):
    clients = module("dense_clients")
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(size, WIDTHS[0])).astype(np.float32)
    count = size * (2 if family == "mixup" else 1)
    labels = clients.draw_labels(generator.integers(0, 10, count), 10, family, generator)
    network = clients.draw(WIDTHS, None, True, "relu", seed)
    return network, inputs, labels


def test_the_gradient_is_the_mean_of_the_examples_own() -> None:
    network, inputs, labels = make(3)
    gradients = module("dense_clients").gradients
    together = gradients(network, inputs, labels)
    alone = [gradients(network, inputs[[index]], labels[[index]]) for index in range(3)]
    for place in range(2):
        mean = np.mean([one.kernel_gradients[place] for one in alone], axis=0)
        np.testing.assert_allclose(together.kernel_gradients[place], mean, atol=1e-6)


@pytest.mark.parametrize("family", ["hard", "smoothing", "mixup"])
def test_labels_are_distributions(family: str) -> None:
    _, _, labels = make(4, family)
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    assert labels.shape == (4, 10)


def test_the_judge_counts_each_example_once_and_what_is_not_there() -> None:
    network, inputs, labels = make(4)
    clients = module("dense_clients")
    layers = clients.gradients(network, inputs, labels)
    found = np.concatenate([inputs[:2], inputs[:1], inputs[2:3] + 1e-2, np.full((1, WIDTHS[0]), 9.0)])
    told = labels[[0, 1, 0, 2, 3]]
    counts = clients.judge(layers, 0, inputs, labels, found, told)
    assert {name: counts[name] for name in ("live", "images", "labels", "both", "claimed", "spurious")} == {
        "live": 4,
        "images": 2,
        "labels": 3,
        "both": 2,
        "claimed": 5,
        "spurious": 1,
    }


def test_the_peers_find_a_small_batch() -> None:
    network, inputs, labels = make(4)
    clients, peers = module("dense_clients"), module("dense_peers")
    layers = clients.gradients(network, inputs, labels, np.float64)
    found, told = peers.peeling(layers, 4, np.float64)
    assert clients.judge(layers, 0, inputs, labels, found, told)["both"] == 4
    found = peers.spear(layers, 4, 20.0, 0)
    assert clients.judge(layers, 0, inputs, labels, found, None)["images"] == 4


def test_the_script_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--quick", "--dataset", "photographs", "--no-peers", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["dense_layers.py", *options])
    module("dense_layers").main()
    rows = json.loads((tmp_path / "dense_layers.json").read_text())["rows"]
    assert [row["both"] for row in rows] == [row["live"] for row in rows] == [4, 6]
    assert (tmp_path / "dense_layers.png").exists()


def test_the_bound_grows_with_the_noise_and_with_the_batch() -> None:
    """More noise, so much more deviation; and no example alone is better known in company."""
    network, inputs, labels = make(3)
    best_deviations = module("dense_clients").best_deviations
    together = best_deviations(network, inputs, labels, 1e-6)
    np.testing.assert_allclose(best_deviations(network, inputs, labels, 1e-3), 1e3 * together, rtol=1e-9)
    # Alone an example's gradient is not divided by three.
    alone = np.concatenate([best_deviations(network, inputs[[i]], labels[[i]], 3e-6) for i in range(3)]) / 3
    assert np.all(together > alone)
