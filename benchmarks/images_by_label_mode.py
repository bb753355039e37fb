"""Tables 3 and 4: images by where the label comes from, and by what is matched (g, f, gf). LeNet, real images.

    python benchmarks/images_by_label_mode.py [--dataset cifar10] [--data-dir DIR] [--networks untrained trained]
                                              [--families smoothing mixup] [--images N] [--restarts R] [--steps S]
                                              [--second-order] [--checkpoints FOLDER] [--seeds 5] [--quick | --full]

Label modes: `true`, what an oracle would do; `hard`, the class of its largest entry; `joint`, optimised together with
the image; `recovered`, from `softinv_jax.recover_many`; `joint from recovered`; and DLG (l2, L-BFGS, 300 steps), from
noise and from the recovered label. `f` and `gf` match the recovered feature too (`recovered` is `g`). `layer by layer`
is the exact inversion, which takes no label, `second order` Levenberg-Marquardt from noise with the recovered label.
Signed Adam, cosine distance, total variation 1e-2 (1e-3 trained). Restarts are chosen by their own loss. An image
without a recovered label, or one that layer by layer finds none for, is failed: it counts as 0 dB, and is not redrawn.

Each seed is a network with its own weights and images; deviations are over all images. Usual: one image a network and
format, one restart, 1200 steps; `--full`, the paper's 30 (smoothing) or 45 (mixup) images in all, 10 restarts, 4800
steps. The last column is what the authors state (their rebuttal; format unknown, untrained).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from clients import load_data
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

LABEL_MODES = ("true", "hard", "joint", "recovered", "joint from recovered", "DLG", "DLG from recovered")
METHODS = ("f", "gf", "layer by layer")
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
        return np.flatnonzero(np.isfinite(self.recovered.label).all(axis=1))

    def chosen(self, rows: np.ndarray) -> Any:
        """The gradients of some examples."""
        return jax.tree.map(lambda leaf: leaf[rows], self.gradients)

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


def attack(victim: Victim, mode: str, steps: int, restarts: int) -> np.ndarray:
    """Images (N, H, W, channels) by one mode; NaN where it has no answer."""
    everything, told = np.arange(len(victim.images)), victim.told
    paper = MatchingSettings(steps=steps, total_variation=victim.total_variation)
    joint, dlg = replace(paper, optimise_label=True), replace(DEEP_LEAKAGE, steps=min(DEEP_LEAKAGE.steps, steps))
    labels, features = victim.recovered.label[told], victim.recovered.feature[told]
    hard = np.eye(victim.labels.shape[1], dtype=np.float32)[np.argmax(victim.labels, axis=1)]
    modes: dict[str, tuple[MatchingSettings, np.ndarray, dict[str, Any]]] = {
        "true": (paper, everything, {"labels": victim.labels}),
        "hard": (paper, everything, {"labels": hard}),
        "joint": (joint, everything, {}),
        "recovered": (paper, told, {"labels": labels}),
        "joint from recovered": (joint, told, {"labels": labels}),
        "DLG": (dlg, everything, {}),
        "DLG from recovered": (dlg, told, {"labels": labels}),
        "f": (replace(paper, method="f"), told, {"labels": labels, "features": features}),
        "gf": (replace(paper, method="gf"), told, {"labels": labels, "features": features}),
    }
    images = np.full(victim.images.shape, np.nan, np.float32)
    shape = images.shape[1:]
    if mode == "layer by layer":
        images[:] = invert(lenet_chain(), victim.parameters, jax.device_get(victim.gradients), shape).images[:, 0]
        return images
    if mode == "second order":
        apply_fn = apply_function(victim.network)
        for row in told:
            noise = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(2), row), shape)
            gradient = jax.tree.map(lambda leaf: leaf[0], victim.chosen(row[None]))
            images[row] = refine_image(apply_fn, victim.parameters, gradient, noise, victim.recovered.label[row]).image
        return images
    settings, rows, options = modes[mode]
    if rows.size == 0:
        return images
    mean, deviation = np.asarray(victim.data.mean), np.asarray(victim.data.std)
    if settings.optimiser != "lbfgs":
        options |= {"low": -mean / deviation, "high": (1 - mean) / deviation}
    if settings.matches_feature:
        options |= {"features_fn": features_function(victim.network)}
    found = match_gradients(
        apply_function(victim.network),
        victim.parameters,
        victim.chosen(rows),
        shape,
        jax.random.key(2),
        settings=settings,
        restarts=restarts,
        **options,
    )
    images[rows] = found.image
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


def main() -> None:
    """Command line."""
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
    arguments = parser.parse_args()
    run = Run("images_by_label_mode", arguments)
    steps, restarts = arguments.steps or run.size(10, 1200, 4800), arguments.restarts or run.size(1, 1, 10)
    data = load_data(arguments)
    modes = arguments.modes + ["second order"] * arguments.second_order
    for name in arguments.networks:
        for family in arguments.families:
            whole = 30 if family == "smoothing" else 45
            count = arguments.images or run.size(1, 1, -(-whole // arguments.seeds))
            victims = [make_victim(run, data, name, family, count, seed) for seed in run.seeds]
            for mode in modes:
                scores = Scores()
                for victim in run.track(victims, f"{name}, {family}, {mode}"):
                    answer = timed(lambda victim=victim, mode=mode: attack(victim, mode, steps, restarts))
                    scores.add(victim, *answer)
                run.add(
                    network=name,
                    format=family,
                    mode=mode,
                    images=len(scores.psnr),
                    failed=scores.failed,
                    psnr=scores.psnr,
                    ssim=scores.ssim,
                    # The fastest network: the first one compiles.
                    seconds_per_image=min(scores.seconds_per_image),
                )
    title = f"Tables 3 and 4: images from one gradient each, LeNet, {steps} steps of Adam, restarts: {restarts}"
    run.finish(title, COLUMNS, draw)


if __name__ == "__main__":
    main()
