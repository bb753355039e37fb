"""Label error under additive noise, against the Cramer-Rao bound.

    python benchmarks/noise.py [--samples 1000] [--levels 1e-6 1e-5 1e-4 1e-3 1e-2] [--json FILE]

Gaussian noise of the given fraction of each gradient's largest entry; C = 10, d = 768, head U(-0.5, 0.5), sigmoid
features, all formats in equal shares, none told. The bound is that of an observer who knows which classes are singled
out and nothing else, so that an estimator that recognises zero smoothing can fall below it.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import softinv_jax
from softinv_jax.client import per_sample_last_layer_gradients, sample_batch
from softinv_jax.measures.cramer_rao import label_bound
from softinv_jax.measures.label_error import label_error

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")
CLASSES, FEATURES = 10, 768


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="in all, a quarter of each format")
    parser.add_argument("--levels", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    weight = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES)).astype(np.float32)
    each = arguments.samples // len(FORMATS)
    table = Table(title="root mean square of label error / bound, over all samples")
    for column in ("noise", "format", "error", "bound", "error / bound", "median ratio", "unique", "wrong unique"):
        table.add_column(column, justify="right")
    rows = []
    for level in track(arguments.levels, description="noise levels"):
        errors, bounds = [], []
        for index, family in enumerate(FORMATS):
            classes = np.arange(each * 2, dtype=np.int32) % CLASSES
            images = np.zeros((each * 2, 1, 1, 1), np.float32)
            label = np.asarray(sample_batch(jax.random.key(index), family, images, classes, CLASSES, each).labels)
            feature = 1 / (1 + np.exp(-rng.standard_normal((each, FEATURES)).astype(np.float32)))
            clean = per_sample_last_layer_gradients(jnp.asarray(weight), jnp.asarray(feature), jnp.asarray(label))
            gradient = np.asarray(clean.weight)
            deviation = level * np.abs(gradient).max(axis=(1, 2))
            noisy = gradient + deviation[:, None, None] * rng.standard_normal(gradient.shape)
            result = softinv_jax.recover_many(softinv_jax.observe(weight, noisy.astype(np.float32)))
            squared = label_error(np.nan_to_num(result.candidates.label[:, 0], nan=1.0), label).squared
            found = np.isfinite(result.label).all(axis=1)
            squared = np.where(found, label_error(np.nan_to_num(result.label), label).squared, squared)
            bound = np.empty(each)
            for sample in range(each):
                common = np.median(label[sample])
                targets = np.flatnonzero(np.abs(label[sample] - common) > 1e-7)
                covariance = label_bound(weight, feature[sample], label[sample], targets, deviation[sample])
                bound[sample] = np.trace(covariance)
            unique = result.verdict == softinv_jax.Verdict.UNIQUE
            wrong = unique & (squared > 36 * bound) & (squared > 1e-8)
            rows.append(
                {
                    "noise": level,
                    "format": family,
                    "root_mean_square_error": float(np.sqrt(squared.mean())),
                    "bound": float(np.sqrt(bound.mean())),
                    "ratio": float(np.sqrt(squared.mean() / bound.mean())),
                    "median_ratio": float(np.sqrt(np.median(squared / bound))),
                    "unique": int(unique.sum()),
                    "not_found": int(np.sum(~found)),
                    "wrong_unique": int(wrong.sum()),
                }
            )
            errors.append(squared)
            bounds.append(bound)
        pooled, pooled_bound = np.concatenate(errors).mean(), np.concatenate(bounds).mean()
        rows.append(
            {
                "noise": level,
                "format": "all",
                "root_mean_square_error": float(np.sqrt(pooled)),
                "bound": float(np.sqrt(pooled_bound)),
                "ratio": float(np.sqrt(pooled / pooled_bound)),
            }
        )
    for row in rows:
        table.add_row(
            f"{row['noise']:.0e}",
            row["format"],
            f"{row['root_mean_square_error']:.2e}",
            f"{row['bound']:.2e}",
            f"{row['ratio']:.2f}",
            f"{row['median_ratio']:.2f}" if "median_ratio" in row else "",
            str(row.get("unique", "")),
            str(row.get("wrong_unique", "")),
        )
    Console().print(table)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
