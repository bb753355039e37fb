"""Where results go: checked before the work starts, apart from every input, written whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from softinv_jax import atomic_file
from softinv_jax.command_line.console import InputError

__all__ = ["check_apart", "check_folder", "check_writable", "make_folder", "write_atomically", "write_npz"]


def check_apart(outputs: Mapping[str, str | None], inputs: Iterable[str | None]) -> None:
    """Refuse an output that would overwrite an input or another output, by whatever names, links included.

    Args:
      outputs: paths by their options, None where not given. inputs: paths, None where not given.

    Raises:
      InputError: naming the two.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    for option, path in given.items():
        if any(_are_one(path, other) for other in inputs if other is not None):
            raise InputError(f"{path}: {option} would overwrite an input; choose another name")
        for other_option, other in given.items():
            if other_option != option and _are_one(path, other):
                raise InputError(f"{path}: {option} and {other_option} name one file; choose another name for one")


def _are_one(first: str, second: str) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # One of them does not exist.
        return False


def check_writable(path: str) -> None:
    """Fail before the work starts where `path` cannot be written.

    Raises:
      InputError: one line with the reason.
    """
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(f"{path}: not a regular file; give the name of a file")
    if not os.path.isdir(target.parent):
        raise InputError(f"{path}: its folder does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        _check_length(target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _check_length(target: Path) -> None:
    """Raise OSError for a name that the file system does not take; os.path.exists only says it is not there."""
    with suppress(FileNotFoundError):
        os.lstat(target)


def check_folder(path: str) -> None:
    """Fail before the work starts where `path` is no folder that can be written, nor can be made; none is made.

    Raises:
      InputError: one line with the reason.
    """
    target = Path(os.path.realpath(path))
    try:
        _check_length(target)
        existing = next(one for one in (target, *target.parents) if os.path.lexists(one))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--out {path}: cannot be made ({error.strerror}); choose another place") from error


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, where it does not exist.

    Raises:
      InputError: one line with the reason.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); choose another place") from error


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write `arrays` under exactly this name (np.savez would append .npz), atomically.

    Raises:
      InputError: one line with the reason; what was at `path` before is then untouched.
    """
    # Through a file object, for the sake of the name.
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def write_atomically(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """`atomic_file.write_atomically`, for a path the user gave.

    Raises:
      InputError: one line with the reason; what was at `path` before is then untouched.
    """
    try:
        atomic_file.write_atomically(path, write)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
