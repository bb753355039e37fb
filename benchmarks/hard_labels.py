"""Table 1: hard labels, ours beside iDLG, on heads with and without a bias.

    python benchmarks/hard_labels.py [--dataset cifar10] [--data-dir DIR] [--seeds 5] [--samples 1000] [--quick]

iDLG (Zhao, Mopuri and Bilen, 2020) takes the class whose row of the gradient has the sign of its own: `idlg`, as ours
does it, by the row whose sum has the odd sign; `idlg, original`, the rule as published, by the sign of the inner
product of each row with all others, which needs no non-negative features. `exact` is not told that the label is hard:
right means the verdict `unique` and a largest label error below 1e-4. Features are those of an untrained LeNet on real
images (sigmoid, all positive), and the same less their mean ("centred": of both signs, as after tanh or a
normalisation). Beyond the class, `exact` gives the feature: its largest relative error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clients import head_and_features, load_data
from runner import SHARE_COLUMNS, Run, add_data_options, new_figure, option_parser, shares, timed

import softinv_jax
from softinv_jax.client import LeNet, initialise, per_sample_last_layer_gradients, sample_batch
from softinv_jax.measures.label_error import feature_error, label_error

HEADS = ("without bias", "with bias")
FEATURES = ("sigmoid", "centred")
PIECE = 100


def original_idlg(gradients: np.ndarray) -> np.ndarray:
    """(N,) class, or -1: the row of (N, C, d) whose inner product with every other row is not positive.

    Source: Zhao, Mopuri and Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020, equation 6 and the text there.
    """
    products = np.einsum("ncd,nkd->nck", gradients, gradients)
    others = ~np.eye(gradients.shape[1], dtype=bool)
    # A row of zeros, of a class whose softmax entry underflowed, agrees with none either.
    odd = np.all((products <= 0) | ~others[None], axis=2) & np.any(products < 0, axis=2)
    return np.where(odd.sum(axis=1) == 1, np.argmax(odd, axis=1), -1)


def attack(
    weight: np.ndarray, features: jax.Array, labels: jax.Array, bias: np.ndarray | None
) -> dict[str, dict[str, np.ndarray]]:
    """Which labels each method gets right, from the same gradients; the truth is used for the comparison only."""
    gradient = per_sample_last_layer_gradients(weight, features, labels, bias)
    gradients = np.asarray(gradient.weight)
    observation = softinv_jax.observe(weight, gradients, bias, None if bias is None else np.asarray(gradient.bias))
    classes = np.argmax(np.asarray(labels), axis=1)

    exact, exact_seconds = timed(lambda: softinv_jax.recover_many(observation))
    unique = exact.verdict == softinv_jax.Verdict.UNIQUE
    ours, idlg_seconds = timed(lambda: softinv_jax.recover_many(observation, method="idlg"))
    original, original_seconds = timed(lambda: original_idlg(gradients))
    right = label_error(exact.label, np.asarray(labels)).largest < 1e-4
    return {
        "exact": {
            "right": unique & right,
            "wrong_unique": unique & ~right,
            "feature_error": feature_error(exact.feature, np.asarray(features)),
            "seconds": np.full(1, exact_seconds),
        },
        "idlg": {"right": np.argmax(ours.label, axis=1) == classes, "seconds": np.full(1, idlg_seconds)},
        "idlg, original": {"right": original == classes, "seconds": np.full(1, original_seconds)},
    }


def draw(rows: list[dict[str, Any]]) -> Any:
    """Share of right labels, with the deviation over networks."""
    figure = new_figure(7, 3.5)
    axes = figure.subplots()
    settings = list(dict.fromkeys((row["head"], row["features"]) for row in rows))
    for shift, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method]
        places = [settings.index((row["head"], row["features"])) + 0.25 * (shift - 1) for row in own]
        deviation = [np.std(row["right_percent"], ddof=1) if row["networks"] > 1 else 0 for row in own]
        axes.bar(places, [np.mean(row["right_percent"]) for row in own], 0.23, yerr=deviation, label=method)
    axes.set_xticks(range(len(settings)), [f"{head}\n{features} features" for head, features in settings])
    axes.set(ylabel="hard labels right, %")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "head": lambda row: row["head"],
    "features": lambda row: row["features"],
    "method": lambda row: row["method"],
    **SHARE_COLUMNS,
    "wrong unique": lambda row: row.get("wrong_unique", ""),
    "largest feature error": lambda row: f"{row['feature_error']:.1e}" if "feature_error" in row else "",
    "samples / s": lambda row: f"{row['samples_per_second']:,.0f}",
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--samples", type=int, default=1000, help="of each network, in hundreds")
    arguments = parser.parse_args()
    run = Run("hard_labels", arguments)
    pieces = max(1, (PIECE if arguments.quick else arguments.samples) // PIECE)
    _, test, images = load_data(arguments)
    network = LeNet(test.number_of_classes)
    for head in HEADS:
        for kind in FEATURES:
            found: dict[str, list[dict[str, np.ndarray]]] = {}
            for seed in run.track(run.seeds, f"{head}, {kind} features"):
                parameters = initialise(network, jax.random.key(seed), images.shape[1:])
                bias = None
                if head == "with bias":
                    bias = np.random.default_rng(seed).uniform(-0.5, 0.5, test.number_of_classes).astype(np.float32)
                parts: dict[str, list[dict[str, np.ndarray]]] = {}
                for piece in range(pieces):
                    key = jax.random.fold_in(jax.random.key(seed), piece)
                    batch = sample_batch(key, "hard", jnp.asarray(images), test.classes, test.number_of_classes, PIECE)
                    weight, features = head_and_features(network, parameters, batch.images)
                    if kind == "centred":
                        features = features - jnp.mean(features)
                    for method, result in attack(np.asarray(weight), features, batch.labels, bias).items():
                        parts.setdefault(method, []).append(result)
                for method, own in parts.items():
                    joined = {name: np.concatenate([part[name] for part in own]) for name in own[0]}
                    found.setdefault(method, []).append(joined)
            for method, results in found.items():
                add_row(run, head, kind, method, results)
    run.finish("Table 1: hard labels from one float32 gradient each, LeNet untrained", COLUMNS, draw)


def add_row(run: Run, head: str, kind: str, method: str, results: list[dict[str, np.ndarray]]) -> None:
    """One method on all networks."""
    row = {
        "head": head,
        "features": kind,
        "method": method,
        **shares([result["right"] for result in results]),
        "samples_per_second": PIECE / float(np.median(np.concatenate([result["seconds"] for result in results]))),
    }
    if method == "exact":
        row["wrong_unique"] = sum(int(result["wrong_unique"].sum()) for result in results)
        row["feature_error"] = float(np.nanmax(np.concatenate([result["feature_error"] for result in results])))
    run.add(**row)


if __name__ == "__main__":
    main()
