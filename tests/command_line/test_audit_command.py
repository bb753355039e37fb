"""`softinv audit`, as its users call it: a folder with a report; one line where the input is at fault."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from softinv_jax.audit import System
from softinv_jax.audit.settings import AuditSettings
from softinv_jax.command_line import audit
from softinv_jax.command_line.main import main

SETTINGS = ["--samples", "3", "--images", "1", "--defences", "pruning"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system of tests/audit in place of the settings' network."""
    from functools import partial  # noqa: PLC0415

    from softinv_jax.client import load_photographs  # noqa: PLC0415
    from softinv_jax.images.layer_chain import Dense, Flatten, apply_chain  # noqa: PLC0415

    chain = (Flatten(), Dense("head"))
    data = load_photographs(per_class=4, image_size=4)
    kernel = np.random.default_rng(0).uniform(-0.3, 0.3, (48, data.number_of_classes)).astype(np.float32)
    system = System("small", partial(apply_chain, chain), {"head": {"kernel": kernel}}, chain, data)
    monkeypatch.setattr("softinv_jax.audit.system.make_system", lambda *args: system)


def test_a_folder_with_a_report(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "audit"
    assert main(["audit", "--out", str(folder), *SETTINGS, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results == json.loads((folder / "results.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["cells", "figures", "report.html", "results.json"]
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == ["images", "labels", "leakage-pruning"]
    assert results["baseline"]["certain"]["count"] == 3
    assert results["settings"]["samples"] == 3
    kept = sorted((folder / "cells").iterdir())
    assert len(kept) == 7
    # Again: a cell that was cut off is computed again, the others are read.
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    (folder / "report.html").unlink()
    assert main(["audit", "--out", str(folder), *SETTINGS]) == 0
    assert "The report:" in capsys.readouterr().out
    again = json.loads((folder / "results.json").read_text())

    def check(path: tuple, second: object, first: object) -> None:
        # Computed beside fewer others, sums may round differently; findings quote errors that are such roundings.
        if path[0].key not in ("seconds", "findings"):
            assert second == (pytest.approx(first, rel=1e-4, abs=1e-6) if isinstance(first, float) else first), path

    jax.tree_util.tree_map_with_path(check, again, results)
    assert (folder / "report.html").exists()


def test_what_real_updates_give_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.uniform(-0.5, 0.5, (48, 10)).astype(np.float32)
    np.savez(tmp_path / "before.npz", **{"head/kernel": kernel})
    names = []
    for number, label in enumerate([np.eye(10)[3], 0.02 + 0.8 * np.eye(10)[5], rng.dirichlet(np.ones(10))]):
        feature = rng.uniform(0, 1, 48)
        powers = np.exp(feature @ kernel)
        gradient = np.outer(feature, powers / powers.sum() - label)
        names.append(str(tmp_path / f"client{number}.npz"))
        np.savez(names[-1], **{"head/kernel": (kernel - 0.5 * gradient).astype(np.float32)})
    folder = tmp_path / "report"
    options = ["--parameters", str(tmp_path / "before.npz"), "--updated", *names, "--learning-rate", "0.5"]
    assert main(["audit", "--out", str(folder), *options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    verdicts = [sample["verdict"] for sample in results["samples"]]
    assert verdicts == ["unique", "unique", "unidentifiable"]
    assert [sample["classes"] for sample in results["samples"][:2]] == [[3], [5]]
    page = (folder / "report.html").read_text()
    for expected in ("client1.npz", "smoothing: class 5; smoothing 0.200", "The labels of 2 of 3 updates leak"):
        assert expected in page


def test_updates_of_more_examples_than_classes_are_told_apart_by_dense_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    sizes = (48, 100, 5)
    names = ("fc1", "fc2")
    before = {}
    for name, inputs, outputs in zip(names, sizes[:-1], sizes[1:], strict=True):
        before[f"{name}.weight"] = rng.uniform(-1, 1, (outputs, inputs)).astype(np.float32) / np.float32(inputs**0.5)
        before[f"{name}.bias"] = rng.uniform(-0.1, 0.1, outputs).astype(np.float32)
    inputs, labels = rng.normal(size=(12, 48)).astype(np.float32), np.eye(5)[rng.integers(0, 5, 12)]
    outputs = inputs @ before["fc1.weight"].T + before["fc1.bias"]
    hidden = np.maximum(outputs, 0)
    logits = hidden @ before["fc2.weight"].T + before["fc2.bias"]
    head = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - labels) / 12
    first = (head @ before["fc2.weight"]) * (outputs > 0)
    gradients = {"fc1.weight": first.T @ inputs, "fc2.weight": head.T @ hidden}
    gradients |= {"fc1.bias": first.sum(axis=0), "fc2.bias": head.sum(axis=0)}
    np.savez(tmp_path / "before.npz", **before)
    # Large steps, so that the rounding of the parameters is small beside them.
    after = {name: (array - 5 * gradients[name]).astype(np.float32) for name, array in before.items()}
    np.savez(tmp_path / "after.npz", **after)
    files = ["--parameters", str(tmp_path / "before.npz"), "--updated", str(tmp_path / "after.npz")]
    options = [*files, "--learning-rate", "5", "--batch-size", "12", "--out", str(tmp_path / "report"), "--json"]
    assert main(["audit", *options]) == 0
    examples = json.loads(capsys.readouterr().out)["batches"][0]["examples"]
    found = [example["classes"] for example in examples if example["verdict"] in ("unique", "conditional")]
    assert sorted(found) == sorted([label] for label in labels.argmax(axis=1).tolist())


@pytest.mark.parametrize("steps", [1, 2])
def test_more_examples_than_classes_are_counted(steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One head alone: how many of each class, for sure after one step, as a likelihood after several."""
    rng = np.random.default_rng(0)
    weight, features = rng.uniform(-0.1, 0.1, (5, 16)), 1 + 0.001 * rng.normal(size=(9, 16))
    classes = np.array([0, 0, 0, 1, 1, 3, 3, 3, 4])
    powers = np.exp(features @ weight.T)
    error = (powers / powers.sum(axis=1, keepdims=True) - np.eye(5)[classes]) / 9
    before = {"fc.weight": weight.astype(np.float32), "fc.bias": np.zeros(5, np.float32)}
    gradients = {"fc.weight": error.T @ features, "fc.bias": error.sum(axis=0)}
    after = {name: (array - 0.5 * gradients[name]).astype(np.float32) for name, array in before.items()}
    np.savez(tmp_path / "before.npz", **before)
    np.savez(tmp_path / "after.npz", **after)
    files = ["--parameters", str(tmp_path / "before.npz"), "--updated", str(tmp_path / "after.npz")]
    options = [*files, "--learning-rate", str(0.5 / steps), "--local-steps", str(steps), "--batch-size", "9"]
    assert main(["audit", *options, "--out", str(tmp_path / "report"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    expected = [3, 2, 0, 3, 1] if steps == 1 else [None] * 5
    assert results["counts"][0]["counts"] == expected
    assert f"for sure of {5 if steps == 1 else 0} of 5 classes" in results["findings"][0]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "class 0: 3, class 1: 2, class 3: 3, class 4: 1" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "none.toml"], "none.toml: cannot be read (No such file"),
        (["--samples", "0"], "samples = 0: give 1 or more"),
        (["--network", "vgg"], "choose among lenet"),
        (["--defences", "prune"], "defence 'prune' is unknown"),
        (["--dataset", "imagenet9"], "imagenet9"),
        (["--parameters", "none.npz"], "none.npz: no such file"),
        (["--learning-rate", "0.1"], "--learning-rate describes an update; give --updated"),
        (["--head", "fc"], "--head goes with --updated"),
        (["--updated", "a.npz"], "--updated needs --parameters"),
        (["--updated", "a.npz", "--parameters", "b.npz", "--quick"], "--quick is for a system to simulate"),
        (
            ["--updated", "a.npz", "--parameters", "b.npz", "--batch-size", "x", "--learning-rate", "1"],
            "-size x",
        ),
        (["--updated", "a.npz", "--parameters", "b.npz"], "b.npz: no such file"),
    ],
)
def test_one_line_says_what_is_wrong(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--out", str(tmp_path / "audit"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "audit" / "report.html").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["audit", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_options_go_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "audit.toml").write_text("samples = 50\nlabel_format = 'mixup'\n")
    parsed: list[AuditSettings] = []
    import argparse  # noqa: PLC0415

    parser = argparse.ArgumentParser()
    audit.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["audit", "--config", str(tmp_path / "audit.toml"), "--samples", "2"])
    parsed.append(audit._settings(arguments))
    assert (parsed[0].samples, parsed[0].images, parsed[0].label_format) == (2, 2, "mixup")
