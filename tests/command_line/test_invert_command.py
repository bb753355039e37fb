"""`softinv invert`, as its users call it: files in, files out, one line where the input is at fault."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.audit.models import MLP, MODELS
from softinv_jax.client import (
    LeNet,
    apply_function,
    initialise,
    load_photographs,
    per_sample_model_gradients,
    sample_batch,
)
from softinv_jax.command_line import invert
from softinv_jax.command_line.argument_types import ACTIVATION_NAMES
from softinv_jax.command_line.main import main
from softinv_jax.images import refinement
from softinv_jax.images.layer_chain import apply_chain, fcn_chain
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio

COUNT = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("invert")
    data = load_photographs(per_class=3)
    network = LeNet(10)
    parameters = initialise(network, jax.random.key(0), (32, 32, 3))
    batch = sample_batch(jax.random.key(1), "mixup", data.normalised(), data.classes, 10, COUNT)
    gradients = per_sample_model_gradients(apply_function(network), parameters, batch.images, batch.labels)
    paths = {}
    for name, tree in (("parameters", parameters), ("gradients", gradients)):
        paths[name] = str(folder / f"{name}.npz")
        arrays = {key: np.asarray(value) for key, value in flatten_dict(tree, sep="/").items()}
        np.savez(paths[name], **arrays)
    return {**paths, "folder": folder, "batch": batch, "data": data}


def command(files: dict, out: Path, *options: str, **replaced: str) -> list[str]:
    paths = {name: replaced.get(name, files[name]) for name in ("parameters", "gradients")}
    return [
        "invert",
        *("--model", "lenet", "--parameters", paths["parameters"], "--gradients", paths["gradients"]),
        *("--out", str(out), *options),
    ]


def test_images_come_back(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figure = tmp_path / "images.npz", tmp_path / "images.png"
    assert main(command(files, out, "--figure", str(figure), "--json")) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert summary["method"] == "exact"
    assert summary["verdicts"]["exact"] == COUNT
    with np.load(out) as found:
        assert found["images"].shape == (COUNT, 32, 32, 3)
        assert found["labels"].shape == (COUNT, 10)
        assert found["verdict"].tolist() == ["exact"] * COUNT
        assert np.all(found["residual"] < 1e-3)
        np.testing.assert_allclose(found["labels"], files["batch"].labels, atol=1e-4)
        original = files["data"].denormalise(files["batch"].images)
        recovered = files["data"].denormalise(found["images"])
        assert np.all(peak_signal_to_noise_ratio(recovered, original) > 60)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_matching_runs_and_is_honest(files: dict, tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    assert main(command(files, out, "--method", "matching", "--steps", "3")) == 0
    with np.load(out) as found:
        assert found["images"].shape == (COUNT, 32, 32, 3)
        assert found["verdict"].tolist() == ["inconsistent"] * COUNT
        assert np.all(found["residual"] > 1e-2)


def test_refinement_is_asked_for_and_written(files: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The polish itself, which takes long to compile, is tested beside its own code."""
    asked: list[int] = []

    def polished(_: object, __: object, ___: object, recovery: Any, *, steps: int, progress: object) -> Any:
        asked.append(steps)
        return replace(recovery, residual=np.full_like(recovery.residual, 1e-9))

    monkeypatch.setattr(refinement, "refine", polished)
    out = tmp_path / "images.npz"
    assert main(command(files, out, "--method", "exact", "--refine", "7")) == 0
    assert asked == [7]
    with np.load(out) as found:
        assert np.all(found["residual"] == 1e-9)


def test_names_of_models() -> None:
    assert set(invert.MODEL_NAMES) == {*MODELS, MLP}
    assert set(ACTIVATION_NAMES) == set(ACTIVATIONS)


