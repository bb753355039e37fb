"""`accelerator.py --growth`: how rate and memory grow with the number of classes C, of features d, and of gradients N.

Each point is a process of its own, because a device tells the largest memory of its process only: all calls together.
On a CPU it is what the process holds at most, above what it held before the call; the first call, which compiles, is
apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from accelerator_labels import Case
from accelerator_session import best_of, score
from runner import Run, new_figure, timed

import softinv_jax
from softinv_jax.command_line.compilation_cache import keep_compiled_programs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Growth with C, d and N"
MEGABYTES, MEGABYTES_ON_CPU = 256, 64  # Of gradients, where N is not what grows.
FEWEST = 4
LONGEST_POINT = 120.0  # Seconds.
POINTS: dict[str, tuple[tuple[int, int, int], ...]] = {  # C, d and N; 0: as many as make up the megabytes.
    "C": tuple((classes, 512, 0) for classes in (10, 30, 100, 300, 1000, 3000, 10_000)),
    "d": tuple((100, features, 0) for features in (64, 256, 1024, 4096)),
    "N": tuple((10, 768, examples) for examples in (1, 64, 1024, 16_384)),
    "C, one gradient, thorough": tuple((classes, 512, -1) for classes in (10, 100, 1000, 10_000, 30_000)),
}
QUICK = {"C": ((10, 512, 0), (30, 512, 0)), "N": ((10, 768, 64),), "C, one gradient, thorough": ((10, 512, -1),)}


class MemoryMeter:
    """The largest memory in use since it was made, above what was in use then; None where nothing tells."""

    def __init__(self) -> None:
        self._statistics = jax.devices()[0].memory_stats
        statistics = self._statistics()
        self._on_device = bool(statistics) and "peak_bytes_in_use" in statistics
        if self._on_device:
            self._before = statistics["bytes_in_use"]
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Forgets the largest so far.
                self._before = _process_bytes("VmRSS")
            except OSError:
                self._before = None

    def bytes(self) -> int | None:
        """Above what was in use before."""
        if self._before is None:
            return None
        largest = self._statistics()["peak_bytes_in_use"] if self._on_device else _process_bytes("VmHWM")
        return max(largest - self._before, 0)


def _process_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure_point(classes: int, features: int, examples: int) -> dict[str, Any]:
    """One row, in this process."""
    megabytes = MEGABYTES_ON_CPU if jax.default_backend() == "cpu" else MEGABYTES
    one = examples < 0
    many = max(megabytes * 2**20 // (4 * classes * features), FEWEST)
    case = Case(classes, features, 1 if one else examples or many)
    weight, labels, gradients = case.clients
    observation = case.observation
    if one:
        single = softinv_jax.observe(weight, gradients[0])
        function: Callable[[], Any] = lambda: softinv_jax.recover(single)  # noqa: E731
    else:
        function = lambda: softinv_jax.recover_many(observation)  # noqa: E731
    meter = MemoryMeter()
    result, first = timed(function)
    first_bytes = meter.bytes()
    meter = MemoryMeter()
    timing = best_of(function)
    later_bytes = meter.bytes()
    if one:
        result = jax.tree.map(lambda leaf: leaf[None], result)
    return {
        "classes": classes,
        "features": features,
        "gradient_bytes": gradients.nbytes,
        "first_call_bytes": first_bytes,
        "later_call_bytes": later_bytes,
        "device": str(jax.devices()[0].device_kind),
        **timing.row(case.examples, "labels"),
        "first_seconds": first - timing.best,
        **score(result, labels),
    }


def measure_apart(classes: int, features: int, examples: int, seconds: float) -> dict[str, Any]:
    """The row of one point, from a process of its own; or why there is none."""
    command = [sys.executable, __file__, *map(str, (classes, features, examples))]
    row: dict[str, Any] = {"classes": classes, "features": features}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 0.0), check=False)
    except subprocess.TimeoutExpired:
        return row | {"error": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return row | {"error": (done.stderr.strip().splitlines() or ["ended without a word"])[-1][:300]}
    return row | json.loads(done.stdout.splitlines()[-1])


def run_growth(arguments: argparse.Namespace) -> None:
    """All points, as far as the time goes."""
    jax.config.update("jax_platforms", "cpu")  # The device is for the points' processes, one at a time.
    run = Run("accelerator_growth", arguments)
    end = time.perf_counter() + arguments.time_limit
    for grows, points in (QUICK if arguments.quick else POINTS).items():
        for point in points:
            left = end - time.perf_counter()
            if left > 0:
                row = measure_apart(*point, seconds=min(left, LONGEST_POINT))
            else:
                row = {"classes": point[0], "features": point[1], "error": "skipped: the time is over"}
            run.notes["device"] = row.get("device", run.notes.get("device", "unknown"))
            run.add(grows=grows, **row)
            run.write(TITLE, COLUMNS)
    run.finish(TITLE, COLUMNS, draw if any("count" in row for row in run.rows) else None)


def _multiple(name: str) -> Callable[[dict[str, Any]], str]:
    """Memory of a call with the gradients in it, over theirs."""

    def value(row: dict[str, Any]) -> str:
        used = row.get(name)
        return "" if used is None else f"{1 + used / row['gradient_bytes']:.2g}"

    return value


COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "grows": lambda row: row["grows"],
    "C": lambda row: row["classes"],
    "d": lambda row: row["features"],
    "N": lambda row: row.get("count", ""),
    "labels/s": lambda row: f"{row['count'] / row['seconds']:,.3g}" if "count" in row else row["error"],
    "GB/s": lambda row: f"{row['gradient_bytes'] / row['seconds'] / 1e9:,.3g}" if "count" in row else "",
    "unique": lambda row: row.get("unique", ""),
    "wrong": lambda row: row.get("wrong", ""),
    "first call, s": lambda row: f"{row['first_seconds']:.1f}" if "count" in row else "",
    "memory / gradients' bytes": _multiple("later_call_bytes"),
    "compiling": _multiple("first_call_bytes"),
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Labels a second above, memory below, against what grows."""
    kinds = list(dict.fromkeys(row["grows"] for row in rows if "count" in row))
    figure = new_figure(3.4 * len(kinds), 5.4)
    panels = figure.subplots(2, len(kinds), squeeze=False)
    for (above, below), kind in zip(panels.T, kinds, strict=True):
        own = [row for row in rows if row["grows"] == kind and "count" in row]
        name = {"d": "features", "N": "count"}.get(kind, "classes")
        at = [row[name] for row in own]
        above.loglog(at, [row["count"] / row["seconds"] for row in own], "o-")
        above.set(title=kind, ylabel="labels/s")
        known = [row for row in own if row["later_call_bytes"] is not None]
        multiples = [1 + row["later_call_bytes"] / row["gradient_bytes"] for row in known]
        below.loglog([row[name] for row in known], multiples, "s-")
        below.axhline(3, color="grey", linestyle=":")
        below.set(xlabel=kind[0], ylabel="memory / gradients' bytes")
    return figure


if __name__ == "__main__":
    keep_compiled_programs()
    print(json.dumps(measure_point(*map(int, sys.argv[1:4]))))
