"""What is known of batches that nothing tells apart, for JSON and for people."""

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from softinv_jax.batches.class_counts import ClassCounts
from softinv_jax.versions import package_versions

__all__ = ["counts_summary", "counts_table"]

LISTED = 12


def counts_summary(counts: list[ClassCounts]) -> dict[str, Any]:
    """One entry for each gradient, in types JSON has: null stands for what is not known."""
    return {
        "versions": package_versions(),
        "batches": [
            {
                "index": index,
                "batch_size": one.batch_size,
                "hard_labels": one.is_whole,
                "mean_label": _numbers(one.label),
                "interval": _numbers(one.interval),
                "counts": [None if count < 0 else int(count) for count in one.count],
                "certainty": _numbers(one.certainty),
            }
            for index, one in enumerate(counts)
        ],
    }


def _numbers(values: np.ndarray) -> list:
    objects = np.asarray(values, float).astype(object)
    objects[~np.isfinite(np.asarray(values, float))] = None
    return objects.tolist()


def counts_table(summary: dict[str, Any]) -> Table:
    """For people: the classes that have the largest share, and how many examples of each are certain."""
    title = f"{len(summary['batches'])} gradients of batches: the mean label"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("gradient", "class", "share of the batch", "examples"):
        table.add_column(name, justify="right")
    for batch in summary["batches"][:LISTED]:
        shares = [-1.0 if share is None else share for share in batch["mean_label"]]
        if max(shares) < 0:
            table.add_row(str(batch["index"]), "-", "not known", "-")
            continue
        for row in np.argsort(shares)[::-1][:LISTED]:
            low, high = batch["interval"][row]
            count = batch["counts"][row]
            told = f"{shares[row]:.2%} ({low:.2%} to {high:.2%})"
            table.add_row(str(batch["index"]), str(row), told, "cannot be known" if count is None else str(count))
    return table
