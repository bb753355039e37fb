"""Float arrays from an .npz file that is not trusted, read or left in the file as memory maps."""

import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

__all__ = ["check_archive", "check_unpacked", "first_line", "map_npz", "read_npz"]

# Floats that were trained do not compress twentyfold; a file that unpacks to more than this could be meant to fill the
# memory. One written without compression holds every byte it declares.
LARGEST_RATIO = 20
LARGEST_SURPRISE = 256 * 2**20
# Before a member's bytes stands a header of 30 bytes, which ends with the lengths of the name and of an extra field
# that follow it (PKWARE's APPNOTE, 4.3.7).
MEMBER_HEADER = 30


def read_npz(
    path: str, check_names: Callable[[list[str]], None] | None = None, *, floats_only: bool = True
) -> dict[str, np.ndarray]:
    """Read all arrays; nothing in the file is executed, and no more memory is taken than the file explains.

    Args:
      path: an .npz file of float16, float32 or float64 arrays.
      check_names: looks at the names before anything is read, and raises ValueError.
      floats_only: refuse integers and booleans, rather than read them too.

    Raises:
      ValueError: one line that names the file, what is wrong, and the remedy.
    """
    if not os.path.exists(path):  # Path.exists raises where a name is longer than the file system takes.
        raise ValueError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file; give an .npz file as np.savez writes it")
    try:
        if not zipfile.is_zipfile(path):
            raise _RefusedError("not an .npz file; write it with np.savez(path, weight=..., ...)")
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive, check_names)
            return {name: _read_member(archive, name, entry, floats_only) for name, entry in members.items()}
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # Damaged and hostile files make NumPy and zipfile raise nearly anything.
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); write it again with np.savez") from error


def map_npz(path: str, check_names: Callable[[list[str]], None] | None = None) -> dict[str, np.ndarray]:
    """Read-only memory maps of all arrays, for files larger than the memory; no value is read.

    Args:
      path: an .npz file of float16, float32 or float64 arrays, as np.savez (not np.savez_compressed) writes it.
      check_names: as in `read_npz`.

    Raises:
      ValueError: one line that names the file, what is wrong, and the remedy.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive, check_names)
        return {name: _map_member(path, name, entry) for name, entry in members.items()}
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # As in read_npz.
        raise ValueError(
            f"{path}: cannot be read in parts ({first_line(error)}); write it again with np.savez"
        ) from error


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


def first_line(error: BaseException) -> str:
    """What to say of an error of unknown origin, in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def _members(
    path: str, archive: zipfile.ZipFile, check_names: Callable[[list[str]], None] | None
) -> dict[str, zipfile.ZipInfo]:
    """By name, checked before any is read."""
    check_archive(path, archive)
    members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
    if check_names is not None:
        try:
            check_names(list(members))
        except ValueError as error:
            raise _RefusedError(str(error)) from error
    return members


def _read_header(file: IO[bytes], name: str, floats_only: bool = True) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order (True for Fortran's) and dtype of a member at its beginning."""
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
    if dtype.kind not in ("f" if floats_only else "fbiu") or dtype.itemsize > 8:
        raise _RefusedError(
            f"{name} must be float16, float32 or float64, but is {dtype}; convert it with .astype(np.float32)"
        )
    return shape, fortran_order, dtype


def _read_member(archive: zipfile.ZipFile, name: str, entry: zipfile.ZipInfo, floats_only: bool) -> np.ndarray:
    with archive.open(entry) as file:
        shape, fortran_order, dtype = _read_header(file, name, floats_only)
        rest = entry.file_size - file.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != rest:
            raise _RefusedError(
                f"{name} declares shape {shape} of {dtype}, but {rest} bytes follow; write it again with np.savez"
            )
        values = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
    return values.astype(dtype.newbyteorder("="))


def _map_member(path: str, name: str, entry: zipfile.ZipInfo) -> np.ndarray:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _RefusedError("is compressed, and can only be read whole; write it with np.savez instead")
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        start = entry.header_offset + MEMBER_HEADER + sum(struct.unpack("<HH", file.read(MEMBER_HEADER)[-4:]))
        file.seek(start)
        shape, fortran_order, dtype = _read_header(file, name)
        offset = file.tell()
    if fortran_order or not dtype.isnative:
        raise _RefusedError(
            f"{name} cannot be read in parts; save np.ascontiguousarray of it in this machine's byte order"
        )
    if 0 in shape:
        raise _RefusedError(f"{name} has shape {shape}, and so no entries; leave it out, or fill it")
    if min(shape, default=0) < 1 or offset + math.prod(shape) * dtype.itemsize != start + entry.file_size:
        raise _RefusedError(f"{name} declares shape {shape} of {dtype}, but other bytes follow; write it again")
    return np.memmap(path, dtype, "r", offset, shape)
