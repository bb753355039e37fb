"""What the commands say to people: on stderr while they work, one line where the input is at fault."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["InputError", "Report", "input_errors", "person_console", "progress_report", "result_console"]

# Wide enough for every table when the output is a file or a pipe, where the width is unknown.
PIPE_WIDTH = 120


class InputError(Exception):
    """Something the user can put right. The message is one line and says how."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


@contextmanager
def input_errors(prefix: str = "") -> Iterator[None]:
    """Make every ValueError an InputError that begins with `prefix`."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{prefix}{error}") from error


class Report(Protocol):
    """Tells how far the work is."""

    def __call__(self, done: int, total: int, stage: str) -> None: ...


def result_console() -> Console:
    """stdout."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def person_console() -> Console:
    """stderr."""
    console = Console(highlight=False, stderr=True)
    return console if console.is_terminal else Console(highlight=False, stderr=True, width=PIPE_WIDTH)


@contextmanager
def progress_report(stages_without_terminal: bool = False) -> Iterator[Report]:
    """A progress bar on stderr, gone when the work is done.

    Args:
      stages_without_terminal: where stderr is not a terminal, print each finished stage on a line; else nothing.
    """
    console = person_console()
    if not console.is_terminal:
        current, start = "", time.perf_counter()

        def print_stage(done: int, total: int, stage: str) -> None:
            nonlocal current, start
            if stage == current:
                return
            # Only once it is over: where a stage fails, the error is all there is to say.
            if stages_without_terminal and current:
                console.print(f"{current}: {time.perf_counter() - start:.0f} s", markup=False)
            current, start = stage, time.perf_counter()

        yield print_stage
        print_stage(0, 0, "")
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def update(done: int, total: int, stage: str) -> None:
            bar.update(task, completed=done, total=total, description=stage)

        yield update
