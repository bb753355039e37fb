"""`softinv demo`: its files, its table and its verdicts on two formats, without the trained network."""

import json

import numpy as np
import pytest

from softinv_jax.command_line.demo import interpretation
from softinv_jax.command_line.main import main
from softinv_jax.report.tables import DemoRow

OPTIONS = ("--samples", "4", "--epochs", "0", "--formats", "hard", "dense", "--scale", "known")


def test_demo_writes_its_files_and_recovers_what_can_be_recovered(tmp_path, capsys) -> None:
    folder = tmp_path / "new" / "demo"
    assert main(["demo", "--out", str(folder), *OPTIONS, "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results == json.loads((folder / "results.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [
        "batch.png",
        "images.png",
        "labels.png",
        "landscape.png",
        "larger_batch.png",
        "results.json",
        "results.npz",
    ]
    for name in ("batch.png", "images.png", "labels.png", "landscape.png", "larger_batch.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    hard, dense = results["rows"]
    assert (hard["network"], hard["label_format"], hard["scale_known"], hard["total"]) == ("untrained", "hard", True, 4)
    # float32 gradients of a network with 768 features give labels to about 1e-7.
    assert (hard["recovered"], hard["wrong"]) == (4, 0)
    assert hard["largest_label_error"] < 1e-5
    assert hard["median_feature_error"] < 1e-5
    assert hard["samples_per_second"] > 0
    assert (dense["wrong"], sum(dense["verdicts"].values())) == (0, 4)
    assert dense["verdicts"]["unidentifiable"] >= 3
    batch = results["batch"]
    assert batch["label_formats"] == ["hard", "smoothing", "mixup", "smoothed_mixup"]
    told = [error for error in batch["label_errors"] if error is not None]
    assert len(told) == sum(verdict in ("unique", "ambiguous") for verdict in batch["verdicts"])
    assert told
    assert max(told) < 1e-5
    for true, recovered in zip(batch["true_labels"], batch["recovered_labels"], strict=True):
        assert recovered is None or np.allclose(true, recovered, atol=1e-5)
    larger = results["larger_batch"]
    assert larger["verdicts"] == ["exact"] * 32
    assert min(larger["psnr"]) > 80
    assert max(larger["label_errors"]) < 1e-5
    hard_image, dense_image = results["images"]
    assert (hard_image["label_format"], hard_image["verdict"]) == ("hard", "exact")
    # 8 bits are 59 dB.
    assert hard_image["psnr"] > 60
    assert (dense_image["verdict"], dense_image["psnr"]) == ("not_found", None)
    with np.load(folder / "results.npz", allow_pickle=False) as file:
        assert file["true_label"].shape == file["recovered_label"].shape == (8, 10)
        assert file["label_format"].tolist() == ["hard"] * 4 + ["dense"] * 4
        claimed = file["verdict"] == "unique"
        assert np.isnan(file["label_error"][file["verdict"] == "unidentifiable"]).all()
        assert (file["label_error"][claimed] < 1e-5).all()
    # The text for people went to stderr, and says where the files are.
    assert "untrained network, known scale" in captured.err
    assert str(folder / "landscape.png") in captured.err
    assert results["interpretation"] in " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--samples", "0"), "--samples 0"),
        (("--samples", "many"), "--samples"),
        (("--epochs", "-1"), "--epochs -1"),
        (("--seed", "-1"), "--seed -1"),
        (("--formats", "fuzzy"), "fuzzy"),
        (("--data-dir", "somewhere"), "--dataset"),
        (("--dataset", "no_such_data_set"), "no_such_data_set"),
        (("--dataset", "cifar10", "--data-dir", "nowhere"), "download_and_prepare"),
        (("--out", "FILE"), "cannot be made"),
    ],
)
def test_bad_options_are_one_line(options, expected, tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    argv = ["demo", "--out", str(tmp_path / "demo"), *options]
    argv = [str(tmp_path / "file") if word == "FILE" else word for word in argv]
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("softinv")
    assert expected in captured.err


def test_interpretation_says_what_leaks_and_what_does_not() -> None:
    verdicts = {"unique": 99, "ambiguous": 1, "unidentifiable": 0, "no_signal": 0}
    hard = DemoRow("trained", "hard", True, 100, 99, 1, 0.2, 1e-7, verdicts, 1000.0)
    dense = DemoRow("trained", "dense", True, 100, 0, 0, None, None, verdicts | {"unidentifiable": 97}, 1000.0)
    text = interpretation([hard, dense])
    assert "99 of 100 gradients" in text
    assert "1 of these claims is wrong" in text
    assert "of 100 dense labels (every entry free) 97 are unidentifiable" in text
    assert interpretation([dense]).startswith("What does not")
