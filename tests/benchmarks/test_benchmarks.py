"""The benchmarks: their runner, their checkpoints, and the published attacks against independent computations."""

import argparse
import importlib.util
import json
import sys
from importlib import import_module as module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client import LeNet, apply_function, initialise, load_photographs, per_sample_model_gradients

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = (
    "accelerator",
    "batches",
    "field",
    "first_layer",
    "class_counts",
    "dense_layers",
    "hard_labels",
    "image_batches",
    "images",
    "images_by_label_mode",
    "labels",
    "local_steps",
    "local_training",
    "noise",
    "peers",
    "soft_labels",
    "soundness",
    "train",
    "unknown_format",
    *(["torch_models"] if importlib.util.find_spec("torch") else []),
)


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(seeds=3, quick=False, full=False, out=tmp_path, dataset="photographs", data_dir=None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_how_it_is_used(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_code:
        module(name).main()
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in text
    assert "--seeds" in text
    assert f"`{name}.py`" in (FOLDER / "README.md").read_text()


def test_results_are_whole_and_say_what_they_depend_on(options: argparse.Namespace, capsys) -> None:
    run = module("runner").Run("example", options)
    run.notes["checkpoints"] = {"a network": {"sha256": "0123456789abcdef0123", "test_accuracy": 0.5}}
    for seed in run.track(run.seeds, "seeds"):
        run.add(name=f"seed {seed}", shares=[1.0, 2.0], value=np.float32(0.5))

    def draw(rows: list[dict[str, Any]]) -> Any:
        figure = module("runner").new_figure(2, 2)
        figure.subplots().plot([len(row["shares"]) for row in rows])
        return figure

    spread = module("runner").spread
    run.finish("Title", {"name": lambda row: row["name"], "share": lambda row: spread(row["shares"], 2)}, draw)
    result = json.loads((options.out / "example.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["seed 0", "seed 1", "seed 2"]
    assert result["rows"][0]["value"] == 0.5
    assert {"date", "commit", "device", "versions", "seconds", "compile_seconds", "arguments"} <= set(result)
    assert result["versions"]["jax"] == jax.__version__
    text = (options.out / "example.md").read_text()
    # Mean and sample standard deviation of 1 and 2.
    assert "| seed 1 | 1.50 ± 0.71 |" in text
    assert "`0123456789abcdef`, 0.500" in text
    assert (options.out / "example.png").read_bytes().startswith(b"\x89PNG")
    assert str(options.out) not in (options.out / "example.json").read_text()


def test_quick_takes_one_seed_and_sizes_follow(options: argparse.Namespace) -> None:
    runner = module("runner")
    options.quick = True
    run = runner.Run("example", options)
    assert (len(run.seeds), run.size(1, 2, 3)) == (1, 1)
    options.quick, options.full = False, True
    assert runner.Run("example", options).size(1, 2, 3) == 3
    options.seeds = 0
    with pytest.raises(SystemExit, match="--seeds must be at least 1, not 0"):
        runner.Run("example", options)


def test_checkpoints_come_back_as_they_were_and_say_what_they_are(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors", reason="checkpoints need the extra benchmarks")
    train = module("train")
    data = load_photographs(per_class=2)
    calls = []

    def initial(recipe: Any, training: Any) -> tuple[Any, Any]:
        calls.append(recipe)
        return initialise(recipe.network(), jax.random.key(recipe.seed), (32, 32, 3)), {}

    monkeypatch.setattr(train, "_train", initial)
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: jnp.asarray(0.25))
    recipe = train.make_recipe("lenet", "mixup", 1, options, data)
    first = train.trained(recipe, tmp_path, data, data)
    again = train.trained(recipe, tmp_path, data, data)
    assert len(calls) == 1
    jax.tree.map(np.testing.assert_array_equal, first.parameters, initial(recipe, data)[0])
    assert first.sha256 == again.sha256
    assert len(first.sha256) == 64
    assert first.test_accuracy == 0.25
    other = train.trained(train.make_recipe("lenet", "mixup", 2, options, data), tmp_path, data, data)
    assert other.sha256 != first.sha256
    path = tmp_path / f"{recipe.name}.safetensors"
    (tmp_path / f"{other.name}.safetensors").replace(path)
    with pytest.raises(ValueError, match=r"was trained otherwise .* remove it to train anew"):
        train.trained(recipe, tmp_path, data, data)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read .* remove it to train anew"):
        train.trained(recipe, tmp_path, data, data)


def test_idlg_as_published_finds_the_row_that_no_other_agrees_with() -> None:
    rng = np.random.default_rng(0)
    gradients = []
    for target in range(5):
        error = rng.dirichlet(np.ones(5))
        error[target] -= 1
        gradients.append(np.outer(error, rng.normal(size=7)))
    gradients.append(np.outer([0.5, 0.3, -0.5, -0.3, 0.0], np.ones(7)))  # Two against two: no hard label.
    found = module("hard_labels").original_idlg(np.stack(gradients))
    assert found.tolist() == [0, 1, 2, 3, 4, -1]


def test_the_peers_lenet_has_the_same_gradient() -> None:
    torch = pytest.importorskip("torch", reason="the published attacks need the extra peers")
    peers = module("published_images")
    network, images = LeNet(10), load_photographs(per_class=1).normalised()[:1]
    parameters = initialise(network, jax.random.key(0), images.shape[1:])
    label = np.full((1, 10), 0.03, np.float32)
    label[0, 4] = 0.73
    expected = per_sample_model_gradients(apply_function(network), parameters, images, label)
    expected = peers.torch_arrays(jax.tree.map(lambda leaf: leaf[0], expected), "cpu")
    arrays = peers.torch_arrays(parameters, "cpu")
    image = torch.from_numpy(np.array(images).transpose(0, 3, 1, 2))
    found = peers.gradient(arrays, image, torch.from_numpy(label), differentiable=False)
    for name, value in zip(sorted(arrays), found, strict=True):
        np.testing.assert_allclose(value, expected[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_published_image_attacks_lower_their_loss() -> None:
    torch = pytest.importorskip("torch", reason="the published attacks need the extra peers")
    peers = module("published_images")
    parameters = peers.torch_arrays(initialise(LeNet(10), jax.random.key(0), (8, 8, 3)), "cpu")
    torch.manual_seed(0)
    label = torch.nn.functional.one_hot(torch.tensor([3]), 10).float()
    observed = peers.gradient(parameters, torch.rand(1, 3, 8, 8), label, differentiable=False)

    def distance(image: np.ndarray) -> float:
        own = peers.gradient(
            parameters, torch.from_numpy(image.transpose(2, 0, 1).copy())[None], label, differentiable=False
        )
        return 1 - float(
            torch.cosine_similarity(*(torch.cat([part.flatten() for part in g]) for g in (own, observed)), dim=0)
        )

    few, many = (
        peers.inverting_gradients(
            parameters, observed, (1, 3, 8, 8), label[0].numpy(), np.zeros(3), np.ones(3), steps=steps, variation=0.0
        )
        for steps in (1, 60)
    )
    assert many.min() >= 0
    assert many.max() <= 1
    assert distance(many) < distance(few) / 2
    assert np.isfinite(peers.deep_leakage(parameters, observed, (1, 3, 8, 8), 10, steps=2)).all()


def test_published_attacks_make_all_their_tensors_on_their_device() -> None:
    """There need not be a second device: every tensor that they make names the one it is for."""
    torch = pytest.importorskip("torch", reason="the published attacks need the extra peers")
    pytest.importorskip("sko", reason="the published attacks need the extra peers")
    images, procedure = module("published_images"), module("published_procedure")
    makers = {torch.randn, torch.rand, torch.zeros, torch.ones, torch.full, torch.empty, torch.tensor, torch.as_tensor}
    own = {Path(one.__file__).name for one in (images, procedure)}
    named: list[str] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            caller = Path(sys._getframe(1).f_code.co_filename).name
            if function in makers and caller in own:
                named.append(str(kwargs.get("device")))
            assert function is not torch.from_numpy or caller not in own
            return function(*args, **kwargs)

    tree = jax.device_get(initialise(LeNet(10), jax.random.key(0), (8, 8, 3)))
    rng = np.random.default_rng(0)
    with Watch():
        arrays = images.torch_arrays(tree, "cpu")
        observed = [arrays[name] for name in sorted(arrays)]
        found = [
            images.deep_leakage(arrays, observed, (1, 3, 8, 8), 10, steps=1),
            images.inverting_gradients(
                arrays, observed, (1, 3, 8, 8), np.full(10, 0.1), np.zeros(3), np.ones(3), steps=2
            ),
        ]
        weight, gradient = rng.normal(size=(2, 5, 4))
        settings = procedure.PublishedSettings(iterations=4, swarm_size=4, swarm_iterations=1, swarm_bound=7.0)
        answer = procedure.recover_published(weight, gradient, excluded=1, settings=settings, device="cpu")
    assert len(named) > 15
    assert set(named) == {"cpu"}
    assert all(isinstance(one, np.ndarray) for one in (*found, answer.label, answer.feature))


def test_a_long_run_goes_on_from_the_rows_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = module("images_by_label_mode")
    calls = []

    def attack(victims: Any, mode: str, steps: int, restarts: int) -> np.ndarray:
        calls.append(mode)
        assert (len(victims), steps, restarts) == (1, 3, 2)
        return np.concatenate([np.asarray(victim.images) + 0.1 for victim in victims])

    monkeypatch.setattr(script, "attack", attack)

    def run(*options: str) -> Any:
        calls.clear()
        words = ["--quick", "--dataset", "photographs", "--networks", "untrained", "--families", "smoothing"]
        words += ["--images", "2", "--steps", "3", "--restarts", "2", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", ["images_by_label_mode.py", *words])
        script.main()
        return json.loads((tmp_path / "images_by_label_mode.json").read_text())

    first = run("--modes", "true", "DLG")
    assert calls == ["true", "DLG"]
    second = run("--modes", "true", "recovered", "DLG")
    assert calls == ["recovered"]
    assert [row["mode"] for row in second["rows"]] == ["true", "recovered", "DLG"]
    assert second["rows"][0] == first["rows"][0]
    assert run("--modes", "true", "joint", "--time-limit", "0")["missing"] == ["untrained, smoothing, joint"]
    assert not calls
    assert "no time for" in capsys.readouterr().err
    run("--modes", "true", "--fresh")
    assert calls == ["true"]
    run("--modes", "true", "--seeds", "1", "--steps", "3")
    assert not calls


def test_images_of_one_file_stand_for_the_data_set(tmp_path: Path, options: argparse.Namespace) -> None:
    clients = module("clients")
    training, test = load_photographs(per_class=2), load_photographs(split="test", per_class=1)
    clients.save_images(tmp_path / "images.npz", training, test)
    options.images_file = tmp_path / "images.npz"
    held, same, normalised = clients.load_data(options)
    np.testing.assert_array_equal(same.images, test.images)
    np.testing.assert_array_equal(normalised, test.with_statistics_of(training).normalised())
    assert held.class_names == training.class_names
    assert held.number_of_classes == training.number_of_classes
