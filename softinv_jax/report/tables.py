"""The demo's result as rows and as tables for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["DemoRow", "demo_tables"]


@dataclass(frozen=True)
class DemoRow:
    """How the attack fared on one label format, for one network and one kind of knowledge of the scale.

    Attributes:
      network: which network. label_format: the clients' label format, which the attack was not told.
      scale_known: whether the attack knew the gradients' scale.
      total: number of gradients. recovered: those with the verdict `unique`.
      wrong: recovered ones whose label is not the true one.
      largest_label_error: largest absolute error of a recovered label's entry, None where none is recovered.
      median_feature_error: median relative error of the recovered features, None likewise.
      verdicts: number of gradients by verdict.
      samples_per_second: of the whole group of formats, without compilation.
    """

    network: str
    label_format: str
    scale_known: bool
    total: int
    recovered: int
    wrong: int
    largest_label_error: float | None
    median_feature_error: float | None
    verdicts: dict[str, int]
    samples_per_second: float


def demo_tables(rows: Sequence[DemoRow]) -> Group:
    """A small table for each network and knowledge of the scale, no wider than a terminal of 80 columns."""
    parts: list[RenderableType] = [
        Text("What one gradient gives away (the attack is not told the label format)", style="bold")
    ]
    for (network, scale_known), section in groupby(rows, key=lambda row: (row.network, row.scale_known)):
        parts += ["", _section(network, scale_known, list(section))]
    parts += ["", "Errors are those of recovered labels (unique). Speed is without compilation."]
    return Group(*parts)


def _section(network: str, scale_known: bool, rows: list[DemoRow]) -> Table:
    scale = "known" if scale_known else "unknown"
    speed = f"{rows[0].samples_per_second:,.0f} samples per second"
    table = Table(
        title=f"{network} network, {scale} scale: {speed}",
        title_style="bold",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("label format", no_wrap=True, min_width=14)
    for name in ("recovered", "wrong", "largest\nlabel\nerror", "median\nfeature\nerror"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("other verdicts")
    for row in rows:
        table.add_row(
            row.label_format.replace("_", " "),
            Text(f"{row.recovered}/{row.total}", style="bold"),
            Text(str(row.wrong), style="bold red" if row.wrong else ""),
            _error(row.largest_label_error),
            _error(row.median_feature_error),
            _other_verdicts(row),
        )
    return table


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _other_verdicts(row: DemoRow) -> str:
    others = [(name, count) for name, count in row.verdicts.items() if count and name != "unique"]
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in others)
