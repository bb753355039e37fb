"""What this machine's accelerator makes of it, in one command of at most five minutes: labels, batches, images, peers.

    python benchmarks/accelerator.py [--time-limit 280] [--growth] [--start-up] [--quick]

Sizes go by the platform: a CPU gets few gradients, a small device as many as fit a sixth of its memory. Gradients are
made on the device: mixup labels, sigmoid features, head U(-0.5, 0.5), float32. "x sum" is the time of ours over that
of `jnp.sum` over the same gradients on the same device, in the same run: reading them once is the floor, and its
inverse the share of the bandwidth reached. Every row: the first call, which compiles, apart ("first call" is what it
took beyond the best one), then the best of several calls, each waited for. "unique" counts verdicts, "wrong" those of
them that the truth contradicts. A row that fails says how, and the rest goes on; rows for which no time is left say so.
Results are written after each row. Needs neither data sets nor an installed package:
`PYTHONPATH=. python benchmarks/accelerator.py` runs in a checkout.

`--growth`: instead, labels a second and memory over the gradients' bytes, by C, d and N, with a plot.
`--start-up`: instead, `softinv recover` of one gradient in a process of its own, with an empty and a filled cache of
compiled programs, and where the time goes. Their results are accelerator_growth and accelerator_start_up.
`--seeds` and `--full` have no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerator_growth import run_growth
from accelerator_images import measure_exact, measure_matching, measure_peers
from accelerator_labels import measure_batches, measure_from_host, measure_labels, measure_thorough
from accelerator_session import Session
from accelerator_start_up import run_start_up
from runner import Run, option_parser

TITLE = "What one device does: labels, batches, images, and published attacks beside them"


def result(row: dict[str, Any]) -> str:
    """The figure that a row is about, or why there is none."""
    if "milliseconds" in row:
        return f"{row['milliseconds']:.3g} ms a{'n' * row['per'].startswith('i')} {row['per']}"
    if "count" in row:
        rate = row["count"] / row["seconds"]
        return f"{rate:,.0f} {row['unit']}/s" if rate >= 100 else f"{rate:.3g} {row['unit']}/s"
    return row.get("skipped") or row.get("error") or ""


COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "section": lambda row: row["section"],
    "case": lambda row: row["case"],
    "what": lambda row: row["what"],
    "result": result,
    "GB/s": lambda row: f"{row['bytes'] / row['seconds'] / 1e9:,.3g}" if "bytes" in row else "",
    "x sum (share of its bandwidth)": lambda row: (
        f"{row['times_sum']:.1f} ({100 / row['times_sum']:.1f} %)" if "times_sum" in row else ""
    ),
    "unique": lambda row: f"{row['unique']:,} of {row['count']:,}" if "unique" in row else "",
    "wrong": lambda row: row.get("wrong", ""),
    "first call, s": lambda row: f"{row['first_seconds']:.1f}" if "first_seconds" in row else "",
    "found": lambda row: row.get("note", ""),
}


def run_sections(session: Session) -> None:
    """What matters most comes first: the time may not suffice for all."""
    size, quick = session.size, session.run.arguments.quick
    shapes = {(10, 768): size(64, 8192, 131_072)}
    if not quick:
        shapes |= {(100, 512): size(0, 2048, 16_384), (1000, 2048): size(0, 64, 1024)}
    for shape, examples in shapes.items():
        measure_labels(session, *shape, examples)
    measure_thorough(session, 10, 768, size(64, 256, 16_384))
    measure_exact(session, size(2, 8, 64))
    if not quick:
        measure_thorough(session, 1000, 2048, size(0, 4, 256))
    measure_batches(session, size(1, 4, 64))
    measure_matching(session, 1, 1, size(10, 50, 200))
    if not quick:
        measure_matching(session, 1, size(0, 8, 32), size(0, 20, 200))
        measure_matching(session, size(0, 4, 32), size(0, 8, 32), size(0, 10, 200))
        measure_thorough(session, 100, 512, size(0, 32, 1024))
    measure_peers(session, size(1, 3, 5), size(10, 50, 200))
    for shape, examples in shapes.items():
        measure_from_host(session, *shape, examples if quick else examples // 8)


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    parser.add_argument("--time-limit", type=float, default=280.0, metavar="SECONDS", help="begin no row after so long")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--growth", action="store_true", help="how rate and memory grow with C, d and N")
    kind.add_argument("--start-up", action="store_true", help="what one `softinv recover` takes, and where")
    arguments = parser.parse_args()
    if arguments.growth:
        run_growth(arguments)
    elif arguments.start_up:
        run_start_up(arguments)
    else:
        run = Run("accelerator", arguments)
        run_sections(Session(run, TITLE, COLUMNS))
        run.finish(TITLE, COLUMNS)


if __name__ == "__main__":
    main()