def spoilt(files: dict, folder: Path, name: str, change: Callable[[dict], None]) -> str:
    with np.load(files[name]) as file:
        arrays = dict(file)
    change(arrays)
    path = folder / f"spoilt-{name}.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gradients", lambda arrays: arrays.pop("conv1/kernel"), "missing: conv1/kernel"),
        ("gradients", lambda arrays: arrays.update(other=np.zeros(3)), "unknown: other"),
        ("gradients", lambda arrays: arrays.update({"conv1/bias": np.zeros((3, 5, 12))}), "conv1/bias has shape"),
        ("gradients", lambda arrays: arrays["conv2/bias"].fill(np.nan), "conv2/bias holds entries that are not finite"),
        ("gradients", lambda arrays: arrays.update({"conv1/bias": arrays["conv1/bias"][:1]}), "number of gradients"),
        ("gradients", lambda arrays: arrays.update({"conv1/bias": np.zeros((2, 12), int)}), "must be float"),
        ("parameters", lambda arrays: arrays.update({"head/kernel": np.zeros((700, 10))}), "head/kernel"),
        ("parameters", lambda arrays: arrays.update({"head/kernel/x": np.zeros(1)}), "lies inside another"),
        ("parameters", lambda arrays: arrays.clear(), "no parameters"),
    ],
)
def test_bad_input(
    files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable, said: str
) -> None:
    path = spoilt(files, tmp_path, name, change)
    out = tmp_path / "images.npz"
    assert main(command(files, out, **{name: path})) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "exact", "--model", "resnet18"], "needs a chain"),
        (["--image-size", "40", "--method", "exact"], "head"),
        (["--batch-size", "auto"], "--batch-size auto is for fcn4 and mlp"),
        (["--activation", "relu"], "--activation is for --model mlp"),
        (["--method", "matching", "--unknown-scale"], "--unknown-scale"),
        (["--refine", "0"], "--refine 0"),
        (["--refine", "2", "--unknown-scale"], "--refine"),
        (["--figure", "no/such/folder/x.png"], "folder"),
    ],
)
def test_bad_options(
    files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    out = tmp_path / "images.npz"
    assert main(command(files, out, *options)) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_bad_batch_size(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command(files, tmp_path / "images.npz", "--batch-size", "0"))
    assert "'0' is neither a positive integer nor auto" in capsys.readouterr().err


def test_missing_file(files: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, tmp_path / "images.npz", gradients=str(tmp_path / "none.npz"))) == 2
    assert "no such file" in capsys.readouterr().err


def test_multilayer_perceptron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More examples than classes, of formats not told; the activation is."""
    rng = np.random.default_rng(0)
    sizes = (4 * 4 * 3, 60, 3)
    layers = {
        name: {
            "kernel": rng.uniform(-1, 1, sizes[index : index + 2]).astype(np.float32) / np.sqrt(sizes[index]),
            "bias": rng.uniform(-0.1, 0.1, sizes[index + 1]).astype(np.float32),
        }
        for index, name in enumerate(("dense1", "head"))
    }
    images = rng.normal(size=(5, 4, 4, 3)).astype(np.float32)
    labels = rng.dirichlet(np.ones(3), 5).astype(np.float32)
    chain = fcn_chain(1, "leaky_relu")

    def loss(parameters: dict) -> jax.Array:
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(apply_chain(chain, parameters, images)), axis=1))

    for name, tree in (("parameters", layers), ("gradients", jax.device_get(jax.grad(loss)(layers)))):
        np.savez(
            tmp_path / f"{name}.npz",
            **{f"{layer}/{part}": a for layer, held in tree.items() for part, a in held.items()},
        )
    out = tmp_path / "images.npz"
    files = [f"--{name}={tmp_path / name}.npz" for name in ("parameters", "gradients")]
    described = ["--model=mlp", "--activation=leaky_relu", "--image-size=4", "--channels=3"]
    assert main(["invert", *described, *files, "--batch-size", "auto", "--out", str(out)]) == 0
    assert "5 exact" in capsys.readouterr().out
    with np.load(out) as found:
        distance = np.abs(found["images"][:, None] - images[None]).max(axis=(2, 3, 4))
        order = distance.argmin(axis=1)
        assert sorted(order.tolist()) == list(range(5))
        assert distance.min(axis=1).max() < 1e-4
        np.testing.assert_allclose(found["labels"], labels[order], atol=1e-4)
