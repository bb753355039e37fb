"""How many examples of a batch does one gradient of dense layers give away? Inputs and labels, formats not told.

    python benchmarks/dense_layers.py [--dataset cifar10] [--data-dir DIR] [--batches 10] [--rows NAME ...] [--list]
                                      [--no-peers] [--peer-seconds 60] [--finished | --fresh] [--quick]

Each row is a network, a batch size B and a label format; `--list` says which there are, `--rows` takes those whose name
contains one of the words. Gradients are float32, of the mean cross-entropy, made by PyTorch if it is installed and the
activation is ReLU, else by jax. A run that was stopped goes on from the rows that are there.

Counted over all batches of a row, of the examples whose g = p - y is not zero: `images` above 80 dB, `labels` with no
entry off by 1e-5 or more, `found` both. `spurious` is claimed and matches no example to 40 dB. Seconds are a batch's on
average, compilation apart. `error / stated`: median over examples of the inputs' root mean square error over the
deviation that `recover_dense` states for it; `error / bound`: over the Cramer-Rao bound, where that is computed. Rows
named `tutorial` take the features after the convolutions for inputs: only their labels are the client's own. Where the
search is at a deeper `layer` than 0, `images` are no images but that layer's inputs, and their truth is in float64.

Peers, each on the first `--peer-batches` batches of their rows: `peeling` (float32, and with float64 gradients) and
`SPEAR`, which has as many seconds as `recover_dense` took for that batch or `--peer-seconds`, whichever is more, and
whose `found` is of inputs alone: it gives no labels. Peeling needs units that one example alone opens: on normalised
images of an untrained network of 1000 there are none, on [0, 1] there are some; rows are given for both. Unless a row
says otherwise, images are normalised. The plot is the fraction found against B, with the counting bound
B < m of each width. `--finished` writes table and plot of the rows that are there, and runs nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from clients import load_data
from dense_clients import (
    DenseClient,
    best_deviations,
    convolved,
    draw,
    draw_labels,
    fit,
    gradients,
    judge,
    noise_deviation,
    with_noise,
)
from dense_peers import peeling, spear
from finished_rows import FinishedRows, add_row_options
from matplotlib.figure import Figure
from runner import Run, add_data_options, new_figure, option_parser, timed

from softinv_jax.client import load_photographs
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.recovery import recover_dense
from softinv_jax.labels.verdicts import verdict_names

# Of images, for which the Cramer-Rao bound is computed.
SMALL_SIDE = 8


@dataclass(frozen=True)
class Row:
    """One line of the table. deviation: of N(0, deviation^2) weights, None for PyTorch's. side: of the images."""

    setting: str
    hidden: tuple[int, ...]
    size: int
    classes: int = 10
    deviation: float | None = None
    family: str = "hard"
    bias: bool = True
    activation: str = "relu"
    normalised: bool = True
    epochs: int = 0
    side: int = 32
    noise: float = 0.0
    tutorial: bool = False
    peers: bool = False
    most_batches: int = 1000

    @property
    def name(self) -> str:
        return f"{self.setting}, B = {self.size}"


