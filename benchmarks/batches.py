"""How many examples of a batch are found in one averaged gradient? LeNet on real images, formats not told.

    python benchmarks/batches.py [--dataset cifar10] [--data-dir DIR] [--batches 10] [--quick | --full]
                                 [--cases 100:8 100:16 ...] [--trained-cases 10:2 10:3 ...] [--seeds 5]
                                 [--unknown-scale-cases 100:8 ...] [--formats hard smoothing mixup smoothed_mixup]
                                 [--training-epochs 5] [--add]

Each case is C:B, the number of classes and the batch size, for the untrained network (`--cases`) and for those trained
with smoothing and mixup (`--trained-cases`; C of the data set). As it is, batches of up to 24 with 10 and 100 classes,
three of each; `--full`: ten of each, up to 64, and 1000 classes too (hours). Cases of `--unknown-scale-cases` have a
factor e^(3 N(0, 1)) on each gradient of the untrained network, negative on every fifth, which is not told. Stopped by
Ctrl-C, it writes the rows that are done; `--add` puts them among those of an earlier run, and the table says which
commit each row is from. The plot is the fraction found, imprecise ones too, against the batch size, with both counting
bounds of docs/batches.md drawn in. There is one network of each kind: `--seeds` has no effect. Images are drawn without
repetition, gradients are float32. With 100 classes networks take more epochs to learn anything (40); their accuracy is
in the JSON file.

An example counts as found if its largest label error is below 1e-5, as imprecise if it is larger but
within six of its own deviations, and a reported label that fits no example as spurious. `bound` counts the examples
whose label the gradient fixes to 1e-5 at all (standard deviation of the best unbiased estimate at the truth).
`together` is the time a batch where all of a row are searched at once, after compilation (`recover_batches`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clients import EPOCHS, FORMATS, head_and_features, load_data, networks
from matplotlib.figure import Figure
from runner import Run, add_data_options, new_figure, option_parser
from scipy.optimize import linear_sum_assignment

import softinv_jax
from softinv_jax.batches.batch_recovery import recover_batch
from softinv_jax.batches.component import Divisor
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.batches.joint import fit_jointly
from softinv_jax.batches.many_batches import recover_batches
from softinv_jax.batches.subspace import batch_subspace
from softinv_jax.client import SoftLabelBatch, cross_entropy, sample_batch
from softinv_jax.float64 import in_float64


def draw_batch(
    images: np.ndarray, classes: np.ndarray, number_of_classes: int, size: int, family: str, seed: int
) -> SoftLabelBatch:
    """A batch in which no image comes twice, as when a client shuffles its data: each example has its own share."""
    order = np.random.default_rng([size, seed]).permutation(len(images))
    each = len(images) // size
    parts = []
    for index in range(size):
        own = order[index * each : (index + 1) * each]
        key = jax.random.key(100_000 * size + 1000 * seed + index)
        parts.append(sample_batch(key, family, images[own], classes[own], number_of_classes, 1))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@jax.jit
def batch_gradient(weight: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Gradient (C, d) of the mean cross-entropy over a batch, float32, as a client computes it."""

    def loss(weight: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(cross_entropy)(features @ weight.T, labels))

    return jax.grad(loss)(weight)


def score(found: softinv_jax.BatchRecovery, labels: np.ndarray) -> dict[str, float]:
    """Counts for one batch. The truth is used here only."""
    told = np.flatnonzero(np.isfinite(found.label).all(axis=1))
    error = np.abs(found.label[told][:, None, :] - labels[None]).max(axis=2)
    rows, columns = linear_sum_assignment(error)
    error = error[rows, columns]
    within = 6 * found.label_deviation[told][rows].max(axis=1)
    exact = error < 1e-5
    imprecise = ~exact & (error <= within)
    wrong = ~exact & ~imprecise
    unique = found.verdict[told][rows] == softinv_jax.Verdict.UNIQUE
    return {
        "found": int(exact.sum()),
        "imprecise": int(imprecise.sum()),
        "spurious": int(wrong.sum()),
        "spurious_unique": int(np.sum(wrong & unique)),
        "largest_error": float(np.max(error[exact], initial=0.0)),
    }


