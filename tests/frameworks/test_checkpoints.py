"""Files as people have them: checkpoints, wrappers' prefixes, half precision, tied heads, heads of every name."""

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from softinv_jax import find_head
from softinv_jax.command_line.main import main
from softinv_jax.frameworks.checkpoint import find_state, plain_names
from softinv_jax.frameworks.parameter_files import read_parameter_file, trained_layers

CLASSES, FEATURES = 5, 8


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def model(torch: Any) -> Any:
    torch.manual_seed(0)
    layers = torch.nn
    return layers.Sequential(layers.Linear(6, FEATURES), layers.BatchNorm1d(FEATURES), layers.Linear(FEATURES, CLASSES))


def assert_parameters(found: dict[str, np.ndarray], model: Any) -> None:
    expected = {name: value.numpy() for name, value in model.state_dict().items() if value.is_floating_point()}
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", "net", "model_state"])
def test_a_checkpoint_of_a_training_script(key: str, tmp_path: Path, torch: Any, model: Any) -> None:
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimiser.step()
    saved = {"epoch": 3, key: model.state_dict(), "optimizer_state_dict": optimiser.state_dict(), "loss": 0.5}
    path = str(tmp_path / "checkpoint.pth.tar")
    torch.save(saved, path)
    assert_parameters(read_parameter_file(path), model)
    assert_parameters(read_parameter_file(path, key), model)


def test_several_models_in_a_checkpoint_are_named(tmp_path: Path, torch: Any, model: Any) -> None:
    path = str(tmp_path / "x.ckpt")
    torch.save({"model": model.state_dict(), "averaged": {"model": model.state_dict()}}, path)
    with pytest.raises(ValueError, match=r"under 'model', 'averaged/model'; choose one with --key"):
        read_parameter_file(path)
    assert_parameters(read_parameter_file(path, "averaged/model"), model)
    with pytest.raises(ValueError, match=r"no parameters under the key 'ema'; parameters are under 'model'"):
        read_parameter_file(path, "ema")


@pytest.mark.filterwarnings("ignore")
def test_prefixes_of_the_real_wrappers(tmp_path: Path, torch: Any, model: Any) -> None:
    wrapped = {
        "DataParallel": torch.nn.DataParallel(model),
        "compiled": torch.compile(model, backend="eager"),
        "both": torch.nn.DataParallel(torch.compile(model, backend="eager")),
    }
    assert next(iter(wrapped["both"].state_dict())).startswith("module._orig_mod.")
    for name, one in wrapped.items():
        torch.save(one.state_dict(), tmp_path / f"{name}.pt")
        assert_parameters(read_parameter_file(str(tmp_path / f"{name}.pt")), model)


