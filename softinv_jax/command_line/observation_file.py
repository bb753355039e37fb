"""OBSERVATION.npz: what the server saw of one head, read without trusting the file."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from softinv_jax.command_line.console import InputError
from softinv_jax.observation.head import Observation, observe

__all__ = ["read_observation"]

_REQUIRED = ("weight", "weight_gradient")
_OPTIONAL = ("bias", "bias_gradient")
# What NumPy and zipfile raise on damaged, encrypted, oversized or hostile files.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_observation(path: str) -> Observation:
    """Read and check an observation.

    Args:
      path: an .npz file with `weight` (C, d), `weight_gradient` (C, d) or (N, C, d) and, for a head with a bias,
        `bias` (C,) and `bias_gradient` (C,) or (N, C); float16, float32 or float64. Nothing in it is executed.

    Returns:
      An `Observation` whose gradients have a leading axis N.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    arrays = _load(path)
    try:
        observation = _observe(arrays)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if observation.weight_gradient.ndim == 2:
        arrays = {name: array[None] if name.endswith("gradient") else array for name, array in arrays.items()}
        observation = _observe(arrays)
    return observation


def _observe(arrays: dict[str, np.ndarray]) -> Observation:
    return observe(arrays["weight"], arrays["weight_gradient"], arrays.get("bias"), arrays.get("bias_gradient"))


def _load(path: str) -> dict[str, np.ndarray]:
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    if not Path(path).is_file():
        raise InputError(f"{path}: not a file; give an .npz file as np.savez writes it")
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}: not an .npz file; write it with np.savez(path, weight=..., ...)")
        with np.load(path, allow_pickle=False) as file:
            _check_keys(path, file.files)
            return {name: _checked(path, name, file) for name in file.files}
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); write it again with np.savez") from error


def _reason(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return first_line or type(error).__name__


def _check_keys(path: str, names: list[str]) -> None:
    missing = [name for name in _REQUIRED if name not in names]
    unknown = [name for name in names if name not in _REQUIRED + _OPTIONAL]
    known = f"an observation has {', '.join(_REQUIRED)} and, for a head with a bias, {', '.join(_OPTIONAL)}"
    if missing:
        found = ", ".join(map(repr, names[:6])) or "nothing"
        raise InputError(f"{path}: {' and '.join(missing)} missing (it holds {found}); {known}")
    if unknown:
        listed = ", ".join(map(repr, unknown[:6]))
        raise InputError(f"{path}: unknown {'array' if len(unknown) == 1 else 'arrays'} {listed}; {known}")


def _checked(path: str, name: str, file: np.lib.npyio.NpzFile) -> np.ndarray:
    try:
        array = file[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise InputError(
            f"{path}: {name} holds Python objects, which are not loaded for safety; save a float array"
        ) from error
    # A member that is not in NumPy's format comes back as bytes.
    dtype = getattr(array, "dtype", None)
    if dtype is None or dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(
            f"{path}: {name} must be float16, float32 or float64, but is {dtype or 'no array'};"
            " convert it with .astype(np.float32)"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)
