"""The demo's result as rows and as a table for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

__all__ = ["DemoRow", "demo_table"]


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


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """A table with one section for each network and knowledge of the scale."""
    table = Table(
        title="What one gradient of the last layer gives away; the attack is not told the label format",
        title_style="bold",
        title_justify="left",
        caption="Errors are those of recovered (unique) labels. Samples per second: all formats of a section"
        " together, without compilation.",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("network")
    table.add_column("scale")
    table.add_column("label format", no_wrap=True)
    for name in ("recovered", "wrong", "largest\nlabel error", "median\nfeature error"):
        table.add_column(name, justify="right")
    table.add_column("other verdicts")
    table.add_column("samples\nper second", justify="right")
    group = None
    for row in rows:
        first = group != (row.network, row.scale_known)
        if first and group is not None:
            table.add_section()
        group = (row.network, row.scale_known)
        table.add_row(
            row.network if first else "",
            ("known" if row.scale_known else "unknown") if first else "",
            row.label_format.replace("_", " "),
            Text(f"{row.recovered}/{row.total}", style="bold"),
            Text(str(row.wrong), style="bold red" if row.wrong else ""),
            _error(row.largest_label_error),
            _error(row.median_feature_error),
            _other_verdicts(row),
            f"{row.samples_per_second:,.0f}" if first else "",
        )
    return table


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _other_verdicts(row: DemoRow) -> str:
    others = [(name, count) for name, count in row.verdicts.items() if count and name != "unique"]
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in others)
