"""What the sections of `accelerator.py` share: rows that are guarded and end in time, timings, and scores."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from runner import Run

import softinv_jax
from softinv_jax.measures.label_error import label_error

LONGEST_ERROR = 300
RIGHT = 1e-4  # As in soft_labels.py.
SIX = 6.0
MEMORY_SHARE = 1 / 6  # Of the device's memory, for the gradients of one case.


class TimeIsUp(BaseException):
    """The run's time is over. No `Exception`: nothing on the way may take it for a failure of its own."""


class Session:
    """Rows one after the other, on the disk after each; what fails or comes too late says so in its row."""

    def __init__(self, run: Run, title: str, columns: Mapping[str, Callable[[dict[str, Any]], object]]) -> None:
        self.run, self._title, self._columns = run, title, columns
        self._limit = run.arguments.time_limit
        self._end = time.perf_counter() + self._limit
        self.platform = jax.default_backend()

    def size(self, quick: int, cpu: int, accelerator: int) -> int:
        """One of three numbers: for `--quick`, a CPU, and everything else."""
        return quick if self.run.arguments.quick else cpu if self.platform == "cpu" else accelerator

    def measure(self, section: str, case: str, what: str, function: Callable[[], dict[str, Any]]) -> None:
        """Add the row that `function` makes, or one that says why there is none."""
        row: dict[str, Any] = {"section": section, "case": case, "what": what}
        left = self._end - time.perf_counter()
        try:
            if left <= 0:
                raise TimeIsUp
            with _alarm(left):
                row |= function()
        except TimeIsUp:
            row["skipped"] = f"skipped: {self._limit:.0f} s are over"
        except Exception as error:
            text = " ".join(str(error).split())[:LONGEST_ERROR]
            row["error"] = f"{type(error).__name__}: {text}"
        self.run.add(**row)
        self.run.write(self._title, self._columns)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` inside after so long, as soon as what is compiling then has been compiled."""

    def ring(*_: object) -> None:
        raise TimeIsUp

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Timing(NamedTuple):
    """Seconds of the first call beyond those of the best later one, those of the best one, and its result."""

    first: float
    best: float
    result: Any

    def row(self, count: int, unit: str) -> dict[str, Any]:
        """What a row says of it: `count` of `unit` in one call."""
        return {"first_seconds": self.first, "seconds": self.best, "count": count, "unit": unit}


def best_of(function: Callable[[], Any], runs: int = 5, budget: float = 4.0) -> Timing:
    """The first call apart, then the best of up to `runs`, no more of them begun once `budget` seconds are spent."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    first = time.perf_counter() - start
    best, begun = np.inf, time.perf_counter()
    for _ in range(runs):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > budget:
            break
    return Timing(max(first - best, 0.0), best, result)


def score(result: softinv_jax.Recovery, labels: Any) -> dict[str, int]:
    """How many labels are given, how many are unique, and how many of these are wrong. The truth is used here only.

    Wrong: farther off than 1e-4 and than six of the deviations that the recovery itself states.
    """
    verdict, deviation = np.asarray(result.verdict), np.asarray(result.evidence.label_deviation)
    error = label_error(np.asarray(result.label), np.asarray(labels)).largest
    unique = verdict == softinv_jax.Verdict.UNIQUE
    wrong = unique & ~(error <= np.maximum(RIGHT, 1e-6 + SIX * deviation.max(axis=-1)))
    return {
        "given": int((verdict >= softinv_jax.Verdict.AMBIGUOUS).sum()),
        "unique": int(unique.sum()),
        "right": int((unique & ~wrong).sum()),
        "wrong": int(wrong.sum()),
    }


def fitting(examples: int, example_bytes: int) -> int:
    """`examples`, halved until their bytes are no more than a sixth of the device's memory, where that is known."""
    statistics = jax.devices()[0].memory_stats() or {}
    room = MEMORY_SHARE * statistics.get("bytes_limit", np.inf)
    while examples > 1 and examples * example_bytes > room:
        examples //= 2
    return examples
