"""Tables 3 and 4: images by where the label comes from, and by what is matched (g, f, gf). LeNet, real images.

    python benchmarks/images_by_label_mode.py [--dataset cifar10] [--data-dir DIR] [--networks untrained trained]
                                              [--families smoothing mixup] [--images N] [--restarts R] [--steps S]
                                              [--second-order] [--checkpoints FOLDER] [--seeds 5] [--quick | --full]
                                              [--time-limit SECONDS] [--fresh] [--images-file FILE]
                                              [--export-images FILE]

Label modes: `true`, what an oracle would do; `hard`, the class of its largest entry; `joint`, optimised together with
the image; `recovered`, from `softinv_jax.recover_many`; `joint from recovered`; and DLG (l2, L-BFGS, 300 steps), from
noise and from the recovered label. `f` and `gf` match the recovered feature too (`recovered` is `g`). `layer by layer`
is the exact inversion, which takes no label, `second order` Levenberg-Marquardt from noise with the recovered label.
Signed Adam, cosine distance, total variation 1e-2 (1e-3 trained). Restarts are chosen by their own loss. An image
without a recovered label, or one that layer by layer finds none for, is failed: it counts as 0 dB, and is not redrawn.

Each seed is a network with its own weights and images; deviations are over all images. All images and restarts of a
mode are one program; the seconds are without compiling. Usual: one image a network and format, one restart, 1200 steps;
`--full`, the paper's 30 (smoothing) or 45 (mixup) images in all, 10 restarts, 4800
steps. The last column is what the authors state (their rebuttal; format unknown, untrained).

A row is written to images_by_label_mode.rows.json when it is there, and a run with the same options goes on from these;
with `--time-limit` it stops before a mode for which the time is not likely to do. `--export-images` writes the images
that untrained networks need to an .npz file, for `--images-file` where there is no TFDS folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clients import load_data, save_images
from finished_rows import FinishedRows
from runner import Run, add_data_options, new_figure, option_parser, spread, timed
from train import add_checkpoint_option, make_recipe, note_checkpoint, trained

import softinv_jax
from softinv_jax.client import (
    ImageDataset,
    LeNet,
    apply_function,
    initialise,
    per_sample_model_gradients,
    sample_batch,
)
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import lenet_chain
from softinv_jax.images.matching import match_gradients
from softinv_jax.images.objective import DEEP_LEAKAGE, ApplyFunction, MatchingSettings
from softinv_jax.images.refinement import refine_image
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio, structural_similarity

# What the paper's comparison rests on comes first.
LABEL_MODES = ("true", "recovered", "joint from recovered", "DLG", "DLG from recovered", "joint", "hard")
METHODS = ("layer by layer", "f", "gf")
# PSNR in dB and SSIM.
STATED = {
    "true": "14.61 / 0.523",
    "recovered": "12.38 / 0.367",
    "DLG": "9.49 / 0.144",
    "DLG from recovered": "9.76 / 0.148",
}


@lru_cache
def features_function(network: LeNet) -> ApplyFunction:
    """The network's features, one function object for each network."""
    return lambda parameters, image: network.apply({"params": parameters}, image, method="features")