def test_prefixes_by_name() -> None:
    one, two = np.ones((CLASSES, FEATURES)), np.ones(CLASSES)
    for before in ("module.", "_orig_mod.", "_module.", "module._orig_mod.", "_orig_mod.module.", "module.module."):
        assert set(plain_names({f"{before}fc.weight": one, f"{before}fc.bias": two})) == {"fc.weight", "fc.bias"}
    # Inside a name, `module` is a layer like any other; torch.compile and Opacus also wrap parts.
    assert set(plain_names({"a.module.weight": one, "fc._orig_mod.weight": one})) == {"a.module.weight", "fc.weight"}
    assert set(plain_names({"module.weight": one, "module.bias": two})) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match=r"fc\._module\.weight and another array are both fc\.weight"):
        plain_names({"fc.weight": one, "fc._module.weight": one})


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_safetensors(kind: str, tmp_path: Path, torch: Any, model: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    half = model.to(getattr(torch, kind))
    safetensors.save_file(half.state_dict(), tmp_path / "x.safetensors")
    found = read_parameter_file(str(tmp_path / "x.safetensors"))
    assert not any(name.endswith("num_batches_tracked") for name in found)
    assert found["2.weight"].dtype == np.dtype(getattr(ml_dtypes, kind, None) or kind)
    np.testing.assert_array_equal(found["2.weight"].astype(np.float32), half[2].weight.detach().float().numpy())


def test_safetensors_of_eight_bits_are_named(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(ValueError, match="x is F8_E4M3"):
        read_parameter_file(str(tmp_path / "x.safetensors"))


def test_integers_beside_parameters_are_left_aside(tmp_path: Path) -> None:
    arrays = {"fc.weight": np.ones((CLASSES, FEATURES)), "position_ids": np.arange(4), "epoch": np.array(3)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert set(read_parameter_file(str(tmp_path / "x.npz"))) == {"fc.weight"}
    np.savez(tmp_path / "two.npz", **{f"{key}/{name}": array for key in "ab" for name, array in arrays.items()})
    assert set(read_parameter_file(str(tmp_path / "two.npz"), "b")) == {"fc.weight"}
    with pytest.raises(ValueError, match="no parameters under the key 'c'"):
        read_parameter_file(str(tmp_path / "two.npz"), "c")


@pytest.mark.parametrize(
    "name",
    ["classifier", "fc", "head", "heads.head", "score", "classifier.6", "lm_head", "classifier.out_proj", "cls.logits"],
)
def test_heads_are_told_from_embeddings_by_their_names(name: str) -> None:
    tree = trained_layers(
        {
            "embeddings.word.weight": np.ones((30, FEATURES)),
            "encoder.dense.weight": np.ones((FEATURES, FEATURES)),
            f"{name}.weight": np.ones((CLASSES, FEATURES)),
        }
    )
    assert find_head(tree) == name.replace(".", "/")


def test_tied_heads(tmp_path: Path, torch: Any) -> None:
    class Tied(torch.nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            self.add_module(first, torch.nn.Embedding(CLASSES, FEATURES))
            self.add_module(second, torch.nn.Linear(FEATURES, CLASSES, bias=False))
            getattr(self, second).weight = getattr(self, first).weight

    for first, second in (("wte", "lm_head"), ("embedded", "decoder")):
        torch.save(Tied(first, second).state_dict(), tmp_path / "x.pt")
        assert find_head(trained_layers(read_parameter_file(str(tmp_path / "x.pt")))) == second
    different = {"a": {"weight": np.ones((5, 8))}, "b": {"weight": np.zeros((5, 8))}}
    with pytest.raises(ValueError, match="2 of the dense layers fit"):
        find_head(different)


def test_a_state_is_found_by_structure_alone() -> None:
    def is_matrix(value: object) -> bool:
        return np.ndim(value) == 2  # type: ignore[arg-type]

    state = {"w": np.ones((2, 2)), "extra": {"w": np.ones((2, 2))}}
    assert find_state(state, is_matrix) is not None
    assert set(find_state({"a": state, "optimizer": {"state": state, "param_groups": []}}, is_matrix)) == {"w", "extra"}
    with pytest.raises(ValueError, match="no mapping of names to tensors"):
        find_state([state], is_matrix)


def test_recover_takes_checkpoints_with_a_key(tmp_path: Path, torch: Any, draw: Any) -> None:
    """The client's comes from DataParallel, the server's does not; both hold an average beside the model."""
    sample = draw("mixup", 3, number_of_classes=CLASSES, features=FEATURES, has_bias=True)
    before = {"fc.weight": sample.weight, "fc.bias": sample.bias}
    gradient = {"fc.weight": sample.gradient, "fc.bias": sample.bias_gradient}
    for name, rate, prefix in (("before", 0.0, ""), ("after", 0.1, "module.")):
        state = {f"{prefix}{k}": torch.tensor(before[k] - np.float32(rate) * gradient[k]) for k in before}
        torch.save({"model": state, "ema": state, "epoch": 1}, tmp_path / f"{name}.pt")
    out = tmp_path / "out.npz"
    command = ["recover", "--parameters", str(tmp_path / "before.pt"), "--updated", str(tmp_path / "after.pt")]
    command += ["--learning-rate", "0.1", "--out", str(out)]
    assert main(command) == 2
    assert main([*command, "--key", "model"]) == 0
    with np.load(out) as found:
        np.testing.assert_allclose(found["labels"][0, 0], sample.label, atol=1e-5)
