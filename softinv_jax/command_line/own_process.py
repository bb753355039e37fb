"""The process of the command line: it ends at once and in one line when it is interrupted, and its streams are there.

Nothing here may load more than Python itself has loaded: an interruption can come within the first milliseconds.
"""

import _thread
import os
import signal
import sys
from types import FrameType

__all__ = ["prepare_process"]

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_ending = _thread.allocate_lock()
_SHOW_CURSOR = b"\x1b[?25h\r\x1b[2K"


def prepare_process() -> None:
    """End on SIGINT and SIGTERM from now on, and replace streams that are closed."""
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # As a shell does for what runs in the background.
            signal.signal(number, _end)
    _watch()
    _open_streams()


def _watch() -> None:
    """End while the main thread computes or compiles as well: Python calls handlers only between its own steps."""
    import threading  # noqa: PLC0415 - takes milliseconds; the handlers are there first

    try:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    except (OSError, ValueError):  # A system without; the handlers do.
        return

    def wait() -> None:
        while True:
            for number in os.read(reading, 1):
                if number in _WORDS:
                    _end(number, None)

    threading.Thread(target=wait, daemon=True).start()


def _end(number: int, frame: FrameType | None) -> None:
    """Say so, leave no temporary file, and end without the clearing up that other threads of jax do not survive."""
    if not _ending.acquire(blocking=False):  # The handler and the watching thread may both come here.
        return
    files = sys.modules.get("softinv_jax.atomic_file")
    if files is not None and hasattr(files, "discard_unfinished"):
        files.discard_unfinished()
    try:
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
        os.write(2, f"softinv: {_WORDS[signal.Signals(number)]}\n".encode())
    except OSError:
        pass
    os._exit(128 + number)


def _open_streams() -> None:
    """A closed stream becomes the null device: else the next file that is opened takes its place, and gets the text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            try:
                os.fstat(number)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)
                if null != number:
                    os.dup2(null, number)
                    os.close(null)
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # Names of files need not be text in this encoding.
