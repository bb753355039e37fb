"""A file that is there whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put that in its place in one step.

    Raises:
      OSError: where it cannot be written; what was at `path` before is then untouched.
    """
    target = Path(os.path.realpath(path))
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            partial = Path(file.name)
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
