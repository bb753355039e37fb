"""Weights of the perceptual distance: read as they were written, and every way a file can be wrong."""

import numpy as np
import pytest

from softinv_jax.command_line.perceptual_weights_file import WEIGHTS_VARIABLE, load_perceptual_weights
from softinv_jax.measures.perceptual import WEIGHT_SHAPES

WEIGHTS = {name: np.full(shape, place, np.float32) for place, (name, shape) in enumerate(WEIGHT_SHAPES.items())}


def test_weights_come_back_by_path_and_by_variable(tmp_path, monkeypatch) -> None:
    file = tmp_path / "lpips.npz"
    # The published file has the classifier too.
    np.savez(file, **WEIGHTS, **{"classifier.6.bias": np.zeros(3)})
    for_path = load_perceptual_weights(file)
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(file))
    for found in (for_path, load_perceptual_weights()):
        assert found.keys() == WEIGHT_SHAPES.keys()
        for name, value in WEIGHTS.items():
            np.testing.assert_array_equal(found[name], value)


def test_a_missing_file_says_how_to_make_it(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=rf"set {WEIGHTS_VARIABLE}[\s\S]*alexnet-owt-7be5be79\.pth[\s\S]*savez"):
        load_perceptual_weights()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        load_perceptual_weights(tmp_path / "nowhere.npz")


def test_wrong_files_are_named(tmp_path) -> None:
    other = tmp_path / "alex.pth"
    other.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"as \.npz, got .*alex\.pth"):
        load_perceptual_weights(other)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.npz"):
        load_perceptual_weights(broken)
    lacking = tmp_path / "lacking.npz"
    np.savez(lacking, **{name: value for name, value in WEIGHTS.items() if name != "lin4.model.1.weight"})
    with pytest.raises(ValueError, match=r"lacking\.npz: weights lack lin4\.model\.1\.weight"):
        load_perceptual_weights(lacking)
