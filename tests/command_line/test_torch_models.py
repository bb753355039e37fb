"""--torch-model: a module of the user's own, from the command line to images and a report."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softinv_jax.command_line.main import main

pytestmark = pytest.mark.filterwarnings("ignore")
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.nn import functional

MODEL = """
import torch
from torch import nn
from beside import WIDTH

print("made by the user's own code")

class Net(nn.Module):
    def __init__(self, classes=6, width=WIDTH):
        super().__init__()
        first, second = nn.Conv2d(1, width, 3, 2, 1), nn.Conv2d(width, 8, 3, 2, 1)
        self.body = nn.Sequential(first, nn.Sigmoid(), second, nn.Sigmoid())
        self.fc = nn.Linear(48, classes)

    def forward(self, images):
        return self.fc(torch.flatten(self.body(images), 1))

class Normalised(Net):
    def __init__(self):
        super().__init__()
        self.body.insert(1, nn.BatchNorm2d(WIDTH))

instance = Net()
number = 3

def fails():
    raise RuntimeError("no such weights")
"""
RATE = 0.5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model file, parameters before and after one step, gradients; of a chain and of a network that is none."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "model.py").write_text(MODEL)
    (folder / "beside.py").write_text("WIDTH = 8\n")
    sys.path.insert(0, str(folder))
    import model  # noqa: PLC0415

    sys.path.remove(str(folder))
    paths: dict[str, Any] = {"model": str(folder / "model.py"), "folder": folder}
    image = np.random.default_rng(0).uniform(-1, 1, (12, 8, 1)).astype(np.float32)
    label = torch.full((1, 6), 0.04)
    label[0, 2] = 0.8
    for name, kind in (("net", model.Net), ("norm", model.Normalised)):
        torch.manual_seed(0)
        module = kind().train()
        with torch.no_grad():
            for value in module.parameters():
                value.uniform_(-0.5, 0.5)
        torch.save({"model": module.state_dict(), "epoch": 3}, folder / f"{name}_before.pt")
        optimiser = torch.optim.SGD(module.parameters(), lr=RATE)
        functional.cross_entropy(module(torch.from_numpy(image.transpose(2, 0, 1)[None].copy())), label).backward()
        torch.save({key: value.grad for key, value in module.named_parameters()}, folder / f"{name}_gradients.pt")
        optimiser.step()
        torch.save(module.state_dict(), folder / f"{name}_after.pt")
        paths |= {f"{name}_{part}": str(folder / f"{name}_{part}.pt") for part in ("before", "after", "gradients")}
    sys.modules.pop("model")
    return paths | {"image": image, "label": label.numpy()[0]}


def invert(files: dict[str, Any], out: Path, *options: str, name: str = "Net", kind: str = "net") -> list[str]:
    given = ("--parameters", files[f"{kind}_before"], "--image-size", "12", "8", "--channels", "1", "--out", str(out))
    return ["invert", "--torch-model", f"{files['model']}:{name}", *given, *options]


def check(files: dict[str, Any], out: Path) -> None:
    with np.load(out) as found:
        np.testing.assert_allclose(found["images"][0], files["image"], atol=0.01)
        np.testing.assert_allclose(found["labels"][0], files["label"], atol=1e-4)
        assert found["verdict"].tolist() == ["exact"]


def test_an_update_to_an_image(files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images.npz"
    options = ("--updated", files["net_after"], "--learning-rate", str(RATE), "--json")
    assert main(invert(files, out, *options, "--figure", str(tmp_path / "images.png"))) == 0
    # What the user's code prints does not get into the JSON.
    summary = json.loads(capsys.readouterr().out)
    assert (summary["method"], summary["model"]) == ("exact", f"{files['model']}:Net")
    check(files, out)
    assert (tmp_path / "images.png").stat().st_size > 1000


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_to_images(files: dict[str, Any], tmp_path: Path, stacked: bool) -> None:
    path, out = files["net_gradients"], tmp_path / "images.npz"
    if stacked:
        gradients = torch.load(path)
        path = str(tmp_path / "two.pt")
        torch.save({name: torch.stack([value, value]) for name, value in gradients.items()}, path)
    arguments = '{"classes": 6, "width": 8}' if stacked else "[6]"
    assert main(invert(files, out, "--gradients", path, "--torch-arguments", arguments)) == 0
    with np.load(out) as found:
        assert found["images"].shape == (1 + stacked, 12, 8, 1)
        np.testing.assert_allclose(found["images"][-1], files["image"], atol=0.01)


def test_an_instance_and_a_process_of_its_own(files: dict[str, Any], tmp_path: Path) -> None:
    """As people run it: nothing of the test's own imports helps."""
    out = tmp_path / "images.npz"
    options = invert(files, out, "--updated", files["net_after"], "--learning-rate", str(RATE), name="instance")
    program = [sys.executable, "-m", "softinv_jax", *options]
    finished = subprocess.run(program, capture_output=True, text=True, timeout=300, check=True, cwd=tmp_path)
    assert "1 images by exact: 1 exact." in finished.stdout
    check(files, out)


