"""How often are soft labels recovered on larger networks? AlexNet, ResNet18 and ResNet50, every format, none told.

    python benchmarks/networks.py [--dataset photographs] [--data-dir DIR] [--samples 24] [--networks NAME ...]
                                  [--epochs 4] [--json FILE]

Untrained networks have PyTorch's default initialisation; batch normalisation is in evaluation mode. The trained
ResNet18 are a quarter as wide, to be trained in minutes: with smoothing and with mixup, `--epochs` over the training
images. Beside the verdicts: the spread of the true logits over the classes, without which no label shows, and the
label deviation that the recovery itself states. Failures are counted, never redrawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import softinv_jax
from softinv_jax.client import (
    AlexNet,
    ImageDataset,
    ResNet18,
    ResNet50,
    SoftLabelBatch,
    initial_batch_statistics,
    initialise,
    load_photographs,
    load_tfds,
    per_sample_last_layer_gradients,
    sample_batch,
    train,
)
from softinv_jax.measures.label_error import label_error

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")
RIGHT = 1e-4
CHUNK = 8


@dataclass(frozen=True)
class Case:
    """A network, the side of its images, and the label family it is trained with (None: untrained)."""

    network: Any
    image_size: int
    family: str | None = None


CASES = {
    "alexnet": Case(AlexNet(10), 224),
    "resnet18_cifar_stem": Case(ResNet18(10, stem="cifar"), 32),
    "resnet18_imagenet_stem": Case(ResNet18(10), 224),
    "resnet50": Case(ResNet50(1000), 64),
    "resnet18_cifar_stem_smoothing": Case(ResNet18(10, stem="cifar", width=16), 32, "smoothing"),
    "resnet18_cifar_stem_mixup": Case(ResNet18(10, stem="cifar", width=16), 32, "mixup"),
}


def load(arguments: argparse.Namespace, split: str, count: int, image_size: int) -> ImageDataset:
    """`count` images of a split."""
    if arguments.dataset == "photographs":
        return load_photographs(split=split, per_class=-(-count // 10), image_size=image_size)
    return load_tfds(arguments.dataset, split, data_dir=arguments.data_dir, limit=count, image_size=image_size)


def prepare(case: Case, training: ImageDataset, epochs: int) -> tuple[Any, Any]:
    """Parameters and batch statistics, trained if the case says so."""
    shape = (case.image_size, case.image_size, 3)
    parameters = initialise(case.network, jax.random.key(0), shape)
    statistics = initial_batch_statistics(case.network, shape)
    if case.family is None:
        return parameters, statistics
    result = train(
        jax.random.key(1),
        case.network,
        parameters,
        training.normalised(),
        training.classes,
        number_of_classes=case.network.number_of_classes,
        family=case.family,
        epochs=epochs,
        learning_rate=3e-3,
        progress=lambda done, total, note: print(f"epoch {done}/{total}, {note}", file=sys.stderr, flush=True),
    )
    print(f"accuracy on its training images {float(result.accuracy):.3f}", file=sys.stderr, flush=True)
    return result.parameters, result.batch_statistics


@partial(jax.jit, static_argnames="network")
def outputs(network: nn.Module, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits and features."""
    return network.apply(variables, images, method="logits_and_features")


def measure(case: Case, variables: Any, batch: SoftLabelBatch) -> dict[str, Any]:
    """Recover every label of the batch; the truth is used for the comparison only."""
    logits, features = (
        jnp.concatenate(parts)
        for parts in zip(
            *(outputs(case.network, variables, batch.images[i : i + 1]) for i in range(len(batch.images))), strict=True
        )
    )
    weight = jnp.asarray(variables["params"]["head"]["kernel"]).T
    verdicts, errors, deviations, seconds = [], [], [], 0.0
    for start in range(0, len(features), CHUNK):
        chosen = slice(start, start + CHUNK)
        gradients = per_sample_last_layer_gradients(weight, features[chosen], batch.labels[chosen]).weight
        observation = softinv_jax.observe(np.asarray(weight), np.asarray(gradients))
        begun = time.perf_counter()
        result = softinv_jax.recover_many(observation)
        seconds += time.perf_counter() - begun
        verdicts.append(np.asarray(result.verdict))
        errors.append(label_error(result.label, batch.labels[chosen]).largest)
        deviations.append(np.max(np.asarray(result.evidence.label_deviation), axis=-1))
    verdict, error, deviation = (np.concatenate(parts) for parts in (verdicts, errors, deviations))
    unique = verdict == softinv_jax.Verdict.UNIQUE
    return {
        "total": len(verdict),
        "recovered": int(np.sum(unique & (error < RIGHT))),
        "verdicts": {kind.name.lower(): int(np.sum(verdict == kind)) for kind in softinv_jax.Verdict},
        "wrong_unique": int(np.sum(unique & ~(error < RIGHT))),
        "wrong_unique_beyond_ten_deviations": int(np.sum(unique & (error > 1e-6 + 10 * deviation))),
        "largest_error": float(np.max(error[unique], initial=0.0)),
        "largest_deviation": float(np.max(deviation[unique], initial=0.0)),
        "logit_spread": float(np.median(np.std(logits, axis=1))),
        "seconds": seconds,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="photographs", help="'photographs', or a prepared TFDS data set")
    parser.add_argument("--data-dir", help="TFDS data directory (default: TFDS_DATA_DIR)")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--training-images", type=int, default=2000)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.dataset}, float32 gradients: unique and label error below {RIGHT} is recovered")
    for column in ("network", "format", "recovered", "other verdicts", "wrong unique", "largest error", "logit spread"):
        table.add_column(column)
    rows = []
    for name in arguments.networks:
        case = CASES[name]
        test = load(arguments, "test", 4 * arguments.samples, case.image_size)
        count = arguments.training_images
        training = test if case.family is None else load(arguments, "train", count, case.image_size)
        parameters, statistics = prepare(case, training, arguments.epochs)
        images = test.with_statistics_of(training).normalised()
        classes, number_of_classes = test.classes, case.network.number_of_classes
        if number_of_classes > test.number_of_classes:
            # With more classes than the data set has, the images get classes at random.
            classes = np.random.default_rng(3).integers(0, number_of_classes, len(images)).astype(np.int32)
        for family in FORMATS:
            batch = sample_batch(jax.random.key(4), family, images, classes, number_of_classes, arguments.samples)
            row = {"network": name, "classes": number_of_classes, "format": family}
            row |= measure(case, {"params": parameters, "batch_stats": statistics}, batch)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            others = ", ".join(
                f"{count} {kind}" for kind, count in row["verdicts"].items() if count and kind != "unique"
            )
            table.add_row(
                f"{name}, C = {number_of_classes}",
                family,
                f"{row['recovered']}/{row['total']}",
                others or "none",
                str(row["wrong_unique"]),
                f"{row['largest_error']:.1e}",
                f"{row['logit_spread']:.1e}",
            )
    Console(width=150).print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
