"""How many images come back from one gradient of a convolutional network? Layers by themselves, and all together.

    python benchmarks/image_batches.py [--dataset cifar10] [--data-dir DIR] [--gradients 3] [--only sigmoid-24-4-10 ...]
                                       [--peer-gradients 1] [--finished] [--fresh] [--quick | --full]

Networks like the paper's LeNet (three 5x5 convolutions, strides 2, 2, 1; a head without bias) with 12, 24 or 48
channels, untrained: sigmoid with the paper's weights U(-0.5, 0.5), other activations with weights
U(-1, 1) / sqrt(fan-in). B images behind one float32 gradient, or behind K steps at 0.01 on all of them; C classes, the
label format not told: half of the gradients have smoothed labels, half mixed ones. `by layer`, `together`: whether the
equations suffice by number, layer by layer and as a whole (`determinacy`). Counted: images above 60 dB, verdicts, exact
images below 40 dB (none may be), error over the one stated. An image not found counts as 0 dB. Seconds are of a
gradient, after compilation. Beside it, of --peer-gradients each, for B up to 2 and one step: matching with Adam (cosine
distance, the paper's settings) from the same labels.

Rows that are there already are kept: the command can be interrupted. There is one network: `--seeds` has no effect.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clients import load_data
from finished_rows import FinishedRows, add_row_options, measure_rows
from runner import Run, add_data_options, option_parser

from softinv_jax import observe_update
from softinv_jax.client import ImageDataset, SoftLabelBatch, sample_batch
from softinv_jax.images.determinacy import count_equations, determined_together
from softinv_jax.images.inversion import invert, match
from softinv_jax.images.layer_chain import Activation, Chain, Convolution, Dense, Flatten, apply_chain
from softinv_jax.images.objective import MatchingSettings
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict
from softinv_jax.local_training.recovery import invert_updates
from softinv_jax.measures.image_quality import match_images, peak_signal_to_noise_ratio

FORMATS = ("smoothing", "mixup")
LARGEST_PEER_BATCH = 2
PEER_STEPS = 4800


class Cell(NamedTuple):
    """One row."""

    activation: str
    channels: int
    batch_size: int
    classes: int
    steps: int = 1

    @property
    def name(self) -> str:
        name = f"{self.activation}-{self.channels}-{self.batch_size}-{self.classes}"
        return name if self.steps == 1 else f"{name}-{self.steps}"


CELLS = [
    Cell("sigmoid", 12, 2, 10),
    Cell("sigmoid", 24, 2, 10),
    Cell("sigmoid", 24, 4, 10),
    Cell("sigmoid", 24, 4, 100),
    Cell("sigmoid", 48, 4, 10),
    Cell("sigmoid", 48, 8, 100),
    Cell("gelu", 12, 1, 10),
    Cell("gelu", 24, 2, 10),
    Cell("silu", 24, 2, 10),
    Cell("relu", 24, 1, 10),
    Cell("relu", 48, 2, 10),
    Cell("gelu", 24, 1, 10, steps=10),
    Cell("gelu", 24, 2, 10, steps=2),
]
RATE = 0.01


def make_chain(activation: str) -> Chain:
    """The paper's LeNet with another activation."""
    padding = ((2, 2), (2, 2))
    layers: list[Any] = []
    for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
        layers += [Convolution(name, (stride, stride), padding), Activation(activation)]
    return (*layers, Flatten(), Dense("head"))


