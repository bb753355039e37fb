"""Float arrays from an .npz file that is not trusted."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["check_archive", "check_unpacked", "read_npz"]

# Floats that were trained do not compress twentyfold; a file that unpacks to more than this could be meant to fill the
# memory. One written without compression holds every byte it declares.
LARGEST_RATIO = 20
LARGEST_SURPRISE = 256 * 2**20


def read_npz(path: str, check_names: Callable[[list[str]], None] | None = None) -> dict[str, np.ndarray]:
    """Read all arrays; nothing in the file is executed, and no more memory is taken than the file explains.

    Args:
      path: an .npz file of float16, float32 or float64 arrays.
      check_names: looks at the names before anything is read, and raises ValueError.

    Raises:
      ValueError: one line that names the file, what is wrong, and the remedy.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    if not Path(path).is_file():
        raise ValueError(f"{path}: not a file; give an .npz file as np.savez writes it")
    try:
        if not zipfile.is_zipfile(path):
            raise _RefusedError("not an .npz file; write it with np.savez(path, weight=..., ...)")
        with zipfile.ZipFile(path) as archive:
            check_archive(path, archive)
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if check_names is not None:
                try:
                    check_names(list(members))
                except ValueError as error:
                    raise _RefusedError(str(error)) from error
            return {name: _read_member(archive, name, entry) for name, entry in members.items()}
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # Damaged and hostile files make NumPy and zipfile raise nearly anything.
        raise ValueError(f"{path}: cannot be read ({_reason(error)}); write it again with np.savez") from error


def check_archive(path: str, archive: zipfile.ZipFile) -> None:
    """Refuse a zip archive with doubtful contents, before anything in it is read.

    Raises:
      ValueError: members with the same name, or ones that unpack to far more than the file holds.
    """
    names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise _RefusedError(f"holds {', '.join(map(repr, twice[:6]))} more than once; write every array under one name")
    check_unpacked(path, sum(entry.file_size for entry in archive.infolist()))


def check_unpacked(path: str, unpacked: int) -> None:
    """Refuse a file whose arrays take up far more bytes, `unpacked`, than itself.

    Raises:
      ValueError: with the two sizes.
    """
    size = Path(path).stat().st_size
    if unpacked > LARGEST_SURPRISE and unpacked > LARGEST_RATIO * size:
        raise _RefusedError(
            f"would unpack from {size} to {unpacked} bytes, as only a file made to fill the memory does; write it"
            " without compression"
        )


class _RefusedError(ValueError):
    """A message of ours, to be told as it is."""


def _reason(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return first_line or type(error).__name__


def _read_member(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(entry) as file:
        magic = file.read(len(np.lib.format.MAGIC_PREFIX))
        if magic != np.lib.format.MAGIC_PREFIX:
            raise _RefusedError(f"{name} is no array; write it with np.savez")
        version = tuple(file.read(2))
        if version not in ((1, 0), (2, 0)):
            raise _RefusedError(f"{name} has the .npy version {version}; save plain float arrays")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        if dtype.hasobject:
            raise _RefusedError(f"{name} holds Python objects, which are not loaded for safety; save a float array")
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise _RefusedError(
                f"{name} must be float16, float32 or float64, but is {dtype}; convert it with .astype(np.float32)"
            )
        count = 1
        for length in shape:  # Python's integers do not overflow.
            count *= length
        rest = entry.file_size - file.tell()
        if min(shape, default=0) < 0 or count * dtype.itemsize != rest:
            raise _RefusedError(
                f"{name} declares shape {shape} of {dtype}, but {rest} bytes follow; write it again with np.savez"
            )
        values = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
    return values.astype(dtype.newbyteorder("="))