@in_float64
def identifiable(weight: jax.Array, gradient: jax.Array, features: jax.Array, labels: np.ndarray) -> int:
    """How many labels of a batch one standard deviation of the best unbiased estimate leaves below 1e-5.

    The joint fit's own deviations at the truth, classes told: no search can do better than this bound.
    """
    weight, gradient = jnp.asarray(weight, jnp.float64), jnp.asarray(gradient, jnp.float64)
    size = len(labels)
    subspace, right, _ = batch_subspace(weight, gradient, size, np.dtype(np.float32), has_bias=False)
    if subspace.singular_values.size < size:
        return 0
    targets = np.argsort(-labels, axis=1)[:, :TARGETS].astype(np.int32)
    level = np.median(labels, axis=1)
    shares = np.take_along_axis(labels, targets, 1).astype(np.float64) - level[:, None]
    targets = np.where(shares > 0, targets, -1)
    start = jnp.asarray(features, jnp.float64) @ right
    bound = fit_jointly(subspace, start, jnp.asarray(shares), jnp.asarray(targets), Divisor(size))
    return int(np.sum(np.max(np.asarray(bound.label_deviation), axis=1) < 1e-5))


UNTRAINED = ("10:2", "10:3", "10:4", "100:4", "100:8", "100:16", "100:24")
UNTRAINED_FULL = (*UNTRAINED, "100:32", "100:48", "100:64", "1000:8", "1000:16", "1000:32", "1000:64")
UNKNOWN_SCALE = ("10:2", "10:3", "10:4", "100:8", "100:16")
TRAINED = ("10:1", "10:2", "10:3", "10:4", "10:5")

COLUMNS = {
    "network": lambda row: row["network"],
    "C": lambda row: row["classes"],
    "B": lambda row: row["batch_size"],
    "format": lambda row: row["format"].replace("_", " "),
    "found": lambda row: f"{row['found']} of {row['total']}",
    "bound": lambda row: row["identifiable"],
    "imprecise": lambda row: row["imprecise"],
    "spurious": lambda row: row["spurious"],
    "of these unique": lambda row: row["spurious_unique"],
    "largest error": lambda row: f"{row['largest_error']:.0e}",
    "seconds a batch": lambda row: f"{row['median_seconds']:.2f}",
    "together": lambda row: f"{row['together_seconds']:.3f}" if "together_seconds" in row else "",
    "commit": lambda row: row["commit"],
}
CASE = ("network", "classes", "batch_size", "format")


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--batches", type=int, help="of each case and format")
    parser.add_argument("--cases", nargs="*", metavar="C:B")
    parser.add_argument("--trained-cases", nargs="*", metavar="C:B")
    parser.add_argument("--unknown-scale-cases", nargs="*", metavar="C:B")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--training-epochs", type=int, default=EPOCHS, help="of the trained networks")
    parser.add_argument("--add", action="store_true", help="keep the rows that are there of cases that are not run now")
    arguments = parser.parse_args()
    run = Run("batches", arguments)
    quick, full = arguments.quick, arguments.full
    usual = ("10:2",) if quick else UNTRAINED_FULL if full else UNTRAINED
    arguments.batches = arguments.batches or run.size(1, 3, 10)
    untrained = chosen(arguments.cases, usual)
    unscaled = chosen(arguments.unknown_scale_cases, () if quick else UNKNOWN_SCALE)
    trained = chosen(arguments.trained_cases, () if quick else TRAINED)
    training, test, images = load_data(arguments)
    arguments.classes = sorted({classes for classes, _ in untrained + unscaled})
    arguments.networks = ["untrained"] * bool(untrained + unscaled) + ["smoothing", "mixup"] * bool(trained)
    try:
        fill(run, networks(arguments, training), images, test.classes, untrained, trained, unscaled)
    except KeyboardInterrupt:
        run.notes["stopped"] = "by hand: the rows that were done"
    if arguments.add:
        done = {tuple(row[name] for name in CASE) for row in run.rows}
        earlier = json.loads((arguments.out / "batches.json").read_text(encoding="utf-8"))
        kept = [{"commit": earlier["commit"]} | row for row in earlier["rows"]]
        run.rows += [row for row in kept if tuple(row[name] for name in CASE) not in done]
        run.rows.sort(key=lambda row: (row["network"], row["classes"], row["batch_size"], FORMATS.index(row["format"])))
    run.finish("Examples found in one averaged gradient", COLUMNS, draw)