def all_rows() -> list[Row]:
    """In order of importance."""
    rows: list[Row] = []
    for normalised in (True, False):
        # On [0, 1] units that one example alone opens are common, and peeling has what it needs.
        sizes = (32, 64, 100, 128, 192, 256, 320) if normalised else (64, 128, 192, 256)
        for classes in (10, 100):
            for what, deviation in (("PyTorch's weights", None), ("N(0, 0.25)", 0.5)):
                setting = f"1000-{classes}, {what}, " + ("normalised" if normalised else "[0, 1]")
                own = Row(setting, (1000,), 0, classes, deviation, normalised=normalised)
                for size in sizes:
                    most = 1 if size > 256 else 3 if size == 256 or not normalised else 10
                    rows.append(replace(own, size=size, most_batches=most, peers=not normalised or size == 32))
    for what, deviation in (("PyTorch's weights", None), ("N(0, 0.25)", 0.5)):
        rows += [Row(f"400-400-10, {what}", (400, 400), size, 10, deviation, peers=True) for size in (8, 16, 32)]
    for family in ("smoothing", "mixup"):
        rows += [Row(f"1000-{classes}, {family}", (1000,), 64, classes, family=family) for classes in (10, 100)]
    rows += [Row("1000-10, no biases", (1000,), size, bias=False) for size in (32, 64, 128)]
    rows += [Row("1000-10, trained", (1000,), size, epochs=3) for size in (32, 64, 128)]
    for side in (64, 224):
        most, peers = (10, True) if side == 64 else (3, False)
        rows += [Row(f"{side}x{side}, 400-10", (400,), n, side=side, peers=peers, most_batches=most) for n in (8, 16)]
    for size, most in ((8, 10), (16, 10), (24, 10), (32, 10), (40, 3)):
        rows.append(Row("tutorial, 400-120-84-10", (120, 84), size, tutorial=True, most_batches=most))
    noises = (1e-6, 1e-5, 1e-4, 1e-3)
    rows += [Row(f"1000-10, noise {noise:.0e}", (1000,), 32, noise=noise) for noise in noises]
    rows += [Row(f"8x8, 60-10, noise {noise:.0e}", (60,), 6, side=SMALL_SIDE, noise=noise) for noise in noises]
    rows += [Row("5 x 200-10", (200,) * 5, size) for size in (8, 16, 24)]
    for activation in ("sigmoid", "gelu"):
        rows += [Row(f"400-10, {activation}", (400,), size, activation=activation) for size in (4, 8, 12, 16)]
    rows.append(Row("4096-100, N(0, 0.25), [0, 1]", (4096,), 512, 100, 0.5, normalised=False, most_batches=1))
    return rows


