"""How exactly do images come back, layer by layer? LeNet and FCN-4 on real images, the label format not told.

    python benchmarks/images.py [--dataset cifar10] [--data-dir DIR] [--images 100] [--quick | --full] [--seeds 5]
                                [--networks untrained smoothing mixup generic fcn4]

Networks: LeNet with the paper's initial weights U(-0.5, 0.5), untrained, and trained from these with smoothing and with
mixup (Adam, rate 1e-3, 5 epochs); `generic`: trained with smoothing from weights U(-1, 1) / sqrt(fan-in) instead, whose
convolutions are worse conditioned; FCN-4 untrained on 64x64 images (photographs). float32 gradients; PSNR in decibels.
Seconds an image after compilation. Failures are counted, never redrawn: an image not found counts as 0 dB. The plot
shows the first image of each row. There is one network of each kind: `--seeds` has no effect.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from clients import load_data
from runner import Run, add_data_options, option_parser

from softinv_jax.client import (
    FCN4,
    ImageDataset,
    LeNet,
    SoftLabelBatch,
    apply_function,
    initialise,
    initialise_fan_in,
    load_photographs,
    per_sample_model_gradients,
    sample_batch,
    train,
)
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import Chain, fcn_chain, lenet_chain
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio, structural_similarity
from softinv_jax.report.image_figures import ImageExample, images_figure

FORMATS = ("smoothing", "mixup")
NETWORKS = ("untrained", "smoothing", "mixup", "generic", "fcn4")
# FCN-4's gradient takes 218 MB an example.
FCN_IMAGES = 5


def networks(
    arguments: argparse.Namespace, training: ImageDataset, test: ImageDataset
) -> Iterator[tuple[str, Any, Chain, Any, ImageDataset, int]]:
    """Name, network, chain, parameters, private images, and how many of them, for each network asked for."""
    shape = training.images.shape[1:]
    lenet = LeNet(training.number_of_classes)
    for name in arguments.networks:
        if name == "fcn4":
            data = load_photographs(split="test", per_class=10, image_size=64)
            network = FCN4(data.number_of_classes)
            parameters = initialise(network, jax.random.key(0), data.images.shape[1:])
            yield "FCN-4 untrained", network, fcn_chain(), parameters, data, min(FCN_IMAGES, arguments.images)
            continue
        title, parameters = "LeNet untrained", initialise(lenet, jax.random.key(0), shape)
        if name != "untrained":
            family = "smoothing" if name == "generic" else name
            start = initialise_fan_in if name == "generic" else initialise
            title = f"LeNet trained with {family}" + (" from fan-in weights" if name == "generic" else "")
            result = train(
                jax.random.key(2),
                lenet,
                start(lenet, jax.random.key(1), shape),
                training.normalised(),
                training.classes,
                number_of_classes=training.number_of_classes,
                family=family,
                learning_rate=1e-3,
            )
            parameters = result.parameters
            title += f" ({float(result.accuracy):.0%})"
        yield title, lenet, lenet_chain(), jax.device_get(parameters), test, arguments.images


def measure(
    network: Any, chain: Chain, parameters: Any, data: ImageDataset, family: str, count: int
) -> tuple[dict[str, Any], ImageExample]:
    """One row, and its first image. The truth is used here only."""
    batch = sample_batch(jax.random.key(3), family, data.normalised(), data.classes, data.number_of_classes, count)
    gradients = jax.device_get(
        per_sample_model_gradients(apply_function(network), parameters, batch.images, batch.labels)
    )
    shape = data.images.shape[1:]
    # Compiles everything, but inverts one image only: there is nothing to invert where a gradient is zero.
    first = np.arange(count) == 0
    invert(
        chain,
        parameters,
        jax.tree.map(lambda leaf: np.where(first.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0), gradients),
        shape,
    )
    start = time.perf_counter()
    result = invert(chain, parameters, gradients, shape)
    seconds = time.perf_counter() - start
    return judged(result, batch, data, seconds, family)


def judged(
    result: ImageRecovery, batch: SoftLabelBatch, data: ImageDataset, seconds: float, title: str
) -> tuple[dict[str, Any], ImageExample]:
    """What images with labels of one format are worth, and the first of them. The truth is used here only."""
    count = len(result.images)
    original = np.asarray(data.denormalise(batch.images))
    recovered = np.asarray(data.denormalise(result.images[:, 0]))
    found = np.all(np.isfinite(recovered), axis=(1, 2, 3))
    quality, similarity = np.zeros(count), np.zeros(count)
    if np.any(found):
        quality[found] = peak_signal_to_noise_ratio(recovered[found], original[found])
        similarity[found] = structural_similarity(recovered[found], original[found])
    verdict = result.verdict[:, 0]
    actual = np.sqrt(np.mean((result.images[:, 0] - np.asarray(batch.images)) ** 2, axis=(1, 2, 3)))
    labels = np.abs(result.labels[:, 0] - np.asarray(batch.labels)).max(axis=1)
    row = {
        "format": title,
        "images": count,
        "median_psnr": float(np.median(quality)),
        "worst_psnr": float(np.min(quality)),
        "above_60_db": int(np.sum(quality > 60)),
        "median_ssim": float(np.median(similarity)),
        "verdicts": {kind.name.lower(): int(np.sum(verdict == kind)) for kind in reversed(ImageVerdict)},
        "exact_below_40_db": int(np.sum((verdict == ImageVerdict.EXACT) & (quality < 40))),
        "largest_label_error": _or_nan(np.nanmax, labels),
        "labels_below_1e-4": int(np.sum(labels < 1e-4)),
        "error_over_expected": _or_nan(np.nanmedian, actual / result.expected_error[:, 0]),
        "largest_error_over_expected": _or_nan(np.nanmax, actual / result.expected_error[:, 0]),
        "seconds_per_image": seconds / count,
    }
    note = f"PSNR {quality[0]:.0f} dB"
    name = ImageVerdict(verdict[0]).name.lower()
    return row, ImageExample(title.replace("_", " "), original[0], recovered[0], name, note)


def _or_nan(function: Callable[[np.ndarray], np.floating], values: np.ndarray) -> float:
    return float(function(values)) if np.any(np.isfinite(values)) else float("nan")


COLUMNS = {
    "network": lambda row: row["network"],
    "format": lambda row: row["format"],
    "exact": lambda row: f"{row['verdicts']['exact']} of {row['images']}",
    "median PSNR": lambda row: f"{row['median_psnr']:.1f}",
    "worst": lambda row: f"{row['worst_psnr']:.1f}",
    "SSIM": lambda row: f"{row['median_ssim']:.4f}",
    "error / expected, median and largest": lambda row: (
        f"{row['error_over_expected']:.1f}, {row['largest_error_over_expected']:.1f}"
    ),
    "largest label error": lambda row: f"{row['largest_label_error']:.0e}",
    "seconds an image": lambda row: f"{row['seconds_per_image']:.2f}",
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--images", type=int, help="of each network and format")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    arguments = parser.parse_args()
    run = Run("images", arguments)
    arguments.images = arguments.images or run.size(2, 100, 100)
    arguments.networks = arguments.networks or (["untrained"] if arguments.quick else list(NETWORKS))
    training, test, _ = load_data(arguments)
    test = test.with_statistics_of(training)
    examples = []
    for name, network, chain, parameters, data, count in networks(arguments, training, test):
        for family in FORMATS:
            row, example = measure(network, chain, parameters, data, family, count)
            run.add(network=name, **row)
            examples.append(example)
    title = f"Images from one float32 gradient each, {arguments.dataset}"
    lenet = [one for one, row in zip(examples, run.rows, strict=True) if not row["network"].startswith("FCN")]
    run.finish(title, COLUMNS, (lambda rows: images_figure(lenet, title)) if lenet else None)


if __name__ == "__main__":
    main()