def fill(
    run: Run,
    networks: Iterable[tuple[str, int, Any, Any]],
    images: np.ndarray,
    classes: np.ndarray,
    untrained: list[tuple[int, ...]],
    trained: list[tuple[int, ...]],
    unscaled: list[tuple[int, ...]],
) -> None:
    """The rows, one after the other."""
    for name, number_of_classes, network, parameters in networks:
        own = [(case, False) for case in (untrained if name == "untrained" else trained)]
        own += [(case, True) for case in unscaled if name == "untrained"]
        weight, features = head_and_features(network, parameters, images)
        accuracy = float(np.mean(np.argmax(features @ weight.T, axis=1) == classes))
        for (_, size), unknown in [each for each in own if each[0][0] == number_of_classes]:
            for family in run.arguments.formats:
                where = (run, name, number_of_classes, network, parameters, images, classes, size, family)
                run.add(**measure(*where, unknown_scale=unknown), accuracy=accuracy)


def chosen(given: list[str] | None, usual: tuple[str, ...]) -> list[tuple[int, ...]]:
    """(C, B) of the cases asked for, or else of the usual ones."""
    return [tuple(map(int, case.split(":"))) for case in (usual if given is None else given)]


def measure(
    run: Run,
    name: str,
    number_of_classes: int,
    network: Any,
    parameters: Any,
    images: np.ndarray,
    classes: np.ndarray,
    size: int,
    family: str,
    *,
    unknown_scale: bool,
) -> dict[str, Any]:
    """One row: some batches of one size and format."""
    counts = dict.fromkeys(("found", "imprecise", "spurious", "spurious_unique", "identifiable"), 0)
    largest, seconds, all_seen = 0.0, [], []
    rng = np.random.default_rng([number_of_classes, size])
    if number_of_classes > classes.max() + 1:  # With more classes than the data set has, images get classes at random.
        classes = rng.integers(0, number_of_classes, len(images)).astype(np.int32)
    for index in run.track(range(run.arguments.batches), f"{name} C={number_of_classes} B={size} {family}"):
        drawn = draw_batch(images, classes, number_of_classes, size, family, index)
        weight, features = head_and_features(network, parameters, drawn.images)
        labels = np.asarray(drawn.labels)
        gradient = batch_gradient(weight, features, drawn.labels)
        seen = gradient
        if unknown_scale:
            size_of_factor = np.exp(3 * np.random.default_rng([number_of_classes, size, index]).standard_normal())
            seen = gradient * np.float32(-size_of_factor if index % 5 == 4 else size_of_factor)
        all_seen.append(np.asarray(seen))
        start = time.perf_counter()
        recovery = recover_batch(softinv_jax.observe(weight, seen), size, unknown_scale=unknown_scale)
        seconds.append(time.perf_counter() - start)
        result = score(recovery, labels)
        result["identifiable"] = identifiable(weight, gradient, features, labels)
        for key_name in counts:
            counts[key_name] += int(result[key_name])
        largest = max(largest, result["largest_error"])
    return {
        "network": name + ", unknown scale" * unknown_scale,
        "classes": number_of_classes,
        "batch_size": size,
        "format": family,
        "total": size * run.arguments.batches,
        **counts,
        "largest_error": largest,
        "median_seconds": float(np.median(seconds)),
        "together_seconds": time_together(softinv_jax.observe(weight, np.stack(all_seen)), size, unknown_scale),
        "commit": run.commit,
    }


def time_together(observation: softinv_jax.Observation, size: int, unknown_scale: bool) -> float:
    """Seconds a batch, of all of them at once; the second time, when everything is compiled."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        recover_batches(observation, size, unknown_scale=unknown_scale)
        seconds = time.perf_counter() - start
    return seconds / len(observation.weight_gradient)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Found fraction against batch size, with the two counting bounds (t = 1 weight)."""
    keys = sorted({(row["network"], row["classes"]) for row in rows})
    columns = min(len(keys), 3)
    lines = -(-len(keys) // columns)
    figure = new_figure(4.6 * columns, 3.2 * lines + 0.8)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, classes) in zip(panels, keys, strict=False):
        for family in FORMATS:
            own = [row for row in rows if (row["network"], row["classes"], row["format"]) == (name, classes, family)]
            own.sort(key=lambda row: row["batch_size"])
            found = [(row["found"] + row["imprecise"]) / row["total"] for row in own]
            axes.plot([row["batch_size"] for row in own], found, "o-", label=family.replace("_", " "))
        for bound, style, text in (((classes - 2) / 2, "--", "one example alone"), (classes - 2, ":", "all together")):
            axes.axvline(bound, color="grey", linestyle=style, label=f"as many equations as unknowns, {text}")
        axes.set(title=f"{name}, C = {classes}", xlabel="batch size", ylabel="found", ylim=(-0.03, 1.03))
        if classes >= 1000:
            axes.set_xscale("log", base=2)
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    main()
