"""Float arrays from an .npz file that is not trusted."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from softinv_jax.command_line.console import InputError

__all__ = ["read_arrays"]

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


def read_arrays(path: str, check_names: Callable[[list[str]], None] | None = None) -> dict[str, np.ndarray]:
    """Read all arrays; nothing in the file is executed.

    Args:
      path: an .npz file of float16, float32 or float64 arrays.
      check_names: looks at the names before anything is read, and raises InputError.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    if not Path(path).is_file():
        raise InputError(f"{path}: not a file; give an .npz file as np.savez writes it")
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}: not an .npz file; write it with np.savez(path, weight=..., ...)")
        with np.load(path, allow_pickle=False) as file:
            if check_names is not None:
                check_names(file.files)
            return {name: _checked(path, name, file) for name in file.files}
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); write it again with np.savez") from error


def _reason(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return first_line or type(error).__name__


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