@dataclass(frozen=True)
class Victim:
    """Clients' gradients, what an observer makes of them, and the truth to measure with."""

    data: ImageDataset
    network: LeNet
    parameters: Any
    images: jax.Array
    labels: jax.Array
    gradients: Any
    recovered: softinv_jax.Recovery
    total_variation: float

    @property
    def told(self) -> np.ndarray:
        """Indices of the examples whose label was recovered."""
        return np.flatnonzero(np.isfinite(np.asarray(self.recovered.label)).all(axis=1))

    def quality(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """PSNR in dB and SSIM of each image; 0 where nothing was found."""
        known = np.isfinite(found).all(axis=(1, 2, 3))
        signal, likeness = np.zeros(len(found)), np.zeros(len(found))
        pair = [np.asarray(self.data.denormalise(images))[known] for images in (found, self.images)]
        if known.any():
            signal[known], likeness[known] = peak_signal_to_noise_ratio(*pair), structural_similarity(*pair)
        return signal, likeness


@dataclass
class Scores:
    """One method over several victims: PSNR in dB and SSIM of every image, images failed, and seconds by victim."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    failed: int = 0
    seconds_per_image: list[float] = field(default_factory=list)

    def add(self, victim: Victim, images: np.ndarray, seconds: float) -> None:
        """Images (N, H, W, channels) found in so many seconds, NaN where there is none."""
        signal, likeness = victim.quality(images)
        self.psnr += signal.tolist()
        self.ssim += likeness.tolist()
        self.failed += int(np.sum(~np.isfinite(images).all(axis=(1, 2, 3))))
        self.seconds_per_image.append(seconds / len(images))


def make_victim(
    run: Run, data: tuple[ImageDataset, ImageDataset, Any], name: str, family: str, count: int, seed: int
) -> Victim:
    """One network, and its clients' gradients."""
    training, test, images = data
    network = LeNet(training.number_of_classes)
    parameters = initialise(network, jax.random.key(seed), images.shape[1:])
    if name == "trained":
        found = trained(
            make_recipe("lenet", family, seed, run.arguments, training), run.arguments.checkpoints, training, test
        )
        note_checkpoint(run, found)
        parameters = found.parameters
    key = jax.random.fold_in(jax.random.key(1), seed)
    batch = sample_batch(key, family, images, test.classes, training.number_of_classes, count)
    gradients = per_sample_model_gradients(apply_function(network), parameters, batch.images, batch.labels)
    recovered = softinv_jax.recover_many(softinv_jax.observe_head(parameters, gradients))
    variation = 1e-3 if name == "trained" else 1e-2
    return Victim(training, network, parameters, batch.images, batch.labels, gradients, recovered, variation)


def attack(victims: Sequence[Victim], mode: str, steps: int, restarts: int) -> np.ndarray:
    """Images (N, H, W, channels) of all victims by one mode, in their order; NaN where it has no answer."""
    if mode == "layer by layer":
        return np.concatenate([_layer_by_layer(victim) for victim in victims])
    if mode == "second order":
        return np.concatenate([_second_order(victim) for victim in victims])
    return _matched(victims, mode, steps, restarts)


def _layer_by_layer(victim: Victim) -> np.ndarray:
    shape = victim.images.shape[1:]
    return invert(lenet_chain(), victim.parameters, victim.gradients, shape).images[:, 0]


def _second_order(victim: Victim) -> np.ndarray:
    apply_fn = apply_function(victim.network)
    images = np.full(victim.images.shape, np.nan, np.float32)
    labels = np.asarray(victim.recovered.label)
    for row in victim.told:
        noise = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(2), row), images.shape[1:])
        gradient = jax.tree.map(lambda leaf, row=row: leaf[row], victim.gradients)
        images[row] = refine_image(apply_fn, victim.parameters, gradient, noise, labels[row]).image
    return images


def _settings(mode: str, steps: int, total_variation: float) -> MatchingSettings:
    paper = MatchingSettings(steps=steps, total_variation=total_variation)
    if mode.startswith("DLG"):
        return replace(DEEP_LEAKAGE, steps=min(DEEP_LEAKAGE.steps, steps))
    if mode.startswith("joint"):
        return replace(paper, optimise_label=True)
    return replace(paper, method=mode) if mode in ("f", "gf") else paper


