"""The judges of the soundness and field benchmarks: falsified truth must be counted as wrong."""

from dataclasses import replace
from importlib import import_module as module
from pathlib import Path

import numpy as np
import pytest

from softinv_jax.client import load_photographs

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_names_of_the_grid_are_unique() -> None:
    names = [cell.name for cell in module("soundness").cells()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("options", "rank"), [({"examples": 3}, 3), ({"steps": 3}, 3), ({}, 1)])
def test_several_examples_and_steps_show_in_the_rank(options: dict[str, int], rank: int) -> None:
    clients_module = module("soundness_clients")
    clients = clients_module.draw(clients_module.Cell(name="rank", **options), 3, seed=0)
    values = np.linalg.svd(clients.gradient.astype(float), compute_uv=False)
    assert np.all(np.sum(values > 1e-6 * values[:, :1], axis=1) == rank)


def test_judge_calls_falsified_truth_wrong() -> None:
    """The same gradients, judged by another label, another factor, or as if they were of two examples."""
    soundness, clients_module = module("soundness"), module("soundness_clients")
    cell = clients_module.Cell(name="judge", label="hard", bias=True)
    clients = clients_module.draw(cell, 4, seed=0)
    other = replace(clients, label=np.roll(clients.label, 1, axis=2))
    counts = soundness.judge(cell, clients)
    assert (counts["unique_right"], counts["unique_wrong"], counts["entries_beyond"]) == (4, 0, 0)
    assert counts["entries_told"] == 4 * 10
    assert soundness.judge(cell, other)["wrong_label"] == 4
    assert soundness.judge(replace(cell, examples=2), clients)["wrong_label"] == 4
    assert soundness.judge(replace(cell, factor=0.5), clients)["wrong_loss"] == 4
    assert soundness.judge(replace(cell, loss="bce_mean"), clients)["wrong_loss"] == 4


def test_compare_names_what_is_lost(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    row = '{"cell": "%s", "unique_right": %d, "gradients": 100}'
    before.write_text(f'{{"rows": [{row % ("kept", 100)}, {row % ("lost", 100)}, {row % ("none", 0)}]}}')
    now = [
        {"cell": name, "unique_right": right, "gradients": 200}
        for name, right in (("kept", 197), ("lost", 195), ("none", 0), ("new", 0))
    ]
    assert module("soundness").compare(now, before) == ["lost: 100.0% before, 97.5% now"]


def test_field_counts_real_training() -> None:
    """One example in one step is found; judged by another label it is wrong; four examples are not one."""
    pytest.importorskip("torch", reason="real training needs PyTorch")
    field, clients = module("field"), module("field_clients")
    photographs = load_photographs(split="test", per_class=2)
    images = np.asarray(photographs.normalised()).transpose(0, 3, 1, 2).copy()
    classes = photographs.classes.astype(np.int64)
    sent = clients.served("two convolutions", images, classes, 0)
    one = field.Setting("smoothing", "sgd", 1, 1)
    updates = field.train_clients(one, "two convolutions", sent, images, classes, 2)
    assert field.judge(one, updates)["counts"] == {"unique right": 2}
    falsified = [replace(update, label=np.roll(update.label, 1, axis=1)) for update in updates]
    result = field.judge(one, falsified)
    assert result["counts"] == {"unique wrong": 2}
    assert result["wrong"] == ["two convolutions"] * 2
    assert field.judge(replace(one, loss="bce"), updates)["counts"] == {"unique wrong": 2}
    four = replace(one, examples=4)
    result = field.judge(four, field.train_clients(four, "two convolutions", sent, images, classes, 2))
    assert not [name for name in result["counts"] if name.startswith(("unique", "conditional"))]
    assert result["mean_labels"]["beyond"] == 0


@pytest.mark.parametrize("name", ["group norm", "sigmoid LeNet", "vision transformer", "ResNet, batch norm"])
def test_every_network_sends_an_outer_product(name: str) -> None:
    """Of one example in one step of SGD, up to the rounding of the parameters."""
    pytest.importorskip("torch", reason="real training needs PyTorch")
    field, clients = module("field"), module("field_clients")
    rng = np.random.default_rng(0)
    images, classes = rng.normal(size=(32, 3, 32, 32)).astype(np.float32), rng.integers(0, 10, 32)
    sent = clients.served(name, images, classes, 1)
    setting = field.Setting("cross_entropy", "momentum", 1, 1)
    (update,) = field.train_clients(setting, name, sent, images, classes, 1)
    values = np.linalg.svd(np.asarray(update.observation.weight_gradient, float), compute_uv=False)
    assert values[1] < 1e-3 * values[0]
    np.testing.assert_allclose(np.sum(update.observation.bias_gradient), 0, atol=1e-4)