def test_what_is_no_chain_is_matched(files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchax")
    out = tmp_path / "images.npz"
    given = invert(files, out, "--gradients", files["norm_gradients"], "--steps", "3", name="Normalised", kind="norm")
    assert main([*given, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["method"] == "matching"
    with np.load(out) as found:
        np.testing.assert_allclose(found["labels"][0], files["label"], atol=1e-4)
    assert main([*given, "--method", "exact"]) == 2
    assert "batch_norm" in capsys.readouterr().err


def test_the_report_shows_images(files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--torch-model", f"{files['model']}:Net", "--image-size", "12", "8", "--channels", "1")
    updates = ("--parameters", files["net_before"], "--updated", files["net_after"], files["net_after"])
    command = ["audit", *given, *updates, "--learning-rate", str(RATE), "--out", str(tmp_path / "report")]
    assert main(command) == 0
    assert "2 of 2 images come back exactly." in capsys.readouterr().out
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["images"] == {"method": "exact", "reason": None, "verdicts": {"exact": 2}}
    assert results["advice"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "What to do next" in page
    assert page.count("data:image/png") == 1
    assert (tmp_path / "report" / "figures" / "images.png").exists()


def test_clients_of_a_module_are_audited(
    files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated ones, with gray images that are not square, and a defence."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 12, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.arange(12) % 6)
    given = ("--torch-model", f"{files['model']}:Net", "--image-size", "12", "8", "--channels", "1")
    command = ["audit", *given, "--parameters", files["net_before"], "--dataset", str(tmp_path / "data.npz")]
    command += ["--samples", "3", "--images", "1", "--defences", "pruning", "--out", str(tmp_path / "report")]
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["system"]["name"] == "Net"
    assert results["baseline"]["image_verdicts"]["exact"] == 1
    assert main([*command, "--network", "lenet"]) == 2
    assert "either --network or --torch-model" in capsys.readouterr().err
    assert main([*command, "--channels", "3"]) == 2
    assert "cannot take images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--torch-model": "nowhere.py:Net"}, "no such file"),
        ({"--torch-model": "model.py"}, "FILE.py:NAME"),
        ({"--torch-model": "{model}:Other"}, "defines no Other"),
        ({"--torch-model": "{model}:number"}, "fails"),
        ({"--torch-model": "{model}:fails"}, "no such weights"),
        ({"--torch-model": "{folder}/net_before.pt:Net"}, "running it fails|no Python file"),
        ({"--torch-arguments": "{"}, "not JSON"),
        ({"--torch-arguments": "3"}, "object of names"),
        ({"--torch-arguments": '{"depth": 2}'}, "--torch-arguments"),
        ({"--torch-arguments": '{"width": 4}'}, "body.0.bias"),
        ({"--image-size": "16"}, "cannot take images"),
        ({"--channels": "3"}, "cannot take images"),
        ({"--parameters": "{norm_before}"}, "lacks body.2.bias"),
        ({"--updated": "{norm_after}"}, "body.2.weight of the module is not among"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], said: str
) -> None:
    options = {
        "--torch-model": "{model}:Net",
        "--parameters": "{net_before}",
        "--updated": "{net_after}",
        "--image-size": "12 8",
        "--channels": "1",
        "--learning-rate": "0.5",
        "--out": str(tmp_path / "images.npz"),
    }
    command = ["invert"]
    for option, value in (options | change).items():
        filled = value
        for name, path in files.items():
            filled = filled.replace("{" + name + "}", str(path))
        command += [option, *(filled.split(" ") if option == "--image-size" else [filled])]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "images.npz").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--torch-model", "m.py:N"], "--image-size"),
        (["--model", "lenet", "--torch-model", "m.py:N", "--image-size", "8"], "either --model"),
        (["--model", "lenet", "--torch-arguments", "{}"], "--torch-model"),
        (["--model", "lenet", "--evaluation-mode"], "--torch-model"),
        (["--torch-model", "m.py:N", "--image-size", "8", "8", "8"], "height and width"),
        (["--torch-model", "m.py:N", "--image-size", "0"], "--image-size 0"),
        (["--torch-model", "m.py:N", "--image-size", "8", "--rename", "a=b"], "--rename"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["invert", "--parameters", "p.pt", "--gradients", "g.pt", "--out", "o.npz", *options]) == 2
    assert said in capsys.readouterr().err