class Clients:
    """Batches and networks of rows; trained networks are kept, each with its accuracy."""

    def __init__(self, arguments: Any) -> None:
        self.training, self.test, self.images = load_data(arguments)
        self.trained: dict[tuple[Any, ...], tuple[DenseClient, float]] = {}
        self.photographs: dict[int, np.ndarray] = {}
        self.training_images = 500 if arguments.quick else 20_000

    def network(self, row: Row, inputs: int, seed: int) -> tuple[DenseClient, float | None]:
        widths = [inputs, *row.hidden, row.classes]
        if not row.epochs:
            return draw(widths, row.deviation, row.bias, row.activation, seed), None
        key = (row.hidden, row.epochs, row.classes)
        if key not in self.trained:  # One network: each batch is another.
            fresh = draw(widths, row.deviation, row.bias, row.activation, 0)
            count = self.training_images
            images = np.asarray(self.training.normalised()[:count]).reshape(-1, inputs)
            network = fit(fresh, images, self.training.classes[:count], row.epochs, 0)
            layers = gradients(network, images[:1], np.eye(row.classes, dtype=np.float32)[:1])
            guesses = layers.predictions(0, np.asarray(self.images).reshape(-1, inputs)).argmax(axis=1)
            self.trained[key] = network, float(np.mean(guesses == self.test.classes))
        return self.trained[key]

    def batch(self, row: Row, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (B, d) and labels (B, C), float32."""
        generator = np.random.default_rng([row.size, seed])
        if row.side == self.test.images.shape[1]:
            images, classes = np.asarray(self.images), self.test.classes
            if not row.normalised:
                images = self.test.images.astype(np.float32) / np.float32(255)
        else:
            if row.side not in self.photographs:
                held = load_photographs(split="test", per_class=10, image_size=row.side)
                self.photographs[row.side] = np.asarray(held.normalised())
            images = self.photographs[row.side]
            classes = np.zeros(len(images), int)
        count = row.size * (2 if row.family == "mixup" else 1)
        own = generator.choice(len(images), count, replace=False)
        # Classes of the data set where it has as many, else any.
        if row.classes == self.test.number_of_classes and row.side == self.test.images.shape[1]:
            named = classes[own]
        else:
            named = generator.integers(0, row.classes, count)
        chosen = images[own]
        if row.tutorial:
            chosen = convolved(chosen, seed)
        inputs = chosen.reshape(count, -1).astype(np.float32)
        if row.family == "mixup":
            # The same shares for images and labels.
            state = generator.bit_generator.state
            labels = draw_labels(named, row.classes, row.family, generator)
            generator.bit_generator.state = state
            share = generator.uniform(0.3, 0.7, (row.size, 1)).astype(np.float32)
            return share * inputs[::2] + (1 - share) * inputs[1::2], labels
        return inputs, draw_labels(named, row.classes, row.family, generator)


COUNTS = ("live", "images", "labels", "both", "claimed", "spurious")


def measure(run: Run, row: Row, clients: Clients) -> list[dict[str, Any]]:
    """`recover_dense` over all batches of a row, then its peers on the first few."""
    batches = min(run.arguments.batches, row.most_batches)
    results: dict[str, list[dict[str, Any]]] = {}
    accuracy = None
    for seed in run.track(range(batches), row.name):
        inputs, labels = clients.batch(row, seed)
        network, accuracy = clients.network(row, inputs.shape[1], seed)
        layers = gradients(network, inputs, labels)
        noise = noise_deviation(layers, row.noise)
        if row.noise:
            layers = with_noise(layers, row.noise, seed)
        ours = _ours(run, row, layers, inputs, labels, seed)
        if row.noise and row.side == SMALL_SIDE:
            bounds = best_deviations(network, inputs, labels, noise)
            ours["over_bound"] = (ours["error"] / bounds[ours["nearest"]]).tolist()
        results.setdefault("recover_dense", []).append(ours)
        if row.peers and run.arguments.peers and seed < run.arguments.peer_batches:
            allowed = max(run.arguments.peer_seconds, results["recover_dense"][-1]["seconds"])
            for name, result in _peers(row, network, layers, inputs, labels, allowed, seed).items():
                results.setdefault(name, []).append(result)
    return [
        {
            "setting": row.setting,
            "B": row.size,
            "m": row.hidden[0],
            "method": method,
            "batches": len(found),
            **{count: sum(result[count] for result in found) for count in COUNTS},
            "seconds": float(np.mean([result["seconds"] for result in found])),
            "slowest": max(result["seconds"] for result in found),
            "failed_seeds": [seed for seed, result in enumerate(found) if result["both"] < result["live"]],
            "error_over_stated": _median([ratio for result in found for ratio in result.get("ratios", [])]),
            "error_over_bound": _median([ratio for result in found for ratio in result.get("over_bound", [])]),
            "verdicts": _added([result.get("verdicts", {}) for result in found]),
            "layers": sorted({result["layer"] for result in found if "layer" in result}),
            "accuracy": accuracy,
        }
        for method, found in results.items()
    ]


def _ours(run: Run, row: Row, layers: DenseLayers, inputs: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Any]:
    compiling = run.compile_seconds
    found, seconds = timed(lambda: recover_dense(layers, row.size, seed=seed))
    told = np.isfinite(found.inputs).all(axis=1)
    judged = judge(layers, max(found.layer, 0), inputs, labels, found.inputs[told], found.label[told])
    names, counts = np.unique(verdict_names(found.verdict), return_counts=True)
    return judged | {
        "seconds": max(seconds - (run.compile_seconds - compiling), 0.0),
        "ratios": (judged["error"] / np.maximum(found.input_deviation[told], 1e-30)).tolist(),
        "verdicts": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "layer": found.layer,
    }


def _peers(
    row: Row,
    network: DenseClient,
    layers: DenseLayers,
    inputs: np.ndarray,
    labels: np.ndarray,
    allowed: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    results = {}
    exact = gradients(network, inputs, labels, np.float64)
    for name, received, dtype in (("peeling", layers, np.float32), ("peeling, float64", exact, np.float64)):
        (found, told), seconds = timed(
            lambda received=received, dtype=dtype: peeling(received, row.size, dtype)  # type: ignore[misc]
        )
        results[name] = judge(layers, 0, inputs, labels, found, told) | {"seconds": seconds}
    found, seconds = timed(lambda: spear(layers, row.size, allowed, seed))
    judged = judge(layers, 0, inputs, labels, found, None)
    results["SPEAR"] = judged | {"both": judged["images"], "seconds": seconds}
    return results


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _added(parts: list[dict[str, int]]) -> dict[str, int]:
    names = sorted({name for part in parts for name in part})
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def draw_found(rows: list[dict[str, Any]]) -> Figure:
    """Fraction found against B: one line a setting, dashed for peers; the counting bounds B < m."""
    figure = new_figure(9, 5.5)
    axis = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault((row["setting"], row["method"]), []).append((row["B"], row["both"] / max(row["live"], 1)))
    for (setting, method), points in lines.items():
        if len(points) > 1:
            ours = method == "recover_dense"
            label = setting if ours else f"{setting}: {method}"
            style, opacity = ("o-", 1.0) if ours else ("x--", 0.6)
            axis.plot(*zip(*sorted(points), strict=True), style, label=label, alpha=opacity)
    for width in sorted({row["m"] for row in rows}):
        axis.axvline(width, color="grey", linestyle=":", linewidth=0.8)
        axis.annotate(f"B < {width}", (width, 0.02), rotation=90, fontsize=6, ha="right")
    axis.set(xlabel="batch size B", ylabel="found, inputs and label", ylim=(-0.03, 1.05), xscale="log")
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=6)
    return figure


COLUMNS = {
    "setting": lambda row: row["setting"] + (f" ({row['accuracy']:.1%})" if row["accuracy"] is not None else ""),
    "B": lambda row: row["B"],
    "method": lambda row: row["method"],
    "batches": lambda row: row["batches"],
    "found": lambda row: f"{row['both']} of {row['live']} ({row['both'] / max(row['live'], 1):.1%})",
    "layer": lambda row: ", ".join(str(layer) for layer in row["layers"]) or "0",
    "images": lambda row: row["images"],
    "labels": lambda row: "-" if row["method"] == "SPEAR" else row["labels"],
    "spurious": lambda row: row["spurious"],
    "s a batch": lambda row: f"{row['seconds']:.1f}",
    "error / stated": lambda row: "-" if row["error_over_stated"] is None else f"{row['error_over_stated']:.2f}",
    "error / bound": lambda row: "-" if row.get("error_over_bound") is None else f"{row['error_over_bound']:.2f}",
    "verdicts": lambda row: ", ".join(f"{count} {name}" for name, count in row["verdicts"].items()) or "-",
}
TITLE = "Whole batches from dense layers, float32, formats not told"


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--batches", type=int, default=10, help="of each row, each with a network of its own")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="rows whose name contains one of these")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="B", help="only these batch sizes")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave peeling and SPEAR out")
    parser.add_argument("--peer-batches", type=int, default=3, help="of each row, for the peers")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="least time of SPEAR a batch")
    add_row_options(parser)
    arguments = parser.parse_args()
    chosen = [
        row
        for row in all_rows()
        if (not arguments.rows or any(word in row.name for word in arguments.rows))
        and (not arguments.sizes or row.size in arguments.sizes)
    ]
    if arguments.list:
        print("\n".join(row.name for row in chosen))
        return
    if not chosen or arguments.batches < 1:
        parser.error("nothing to do: no row has such a name (--list), or --batches is below 1")
    run = Run("dense_layers", arguments)
    if arguments.quick:
        arguments.batches, arguments.peer_seconds = 1, 1.0
        chosen = [Row("60-10", (60,), size, peers=True) for size in (4, 6)]
    clients = Clients(arguments)
    options = {name: getattr(arguments, name) for name in ("dataset", "batches", "peers", "peer_batches")}
    finished = FinishedRows(
        arguments.out / "dense_layers.rows.json",
        options | {"quick": arguments.quick, "peer_seconds": arguments.peer_seconds},
        fresh=arguments.fresh,
    )
    try:
        for row in chosen:
            held = finished.get(row.name)
            if held is None or held["row"] != _plain(asdict(row)):
                if arguments.finished:
                    continue
                held = {"row": _plain(asdict(row)), "commit": run.commit, "results": measure(run, row, clients)}
                finished.keep(row.name, held)
            for result in held["results"]:
                run.add(**result, commit=held["commit"])
            run.write(TITLE, COLUMNS)
    except KeyboardInterrupt:
        print("stopped: the rows that are done are written")
    if run.rows:
        run.finish(TITLE, COLUMNS, draw_found)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


if __name__ == "__main__":
    main()
