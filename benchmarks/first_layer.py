"""How many images does an update of many steps give away, if they enter a dense layer with ReLU? CIFAR-10, PyTorch.

    python benchmarks/first_layer.py [--dataset cifar10] [--data-dir DIR] [--clients 3] [--rows NAME ...] [--fresh]

Each client trains 3072-1000-10 (or the widths that a row names) by `torch.optim.SGD` with momentum 0.9, on batches or
on minibatches in a random order, and sends its parameters back in float32. The observer is told which parameters it
sent; for the labels also rate, K and momentum. Weights are PyTorch's initial ones, labels hard, formats not told.

Counted over all clients of a row: images above 60 dB, `exact` ones, claimed ones that match no image to 40 dB (none
may), clients all of whose images are found (else none are given), right classes, labels within 1e-4, error over the
stated deviation (largest). `rows` is the best that single rows could give: images for which some row of the update,
divided by its bias's, is above 60 dB, picked by looking at the truth. Seconds are a client's, after compilation.

Rows that are there already are kept: the command can be interrupted. `--seeds` has no effect.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from clients import load_data
from dense_clients import draw, train_by_torch
from finished_rows import FinishedRows, add_row_options, measure_rows
from matplotlib.figure import Figure
from runner import Run, add_data_options, new_figure, option_parser
from scipy.spatial.distance import cdist

from softinv_jax import Verdict, observe_update
from softinv_jax.images.layer_chain import Activation, Dense, Flatten
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.local_training.recovery import invert_updates

MOMENTUM = 0.9


class Row(NamedTuple):
    """One line of the table; minibatch: None where each step is on all examples."""

    examples: int
    minibatch: int | None
    epochs: int
    rate: float
    hidden: tuple[int, ...] = (1000,)
    normalised: bool = True

    @property
    def name(self) -> str:
        steps = "all" if self.minibatch is None else f"minibatches of {self.minibatch}"
        kind = "" if self.normalised else ", in [0, 1]"
        widths = "" if self.hidden == (1000,) else f", {'-'.join(map(str, self.hidden))}"
        return f"B = {self.examples}, {steps}, {self.epochs} epochs, rate {self.rate:g}{widths}{kind}"


ROWS = (
    Row(16, 5, 10, 0.001),
    Row(16, 5, 10, 0.01),
    Row(16, 5, 10, 0.001, normalised=False),
    Row(16, 5, 10, 0.01, normalised=False),
    Row(16, None, 5, 0.01),
    Row(16, 5, 10, 0.001, hidden=(400, 400)),
    Row(50, 5, 10, 0.001),
    Row(50, 5, 10, 0.005),
    Row(50, 5, 10, 0.01),
    Row(50, 5, 10, 0.001, normalised=False),
    Row(50, None, 5, 0.01),
    Row(100, 10, 5, 0.001),
)


class Clients:
    """Images, loaded once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        _, self.data, self.images = load_data(arguments)
        self.normalised = np.asarray(self.images, np.float32)
        self.plain = self.data.images.astype(np.float32) / np.float32(255)

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """One client; the truth is used below the attack only."""
        generator = np.random.default_rng([row.examples, seed])
        chosen = generator.choice(len(self.plain), row.examples, replace=False)
        images = (self.normalised if row.normalised else self.plain)[chosen]
        inputs = images.reshape(row.examples, -1)
        labels = np.eye(self.data.number_of_classes)[self.data.classes[chosen]]
        network = draw([inputs.shape[1], *row.hidden, labels.shape[1]], None, True, "relu", seed)
        names = [f"dense{place + 1}" for place in range(len(row.hidden))] + ["head"]
        sent, returned = train_by_torch(
            network, names, inputs, labels, row.epochs, row.minibatch or row.examples, row.rate, MOMENTUM, seed
        )
        update = observe_update(
            sent,
            returned,
            learning_rate=row.rate,
            local_steps=row.epochs * -(-row.examples // (row.minibatch or row.examples)),
            momentum=MOMENTUM,
            minibatch_size=row.minibatch,
        )
        layers = [part for name in names[:-1] for part in (Dense(name), Activation("relu"))]
        start = time.perf_counter()
        found = invert_updates((Flatten(), *layers, Dense("head")), [update], images.shape[1:], batch_size=row.examples)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "rows": _rows(update.gradients, inputs)} | _judged(found, inputs, labels)


def _decibels(error: np.ndarray, images: np.ndarray) -> np.ndarray:
    return -20 * np.log10(np.maximum(error, 1e-30) / np.ptp(images))


def _rows(gradients: Any, inputs: np.ndarray) -> int:
    """Images that some row is, to 60 dB."""
    first = next(iter(gradients.values()))
    opened = first["bias"] != 0
    divided = (first["kernel"][:, opened] / first["bias"][opened]).T
    distance = cdist(inputs, divided) / np.sqrt(inputs.shape[1])
    return int(np.sum(_decibels(distance.min(axis=1), inputs) > 60))


