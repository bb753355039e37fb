"""Label error under additive noise, against the Cramer-Rao bound.

    python benchmarks/noise.py [--samples 200] [--levels 1e-6 1e-5 1e-4 1e-3 1e-2] [--quick | --full]

Gaussian noise of the given fraction of each gradient's largest entry; C = 10, d = 768, head U(-0.5, 0.5), sigmoid
features, all formats, none told; gradients in float64, so that the noise is the only error. The bound is that of an
observer who knows which classes are singled out and nothing else, so that an estimator that recognises zero smoothing
can fall below it. Each sample's error is divided by its own bound: the bounds differ a thousandfold, and the root mean
square of the errors over that of the bounds (column "pooled") is that of the one or two samples that say least.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clients import FORMATS
from runner import Run, new_figure, option_parser

import softinv_jax
from softinv_jax.client import per_sample_last_layer_gradients, sample_batch
from softinv_jax.measures.cramer_rao import label_bound
from softinv_jax.measures.label_error import label_error

CLASSES, FEATURES = 10, 768


def noisy_examples(family: str, level: float, examples: int, seed: int) -> tuple[np.ndarray, ...]:
    """Weight (C, d), features (N, d), labels (N, C), noise deviations (N,) and gradients (N, C, d), all float64."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES))
    classes = np.arange(examples * 2, dtype=np.int32) % CLASSES
    images = np.zeros((examples * 2, 1, 1, 1), np.float32)
    drawn = sample_batch(jax.random.key(seed), family, images, classes, CLASSES, examples).labels
    label = np.asarray(drawn, np.float64)
    label /= label.sum(axis=1, keepdims=True)  # Drawn in float32.
    feature = 1 / (1 + np.exp(-rng.standard_normal((examples, FEATURES))))
    with jax.enable_x64(True):
        clean = per_sample_last_layer_gradients(jnp.asarray(weight), jnp.asarray(feature), jnp.asarray(label))
        gradient = np.asarray(clean.weight)
    deviation = level * np.abs(gradient).max(axis=(1, 2))
    return weight, feature, label, deviation, gradient + deviation[:, None, None] * rng.standard_normal(gradient.shape)


def errors_and_bounds(family: str, level: float, examples: int, seed: int) -> dict[str, np.ndarray]:
    """Squared label errors (N,) with the best candidate where the verdict gives none, their bounds, and verdicts."""
    weight, feature, label, deviation, gradient = noisy_examples(family, level, examples, seed)
    result = softinv_jax.recover_many(softinv_jax.observe(weight, gradient))
    found = np.isfinite(result.label).all(axis=1)
    best = np.where(found[:, None], result.label, np.nan_to_num(result.candidates.label[:, 0], nan=1.0))
    bound = np.empty(examples)
    for sample in range(examples):
        targets = np.flatnonzero(np.abs(label[sample] - np.median(label[sample])) > 1e-7)
        covariance = label_bound(weight, feature[sample], label[sample], targets, deviation[sample])
        bound[sample] = np.trace(covariance)
    return {
        "squared": label_error(best, label).squared,
        "bound": bound,
        "found": found,
        "unique": result.verdict == softinv_jax.Verdict.UNIQUE,
    }


def summarise(level: float, family: str, measured: dict[str, np.ndarray]) -> dict[str, float | int | str]:
    """One row of the table."""
    squared, bound = measured["squared"], measured["bound"]
    wrong = measured["unique"] & (squared > 36 * bound)
    return {
        "noise": level,
        "format": family,
        "samples": squared.size,
        "ratio": float(np.sqrt((squared / bound).mean())),
        "median_ratio": float(np.sqrt(np.median(squared / bound))),
        "pooled_ratio": float(np.sqrt(squared.mean() / bound.mean())),
        "not_found": int(np.sum(~measured["found"])),
        "beyond_six_bounds": int(np.sum(squared > 36 * bound)),
        "unique": int(measured["unique"].sum()),
        "wrong_unique": int(wrong.sum()),
    }


def draw(rows: list[dict[str, Any]]) -> Any:
    """The ratio over the noise, by format."""
    figure = new_figure(5, 3.5)
    axes = figure.subplots()
    for family in (*FORMATS, "all"):
        own = [row for row in rows if row["format"] == family]
        axes.loglog([row["noise"] for row in own], [row["ratio"] for row in own], "o-", label=family.replace("_", " "))
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(xlabel="noise over the gradient's largest entry", ylabel="label error / Cramer-Rao bound")
    axes.legend(fontsize=8)
    return figure


COLUMNS = {
    "noise": lambda row: f"{row['noise']:.0e}",
    "format": lambda row: row["format"].replace("_", " "),
    "samples": lambda row: row["samples"],
    "error / bound": lambda row: f"{row['ratio']:.2f}",
    "median": lambda row: f"{row['median_ratio']:.2f}",
    "pooled": lambda row: f"{row['pooled_ratio']:.2f}",
    "not found": lambda row: row["not_found"],
    "> 6 bounds": lambda row: row["beyond_six_bounds"],
    "unique": lambda row: row["unique"],
    "wrong unique": lambda row: row["wrong_unique"],
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    parser.add_argument("--samples", type=int, help="of each format at each level")
    parser.add_argument("--levels", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    arguments = parser.parse_args()
    run = Run("noise", arguments)
    samples = arguments.samples or run.size(16, 200, 1000)
    for level in run.track(arguments.levels, "noise levels"):
        measured = [errors_and_bounds(family, level, samples, seed) for seed, family in enumerate(FORMATS)]
        for family, part in zip(FORMATS, measured, strict=True):
            run.add(**summarise(level, family, part))
        everything = {key: np.concatenate([part[key] for part in measured]) for key in measured[0]}
        run.add(**summarise(level, "all", everything))
    run.finish("Label error over its Cramer-Rao bound, root mean square over samples", COLUMNS, draw)


if __name__ == "__main__":
    main()
