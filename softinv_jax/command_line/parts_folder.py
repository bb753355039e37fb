"""RECOVERY.npz.parts: finished parts of a long run, in a folder that carries our mark and has one user."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from softinv_jax.command_line.console import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs at once are then not told apart.
    fcntl = None  # type: ignore[assignment]

__all__ = ["claim_parts", "remove_parts"]

MARK = "softinv-parts"
_OURS = (MARK, "settings.json", "part-*.npz", ".softinv-*")


@contextmanager
def claim_parts(path: str) -> Iterator[None]:
    """Make the folder, or take up that of a run that was stopped, and keep other runs out.

    Raises:
      InputError: for a folder that softinv did not make, one that another run is using, or one that cannot be made.
    """
    folder = Path(path)
    try:
        if os.path.lexists(folder):
            if not os.path.isfile(folder / MARK):
                raise InputError(f"{path}: not made by softinv; move it away, or choose another --out")
        else:
            folder.mkdir()
        with open(folder / MARK, "ab") as mark:
            _lock(mark, path)
            yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); mend that and run the same command again, which goes on"
            " where this one stopped, or choose another --out"
        ) from error


def _lock(mark: IO[bytes], path: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Given back when the process ends, however it does.
    except BlockingIOError:
        raise InputError(f"{path}: another run is using it; wait for that, or choose another --out") from None
    except OSError:  # A file system without locks.
        pass


def remove_parts(path: str) -> None:
    """Remove what softinv wrote, and the folder where nothing else is in it."""
    folder = Path(path)
    for pattern in reversed(_OURS):  # The mark last: without it the folder would be taken for a stranger's.
        for file in folder.glob(pattern):
            with suppress(OSError):
                file.unlink()
    with suppress(OSError):
        folder.rmdir()