def _judged(found: Any, inputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    given = np.isfinite(found.images[0]).all(axis=(1, 2, 3))
    counts = {"examples": len(inputs), "images": 0, "exact": 0, "spurious": 0, "classes": 0, "labels": 0, "unique": 0}
    if not np.any(given):
        return counts | {"whole": 0, "error_over_stated": None, "median_psnr": None}
    images = found.images[0][given].reshape(-1, inputs.shape[1])
    distance = cdist(images, inputs) / np.sqrt(inputs.shape[1])
    nearest, error = np.argmin(distance, axis=1), np.min(distance, axis=1)
    decibels, told = _decibels(error, inputs), found.labels[0][given]
    right = np.argmax(told, axis=1) == np.argmax(labels[nearest], axis=1)
    stated = found.expected_error[0][given] + np.finfo(np.float32).eps * np.sqrt(np.mean(images**2, axis=1))
    return {
        "examples": len(inputs),
        "images": len(set(nearest[decibels > 60])),
        "exact": int(np.sum(found.verdict[0] == ImageVerdict.EXACT)),
        "spurious": int(np.sum(decibels < 40)),
        "classes": int(right.sum()),
        "labels": int(np.sum(np.abs(told - labels[nearest]).max(axis=1) < 1e-4)),
        "unique": int(np.sum(found.label_verdict[0] == Verdict.UNIQUE)),
        "whole": int(len(set(nearest)) == len(inputs)),
        "error_over_stated": float(np.max(error / stated)),
        "median_psnr": float(np.median(decibels)),
    }


def _sum(row: dict[str, Any], key: str) -> str:
    return str(sum(one[key] for one in row["clients"]))


def _of(row: dict[str, Any], key: str) -> str:
    return f"{_sum(row, key)} of {_sum(row, 'examples')}"


def _largest(row: dict[str, Any]) -> str:
    known = [one["error_over_stated"] for one in row["clients"] if one["error_over_stated"] is not None]
    return f"{max(known):.1f}" if known else "-"


COLUMNS = {
    "clients": lambda row: row["row"],
    "single rows, best": lambda row: _of(row, "rows"),
    "images above 60 dB": lambda row: _of(row, "images"),
    "exact": lambda row: _sum(row, "exact"),
    "spurious": lambda row: _sum(row, "spurious"),
    "whole clients": lambda row: f"{_sum(row, 'whole')} of {len(row['clients'])}",
    "classes": lambda row: _of(row, "classes"),
    "labels within 1e-4": lambda row: _of(row, "labels"),
    "unique labels": lambda row: _sum(row, "unique"),
    "error / stated, largest": _largest,
    "s / client": lambda row: f"{np.mean([one['seconds'] for one in row['clients']]):.0f}",
}


def draw_rows(rows: list[dict[str, Any]]) -> Figure:
    """Share of images: what is found, and the best of single rows."""
    figure = new_figure(8, 0.4 * len(rows) + 1.2)
    axes = figure.subplots()
    places = np.arange(len(rows))
    for offset, key, title in ((-0.2, "images", "found, above 60 dB"), (0.2, "rows", "in single rows, at best")):
        shares = [
            sum(one[key] for one in row["clients"]) / sum(one["examples"] for one in row["clients"]) for row in rows
        ]
        axes.barh(places + offset, shares, 0.38, label=title)
    axes.set_yticks(places, [row["row"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="share of images", xlim=(0, 1.02))
    axes.legend(fontsize=8, loc="lower right")
    return figure


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--clients", type=int, help="of each row")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    add_row_options(parser)
    arguments = parser.parse_args()
    run = Run("first_layer", arguments)
    count = arguments.clients or run.size(1, 3, 10)
    wanted = ROWS[:1] if arguments.quick else ROWS
    finished = FinishedRows(
        arguments.out / "first_layer.rows.json", {"dataset": arguments.dataset, "clients": count}, fresh=arguments.fresh
    )
    own = Clients(arguments)
    title = f"Images behind updates of many steps through a dense ReLU layer, {arguments.dataset}, float32"

    def asked(name: str) -> bool:
        return not arguments.finished and (not arguments.rows or any(part in name for part in arguments.rows))

    def measure(row: Row) -> dict[str, Any]:
        own.measure(row, 0)  # Compiles everything.
        return {"row": row.name, "clients": [own.measure(row, seed) for seed in range(count)]}

    rows = {row.name: partial(measure, row) for row in wanted}
    measure_rows(run, finished, rows, title, COLUMNS, draw_rows, asked=asked)


if __name__ == "__main__":
    main()