def _matched(victims: Sequence[Victim], mode: str, steps: int, restarts: int) -> np.ndarray:
    """By gradient matching: one program for all victims, whose examples bring their network along."""
    first = victims[0]
    settings = _settings(mode, steps, first.total_variation)
    counts = [len(victim.images) for victim in victims]
    starts = np.cumsum(counts) - counts
    told = np.concatenate([victim.told + start for victim, start in zip(victims, starts, strict=True)])
    own = np.concatenate([np.asarray(victim.recovered.label) for victim in victims])
    true = np.concatenate([np.asarray(victim.labels) for victim in victims])
    images = np.full((sum(counts), *first.images.shape[1:]), np.nan, np.float32)
    needs_label = mode not in ("true", "hard", "joint", "DLG")
    rows = told if needs_label else np.arange(len(images))
    if rows.size == 0:
        return images
    # Always as many, for one program: in place of what was not told the first that was, whose second copy is not used.
    filled = np.full(len(images), rows[0])
    filled[rows] = rows
    owner = np.repeat(np.arange(len(victims)), counts)[filled]
    hard = np.eye(true.shape[1], dtype=np.float32)[np.argmax(true, axis=1)]
    labels = {"true": true, "hard": hard, "joint": None, "DLG": None}.get(mode, own[filled])
    options: dict[str, Any] = {} if labels is None else {"labels": labels}
    if settings.optimiser != "lbfgs":
        mean, deviation = np.asarray(first.data.mean), np.asarray(first.data.std)
        options |= {"low": -mean / deviation, "high": (1 - mean) / deviation}
    if settings.matches_feature:
        features = np.concatenate([np.asarray(victim.recovered.feature) for victim in victims])[filled]
        options |= {"features_fn": features_function(first.network), "features": features}
    found = match_gradients(
        apply_function(first.network),
        jax.tree.map(lambda *leaves: jnp.stack(leaves)[owner], *(victim.parameters for victim in victims)),
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[filled], *(victim.gradients for victim in victims)),
        images.shape[1:],
        jax.random.key(2),
        settings=settings,
        restarts=restarts,
        own_parameters=True,
        **options,
    )
    images[rows] = np.asarray(found.image)[rows]
    return images


def draw(rows: list[dict[str, Any]]) -> Any:
    """PSNR of every image, by mode."""
    settings = list(dict.fromkeys((row["network"], row["format"]) for row in rows))
    figure = new_figure(9, 2.6 * len(settings))
    for axes, setting in zip(
        figure.subplots(len(settings), 1, squeeze=False, sharex=True)[:, 0], settings, strict=True
    ):
        own = [row for row in rows if (row["network"], row["format"]) == setting]
        for index, row in enumerate(own):
            axes.plot(np.full(len(row["psnr"]), index), row["psnr"], "o", alpha=0.5)
            axes.plot(index, np.mean(row["psnr"]), "k_", markersize=20)
        axes.set_xticks(range(len(own)), [row["mode"].replace(" from ", "\nfrom ") for row in own], fontsize=7)
        axes.set(ylabel="PSNR, dB", title=f"{setting[0]}, {setting[1]}: every image and the mean")
    return figure


COLUMNS = {
    "network": lambda row: row["network"],
    "format": lambda row: row["format"],
    "mode": lambda row: row["mode"],
    "images": lambda row: row["images"],
    "failed": lambda row: row["failed"],
    "PSNR, dB": lambda row: spread(row["psnr"]),
    "median": lambda row: f"{np.median(row['psnr']):.1f}",
    "SSIM": lambda row: spread(row["ssim"], 3),
    "s / image": lambda row: f"{row['seconds_per_image']:.1f}",
    "stated": lambda row: STATED.get(row["mode"], "") if row["network"] == "untrained" else "",
}


def measure(run: Run, victims: Sequence[Victim], mode: str, steps: int, restarts: int) -> dict[str, Any]:
    """The row of one mode. The truth is used here only."""
    before = run.compile_seconds
    images, seconds = timed(lambda: attack(victims, mode, steps, restarts))
    seconds = max(seconds - (run.compile_seconds - before), 0.0)
    scores, start = Scores(), 0
    for victim in victims:
        own = images[start : start + len(victim.images)]
        scores.add(victim, own, seconds * len(own) / len(images))
        start += len(own)
    return {
        "mode": mode,
        "images": len(scores.psnr),
        "failed": scores.failed,
        "psnr": scores.psnr,
        "ssim": scores.ssim,
        "seconds_per_image": seconds / len(images),
        # A run may have gone on elsewhere.
        "made_by": f"{run.commit}, {run.facts()['device']}",
    }


