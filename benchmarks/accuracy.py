"""How often are soft labels recovered, and how exactly? LeNet on real images, every format, none told to `exact`.

    python benchmarks/accuracy.py [--dataset cifar10] [--data-dir DIR] [--samples 1000] [--classes 10 100 1000]
                                  [--networks untrained smoothing mixup] [--json FILE]

Networks: untrained, U(-0.5, 0.5), with C classes each, and trained with smoothing and with mixup (C of the data set).
`exact` runs with the gradient's scale known and with a random factor e^(3 N(0, 1)); the paper's `variance` loss, told
the format, and `idlg` run beside it on the same gradients. Failures are counted, never redrawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import softinv_jax
from softinv_jax.client import (
    ImageDataset,
    LeNet,
    SoftLabelBatch,
    initialise,
    initialise_fan_in,
    load_photographs,
    load_tfds,
    per_sample_last_layer_gradients,
    sample_batch,
    train,
)
from softinv_jax.measures.label_error import label_error

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")
TRAINING_EXAMPLES = 20_000


def load_data(arguments: argparse.Namespace) -> tuple[ImageDataset, ImageDataset, np.ndarray]:
    """Training and test data as `--dataset` and `--data-dir` say; the test images, normalised as the training's."""
    if arguments.dataset == "photographs":
        training, test = load_photographs(split="train"), load_photographs(split="test")
    else:
        training = load_tfds(arguments.dataset, "train", data_dir=arguments.data_dir, limit=TRAINING_EXAMPLES)
        test = load_tfds(arguments.dataset, "test", data_dir=arguments.data_dir, limit=2000)
    images = test.with_statistics_of(training).normalised()
    return training, test, images


def networks(arguments: argparse.Namespace, training: Any) -> Iterator[tuple[str, int, LeNet, Any]]:
    """Name, number of classes, network and parameters of each network asked for."""
    shape = training.images.shape[1:]
    for number_of_classes in arguments.classes:
        if "untrained" in arguments.networks:
            network = LeNet(number_of_classes)
            yield "untrained", number_of_classes, network, initialise(network, jax.random.key(0), shape)
    for family in ("smoothing", "mixup"):
        if family in arguments.networks:
            network = LeNet(training.number_of_classes)
            start = initialise_fan_in(network, jax.random.key(1), shape)
            result = train(
                jax.random.key(2),
                network,
                start,
                training.normalised(),
                training.classes,
                number_of_classes=training.number_of_classes,
                family=family,
            )
            yield f"trained with {family}", training.number_of_classes, network, result.parameters


@partial(jax.jit, static_argnums=0)
def _features(network: LeNet, parameters: Any, images: jax.Array) -> jax.Array:
    return network.apply({"params": parameters}, images, method="features")


def head_and_features(network: LeNet, parameters: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weight (C, d) of the last layer, and what goes into it, (N, d)."""
    return jnp.asarray(parameters["head"]["kernel"]).T, _features(network, parameters, images)


def last_layer(network: LeNet, parameters: Any, batch: SoftLabelBatch) -> tuple[np.ndarray, jax.Array]:
    """Weight (C, d) and the clients' last-layer gradients (N, C, d)."""
    weight, features = head_and_features(network, parameters, batch.images)
    return np.asarray(weight), per_sample_last_layer_gradients(weight, features, batch.labels).weight


def row(name: str, method: str, result: softinv_jax.Recovery, labels: np.ndarray, seconds: float) -> dict[str, Any]:
    """What one method did on one set of gradients. The truth is used here only."""
    error = label_error(result.label, labels)
    unique = result.verdict == softinv_jax.Verdict.UNIQUE
    right = error.largest < 1e-4
    claimed = unique if method.startswith("exact") else np.ones_like(unique)
    return {
        "name": name,
        "method": method,
        "total": len(labels),
        "unique": int(unique.sum()),
        "recovered": int(np.sum(claimed & right)),
        "wrong_unique": int(np.sum(unique & ~right)),
        "largest_error": float(np.max(error.largest[unique], initial=0.0)),
        "mean_squared_error": float(np.nanmean(error.squared)) if np.any(np.isfinite(error.squared)) else None,
        "samples_per_second": len(labels) / seconds,
    }


def compare(
    name: str, weight: np.ndarray, gradients: jax.Array, labels: np.ndarray, family: str
) -> list[dict[str, Any]]:
    """All methods on the same gradients."""
    scales = np.exp(3 * np.random.default_rng(0).standard_normal(len(labels))).astype(np.float32)
    told = "mixup" if "mixup" in family else "smoothing"
    runs: dict[str, tuple[Any, dict[str, Any]]] = {
        "exact": (gradients, {}),
        "exact, unknown scale": (gradients * scales[:, None, None], {"unknown_scale": True}),
        "idlg": (gradients, {"method": "idlg"}),
    }
    if weight.shape[0] <= 100:  # L-BFGS on 1000 classes takes minutes and shows nothing new.
        runs["variance, format told"] = (gradients, {"method": "variance", "label_format": told})
    rows = []
    for method, (observed, options) in runs.items():
        observation = softinv_jax.observe(weight, observed)
        start = time.perf_counter()
        result = softinv_jax.recover_many(observation, **options)
        rows.append(row(name, method, result, labels, time.perf_counter() - start))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", help="a prepared TFDS data set, or 'photographs'")
    parser.add_argument("--data-dir", help="TFDS data directory (default: TFDS_DATA_DIR)")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--networks", nargs="+", default=["untrained", "smoothing", "mixup"])
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    training, test, images = load_data(arguments)
    table = Table(title=f"LeNet, {arguments.dataset}, float32 gradients: label error below 1e-4 counts as recovered")
    for column in ("network", "C", "format", "method", "recovered", "unique", "wrong unique", "largest error", "per s"):
        table.add_column(column)
    rows = []
    for name, number_of_classes, network, parameters in networks(arguments, training):
        for family in FORMATS:
            # With more classes than the data set has, the images get classes at random.
            classes = test.classes
            if number_of_classes > test.number_of_classes:
                classes = np.random.default_rng(3).integers(0, number_of_classes, len(images)).astype(np.int32)
            parts = []
            for start in range(0, arguments.samples, 50 if number_of_classes > 100 else arguments.samples):
                count = min(50 if number_of_classes > 100 else arguments.samples, arguments.samples - start)
                key = jax.random.fold_in(jax.random.key(4), start)
                batch = sample_batch(key, family, images, classes, number_of_classes, count)
                weight, gradients = last_layer(network, parameters, batch)
                parts.append(compare(name, weight, gradients, np.asarray(batch.labels), family))
            for same in zip(*parts, strict=True):
                merged = dict(same[0])
                for key_name in ("total", "unique", "recovered", "wrong_unique"):
                    merged[key_name] = sum(part[key_name] for part in same)
                merged["largest_error"] = max(part["largest_error"] for part in same)
                merged |= {"classes": number_of_classes, "format": family}
                rows.append(merged)
                print(json.dumps(merged), file=sys.stderr, flush=True)
                table.add_row(
                    name,
                    str(number_of_classes),
                    family,
                    merged["method"],
                    f"{merged['recovered']}/{merged['total']}",
                    str(merged["unique"]),
                    str(merged["wrong_unique"]),
                    f"{merged['largest_error']:.1e}",
                    f"{merged['samples_per_second']:,.0f}",
                )
    Console(width=150).print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
