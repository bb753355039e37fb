"""Rows of a long benchmark, each written down as soon as it is there: a run that was stopped goes on from them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softinv_jax.atomic_file import write_atomically

if TYPE_CHECKING:
    from runner import Run

__all__ = ["FinishedRows", "add_row_options", "measure_rows"]


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """--finished and --fresh."""
    parser.add_argument("--finished", action="store_true", help="the rows that are there already, and no others")
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever rows are there already")


class FinishedRows:
    """A JSON file of rows by name, and the options they were made with; rows of other options are left out.

    Args:
      path: of the file; its folder is made.
      options: all that the rows depend on, plain values.
      fresh: begin anew.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path, self.options = path, json.loads(json.dumps(options))
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh or not path.exists():
            return
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["options"] == self.options:
            self.rows = held["rows"]
            print(f"{path}: {len(self.rows)} rows are there already (--fresh begins anew)", file=sys.stderr)
        else:
            print(f"{path}: rows of other options, which will be overwritten", file=sys.stderr)

    def get(self, name: str) -> dict[str, Any] | None:
        """The row of that name, or None."""
        return self.rows.get(name)

    def keep(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a row of plain values, and write all of them."""
        self.rows[name] = json.loads(json.dumps(row))
        text = json.dumps({"options": self.options, "rows": self.rows})
        write_atomically(self.path, lambda file: file.write(text.encode()))


def measure_rows(
    run: Run,
    finished: FinishedRows,
    rows: Mapping[str, Callable[[], Mapping[str, Any]]],
    title: str,
    columns: Mapping[str, Callable[[dict[str, Any]], str]],
    draw: Callable[..., Any] | None = None,
    *,
    asked: Callable[[str], bool] = lambda name: True,
) -> None:
    """Measure the rows that are not there yet, and write the table after each; can be interrupted.

    Args:
      rows: by name, what measures each. title, columns, draw: as of `Run.finish`.
      asked: whether a row is to be measured; one that is not is only shown where it is there already.
    """
    try:
        for name, measure in rows.items():
            held = finished.get(name)
            if held is None and asked(name):
                held = {**measure(), "commit": run.commit}
                finished.keep(name, held)
            if held is not None:
                run.add(**held)
                run.write(title, columns)
    except KeyboardInterrupt:
        print("stopped: the rows that are done are written")
    if run.rows:
        run.finish(title, columns, draw)
