"""`--parameters BEFORE --updated AFTER`: what clients sent back, as a user has it on disk."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from softinv_jax.client import (
    LeNet,
    apply_function,
    initialise,
    load_photographs,
    per_sample_model_gradients,
    sample_batch,
)
from softinv_jax.command_line.main import main

CLASSES, FEATURES = 6, 16
RATE = 0.1


def save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def files(tmp_path: Path, draw: Any) -> dict[str, Any]:
    """A head by PyTorch's names, before and after one step on a mixup label, and a layer below that stays."""
    sample = draw("mixup", 3, number_of_classes=CLASSES, features=FEATURES, has_bias=True)
    before = {"body.weight": np.ones((FEATURES, 3), np.float32), "fc.weight": sample.weight, "fc.bias": sample.bias}
    gradient = {"fc.weight": sample.gradient, "fc.bias": sample.bias_gradient}
    after = before | {name: before[name] - np.float32(RATE) * change for name, change in gradient.items()}
    return {
        "label": sample.label,
        "before": save(tmp_path / "before.npz", before),
        "after": save(tmp_path / "after.npz", after),
        "arrays": after,
        "out": str(tmp_path / "out.npz"),
    }


def test_recover_takes_an_update(files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["recover", "--parameters", files["before"], "--updated", files["after"], "--out", files["out"]]
    assert main([*command, "--learning-rate", str(RATE), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["verdicts"]["unique"] == 1
    assert summary["update"].startswith("Exact up to the rounding")
    with np.load(files["out"]) as found:
        np.testing.assert_allclose(found["labels"][0, 0], files["label"], atol=1e-5)
    assert main([*command, "--learning-rate", str(RATE), "--local-steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "Approximate: the average gradient of 2 local steps" in text
    with np.load(files["out"]) as found:
        assert found["verdict"].item() != "unique"


def test_without_the_learning_rate_it_is_recovered(files: dict[str, Any], tmp_path: Path) -> None:
    other = save(tmp_path / "other.npz", files["arrays"])
    command = ["recover", "--parameters", files["before"], "--updated", files["after"], other, "--out", files["out"]]
    assert main(command) == 0
    with np.load(files["out"]) as found:
        np.testing.assert_allclose(found["labels"][:, 0], [files["label"]] * 2, atol=1e-4)
        np.testing.assert_allclose(found["scale"], RATE, rtol=1e-3)


TOLD_VARIANCE = ("--method", "variance", "--label-format", "mixup")
BAD_OPTIONS = {
    "neither": (["recover", "--out", "OUT"], "give either OBSERVATION.npz, or --parameters"),
    "both": (["recover", "BEFORE", "--parameters", "BEFORE", "--updated", "AFTER", "--out", "OUT"], "give either"),
    "no parameters": (["recover", "--updated", "AFTER", "--out", "OUT"], "--updated needs --parameters"),
    "no update": (["recover", "BEFORE", "--parameters", "BEFORE", "--out", "OUT"], "go with --updated"),
    "rate without update": (["recover", "BEFORE", "--learning-rate", "1", "--out", "OUT"], "give --updated with it"),
    "variance of unknown rate": (
        [*("recover", "--parameters", "BEFORE", "--updated", "AFTER", "--out", "OUT"), *TOLD_VARIANCE],
        "needs a known scale",
    ),
    "bad rate": (
        ["recover", "--parameters", "BEFORE", "--updated", "AFTER", "--learning-rate", "-1", "--out", "OUT"],
        "learning_rate must be positive",
    ),
    "bad head": (
        ["recover", "--parameters", "BEFORE", "--updated", "AFTER", "--head", "top", "--out", "OUT"],
        "name='top'",
    ),
    "out is an input": (
        ["recover", "--parameters", "BEFORE", "--updated", "AFTER", "--out", "AFTER"],
        "would overwrite an input",
    ),
    "other arrays": (
        ["recover", "--parameters", "BEFORE", "--updated", "OTHER", "--out", "OUT"],
        "must hold the arrays of",
    ),
    "no such file": (["recover", "--parameters", "none.pt", "--updated", "AFTER", "--out", "OUT"], "no such file"),
    "invert neither": (["invert", "--model", "lenet", "--parameters", "BEFORE", "--out", "OUT"], "give either"),
    "invert resnet": (
        ["invert", "--model", "resnet18", "--parameters", "BEFORE", "--updated", "AFTER", "--out", "OUT"],
        "chains of layers",
    ),
    "invert rename": (
        ["invert", "--model", "lenet", "--parameters", "BEFORE", "--updated", "AFTER", "--rename", "a", "--out", "OUT"],
        "give OLD=NEW",
    ),
    "invert other layers": (
        ["invert", "--model", "lenet", "--parameters", "BEFORE", "--updated", "AFTER", "--out", "OUT"],
        "no layer 'conv1'",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_input_is_one_line(
    case: str, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, said = BAD_OPTIONS[case]
    other = save(tmp_path / "other.npz", {"fc.weight": files["arrays"]["fc.weight"]})
    named = {"BEFORE": files["before"], "AFTER": files["after"], "OUT": files["out"], "OTHER": other}
    before = Path(files["after"]).read_bytes()
    assert main([named.get(word, word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert Path(files["after"]).read_bytes() == before
    assert not Path(files["out"]).exists()


def torch_names(parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    """A linen LeNet as PyTorch's Sequential would name and shape it."""
    arrays = {}
    for name, value in flatten_dict(parameters, sep="/").items():
        layer, part = name.split("/")
        new = {"conv1": "0", "conv2": "2", "conv3": "4", "head": "7"}[layer]
        array = np.asarray(value)
        if layer == "head":
            array = array.T.reshape(-1, 8, 8, 12).transpose(0, 3, 1, 2).reshape(-1, 768)
        elif part == "kernel":
            array = array.transpose(3, 2, 0, 1)
        arrays[f"{new}.{'weight' if part == 'kernel' else 'bias'}"] = array
    return arrays


def test_invert_takes_updates_in_pytorchs_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_photographs(per_class=3)
    network = LeNet(10)
    before = jax.device_get(initialise(network, jax.random.key(0), (32, 32, 3)))
    batch = sample_batch(jax.random.key(1), "mixup", data.normalised(), data.classes, 10, 2)
    gradients = per_sample_model_gradients(apply_function(network), before, batch.images, batch.labels)
    paths = [save(tmp_path / "before.npz", torch_names(before))]
    for index in range(2):
        after = jax.tree.map(lambda leaf, g, i=index: leaf - np.float32(RATE) * np.asarray(g)[i], before, gradients)
        paths.append(save(tmp_path / f"after{index}.npz", torch_names(after)))
    out = tmp_path / "images.npz"
    command = ["invert", "--model", "lenet", "--parameters", paths[0], "--updated", *paths[1:], "--out", str(out)]
    renamed = ["--rename", "0=conv1", "2=conv2", "4=conv3", "7=head"]
    assert main([*command, *renamed, "--learning-rate", str(RATE), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["update"].startswith("Exact")
    assert summary["method"] == "exact"
    with np.load(out) as found:
        np.testing.assert_allclose(found["labels"], batch.labels, atol=1e-5)
        # Float32 parameters keep fewer digits than float32 gradients.
        assert set(found["verdict"].tolist()) <= {"exact", "approximate"}
        error = np.sqrt(np.mean((found["images"] - np.asarray(batch.images)) ** 2, axis=(1, 2, 3)))
        assert np.all(error < 0.05)
        assert np.all(error < 5 * found["expected_error"])
