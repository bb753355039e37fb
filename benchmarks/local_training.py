"""Images behind K local steps: how often does the client, run on guesses, give image and label back? LeNet, CIFAR-10.

    python benchmarks/local_training.py [--dataset cifar10] [--data-dir DIR] [--images 10] [--peer-images 1] [--fresh]
                                        [--networks untrained smoothing] [--rates 0.01 0.001] [--steps 2 3]

A client trains on one image for K steps of plain gradient descent, in float32, and sends its parameters back. The
observer is told K and the learning rate, not the label's format. Half of the labels are smoothed, half mixed. Counted
for each K, rate and network: images above 60 dB, labels within 1e-4, verdicts, exact images below 40 dB (none may be),
and the error over the one stated. An image that is not found has the quality of the best guess, which is not called
found. Seconds are those of one process, after compilation. Beside it, of --peer-images each: matching the average
gradient with Adam (cosine distance, the paper's settings), which is what is left without running the client.

Rows that are there already are kept: the command can be interrupted. There is one network: `--seeds` has no effect.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from clients import load_data
from finished_rows import FinishedRows, add_row_options, measure_rows
from images import judged
from images import networks as image_networks
from local_steps import clients
from matplotlib.figure import Figure
from runner import Run, add_data_options, new_figure, option_parser

from softinv_jax import observe_update
from softinv_jax.client import apply_function, sample_batch
from softinv_jax.images.inversion import match
from softinv_jax.images.objective import MatchingSettings
from softinv_jax.local_training.recovery import invert_updates

FORMATS = ("smoothing", "mixup")
CELLS = {0.001: (2, 5, 10), 0.01: (2, 3, 4, 5, 10), 0.1: (2, 3)}
PEER_STEPS = 4800


class Cell(NamedTuple):
    """One row."""

    network: str
    steps: int
    rate: float


def all_cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Those that are asked for."""
    for network in arguments.networks:
        for rate in arguments.rates or CELLS:
            for steps in arguments.steps or CELLS.get(rate, (2,)):
                yield Cell(network, steps, rate)


class Clients:
    """Networks and images, loaded once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        training, test, _ = load_data(arguments)
        self.test = test.with_statistics_of(training)
        self.networks = {}
        for name, entry in zip(arguments.networks, image_networks(arguments, training, self.test), strict=True):
            self.networks[name] = entry

    def measure(self, run: Run, cell: Cell) -> dict[str, Any]:
        """One row. The truth is used by `judged` only."""
        title, network, chain, parameters, data, count = self.networks[cell.network]
        rows, peers = [], []
        for family, size in zip(FORMATS, (count - count // 2, count // 2), strict=True):
            if not size:
                continue
            batch = sample_batch(
                jax.random.key(3), family, data.normalised(), data.classes, data.number_of_classes, size
            )
            returned = clients(network, parameters, batch.images, batch.labels, cell.steps, cell.rate)
            updates = [
                observe_update(
                    parameters,
                    jax.tree.map(lambda leaf, index=index: leaf[index], returned),
                    learning_rate=cell.rate,
                    local_steps=cell.steps,
                )
                for index in range(size)
            ]
            shape = data.images.shape[1:]
            if not rows:
                invert_updates(chain, updates[:1], shape)  # Compiles everything.
            start = time.perf_counter()
            found = invert_updates(chain, updates, shape)
            rows.append(judged(found, batch, data, time.perf_counter() - start, family)[0])
            chosen = min(size, self.arguments.peer_images)
            if chosen:
                peers.append(self.match(network, parameters, updates[:chosen], batch, data, family))
        return {"network": title, "steps": cell.steps, "rate": cell.rate, "rows": rows, "peers": peers}

    def match(self, network: Any, parameters: Any, updates: list, batch: Any, data: Any, family: str) -> dict[str, Any]:
        """The average gradients, matched."""
        gradients = jax.tree.map(lambda *leaves: np.stack(leaves), *(update.gradients for update in updates))
        settings = MatchingSettings(steps=self.arguments.peer_steps)
        found = match(apply_function(network), parameters, gradients, data.images.shape[1:], settings=settings)
        chosen = jax.tree.map(lambda leaf: leaf[: len(updates)], batch)
        return judged(found, chosen, data, 0.0, family)[0]


def _sum(row: dict[str, Any], key: str) -> int:
    return sum(part[key] for part in row["rows"])


def _verdicts(row: dict[str, Any]) -> str:
    names = row["rows"][0]["verdicts"]
    counts = {name: sum(part["verdicts"][name] for part in row["rows"]) for name in names}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _images(row: dict[str, Any]) -> int:
    return _sum(row, "images")


COLUMNS = {
    "network": lambda row: row["network"],
    "rate": lambda row: f"{row['rate']:g}",
    "K": lambda row: row["steps"],
    "above 60 dB": lambda row: f"{_sum(row, 'above_60_db')} of {_images(row)}",
    "labels within 1e-4": lambda row: f"{_sum(row, 'labels_below_1e-4')} of {_images(row)}",
    "verdicts": _verdicts,
    "exact below 40 dB": lambda row: _sum(row, "exact_below_40_db"),
    "median PSNR": lambda row: ", ".join(f"{part['median_psnr']:.0f}" for part in row["rows"]),
    "error / expected, largest": lambda row: ", ".join(
        f"{part['largest_error_over_expected']:.1f}" for part in row["rows"]
    ),
    "s / image": lambda row: f"{np.mean([part['seconds_per_image'] for part in row['rows']]):.0f}",
    "matching, PSNR": lambda row: ", ".join(f"{part['median_psnr']:.0f}" for part in row["peers"]) or "-",
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Share of images above 60 dB against K, a line for each network and rate."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for network in dict.fromkeys(row["network"] for row in rows):
        for rate in dict.fromkeys(row["rate"] for row in rows):
            own = sorted((row["steps"], row) for row in rows if (row["network"], row["rate"]) == (network, rate))
            if own:
                shares = [_sum(row, "above_60_db") / _images(row) for _, row in own]
                axes.plot([steps for steps, _ in own], shares, marker="o", label=f"{network}, rate {rate:g}")
    axes.set(xlabel="local steps K", ylabel="share of images above 60 dB", ylim=(-0.05, 1.05))
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--images", type=int, help="of each row, half of them smoothed, half mixed")
    parser.add_argument("--networks", nargs="+", choices=("untrained", "smoothing", "mixup"))
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--steps", nargs="+", type=int)
    parser.add_argument("--peer-images", type=int, default=1, help="of each row and format, for matching")
    add_row_options(parser)
    arguments = parser.parse_args()
    run = Run("local_training", arguments)
    arguments.images = arguments.images or run.size(1, 10, 20)
    arguments.networks = arguments.networks or (["untrained"] if arguments.quick else ["untrained", "smoothing"])
    arguments.peer_steps = run.size(20, PEER_STEPS, PEER_STEPS)
    if arguments.quick:
        arguments.rates, arguments.steps = arguments.rates or [0.001], arguments.steps or [2]
    options = {name: getattr(arguments, name) for name in ("dataset", "images", "peer_images", "peer_steps")}
    finished = FinishedRows(arguments.out / "local_training.rows.json", options, fresh=arguments.fresh)
    own = Clients(arguments)
    title = f"Images behind K local steps, LeNet, {arguments.dataset}, float32, formats not told"
    rows = {str(cell): partial(own.measure, run, cell) for cell in all_cells(arguments)}
    measure_rows(run, finished, rows, title, COLUMNS, draw, asked=lambda name: not arguments.finished)


if __name__ == "__main__":
    main()
