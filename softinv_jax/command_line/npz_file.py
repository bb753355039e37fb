"""Float arrays from an .npz file that is not trusted."""

import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from softinv_jax.command_line.console import InputError

__all__ = ["map_arrays", "read_arrays"]

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
    with _opened(path), np.load(path, allow_pickle=False) as file:
        if check_names is not None:
            check_names(file.files)
        return {name: _checked(path, name, file) for name in file.files}


def map_arrays(path: str, check_names: Callable[[list[str]], None] | None = None) -> dict[str, np.ndarray]:
    """As `read_arrays`, but nothing is read: memory maps into an .npz file that is not compressed.

    Raises:
      InputError: as `read_arrays`, and for a file that np.savez_compressed wrote.
    """
    with _opened(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if check_names is not None:
            check_names(list(members))
        return {name: _mapped(path, name, archive.getinfo(member)) for name, member in members.items()}


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    """The file as an archive; what NumPy and zipfile raise inside is the file's fault."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    if not Path(path).is_file():
        raise InputError(f"{path}: not a file; give an .npz file as np.savez writes it")
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}: not an .npz file; write it with np.savez(path, weight=..., ...)")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); write it again with np.savez") from error


def _mapped(path: str, name: str, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise InputError(
            f"{path}: is compressed, and can only be read whole; write it with np.savez to read it in parts"
        )
    with open(path, "rb") as file:
        # Before a member's bytes stands a header of 30 bytes, which ends with the lengths of the name and of an
        # extra field that follow it (PKWARE's APPNOTE, 4.3.7).
        file.seek(member.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{name} has no header")
        start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        file.seek(start)
        major, _ = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
        offset = file.tell()
    _check_dtype(path, name, dtype)
    if offset + math.prod(shape) * dtype.itemsize > start + member.file_size:
        raise ValueError(f"{name} is shorter than its shape {shape} says")
    if is_fortran or not dtype.isnative or not shape or 0 in shape:
        raise InputError(
            f"{path}: {name} cannot be read in parts; save np.ascontiguousarray of it in this machine's byte order"
        )
    return np.memmap(path, dtype, "r", offset, shape)


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
    _check_dtype(path, name, getattr(array, "dtype", None))
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_dtype(path: str, name: str, dtype: np.dtype | None) -> None:
    if dtype is None or dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(
            f"{path}: {name} must be float16, float32 or float64, but is {dtype or 'no array'};"
            " convert it with .astype(np.float32)"
        )
