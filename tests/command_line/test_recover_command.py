"""`softinv recover`: right labels, pure JSON, whole files, and one line for whatever is wrong with the input."""

import json
import os
import tempfile
import zipfile

import numpy as np
import pytest

from softinv_jax import streaming
from softinv_jax.command_line import recover
from softinv_jax.command_line.main import main
from softinv_jax.command_line.observation_file import read_observation

C, D, N = 10, 24, 6
TARGETS = [3, 7]


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    """Hard, smoothed and mixed labels with (softmax - y) x^T, made with NumPy alone."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(C, D)) / 3
    features = generator.random((N, D))
    labels = np.zeros((N, C))
    labels[:, TARGETS[0]] = np.resize([1.0, 0.8, 0.6], N)
    labels[:, TARGETS[1]] = np.resize([0.0, 0.0, 0.4], N)
    labels += (1 - labels.sum(axis=1, keepdims=True)) / C
    powers = np.exp(features @ weight.T)
    errors = powers / powers.sum(axis=1, keepdims=True) - labels
    gradients = errors[:, :, None] * features[:, None, :]
    return {"weight": weight, "weight_gradient": gradients, "features": features, "labels": labels}


@pytest.fixture
def observation(truth) -> dict[str, np.ndarray]:
    return {name: truth[name] for name in ("weight", "weight_gradient")}


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def save(path, arrays) -> str:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return str(path)


def test_recovers_labels_and_features(tmp_path, capsys, observation, truth) -> None:
    # A name without .npz is taken as it is.
    out = tmp_path / "recovered"
    code, text, _ = run(capsys, "recover", save(tmp_path / "seen.npz", observation), "--out", out)
    assert code == 0
    assert "6 unique" in text
    assert "hard: class 3" in text
    assert "mixup: class 3 60.0%, class 7 40.0%" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recovered", "seen.npz"]
    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    shapes = {"labels": (N, 1, C), "features": (N, 1, D), "scale": (N,), "verdict": (N, 1), "residual": (N, 1)}
    assert {name: arrays[name].shape for name in shapes} == shapes
    # float64 gradients: the scalar is found to about 1e-12, far better than any use of the label needs.
    np.testing.assert_allclose(arrays["labels"][:, 0], truth["labels"], atol=1e-9)
    np.testing.assert_allclose(arrays["features"][:, 0], truth["features"], atol=1e-9)
    np.testing.assert_array_equal(arrays["scale"], 1.0)
    assert set(arrays["verdict"].ravel()) == {"unique"}
    assert arrays["verdict"].dtype.kind == "U"
    assert arrays["kind"][:3, 0].tolist() == ["hard", "smoothing", "mixup"]
    assert arrays["residual"].max() < 1e-9
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_is_all_there_is_on_stdout(tmp_path, capsys, observation) -> None:
    gradients = observation["weight_gradient"].copy()
    gradients[1] = 0.0
    seen = save(tmp_path / "seen.npz", observation | {"weight_gradient": gradients})
    code, text, errors = run(capsys, "recover", seen, "--out", tmp_path / "out.npz", "--json")
    assert (code, errors) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    summary = json.loads(text, parse_constant=refuse)
    counts = dict.fromkeys(("refuted", "no_signal", "unidentifiable", "ambiguous", "conditional"), 0)
    assert summary["verdicts"] == counts | {"no_signal": 1, "unique": N - 1}
    assert sum(summary["kinds"].values()) == N
    assert (summary["method"], summary["scale"], summary["dtype"]) == ("exact", "known", "float64")
    assert (summary["examples"], summary["classes"], summary["features"]) == (N, C, D)
    assert set(summary["versions"]) >= {"softinv_jax", "jax", "numpy", "python"}
    samples = summary["samples"]
    assert [sample["index"] for sample in samples] == list(range(N))
    assert (samples[0]["verdict"], samples[0]["kind"], samples[0]["classes"]) == ("unique", "hard", [3])
    assert (samples[1]["verdict"], samples[1]["scalar"], samples[1]["weights"]) == ("no_signal", None, [])
    with np.load(tmp_path / "out.npz") as file:
        assert np.isnan(file["labels"][1]).all()
        assert np.isnan(file["features"][1]).all()


def test_unknown_scale_and_bias_and_a_single_gradient(tmp_path, capsys, truth) -> None:
    weight, features, labels = truth["weight"], truth["features"], truth["labels"]
    bias = np.linspace(-1, 1, C)
    powers = np.exp(features @ weight.T + bias)
    errors = -0.01 * (powers / powers.sum(axis=1, keepdims=True) - labels)
    seen = save(
        tmp_path / "seen.npz",
        {
            "weight": weight,
            "weight_gradient": np.outer(errors[2], features[2]),
            "bias": bias,
            "bias_gradient": errors[2],
        },
    )
    code, _, _ = run(capsys, "recover", seen, "--out", tmp_path / "out.npz", "--unknown-scale")
    assert code == 0
    with np.load(tmp_path / "out.npz") as file:
        assert file["labels"].shape == (1, 1, C)
        assert file["features"].shape == (1, 1, D)
        np.testing.assert_allclose(file["labels"][0, 0], labels[2], atol=1e-9)
        np.testing.assert_allclose(file["scale"], -0.01, rtol=1e-9)


def without(observation, name):
    return {key: value for key, value in observation.items() if key != name}


BAD_ARRAYS = {
    "missing key": (lambda o: without(o, "weight_gradient"), "weight_gradient missing"),
    "unknown key": (lambda o: o | {"label": o["weight"]}, "'label'"),
    "bias without its gradient": (lambda o: o | {"bias": np.zeros(C)}, "bias_gradient"),
    "objects": (lambda o: o | {"weight": np.array([[{}] * D] * C, object)}, "Python objects"),
    "integers": (lambda o: o | {"weight": np.ones((C, D), int)}, "int64"),
    "complex": (lambda o: o | {"weight": np.ones((C, D), complex)}, "complex128"),
    "text": (lambda o: o | {"weight": np.full((C, D), "x")}, "float32"),
    "transposed weight": (lambda o: o | {"weight": o["weight"].T}, "shape"),
    "flat gradient": (lambda o: o | {"weight_gradient": np.ones(C * D)}, "shape"),
    "no gradients": (lambda o: o | {"weight_gradient": np.ones((0, C, D))}, "shape"),
    "scalar bias": (lambda o: o | {"bias": np.zeros(()), "bias_gradient": np.zeros((N, C))}, "bias"),
    "two classes": (lambda o: {"weight": np.ones((2, D)), "weight_gradient": np.ones((2, D))}, "3"),
    "NaN": (lambda o: o | {"weight": np.full((C, D), np.nan)}, "not finite"),
    "infinity": (lambda o: o | {"weight_gradient": o["weight_gradient"] + np.inf}, "not finite"),
}


def check_refused(capsys, out, argv, expected: str) -> None:
    before = out.read_bytes() if out.is_file() else None
    siblings = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    code, text, errors = run(capsys, *argv)
    assert (code, text) == (2, "")
    assert errors.count("\n") == 1, errors
    assert errors.startswith("softinv")
    assert errors.endswith("\n")
    assert "Traceback" not in errors
    assert expected in errors
    # Nothing written, nothing left over, nothing lost.
    assert (out.read_bytes() if out.is_file() else None) == before
    if siblings is not None:
        assert sorted(out.parent.iterdir()) == siblings


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_refused_in_one_line(name, tmp_path, capsys, observation) -> None:
    change, expected = BAD_ARRAYS[name]
    seen = save(tmp_path / "seen.npz", change(observation))
    out = tmp_path / "out.npz"
    out.write_bytes(b"an earlier result")
    check_refused(capsys, out, ("recover", seen, "--out", out, "--json"), expected)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "cut short", "damaged", "a zip of texts"])
def test_bad_files_are_refused_in_one_line(kind, tmp_path, capsys, observation) -> None:
    seen = tmp_path / "seen.npz"
    expected = "seen.npz"
    if kind == "folder":
        seen.mkdir()
    elif kind == "text":
        seen.write_text("weight = 1")
        expected = "not an .npz file"
    elif kind == "empty":
        seen.touch()
    elif kind == "a zip of texts":
        with zipfile.ZipFile(seen, "w") as archive:
            archive.writestr("weight", "1")
            archive.writestr("weight_gradient", "1")
        expected = "no array"
    elif kind != "missing":
        content = bytearray((tmp_path / save(seen, observation)).read_bytes())
        if kind == "cut short":
            content = content[: len(content) // 2]
        else:
            content[200:400] = bytes(200)
        seen.write_bytes(content)
    out = tmp_path / "out.npz"
    check_refused(capsys, out, ("recover", seen, "--out", out), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--method", "variance"), "--label-format smoothing or mixup"),
        (("--method", "variance", "--label-format", "mixup", "--unknown-scale"), "known scale"),
        (("--label-format", "mixup"), "--method variance"),
        (("--method", "magic"), "magic"),
        (("--no-such-option",), "--no-such-option"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, expected, tmp_path, capsys, observation) -> None:
    seen = save(tmp_path / "seen.npz", observation)
    out = tmp_path / "out.npz"
    check_refused(capsys, out, ("recover", seen, "--out", out, *options), expected)


def test_variance_with_a_bias_is_refused(tmp_path, capsys, observation) -> None:
    biased = observation | {"bias": np.zeros(C), "bias_gradient": np.zeros((N, C))}
    seen = save(tmp_path / "seen.npz", biased)
    out = tmp_path / "out.npz"
    options = ("--method", "variance", "--label-format", "mixup")
    check_refused(capsys, out, ("recover", seen, "--out", out, *options), "without bias")


def test_out_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, observation, monkeypatch) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("the work has started")

    monkeypatch.setattr("softinv_jax.labels.many.recover_many", no_work)
    seen = save(tmp_path / "seen.npz", observation)
    for out, expected in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "out.npz", "folder does not exist"),
        (tmp_path / "seen.npz", "overwrite"),
        (tmp_path / "seen.npz" / "out.npz", "folder does not exist"),
    ):
        check_refused(capsys, out, ("recover", seen, "--out", out), expected)

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    out = tmp_path / "out.npz"
    check_refused(capsys, out, ("recover", seen, "--out", out), "Permission denied")


def test_a_full_disk_leaves_the_earlier_result(tmp_path, capsys, observation, monkeypatch) -> None:
    def fill(file, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    seen = save(tmp_path / "seen.npz", observation)
    out = tmp_path / "out.npz"
    out.write_bytes(b"an earlier result")
    monkeypatch.setattr(np, "savez", fill)
    check_refused(capsys, out, ("recover", seen, "--out", out, "--json"), "No space left on device")


def test_interruption_is_one_line_and_its_own_code(tmp_path, capsys, observation, monkeypatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("softinv_jax.labels.many.recover_many", interrupt)
    out = tmp_path / "out.npz"
    argv = ("recover", save(tmp_path / "seen.npz", observation), "--out", out)
    assert run(capsys, *argv) == (130, "", "softinv: interrupted\n")
    assert not out.exists()


def test_help_and_version(capsys) -> None:
    for argv, expected in (
        (("--help",), "unidentifiable"),
        (("recover", "--help"), "weight_gradient"),
        (("demo", "--help"), "photographs"),
        (("--version",), "jax"),
    ):
        code, text, errors = run(capsys, *argv)
        assert (code, errors) == (0, "")
        assert expected in text
    code, text, errors = run(capsys)
    assert (code, text, errors.count("\n")) == (2, "", 1)


def test_batches(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(-0.5, 0.5, (40, 64)).astype(np.float32)
    features = rng.uniform(0, 1, (2, 4, 64)).astype(np.float32)
    labels = np.full((2, 4, 40), 0.2 / 40, np.float32)
    labels[:, np.arange(4), [4, 9, 17, 33]] += 0.8
    logits = features @ weight.T
    prediction = np.exp(logits - logits.max(axis=-1, keepdims=True))
    prediction /= prediction.sum(axis=-1, keepdims=True)
    gradient = (np.swapaxes(prediction - labels, 1, 2) @ features / 4).astype(np.float32)
    seen = save(tmp_path / "seen.npz", {"weight": weight, "weight_gradient": gradient})
    code, text, errors = run(capsys, "recover", seen, "--out", tmp_path / "out.npz", "--batch-size", "auto", "--json")
    assert (code, errors) == (0, "")
    assert json.loads(text)["verdicts"]["unique"] == 8
    with np.load(tmp_path / "out.npz") as out:
        assert out["labels"].shape == (2, 4, 40)
        assert out["features"].shape == (2, 4, 64)
        assert out["verdict"].tolist() == [["unique"] * 4] * 2
        found = out["labels"][np.arange(2)[:, None], np.argsort(out["labels"].argmax(axis=2), axis=1)]
        np.testing.assert_allclose(found, labels, atol=1e-5)
    rescaled = gradient * np.float32([2.5, 0.01])[:, None, None]
    seen = save(tmp_path / "seen.npz", {"weight": weight, "weight_gradient": rescaled})
    out = tmp_path / "out.npz"
    code, text, errors = run(capsys, "recover", seen, "--out", out, "--batch-size", "4", "--unknown-scale")
    assert code == 0
    assert "8 unique" in text
    with np.load(out) as found_again:
        np.testing.assert_allclose(found_again["scale"], [2.5, 0.01], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch-size", "0"), "neither a positive integer nor auto"),
        (("--batch-size", "10", "--unknown-scale"), "number of classes"),
        (("--batch-size", "2", "--method", "idlg"), "--method exact"),
        (("--batch-size", "2", "--chunk", "3"), "leave out --batch-size or --chunk"),
    ],
)
def test_bad_batch_sizes_are_refused_in_one_line(options, expected, tmp_path, capsys, observation) -> None:
    out = tmp_path / "out.npz"
    seen = save(tmp_path / "seen.npz", observation)
    check_refused(capsys, out, ("recover", seen, "--out", out, *options), expected)


def test_in_chunks_as_in_one_go_and_taken_up_again(tmp_path, capsys, observation, monkeypatch) -> None:
    # How the file is divided does not depend on what is recovered; iDLG compiles in seconds.
    seen, out, method = save(tmp_path / "seen.npz", observation), tmp_path / "out.npz", ("--method", "idlg")
    assert run(capsys, "recover", seen, "--out", tmp_path / "whole.npz", *method)[0] == 0
    recover_many, calls = streaming.recover_many, []

    def stopped(*args: object, **options: object) -> object:
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return recover_many(*args, **options)

    monkeypatch.setattr(streaming, "recover_many", stopped)
    assert run(capsys, "recover", seen, "--out", out, *method, "--chunk", 3)[0] == 130
    parts = tmp_path / "out.npz.parts"
    assert sorted(path.name for path in parts.iterdir()) == ["part-00000000.npz", "settings.json", "softinv-parts"]
    code, _, errors = run(capsys, "recover", seen, "--out", out, *method, "--chunk", 2)
    assert code == 2
    assert "chunk 3, not 2; choose another folder" in errors
    assert not out.exists()

    assert run(capsys, "recover", seen, "--out", out, *method, "--chunk", 3)[0] == 0
    assert len(calls) == 3
    assert not parts.exists()
    with np.load(out) as found, np.load(tmp_path / "whole.npz") as whole:
        assert found.files == whole.files
        for name in found.files:
            if found[name].dtype.kind == "f":
                np.testing.assert_allclose(found[name], whole[name], rtol=1e-9, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], whole[name])


def test_large_files_are_left_on_the_disk(tmp_path, observation, monkeypatch) -> None:
    seen = save(tmp_path / "seen.npz", observation)
    assert not recover._is_large(seen)
    monkeypatch.setattr(recover, "LARGEST_SHARE", 0.0)
    assert recover._is_large(seen)
    mapped = read_observation(seen, mapped=True)
    assert isinstance(mapped.weight_gradient, np.memmap)
    whole = read_observation(seen)
    for name in ("weight", "weight_gradient"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(whole, name))


def test_what_cannot_be_read_in_parts_is_named(tmp_path, capsys, observation) -> None:
    names = ("compressed", "fortran", "short", "damaged")
    compressed, fortran, short, damaged = (tmp_path / f"{name}.npz" for name in names)
    np.savez_compressed(compressed, **observation)
    gradients = observation["weight_gradient"]
    save(fortran, observation | {"weight_gradient": np.asfortranarray(gradients)})
    with zipfile.ZipFile(short, "w") as archive, zipfile.ZipFile(save(tmp_path / "seen.npz", observation)) as source:
        archive.writestr("weight.npy", source.read("weight.npy"))
        archive.writestr("weight_gradient.npy", source.read("weight_gradient.npy")[:-8])
    damaged.write_bytes(short.read_bytes()[:-30])
    for path, message in (
        (compressed, "is compressed, and can only be read whole"),
        (fortran, "np.ascontiguousarray"),
        (short, "declares shape (6, 10, 24) of float64, but other bytes follow"),
        (damaged, "cannot be read in parts"),
    ):
        code, _, errors = run(capsys, "recover", path, "--out", tmp_path / "out.npz", "--chunk", 3)
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1
    code, _, errors = run(capsys, "recover", tmp_path / "seen.npz", "--out", tmp_path / "out.npz", "--chunk", 0)
    assert code == 2
    assert "'0' is not a positive integer" in errors


def with_bias(truth, rows: slice, factor: float = 1.0) -> dict[str, np.ndarray]:
    """The mean of some gradients of a head with a bias of zeros, as float32, times a factor."""
    powers = np.exp(truth["features"][rows] @ truth["weight"].T)
    errors = powers / powers.sum(axis=1, keepdims=True) - truth["labels"][rows]
    gradient = factor * errors.T @ truth["features"][rows] / len(errors)
    arrays = {"weight": truth["weight"], "weight_gradient": gradient, "bias": np.zeros(C)}
    arrays |= {"bias_gradient": factor * errors.mean(axis=0)}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def test_what_was_told_and_is_not_so_is_said_with_its_remedy(tmp_path, capsys, truth) -> None:
    out = tmp_path / "out.npz"
    code, text, _ = run(capsys, "recover", save(tmp_path / "seen.npz", with_bias(truth, slice(0, 3))), "--out", out)
    assert code == 0
    assert "1 refuted" in text
    assert "--batch-size auto" in text
    with np.load(out) as found:
        assert found["verdict"].tolist() == [["refuted"]]
        assert found["refuted"].tolist() == [["one_example"]]
        assert found["examples"].tolist() == [3]
        mean = truth["labels"][:3].mean(axis=0)
        assert np.all(np.abs(found["mean_labels"][0] - mean) <= 6 * found["mean_label_deviation"][0])
    code, text, _ = run(
        capsys, "recover", save(tmp_path / "seen.npz", with_bias(truth, slice(0, 1), 0.1)), "--out", out, "--json"
    )
    sample = json.loads(text)["samples"][0]
    assert (sample["verdict"], sample["loss"], sample["refuted"]) == ("unique", "weighted_cross_entropy", ["scale"])
    np.testing.assert_allclose(sample["scale"], 0.1, rtol=1e-4)


def test_a_loss_that_is_told(tmp_path, capsys, truth) -> None:
    out, seen = tmp_path / "out.npz", save(tmp_path / "seen.npz", with_bias(truth, slice(0, 1)))
    code, text, _ = run(capsys, "recover", seen, "--out", out, "--loss", "cross_entropy", "--json")
    assert (code, json.loads(text)["verdicts"]["unique"]) == (0, 1)
    check_refused(capsys, out, ("recover", seen, "--out", out, "--loss", "hinge"), "invalid choice")


def test_more_examples_than_classes_give_counts(tmp_path, capsys, truth) -> None:
    out, seen = tmp_path / "out.npz", save(tmp_path / "seen.npz", with_bias(truth, slice(0, 6)))
    code, text, _ = run(capsys, "recover", seen, "--out", out, "--batch-size", "12", "--json")
    assert code == 0
    batch = json.loads(text)["batches"][0]
    mean = truth["labels"][:6].mean(axis=0)
    assert all(low <= share <= high for share, (low, high) in zip(mean, batch["interval"], strict=True))
    with np.load(out) as found:
        assert found["count"].shape == (1, C)
