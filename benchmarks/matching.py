"""What gradient matching costs and what it gives back, by label mode and by method: untrained LeNet, smoothed labels.

    python benchmarks/matching.py [--dataset cifar10] [--data-dir DIR] [--images 30] [--restarts 10] [--steps 4800]
                                  [--parts speed labels methods] [--lanes 1 8 32] [--second-order]
                                  [--json FILE] [--figure FILE.png]

`speed`: milliseconds a step with 1, 8 and 32 restarts at once, compilation apart. `labels`: PSNR and SSIM by where the
label comes from (the paper's table 3); `true` is what an oracle would do, `hard` the class of its largest entry,
`joint` optimises it together with the image, `recovered` takes it from `softinv_jax.recover_many`. `methods`: matching
of g, f, and gf (table 4) with the recovered label and feature. `--second-order` adds Levenberg-Marquardt from noise
with the recovered label, no total variation, one start. Restarts are chosen by their own loss; images without a
recovered label are counted as failed and not redrawn. The truth is used to measure only, and by the modes that say so.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from clients import load_data
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import softinv_jax
from softinv_jax.client import LeNet, apply_function, initialise, per_sample_model_gradients, sample_batch
from softinv_jax.images.matching import Matching, match_gradients
from softinv_jax.images.objective import DEEP_LEAKAGE, ApplyFunction, MatchingSettings
from softinv_jax.images.refinement import refine_image

# PSNR in dB and SSIM that the paper's authors state for these modes (their rebuttal, the label's format not known).
STATED = {
    "true": (14.61, 0.523),
    "recovered": (12.38, 0.367),
    "DLG": (9.49, 0.144),
    "DLG from recovered": (9.76, 0.148),
}


@lru_cache
def features_function(network: LeNet) -> ApplyFunction:
    """The network's features, one function object for each network."""
    return lambda parameters, image: network.apply({"params": parameters}, image, method="features")


class Victim:
    """Clients' gradients, what an observer makes of them, and the truth to measure with."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        training, test, images = load_data(arguments)
        self.data = training
        self.network = LeNet(training.number_of_classes)
        self.parameters = initialise(self.network, jax.random.key(0), images.shape[1:])
        batch = sample_batch(
            jax.random.key(1), "smoothing", images, test.classes, training.number_of_classes, arguments.images
        )
        self.images, self.labels = batch.images, batch.labels
        self.apply_fn, self.features_fn = apply_function(self.network), features_function(self.network)
        self.gradients = per_sample_model_gradients(self.apply_fn, self.parameters, batch.images, batch.labels)
        found = softinv_jax.recover_many(softinv_jax.observe_head(self.parameters, self.gradients), thorough=True)
        self.recovered, self.features = found.label, found.feature
        self.told = np.flatnonzero(np.isfinite(found.label).all(axis=1))
        mean, deviation = np.asarray(training.mean), np.asarray(training.std)
        self.box = {"low": -mean / deviation, "high": (1 - mean) / deviation}

    def match(self, settings: MatchingSettings, rows: np.ndarray, restarts: int, **options: Any) -> Matching:
        """Match the gradients of some images."""
        return match_gradients(
            self.apply_fn,
            self.parameters,
            jax.tree.map(lambda leaf: leaf[rows], self.gradients),
            self.images.shape[1:],
            jax.random.key(2),
            settings=settings,
            restarts=restarts,
            features_fn=self.features_fn if settings.matches_feature else None,
            **({} if settings.optimiser == "lbfgs" else self.box),
            **options,
        )

    def quality(self, found: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """PSNR in dB and SSIM of each image, on the scale [0, 1] and clipped to it."""
        pairs = [np.clip(np.asarray(self.data.denormalise(images)), 0, 1) for images in (found, self.images[rows])]
        signal = [peak_signal_noise_ratio(true, image, data_range=1) for image, true in zip(*pairs, strict=True)]
        likeness = [
            structural_similarity(true, image, data_range=1, channel_axis=-1)
            for image, true in zip(*pairs, strict=True)
        ]
        return np.array(signal), np.array(likeness)


def speed(victim: Victim, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a step, for several restarts of one example at once."""
    rows = []
    settings = MatchingSettings(steps=100)
    first = np.zeros(1, np.int32)
    for lanes in arguments.lanes:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            found = victim.match(settings, first, lanes, labels=victim.labels[first])
            jax.block_until_ready(found.image)
            seconds.append(time.perf_counter() - start)
        step = 1e3 * min(seconds[1:]) / settings.steps
        rows.append({"lanes": lanes, "first_call_s": seconds[0], "step_ms": step, "image_step_ms": step / lanes})
    return rows


