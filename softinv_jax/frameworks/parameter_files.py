"""Parameters by name, from whatever a training framework writes: .npz, safetensors, PyTorch, lists of arrays.

No file is trusted: nothing in one is executed, and what is damaged or hostile gives one ValueError.
"""

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from softinv_jax.frameworks.checkpoint import find_state, plain_names, under_key
from softinv_jax.frameworks.npz_file import check_archive, check_unpacked, first_line, read_npz

__all__ = ["FORMATS", "Tree", "flat", "name_arrays", "nested", "read_parameter_file", "trained_layers"]

Tree = dict[str, "np.ndarray | Tree"]

FORMATS = {".safetensors": "safetensors"} | dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".tar"), "torch")
"""What a file is, by the end of its name; any other is an .npz file."""

FLOATING = tuple(np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


# By the names in a safetensors file, all of which are little-endian.
SAFETENSORS_FLOATS = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}


def read_parameter_file(path: str, key: str | None = None) -> dict[str, np.ndarray]:
    """Read a model's arrays by name, without what DataParallel, torch.compile or Opacus put before the names.

    What is no parameter is left aside: optimisers, the epoch, counters and other integers.

    Args:
      path: .npz as `np.savez` writes it; .safetensors (needs safetensors); .pt, .pth, .bin, .ckpt or .tar as
        `torch.save` writes it (needs torch), with a `state_dict` or a dictionary that holds one. float16, bfloat16,
        float32 or float64.
      key: which of the models in the file, where it holds several; names joined by "/".

    Raises:
      ValueError: one line that names the file, what is wrong, and the remedy.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        arrays = read_npz(path, floats_only=False)
    elif not os.path.isfile(path):
        raise ValueError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    else:
        arrays = _read_safetensors(path) if kind == "safetensors" else _read_torch(path, key)
    try:
        if key is not None and kind != "torch":
            arrays = under_key(arrays, key)
        arrays = plain_names(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name, array in arrays.items():
        if array.dtype not in FLOATING and array.dtype.kind not in "biu":
            raise ValueError(f"{path}: {name} must be floating, but is {array.dtype}; save parameters only")
    floats = {name: array for name, array in arrays.items() if array.dtype in FLOATING}
    if arrays and not floats:
        name, array = next(iter(arrays.items()))
        raise ValueError(f"{path}: holds no floating arrays ({name} is {array.dtype}); save a model's parameters")
    return floats


def name_arrays(arrays: Iterable[Any], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Names for a list of arrays, as Flower's NumPy clients send them: those of `model.state_dict()`, in its order.

    Raises:
      ValueError: if there are not as many names, all different, as arrays.
    """
    listed = [np.asarray(array) for array in arrays]
    if len(listed) != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(set(names))} different names for {len(listed)} arrays; give list(model.state_dict()), or whatever"
            " names the client sends them by"
        )
    return dict(zip(names, listed, strict=True))


def nested(arrays: Mapping[str, np.ndarray], separator: str = "/") -> Tree:
    """The tree whose branches `separator` marks in the names: "/" in flax's, "." in PyTorch's.

    Raises:
      ValueError: naming an array with entries that are not finite, or one that lies inside another.
    """
    tree: Tree = {}
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{name} holds entries that are not finite; leave out what they belong to")
        *parents, last = name.split(separator)
        branch = tree
        for part in parents:
            inner = branch.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name} lies inside another array; name arrays as layer{separator}part")
            branch = inner
        if last in branch:
            raise ValueError(f"{name} is given twice; name arrays as layer{separator}part")
        branch[last] = array
    return tree


def trained_layers(arrays: Mapping[str, np.ndarray]) -> Tree:
    """The tree of what clients train: all but the running statistics of batch normalisation, which no gradient moves.

    "." in a name marks the layers, as in PyTorch, or "/" where no name has a ".".

    Raises:
      ValueError: as `nested`.
    """
    untrained = ("num_batches_tracked", "running_mean", "running_var")
    trained = {
        name: array
        for name, array in arrays.items()
        if name.rsplit(".", 1)[-1] not in untrained and not name.startswith("batch_stats/")
    }
    return nested(trained, "." if any("." in name for name in trained) else "/")


def flat(tree: Tree, separator: str = "/") -> dict[str, np.ndarray]:
    """The arrays of a tree by name; undoes `nested`."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            arrays |= {f"{name}{separator}{rest}": leaf for rest, leaf in flat(value, separator).items()}
        else:
            arrays[name] = value
    return arrays


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    try:
        import safetensors  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ValueError(f"{path}: needs safetensors; pip install 'softinv_jax[safetensors]'") from error
    try:
        # Its own loader for NumPy knows no bfloat16.
        entries = safetensors.deserialize(Path(path).read_bytes())
    except Exception as error:  # Its own error class.
        raise ValueError(f"{path}: no safetensors file that can be read ({first_line(error)})") from error
    arrays = {}
    for name, entry in entries:
        kind = SAFETENSORS_FLOATS.get(entry["dtype"])
        if kind is not None:
            little = np.frombuffer(entry["data"], np.dtype(kind).newbyteorder("<"))
            arrays[name] = little.astype(kind).reshape(entry["shape"])
        elif entry["dtype"].startswith("F"):
            raise ValueError(f"{path}: {name} is {entry['dtype']}, which is not supported; save it as bfloat16")
    if entries and not arrays:
        raise ValueError(f"{path}: holds no floating arrays; save a model's parameters")
    return arrays


def _read_torch(path: str, key: str | None) -> dict[str, np.ndarray]:
    try:
        import torch  # noqa: PLC0415 - optional, and slow
    except ImportError as error:
        raise ValueError(f"{path}: needs torch; pip install 'softinv_jax[torch]', or save as safetensors") from error
    try:
        # What older versions wrote, and any other pickle, says nothing of its size beforehand.
        if not zipfile.is_zipfile(path):
            raise ValueError("not a file of PyTorch 1.6 or newer")
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged and hostile files make it raise nearly anything.
        raise ValueError(
            f"{path}: cannot be loaded as weights only ({first_line(error)}); write it with"
            " torch.save(model.state_dict(), path)"
        ) from error

    def is_matrix(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim >= 2 and value.is_floating_point()

    try:
        state = find_state(loaded, is_matrix, key)
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        for name, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise ValueError(f"{name} is no dense tensor; save parameters only")
        # A tensor may repeat one stored number a billion times.
        check_unpacked(path, sum(value.numel() * value.element_size() for value in tensors.values()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {name: _to_numpy(tensor.detach().contiguous()) for name, tensor in tensors.items()}


def _to_numpy(tensor: Any) -> np.ndarray:
    import torch  # noqa: PLC0415

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.resolve_conj().resolve_neg().numpy()
