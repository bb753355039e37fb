"""The arrays of an .npz file left where they are: memory maps, for files larger than the memory."""

import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from softinv_jax.command_line.console import InputError

__all__ = ["map_arrays"]

# Before a member's bytes stands a header of 30 bytes, which ends with the lengths of the name and of an extra field
# that follow it (PKWARE's APPNOTE, 4.3.7).
MEMBER_HEADER = 30


def map_arrays(path: str) -> dict[str, np.ndarray]:
    """Read-only memory maps of all arrays; no value is read.

    Args:
      path: an .npz file of float16, float32 or float64 arrays, as np.savez (not np.savez_compressed) writes it.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise InputError(f"{path}: holds an array more than once; write every array under one name")
        return {name: _mapped(path, name, entry) for name, entry in entries.items()}
    except InputError:
        raise
    except Exception as error:  # Damaged and hostile files make NumPy and zipfile raise nearly anything.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(f"{path}: cannot be read in parts ({reason}); write it again with np.savez") from error


def _mapped(path: str, name: str, entry: zipfile.ZipInfo) -> np.ndarray:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: is compressed, and can only be read whole; write it with np.savez instead")
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        header = file.read(MEMBER_HEADER)
        start = entry.header_offset + MEMBER_HEADER + sum(struct.unpack("<HH", header[-4:]))
        file.seek(start)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
        offset = file.tell()
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(
            f"{path}: {name} must be float16, float32 or float64, but is {dtype}; convert it with .astype(np.float32)"
        )
    if is_fortran or not dtype.isnative:
        raise InputError(
            f"{path}: {name} cannot be read in parts; save np.ascontiguousarray of it in this machine's byte order"
        )
    if min(shape, default=0) < 1 or offset + math.prod(shape) * dtype.itemsize != start + entry.file_size:
        raise InputError(f"{path}: {name} declares shape {shape} of {dtype}, but other bytes follow; write it again")
    return np.memmap(path, dtype, "r", offset, shape)