def attack(victim: Victim, name: str, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """One label mode or one method on all images."""
    paper = MatchingSettings(steps=arguments.steps)
    everything = np.arange(arguments.images)
    hard = np.eye(victim.labels.shape[1], dtype=np.float32)[np.argmax(victim.labels, axis=1)]
    joint = replace(paper, optimise_label=True)
    dlg = replace(DEEP_LEAKAGE, steps=arguments.dlg_steps)
    told, recovered = victim.told, victim.recovered[victim.told]
    features = victim.features[victim.told]
    modes: dict[str, tuple[MatchingSettings, np.ndarray, dict[str, Any]]] = {
        "true": (paper, everything, {"labels": victim.labels}),
        "hard": (paper, everything, {"labels": hard}),
        "joint": (joint, everything, {}),
        "recovered": (paper, told, {"labels": recovered}),
        "joint from recovered": (joint, told, {"labels": recovered}),
        "DLG": (dlg, everything, {}),
        "DLG from recovered": (dlg, told, {"labels": recovered}),
        "g": (replace(paper, method="g"), told, {"labels": recovered}),
        "f": (replace(paper, method="f"), told, {"labels": recovered, "features": features}),
        "gf": (replace(paper, method="gf"), told, {"labels": recovered, "features": features}),
    }
    start = time.perf_counter()
    if name == "second order":
        rows, images, residual = told, *second_order(victim, progress)
    else:
        settings, rows, options = modes[name]
        task = progress.add_task(name, total=settings.steps)
        found = victim.match(
            settings,
            rows,
            arguments.restarts,
            progress=lambda done, total: progress.update(task, completed=done),
            **options,
        )
        images, residual = np.asarray(found.image), np.asarray(found.gradient_residual)
    seconds = time.perf_counter() - start
    signal, likeness = victim.quality(images, rows)
    return {
        "mode": name,
        "images": len(rows),
        "failed": arguments.images - len(rows),
        "psnr": signal.tolist(),
        "ssim": likeness.tolist(),
        "residual": float(np.median(residual)),
        "seconds": seconds,
    }


def second_order(victim: Victim, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Images by Levenberg-Marquardt, each from one noise start, with the recovered labels."""
    images, residuals = [], []
    for row in progress.track(victim.told, description="second order"):
        noise = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(2), row), victim.images.shape[1:])
        gradient = jax.tree.map(lambda leaf, row=row: leaf[row], victim.gradients)
        found = refine_image(victim.apply_fn, victim.parameters, gradient, noise, victim.recovered[row])
        images.append(np.asarray(found.image))
        residuals.append(float(found.gradient_residual))
    return np.stack(images), np.array(residuals)


def show(result: dict[str, Any]) -> None:
    """Print what was measured as tables."""
    console = Console(width=120)
    if result["speed"]:
        table = Table("at once", "first call, s", "step, ms", "step of one image, ms", title="cost of signed Adam")
        for row in result["speed"]:
            table.add_row(
                str(row["lanes"]), *(f"{row[key]:.2f}" for key in ("first_call_s", "step_ms", "image_step_ms"))
            )
        console.print(table)
    for part in ("labels", "methods"):
        if not result[part]:
            continue
        table = Table("mode", title=f"images, by {part[:-1]}")
        for column in ("images", "failed", "PSNR, dB", "median", "SSIM", "residual", "s", "stated by the authors"):
            table.add_column(column, justify="right")
        for row in result[part]:
            spread = np.std(row["psnr"], ddof=1) / np.sqrt(row["images"]) if row["images"] > 1 else np.nan
            stated = STATED.get(row["mode"])
            table.add_row(
                row["mode"],
                str(row["images"]),
                str(row["failed"]),
                f"{np.mean(row['psnr']):.2f} +- {spread:.2f}",
                f"{np.median(row['psnr']):.2f}",
                f"{np.mean(row['ssim']):.3f}",
                f"{row['residual']:.1e}",
                f"{row['seconds']:.0f}",
                f"{stated[0]} / {stated[1]}" if stated else "",
            )
        console.print(table)


def draw(result: dict[str, Any], path: str) -> None:
    """PSNR of every image, by mode."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = result["labels"] + result["methods"]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        axes.plot(np.full(len(row["psnr"]), index), row["psnr"], "o", alpha=0.5)
        axes.plot(index, np.mean(row["psnr"]), "k_", markersize=20)
    axes.set_xticks(range(len(rows)), [row["mode"].replace(" from ", "\nfrom ") for row in rows], fontsize=8)
    axes.set(ylabel="PSNR, dB", title="every image (dots) and the mean (bar)")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", help="a prepared TFDS data set, or 'photographs'")
    parser.add_argument("--data-dir", help="TFDS data directory (default: TFDS_DATA_DIR)")
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4800, help="of Adam")
    parser.add_argument("--dlg-steps", type=int, default=300, help="of L-BFGS")
    parser.add_argument(
        "--parts", nargs="*", choices=("speed", "labels", "methods"), default=["speed", "labels", "methods"]
    )
    parser.add_argument("--lanes", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--second-order", action="store_true", help="adds about a minute an image on two cores")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--figure", metavar="FILE.png", help="PSNR of every image")
    arguments = parser.parse_args()
    victim = Victim(arguments)
    modes = ["true", "hard", "joint", "recovered", "joint from recovered", "DLG", "DLG from recovered"]
    modes += ["second order"] if arguments.second_order else []
    result: dict[str, Any] = {"jax": jax.__version__, "images": arguments.images, "steps": arguments.steps}
    result["speed"] = speed(victim, arguments) if "speed" in arguments.parts else []
    with Progress(console=Console(stderr=True)) as progress:
        for part, names in (("labels", modes), ("methods", ["g", "f", "gf"])):
            chosen = names if part in arguments.parts else []
            result[part] = [attack(victim, name, arguments, progress) for name in chosen]
    show(result)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    if arguments.figure:
        draw(result, arguments.figure)


if __name__ == "__main__":
    main()
