"""Table 2: how often are soft labels recovered, and how exactly? Five architectures, untrained and trained.

    python benchmarks/soft_labels.py [--datasets cifar10 cifar100] [--cases NAME ...] [--data-dir DIR]
                                     [--checkpoints FOLDER] [--seeds 5] [--quick | --full]

Formats: label smoothing and mixup as in the paper, and beyond it hard labels and smoothed mixup. `exact` is told
neither the format nor, in the rows "unknown scale", the factor e^(3 N(0, 1)) on each gradient; `variance` is the
paper's loss, told both. Each seed is a network with its own weights (trained ones: their own training) and clients of
its own; deviations are over these networks. Right: largest label error below 1e-4 and, for `exact`, the verdict
`unique`. Failures are counted, never redrawn. Of them, imprecise: `unique`, and the error within six of the deviations
that the recovery itself states (an untrained network's logits may differ too little to say more); wrong unique: beyond.
float32 gradients, batch normalisation in evaluation mode.

LeNet and FCN-4 run with the paper's 1000 samples (smoothing, hard) and 900 (mixup) for each network; the larger
networks with 40, with `--full` as many. ResNet50 and one LeNet have 1000 classes, of which images get one at random
where the data set has fewer. Untrained ResNet18 has the ImageNet stem, the trained one (`train.py`) the CIFAR stem, as
in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clients import FORMATS, head_and_features, load_data
from matplotlib.figure import Figure
from runner import SHARE_COLUMNS, Run, new_figure, option_parser, shares, timed
from train import add_checkpoint_option, make_recipe, note_checkpoint, trained

import softinv_jax
from softinv_jax.client import (
    FCN4,
    AlexNet,
    ImageDataset,
    LeNet,
    ResNet18,
    ResNet50,
    initial_batch_statistics,
    initialise,
    per_sample_last_layer_gradients,
    sample_batch,
)
from softinv_jax.measures.label_error import label_error

RIGHT = 1e-4


@dataclass(frozen=True)
class Case:
    """A network to attack.

    Attributes:
      network: makes it for C classes; None for a trained one.
      image_size: side of its images; None as they are.
      trained: architecture and label family it is trained with, or None.
      classes: C, or None for that of the data set.
      all_samples: whether the paper's number of samples takes no more than seconds.
      piece: samples worked on at once.
    """

    network: Callable[[int], Any] | None = None
    image_size: int | None = None
    trained: tuple[str, str] | None = None
    classes: int | None = None
    all_samples: bool = False
    piece: int = 100


CASES = {
    "LeNet untrained": Case(LeNet, all_samples=True),
    "LeNet trained, smoothing": Case(trained=("lenet", "smoothing"), all_samples=True),
    "LeNet trained, mixup": Case(trained=("lenet", "mixup"), all_samples=True),
    "LeNet untrained, 1000 classes": Case(LeNet, classes=1000, all_samples=True),
    "FCN-4 untrained": Case(FCN4, 64, all_samples=True),
    "ResNet18 untrained": Case(ResNet18, piece=20),
    "ResNet18 trained, smoothing": Case(trained=("resnet18", "smoothing"), piece=20),
    "ResNet18 trained, mixup": Case(trained=("resnet18", "mixup"), piece=20),
    "AlexNet untrained": Case(AlexNet, 224, piece=20),
    "ResNet50 untrained": Case(ResNet50, 64, classes=1000, piece=20),
}
FIRST_DATA_SET_ONLY = ("LeNet trained", "LeNet untrained, 1000", "ResNet18 trained", "AlexNet", "ResNet50")


@dataclass
class Victim:
    """A network with its parameters, and the private images of its clients."""

    network: Any
    parameters: Any
    statistics: Any
    classes: int
    images: jax.Array
    image_classes: np.ndarray


def victims(name: str, run: Run, data: tuple[ImageDataset, ImageDataset, jax.Array]) -> Iterator[Victim]:
    """One for each seed."""
    case, (training, test, images) = CASES[name], data
    classes = case.classes or test.number_of_classes
    own = test.classes
    if classes > test.number_of_classes:
        own = np.random.default_rng(3).integers(0, classes, len(images)).astype(np.int32)
    for seed in run.track(run.seeds, name):
        if case.trained is not None:
            recipe = make_recipe(*case.trained, seed, run.arguments, training)
            found = trained(recipe, run.arguments.checkpoints, training, test)
            note_checkpoint(run, found)
            yield Victim(found.network, found.parameters, found.batch_statistics, classes, images, own)
        else:
            assert case.network is not None
            network, shape = case.network(classes), images.shape[1:]
            parameters = initialise(network, jax.random.key(seed), shape)
            statistics = initial_batch_statistics(network, shape)
            yield Victim(network, parameters, statistics, classes, images, own)


def methods(family: str, victim: Victim, case: Case) -> dict[str, dict[str, Any]]:
    """Options of `recover_many` by the name they get in the table."""
    found: dict[str, dict[str, Any]] = {"exact": {}}
    if case.all_samples:
        found["exact, unknown scale"] = {"unknown_scale": True}
        if victim.classes <= 10:  # L-BFGS on many classes takes minutes and shows nothing new.
            found["variance, told"] = {
                "method": "variance",
                "label_format": "mixup" if "mixup" in family else "smoothing",
            }
    return found


def attack(victim: Victim, case: Case, family: str, samples: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Errors and verdicts of each method on one network; the truth is used for the comparison only."""
    parts: dict[str, list[dict[str, Any]]] = {}
    variance_samples = 100
    for start in range(0, samples, case.piece):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(4), seed), start)
        batch = sample_batch(key, family, victim.images, victim.image_classes, victim.classes, case.piece)
        weight, features = head_and_features(
            victim.network, victim.parameters, batch.images, victim.statistics, pieces=max(1, case.piece // 20)
        )
        gradients = np.asarray(per_sample_last_layer_gradients(weight, features, batch.labels).weight)
        scales = np.exp(3 * np.random.default_rng([seed, start]).standard_normal((case.piece, 1, 1)))
        for method, options in methods(family, victim, case).items():
            if method.startswith("variance") and start >= variance_samples:
                continue
            seen = gradients * scales.astype(np.float32) if "unknown_scale" in options else gradients
            observation = softinv_jax.observe(weight, seen)
            found, seconds = timed(lambda options=options, seen=observation: softinv_jax.recover_many(seen, **options))
            error = label_error(found.label, np.asarray(batch.labels))
            unique = found.verdict == softinv_jax.Verdict.UNIQUE
            claimed = unique if method.startswith("exact") else np.ones_like(unique)
            within = error.largest <= 1e-6 + 6 * np.max(found.evidence.label_deviation, axis=1)
            parts.setdefault(method, []).append(
                {
                    "recovered": claimed & (error.largest < RIGHT),
                    "unique": unique,
                    "imprecise": unique & ~(error.largest < RIGHT) & within,
                    "wrong": unique & ~(error.largest < RIGHT) & ~within,
                    "largest": error.largest,
                    "squared": error.squared,
                    "seconds": np.full(1, seconds),
                }
            )
    return {
        method: {name: np.concatenate([part[name] for part in own]) for name in own[0]} for method, own in parts.items()
    }


def measure(name: str, dataset: str, run: Run, data: tuple[ImageDataset, ImageDataset, jax.Array]) -> None:
    """The rows of one case on one data set."""
    case = CASES[name]
    found: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    for seed, victim in enumerate(victims(name, run, data)):
        for family in FORMATS:
            full = 900 if "mixup" in family else 1000
            samples = run.size(case.piece, full if case.all_samples else 40, full)
            for method, result in attack(victim, case, family, samples, seed).items():
                found.setdefault((family, method), []).append(result)
    for (family, method), results in sorted(found.items(), key=lambda item: FORMATS.index(item[0][0])):
        largest = np.concatenate([result["largest"][result["recovered"]] for result in results])
        squared = np.concatenate([result["squared"][result["recovered"]] for result in results])
        run.add(
            dataset=dataset,
            network=name,
            classes=data[1].number_of_classes if case.classes is None else case.classes,
            format=family,
            method=method,
            **shares([result["recovered"] for result in results]),
            imprecise=sum(int(result["imprecise"].sum()) for result in results),
            wrong_unique=sum(int(result["wrong"].sum()) for result in results),
            largest_error=float(np.max(largest, initial=0.0)),
            median_squared_error=float(np.median(squared)) if squared.size else None,
            mean_squared_error=float(np.mean(squared)) if squared.size else None,
            milliseconds_each=1e3
            * float(np.median(np.concatenate([result["seconds"] for result in results])))
            / case.piece,
        )


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Recovered share by network and format, one panel a method; error bars over networks."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    labels = list(dict.fromkeys((row["dataset"], row["network"]) for row in rows))
    figure = new_figure(4 * len(methods), 1.5 + 0.45 * len(labels))
    for axes, method in zip(figure.subplots(1, len(methods), squeeze=False, sharey=True)[0], methods, strict=True):
        for shift, family in enumerate(FORMATS):
            own = [row for row in rows if row["method"] == method and row["format"] == family]
            places = [labels.index((row["dataset"], row["network"])) + 0.18 * (shift - 1.5) for row in own]
            means = [np.mean(row["right_percent"]) for row in own]
            deviations = [np.std(row["right_percent"], ddof=1) if row["networks"] > 1 else 0 for row in own]
            axes.errorbar(means, places, xerr=deviations, fmt="o", markersize=4, label=family.replace("_", " "))
        axes.set(title=method, xlabel="labels recovered, %")
        axes.set_yticks(range(len(labels)), [f"{network}, {dataset}" for dataset, network in labels], fontsize=7)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


COLUMNS = {
    "data": lambda row: row["dataset"],
    "network": lambda row: row["network"],
    "C": lambda row: row["classes"],
    "format": lambda row: row["format"].replace("_", " "),
    "method": lambda row: row["method"],
    **SHARE_COLUMNS,
    "imprecise": lambda row: row["imprecise"],
    "wrong unique": lambda row: row["wrong_unique"],
    "largest error": lambda row: f"{row['largest_error']:.1e}",
    "mean squared error (sum over classes)": lambda row: (
        "" if row["mean_squared_error"] is None else f"{row['mean_squared_error']:.1e}"
    ),
    "ms each": lambda row: f"{row['milliseconds_each']:.2f}",
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    parser.add_argument(
        "--datasets", nargs="+", default=["cifar10", "cifar100"], help="prepared TFDS data sets, photographs"
    )
    parser.add_argument("--data-dir", help="TFDS data directory (default: TFDS_DATA_DIR)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    add_checkpoint_option(parser)
    arguments = parser.parse_args()
    run = Run("soft_labels", arguments)
    for place, dataset in enumerate(arguments.datasets):
        arguments.dataset = dataset
        data: dict[int | None, Any] = {}
        for name in arguments.cases:
            if place > 0 and name.startswith(FIRST_DATA_SET_ONLY):
                continue
            size = CASES[name].image_size
            if size not in data:
                training, test, images = load_data(arguments, size)
                data[size] = training, test, jnp.asarray(images)
            measure(name, dataset, run, data[size])
    run.finish("Table 2: soft labels recovered from one float32 gradient each", COLUMNS, draw)


if __name__ == "__main__":
    main()
