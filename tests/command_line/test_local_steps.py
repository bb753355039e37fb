"""`softinv invert --local-steps K`: parameters before and after several steps, image and label back."""

import json
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from softinv_jax.command_line.main import main

RATE = 0.1


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def train(parameters: dict[str, np.ndarray], image: np.ndarray, label: np.ndarray, steps: int) -> dict[str, np.ndarray]:
    """A client in NumPy, float32: one hidden layer of sigmoids, with momentum 0.9."""
    held = {name: array.copy() for name, array in parameters.items()}
    velocity = {name: np.zeros_like(array) for name, array in held.items()}
    for _ in range(steps):
        hidden = 1 / (1 + np.exp(-(image @ held["dense1/kernel"] + held["dense1/bias"])))
        slope = softmax(hidden @ held["head/kernel"] + held["head/bias"]) - label
        back = (held["head/kernel"] @ slope) * hidden * (1 - hidden)
        gradients = {
            "dense1/kernel": np.outer(image, back),
            "dense1/bias": back,
            "head/kernel": np.outer(hidden, slope),
            "head/bias": slope,
        }
        for name, gradient in gradients.items():
            velocity[name] = np.float32(0.9) * velocity[name] + gradient.astype(np.float32)
            held[name] = held[name] - np.float32(RATE) * velocity[name]
    return held


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("steps")
    rng = np.random.default_rng(0)
    crop = data.astronaut()[60:120:10, 200:260:10] / 255.0
    image = ((crop - crop.mean()) / crop.std()).astype(np.float32)
    shapes = {"dense1/kernel": (image.size, 24), "dense1/bias": (24,), "head/kernel": (24, 5), "head/bias": (5,)}
    parameters = {name: rng.uniform(-0.3, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    label = np.array([0.04, 0.84, 0.04, 0.04, 0.04], np.float32)
    paths = {"before": folder / "before.npz", "after": folder / "after.npz"}
    np.savez(paths["before"], **parameters)
    np.savez(paths["after"], **train(parameters, image.reshape(-1), label, 3))
    return {**paths, "image": image, "label": label}


def command(files: dict, out: Path, *options: str) -> list[str]:
    return [
        *("invert", "--model", "mlp", "--activation", "sigmoid", "--parameters", str(files["before"])),
        *("--updated", str(files["after"]), "--image-size", "6", "--momentum", "0.9", "--out", str(out), *options),
    ]


def test_image_and_label_of_three_steps(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images.npz"
    assert main(command(files, out, "--local-steps", "3", "--learning-rate", str(RATE), "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["method"] == "client"
    assert summary["verdicts"]["exact"] == 1
    with np.load(out) as found:
        np.testing.assert_allclose(found["images"][0], files["image"], atol=1e-5)
        np.testing.assert_allclose(found["labels"][0], files["label"], atol=1e-5)
        assert found["label_verdict"].tolist() == ["unique"]


def test_several_examples_are_left_to_the_layers_that_tell_them_apart(
    files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More examples than classes, which the head alone would refuse."""

    def invert(*_: object, batch_size: int, **__: object) -> None:
        raise ValueError(f"asked for {batch_size} in the average gradient")

    monkeypatch.setattr("softinv_jax.inversions.invert", invert)
    options = ("--local-steps", "3", "--learning-rate", str(RATE), "--batch-size", "6")
    assert main(command(files, tmp_path / "images.npz", *options)) == 2
    assert "asked for 6 in the average gradient" in capsys.readouterr().err


@pytest.mark.parametrize("by_torch", [False, True])
def test_minibatches_of_a_batch_through_relu(
    dense_run, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_torch: bool
) -> None:
    """By the first layer; neither rate nor momentum told, nor, for PyTorch's files, which layer is which."""
    run = dense_run(6, 9, 2)
    for name, tree in (("before", run.sent), ("after", run.returned)):
        arrays = {f"{layer}/{part}": array for layer, held in tree.items() for part, array in held.items()}
        if by_torch:
            numbers = {"dense1": 1, "head": 3}
            arrays = {f"{numbers[layer]}.weight": held["kernel"].T for layer, held in tree.items()}
            arrays |= {f"{numbers[layer]}.bias": held["bias"] for layer, held in tree.items()}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    out = tmp_path / "images.npz"
    paths = ("--parameters", str(tmp_path / "before.npz"), "--updated", str(tmp_path / "after.npz"), "--out", str(out))
    options = ("--image-size", "4", "--batch-size", "auto", "--local-steps", "9", "--minibatch-size", "2", "--json")
    assert main(["invert", "--model", "mlp", *paths, *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["verdicts"]["exact"] == 6
    assert "minibatches of 2" in summary["update"]
    images = run.inputs.reshape(-1, 3, 4, 4).transpose(0, 2, 3, 1) if by_torch else run.inputs
    with np.load(out) as found:
        distance = np.abs(found["images"].reshape(6, 1, -1) - images.reshape(6, -1)).max(axis=2)
        assert sorted(np.argmin(distance, axis=1)) == list(range(6))
        assert distance.min(axis=1).max() < 1e-4
