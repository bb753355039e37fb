"""What every benchmark shares: options, seeds, versions, time, and the results as JSON, a table and a plot."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from softinv_jax.atomic_file import write_atomically
from softinv_jax.command_line.compilation_cache import keep_compiled_programs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
SEEDS = 5
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "numpy", "torch")
Item = TypeVar("Item")


def option_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="networks, each with its own weights and clients")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the smallest run that goes through all of it")
    size.add_argument("--full", action="store_true", help="the numbers of samples of the paper")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where NAME.json, .md, .png go")
    return parser


def add_data_options(parser: argparse.ArgumentParser, dataset: str = "cifar10") -> None:
    """`--dataset` and `--data-dir`."""
    parser.add_argument("--dataset", default=dataset, help="a prepared TFDS data set, or 'photographs'")
    parser.add_argument("--data-dir", help="TFDS data directory (default: TFDS_DATA_DIR)")


class Run:
    """One run of a benchmark: collects rows and writes them down with what they depend on."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        if arguments.seeds < 1:
            raise SystemExit(f"--seeds must be at least 1, not {arguments.seeds}")
        keep_compiled_programs()
        if arguments.quick:
            arguments.seeds = 1
        self.name, self.arguments = name, arguments
        self.rows: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self._start = time.perf_counter()
        self.commit = _commit()  # What runs, not what is there when it ends.
        self._compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note_compilation)

    def _note_compilation(self, event: str, seconds: float, **_: Any) -> None:
        if event in ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_trace_duration"):
            self._compiling += seconds

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self._start

    @property
    def compile_seconds(self) -> float:
        """Spent on tracing and compiling so far."""
        return self._compiling

    @property
    def seeds(self) -> range:
        return range(self.arguments.seeds)

    def size(self, quick: int, usual: int, full: int) -> int:
        """One of three numbers, as `--quick` and `--full` say."""
        return quick if self.arguments.quick else full if self.arguments.full else usual

    def track(self, items: Iterable[Item], description: str) -> Iterator[Item]:
        """Iterate with a progress bar on stderr."""
        console = Console(stderr=True)
        hidden = not console.is_terminal
        yield from track(list(items), description, console=console, transient=True, disable=hidden)

    def add(self, **row: Any) -> None:
        """Keep a row, and say it on stderr, so that a long run can be followed."""
        self.rows.append(row)
        short = {name: value for name, value in row.items() if not isinstance(value, list | dict)}
        print(json.dumps(short, default=_plain), file=sys.stderr, flush=True)

    def finish(
        self,
        title: str,
        columns: Mapping[str, Callable[[dict[str, Any]], object]],
        draw: Callable[[list[dict[str, Any]]], Figure] | None = None,
    ) -> None:
        """Print the table, and write NAME.json, NAME.md and, where something is drawn, NAME.png.

        Args:
          title: of the table.
          columns: heading and what stands there, by row.
          draw: makes the plot from the rows.
        """
        cells = self.write(title, columns)
        table = Table(*columns, title=title)
        for row in cells:
            table.add_row(*row)
        Console(width=max(Console().width, 150)).print(table)
        folder = self.arguments.out
        if draw is not None:
            figure = draw(self.rows)
            write_atomically(folder / f"{self.name}.png", lambda file: figure.savefig(file, dpi=110))
        print(f"{folder}/{self.name}.json, .md{', .png' if draw else ''}", file=sys.stderr)

    def write(self, title: str, columns: Mapping[str, Callable[[dict[str, Any]], object]]) -> list[list[str]]:
        """Write NAME.json and NAME.md of the rows so far, so that a run that is stopped leaves what it had.

        Returns:
          What stands in the table, row by row.
        """
        facts = self.facts()
        cells = [[str(value(row)) for value in columns.values()] for row in self.rows]
        folder = self.arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(facts | {"rows": self.rows}, indent=1, default=_plain)
        write_atomically(folder / f"{self.name}.json", lambda file: file.write(f"{text}\n".encode()))
        page = _markdown(title, list(columns), cells, facts, self.name)
        write_atomically(folder / f"{self.name}.md", lambda file: file.write(page.encode()))
        return cells

    def facts(self) -> dict[str, Any]:
        """What the results depend on, and what they cost."""
        plain = {name: value for name, value in vars(self.arguments).items() if name not in ("out", "data_dir")}
        return {
            "benchmark": self.name,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "commit": self.commit,
            "device": _device(),
            "versions": {name: found for name in PACKAGES if (found := _version(name))}
            | {"python": platform.python_version()},
            "arguments": {name: value for name, value in plain.items() if isinstance(value, str | int | float | list)},
            "seconds": round(self.seconds, 1),
            "compile_seconds": round(self._compiling, 1),
            **self.notes,
        }


def timed(function: Callable[[], Item]) -> tuple[Item, float]:
    """The result, ready, and the seconds it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return result, time.perf_counter() - start


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation over repetitions, as text."""
    if len(values) < 2:
        return f"{np.mean(values):.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def shares(right: Sequence[np.ndarray]) -> dict[str, Any]:
    """What a row says of right answers: one (N,) bool a network."""
    return {
        "networks": len(right),
        "samples_each": right[0].size,
        "right_percent": [100 * float(np.mean(own)) for own in right],
        "total": sum(own.size for own in right),
        "failed": sum(int(np.sum(~own)) for own in right),
    }


SHARE_COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "networks x samples": lambda row: f"{row['networks']} x {row['samples_each']}",
    "right, %": lambda row: spread(row["right_percent"], 2),
    "failed": lambda row: f"{row['failed']} of {row['total']}",
}
"""Of a table whose rows hold `shares`."""


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own: no window, no global state."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    return Figure(figsize=(width, height), layout="constrained")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that ran, with a plus if files that matter to it were changed since."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "softinv_jax", "benchmarks/*.py").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} {'core' if cores == 1 else 'cores'} of {model}"


def _markdown(title: str, columns: list[str], cells: list[list[str]], facts: dict[str, Any], name: str) -> str:
    lines = [f"# {title}", ""]
    lines += [" | ".join(["", *columns, ""]).strip(), "|" + "---|" * len(columns)]
    lines += [" | ".join(["", *row, ""]).strip() for row in cells]
    lines += ["", f"`python benchmarks/{name}.py`, {facts['date']}, commit {facts['commit']}, {facts['device']}:"]
    lines += [f"{facts['seconds']:.0f} s, {facts['compile_seconds']:.0f} s of it compiling. Options: "]
    lines += [", ".join(f"{key} {value}" for key, value in facts["arguments"].items()) + ". Versions: "]
    lines += [", ".join(f"{key} {value}" for key, value in facts["versions"].items()) + "."]
    if "checkpoints" in facts:
        lines += ["", "Trained networks (SHA-256 of the file, accuracy on the test images):", ""]
        lines += [
            f"* {key}: `{value['sha256'][:16]}`, {value['test_accuracy']:.3f}"
            for key, value in facts["checkpoints"].items()
        ]
    return "\n".join(lines) + "\n"
