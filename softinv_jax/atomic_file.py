"""A file that is there whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["discard_unfinished", "write_atomically"]

# A short name of our own: with the target's in it, it could be longer than the file system takes.
PREFIX = ".softinv-"
_unfinished: set[Path] = set()


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put that in its place in one step.

    Raises:
      OSError: where it cannot be written; what was at `path` before is then untouched.
    """
    target = Path(os.path.realpath(path))
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=PREFIX, delete=False) as file:
            partial = Path(file.name)
            _unfinished.add(partial)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # Temporary files are private; the result gets the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(target)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
            _unfinished.discard(partial)


def discard_unfinished() -> None:
    """Remove temporary files that are being written: for a process that ends at once."""
    for partial in list(_unfinished):
        partial.unlink(missing_ok=True)