def make_parameters(cell: Cell, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Untrained, by layer."""
    rng = np.random.default_rng(0)

    def draw(*size: int, fan_in: int) -> np.ndarray:
        reach = 0.5 if cell.activation == "sigmoid" else fan_in**-0.5
        return rng.uniform(-reach, reach, size).astype(np.float32)

    parameters: dict[str, Any] = {}
    channels = shape[2]
    for name in ("conv1", "conv2", "conv3"):
        fan_in = 25 * channels
        parameters[name] = {
            "kernel": draw(5, 5, channels, cell.channels, fan_in=fan_in),
            "bias": draw(cell.channels, fan_in=fan_in),
        }
        channels = cell.channels
    features = -(-shape[0] // 4) * -(-shape[1] // 4) * channels
    parameters["head"] = {"kernel": draw(features, cell.classes, fan_in=features)}
    return parameters


def draw_batch(cell: Cell, data: ImageDataset, family: str, number: int) -> SoftLabelBatch:
    """B images and labels. More classes than the data have: the images' own are drawn among all of them."""
    classes = data.classes
    if cell.classes != data.number_of_classes:
        classes = np.random.default_rng(number).integers(cell.classes, size=len(data.classes))
    key = jax.random.fold_in(jax.random.key(3), number)
    return sample_batch(key, family, data.normalised(), classes, cell.classes, cell.batch_size)


def gradient_of(chain: Chain, parameters: Any, batch: SoftLabelBatch) -> Any:
    """Of the mean loss, with a leading axis of one gradient."""

    def loss(held: Any) -> jax.Array:
        logits = apply_chain(chain, held, batch.images)
        return -jnp.mean(jnp.sum(batch.labels * jax.nn.log_softmax(logits), axis=-1))

    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], jax.jit(jax.grad(loss))(parameters))


def returned(chain: Chain, parameters: Any, batch: SoftLabelBatch, steps: int) -> Any:
    """The parameters after so many steps on the batch."""
    for _ in range(steps):
        gradient = gradient_of(chain, parameters, batch)
        parameters = jax.tree.map(lambda value, slope: value - np.float32(RATE) * slope[0], parameters, gradient)
    return parameters


def attack(cell: Cell, chain: Chain, parameters: Any, batch: SoftLabelBatch, shape: tuple[int, int, int]) -> Any:
    """What the observer is told: the gradient and B, or the update, B, K and the rate."""
    if cell.steps == 1:
        return invert(chain, parameters, gradient_of(chain, parameters, batch), shape, batch_size=cell.batch_size)
    after = returned(chain, parameters, batch, cell.steps)
    update = observe_update(parameters, after, learning_rate=RATE, local_steps=cell.steps)
    return invert_updates(chain, [update], shape, batch_size=cell.batch_size)


def judge(found: ImageRecovery, batch: SoftLabelBatch, data: ImageDataset) -> dict[str, list[float]]:
    """Of one gradient's images, which come in any order. The truth is used here only."""
    truth = np.asarray(batch.images)
    images, verdict = found.images[0], found.verdict[0]
    quality, ratio, label_error = (np.full(len(truth), value) for value in (0.0, np.nan, np.nan))
    kinds = np.full(len(truth), int(ImageVerdict.NOT_FOUND))
    shown, real = (np.asarray(data.denormalise(array)) for array in (images, truth))
    for own, row in enumerate(match_images(shown, real)):
        if row >= 0:
            quality[own] = peak_signal_to_noise_ratio(shown[row], real[own])
            ratio[own] = np.sqrt(np.mean((images[row] - truth[own]) ** 2)) / found.expected_error[0, row]
            label_error[own] = np.abs(found.labels[0, row] - batch.labels[own]).max()
            kinds[own] = int(verdict[row])
    return {
        "psnr": quality.tolist(),
        "verdict": kinds.tolist(),
        "error_over_expected": ratio.tolist(),
        "label_error": label_error.tolist(),
    }