def go_through(run: Run, data: Any, rows: FinishedRows, steps: int, restarts: int) -> list[str]:
    """Add the rows of all modes to the run; returns what there was no time for."""
    arguments, missing, longest = run.arguments, [], 0.0
    modes = arguments.modes + ["second order"] * arguments.second_order
    for name in arguments.networks:
        for family in arguments.families:
            whole = 30 if family == "smoothing" else 45
            count = arguments.images or run.size(1, 1, -(-whole // arguments.seeds))
            victims: list[Victim] = []
            for mode in modes:
                title = f"{name}, {family}, {mode}"
                row = rows.get(title)
                if row is None:
                    if arguments.time_limit is not None and run.seconds + longest > arguments.time_limit:
                        missing.append(title)
                        continue
                    start = time.perf_counter()
                    victims = victims or [make_victim(run, data, name, family, count, seed) for seed in run.seeds]
                    row = {"network": name, "format": family, **measure(run, victims, mode, steps, restarts)}
                    longest = max(longest, time.perf_counter() - start)
                    rows.keep(title, row)
                run.add(**row)
    return missing


def make_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    add_checkpoint_option(parser)
    parser.add_argument("--networks", nargs="+", choices=("untrained", "trained"), default=["untrained", "trained"])
    parser.add_argument("--families", nargs="+", choices=("smoothing", "mixup"), default=["smoothing", "mixup"])
    parser.add_argument(
        "--modes", nargs="+", choices=(*LABEL_MODES, *METHODS, "second order"), default=[*LABEL_MODES, *METHODS]
    )
    parser.add_argument("--images", type=int, help="of each network and format")
    parser.add_argument("--restarts", type=int)
    parser.add_argument("--steps", type=int, help="of Adam")
    parser.add_argument("--second-order", action="store_true", help="adds about a minute an image on two cores")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop in time, between two modes")
    parser.add_argument("--fresh", action="store_true", help="do not go on from the rows that are there")
    parser.add_argument("--images-file", type=Path, help="images from this .npz file, for untrained networks")
    parser.add_argument("--export-images", type=Path, metavar="FILE", help="write that file, and no more")
    return parser


def main() -> None:
    """Command line."""
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.images_file and "trained" in arguments.networks:
        parser.error("--images-file has no training images; add --networks untrained")
    run = Run("images_by_label_mode", arguments)
    steps, restarts = arguments.steps or run.size(10, 1200, 4800), arguments.restarts or run.size(1, 1, 10)
    data = load_data(arguments)
    if arguments.export_images:
        save_images(arguments.export_images, *data[:2])
        return
    options = {
        "steps": steps,
        "restarts": restarts,
        "images": arguments.images or run.size(1, 1, -1),
        "seeds": arguments.seeds,
        "data": [data[1].name, *data[0].mean, len(data[1])],
    }
    rows = FinishedRows(arguments.out / "images_by_label_mode.rows.json", options, fresh=arguments.fresh)
    missing = go_through(run, data, rows, steps, restarts)
    if missing:
        run.notes["missing"] = missing
        print(f"no time for: {'; '.join(missing)}; run this again", file=sys.stderr)
    title = f"Tables 3 and 4: images from one gradient each, LeNet, {steps} steps of Adam, restarts: {restarts}"
    title += f"; {len(missing)} rows are missing" if missing else ""
    makers = sorted({row["made_by"] for row in run.rows})
    title += f"; rows made by {' and by '.join(makers)}" if len(makers) > 1 else ""
    run.finish(title, COLUMNS, draw if run.rows else None)


if __name__ == "__main__":
    main()