def measure(arguments: argparse.Namespace, data: ImageDataset, cell: Cell) -> dict[str, Any]:
    """One row."""
    shape = data.images.shape[1:]
    chain, parameters = make_chain(cell.activation), make_parameters(cell, shape)
    counts = count_equations(chain, parameters, shape, cell.batch_size)
    row: dict[str, Any] = cell._asdict() | {
        "by_layer": all(count.determined for count in counts),
        "together": determined_together(chain, parameters, shape, cell.batch_size, len(chain) - 1),
        "seconds": [],
        "peer_psnr": [],
    }
    for number in range(arguments.gradients + 1):
        batch = draw_batch(cell, data, FORMATS[number % 2], number)
        start = time.perf_counter()
        found = attack(cell, chain, parameters, batch, shape)
        seconds = time.perf_counter() - start
        if number == 0:
            continue  # Has compiled everything; it is not among those counted.
        row["seconds"].append(seconds)
        for key, values in judge(found, batch, data).items():
            row.setdefault(key, []).extend(values)
        if number <= arguments.peer_gradients and cell.batch_size <= LARGEST_PEER_BATCH and cell.steps == 1:
            matched = match(
                partial(apply_chain, chain),
                parameters,
                gradient_of(chain, parameters, batch),
                shape,
                batch_size=cell.batch_size,
                settings=MatchingSettings(steps=arguments.peer_steps),
            )
            row["peer_psnr"] += judge(matched, batch, data)["psnr"]
    return row


def _verdicts(row: dict[str, Any]) -> str:
    counts = {kind.name.lower(): row["verdict"].count(int(kind)) for kind in reversed(ImageVerdict)}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


COLUMNS = {
    "activation": lambda row: row["activation"],
    "channels": lambda row: row["channels"],
    "B": lambda row: row["batch_size"],
    "C": lambda row: row["classes"],
    "K": lambda row: row["steps"],
    "by layer": lambda row: "yes" if row["by_layer"] else "no",
    "together": lambda row: "yes" if row["together"] else "no",
    "above 60 dB": lambda row: f"{sum(value > 60 for value in row['psnr'])} of {len(row['psnr'])}",
    "verdicts": _verdicts,
    "exact below 40 dB": lambda row: sum(
        value < 40 and verdict == ImageVerdict.EXACT for value, verdict in zip(row["psnr"], row["verdict"], strict=True)
    ),
    "median PSNR": lambda row: f"{np.median(row['psnr']):.0f}",
    "error / expected, largest": lambda row: _largest(row["error_over_expected"]),
    "label error, largest": lambda row: _largest(row["label_error"], "{:.0e}"),
    "s / gradient": lambda row: f"{np.median(row['seconds']):.0f}",
    "matching, PSNR": lambda row: f"{np.median(row['peer_psnr']):.0f}" if row["peer_psnr"] else "-",
}


def _largest(values: list[float], form: str = "{:.1f}") -> str:
    finite = [value for value in values if np.isfinite(value)]
    return form.format(max(finite)) if finite else "-"


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--gradients", type=int, help="of each row")
    parser.add_argument("--only", nargs="+", choices=[cell.name for cell in CELLS], metavar="CELL", help="these rows")
    parser.add_argument("--peer-gradients", type=int, default=1, help="of each row, for matching")
    add_row_options(parser)
    arguments = parser.parse_args()
    run = Run("image_batches", arguments)
    arguments.gradients = arguments.gradients or run.size(1, 3, 10)
    arguments.peer_steps = run.size(20, PEER_STEPS, PEER_STEPS)
    chosen = arguments.only or (["relu-24-1-10"] if arguments.quick else [cell.name for cell in CELLS])
    _, data, _ = load_data(arguments)
    options = {name: getattr(arguments, name) for name in ("dataset", "gradients", "peer_gradients", "peer_steps")}
    finished = FinishedRows(arguments.out / "image_batches.rows.json", options, fresh=arguments.fresh)
    title = f"Images behind one gradient, {arguments.dataset}, float32, formats not told"
    rows = {cell.name: partial(measure, arguments, data, cell) for cell in CELLS}
    measure_rows(run, finished, rows, title, COLUMNS, asked=lambda name: not arguments.finished and name in chosen)


if __name__ == "__main__":
    main()
