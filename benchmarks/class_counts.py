"""How many examples of each class: ours beside iLRG, on the same gradients of batches of any size.

    python benchmarks/class_counts.py [--dataset cifar100] [--data-dir DIR] [--seeds 5] [--batches 4] [--quick]

One float32 gradient of the mean cross-entropy over B real images with hard labels drawn at random, from a LeNet's last
layer. Ours is not told that labels are hard; it answers for each class with a count, or says that it cannot be known.
Untrained networks: PyTorch's initialisation (features nearly alike) and U(-0.5, 0.5). Trained: from PyTorch's, briefly,
on images of their own. The rows of 1,000 classes have no images: features drawn as max(0, m + s N(0, 1)), m the same
for all, are a stand-in for a large network's.

"classes right" is iLRG's LnAcc, the share of classes whose count is exact, none told included; "examples right" its
IRec, the sum of min(found, true) over B. For ours both are of the likeliest counts, and "told" is the share of classes
with a count that is told as sure, "wrong" how many of those are not so. "errors / deviation": largest error of the mean
label in the deviations that it states, and how many are over six. iLRG (Ma et al., ICLR 2023) needs a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clients import head_and_features, load_data
from published_counts import count_published
from runner import Run, add_data_options, option_parser, spread, timed

import softinv_jax
from softinv_jax.client import LeNet, cross_entropy, initialise, initialise_fan_in, train

SIZES = (24, 128, 512, 1024)
MANY_CLASSES, MANY_EXAMPLES, MANY_FEATURES = 1000, 4096, 512
SPREADS = (0.1, 0.3)  # Of synthetic features, of their mean.
EPOCHS = 8
SIX = 6.0


class Head(NamedTuple):
    """A last layer, (C, d) and (C,), and what its clients' examples are: features (N, d) and classes (N,)."""

    weight: np.ndarray
    bias: np.ndarray
    features: np.ndarray
    classes: np.ndarray


@partial(jax.jit, static_argnames="has_bias")
def batch_gradient(
    weight: jax.Array, bias: jax.Array, features: jax.Array, classes: jax.Array, has_bias: bool
) -> tuple[jax.Array, jax.Array]:
    """(C, d) and (C,): of the mean cross-entropy, by automatic differentiation."""

    def loss(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        labels = jax.nn.one_hot(classes, len(weight))
        return jnp.mean(jax.vmap(cross_entropy)(features @ layer[0].T + has_bias * layer[1], labels))

    return jax.grad(loss)((weight, bias))


def real_heads(kind: str, seed: int, data: tuple[Any, Any, np.ndarray], epochs: int) -> Head:
    """A LeNet with a bias in its head, and the features of the test images."""
    training, test, images = data
    network = LeNet(test.number_of_classes, head_bias=True)
    start = initialise if kind == "U(-0.5, 0.5)" else initialise_fan_in
    parameters: Any = start(network, jax.random.key(seed), images.shape[1:])
    if kind == "trained":
        parameters = train(
            jax.random.key(seed),
            network,
            parameters,
            training.normalised(),
            training.classes,
            number_of_classes=test.number_of_classes,
            family="smoothing",
            smoothing_range=(0.0, 0.0),
            epochs=epochs,
            learning_rate=5e-3,
        ).parameters
    weight, features = head_and_features(network, parameters, jnp.asarray(images))
    bias = np.asarray(parameters["head"]["bias"])
    return Head(np.asarray(weight), bias, np.asarray(features), np.asarray(test.classes))


def synthetic_head(deviation: float, seed: int, classes: int, examples: int) -> Head:
    """Features that scatter by so much of their mean, at a head drawn as PyTorch draws it."""
    rng = np.random.default_rng(seed)
    bound = 1 / np.sqrt(MANY_FEATURES)
    middle = rng.uniform(0.2, 1.0, MANY_FEATURES)
    features = np.maximum(0, middle * (1 + deviation * rng.normal(size=(examples, MANY_FEATURES))))
    weight, bias = rng.uniform(-bound, bound, (classes, MANY_FEATURES)), rng.uniform(-bound, bound, classes)
    weight, bias, features = (np.asarray(array, np.float32) for array in (weight, bias, features))
    return Head(weight, bias, features, rng.integers(classes, size=examples))


def attack(head: Head, chosen: np.ndarray, has_bias: bool) -> dict[str, dict[str, float]]:
    """What each method says of one batch; the truth is used for the comparison only."""
    size, number = len(chosen), len(head.bias)
    gradient, bias_gradient = (
        np.asarray(part)
        for part in batch_gradient(head.weight, head.bias, head.features[chosen], head.classes[chosen], has_bias)
    )
    true = np.bincount(head.classes[chosen], minlength=number)
    observation = softinv_jax.observe(
        head.weight, gradient, *((head.bias, bias_gradient) if has_bias else (None, None))
    )
    ours, seconds = timed(lambda: softinv_jax.count_classes(observation, size))
    told, offset = ours.count >= 0, np.abs(ours.label - true / size) / ours.deviation
    found = {
        "ours": measured(ours.likeliest, true)
        | {
            "told": 100 * float(np.mean(told)),
            "wrong": int(np.sum(told & (ours.count != true))),
            "outside": int(np.sum((ours.interval[:, 0] > true / size) | (ours.interval[:, 1] < true / size))),
            "largest_offset": float(np.nanmax(offset, initial=0.0)),
            "over_six": int(np.sum(offset > SIX)),
            "examples_deviation": float(np.median(size * ours.deviation)),
            "seconds": seconds,
        }
    }
    if has_bias:
        published, seconds = timed(lambda: count_published(head.weight, gradient, head.bias, bias_gradient, size))
        found["iLRG"] = measured(published, true) | {"seconds": seconds}
    return found


def measured(counts: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Shares of classes and of examples that are right, in percent; -1 is none."""
    shared = np.minimum(np.maximum(counts, 0), true)
    return {"classes_right": 100 * float(np.mean(counts == true)), "examples_right": 100 * shared.sum() / true.sum()}


def add_rows(run: Run, network: str, size: int, has_bias: bool, found: list[dict[str, dict[str, float]]]) -> None:
    """One row a method, over all networks and batches."""
    for method in found[0]:
        results = [one[method] for one in found]
        row: dict[str, Any] = {"network": network, "batch_size": size, "bias": has_bias, "method": method}
        row |= {"batches": len(results)}
        for name in results[0]:
            row[name] = [result[name] for result in results]
        run.add(**row, classes_right_mean=float(np.mean(row["classes_right"])))


def cases(run: Run, batches: int) -> Iterator[tuple[str, int, bool, list[dict[str, dict[str, float]]]]]:
    """Every network, batch size and kind of head with what was found of it."""
    data = load_data(run.arguments)
    epochs = run.size(1, EPOCHS, EPOCHS)
    for kind in ("PyTorch's start", "U(-0.5, 0.5)", "trained"):
        heads = [real_heads(kind, seed, data, epochs) for seed in run.track(run.seeds, kind)]
        for has_bias in (True, False):
            for size in SIZES:
                yield f"LeNet, {kind}", size, has_bias, over_batches(heads, min(size, len(data[1])), batches, has_bias)
    for deviation in SPREADS:
        made = [synthetic_head(deviation, seed, MANY_CLASSES, MANY_EXAMPLES) for seed in run.seeds]
        yield f"synthetic, spread {deviation}", MANY_EXAMPLES, True, over_batches(made, MANY_EXAMPLES, 1, True)


def over_batches(heads: list[Head], size: int, batches: int, has_bias: bool) -> list[dict[str, dict[str, float]]]:
    """Batches drawn anew without replacement, from each head."""
    rng = np.random.default_rng(size)
    return [
        attack(head, rng.choice(len(head.classes), size, replace=False), has_bias)
        for head in heads
        for _ in range(batches)
    ]


def maximum(name: str) -> Callable[[dict[str, Any]], object]:
    """The largest of a column over batches, where a method states it."""
    return lambda row: f"{max(row[name]):.1f}" if name in row else ""


def total(name: str) -> Callable[[dict[str, Any]], object]:
    """The sum of a column over batches, where a method states it."""
    return lambda row: sum(row[name]) if name in row else ""


COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "network": lambda row: row["network"],
    "B": lambda row: row["batch_size"],
    "bias": lambda row: "yes" if row["bias"] else "no",
    "method": lambda row: row["method"],
    "batches": lambda row: row["batches"],
    "classes right, %": lambda row: spread(row["classes_right"]),
    "examples right, %": lambda row: spread(row["examples_right"]),
    "told, %": lambda row: spread(row["told"]) if "told" in row else "",
    "wrong": total("wrong"),
    "largest error / deviation": maximum("largest_offset"),
    "over six": total("over_six"),
    "deviation, examples": lambda row: (
        f"{np.median(row['examples_deviation']):.2g}" if "examples_deviation" in row else ""
    ),
    "ms": lambda row: f"{1000 * np.median(row['seconds']):.0f}",
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser, "cifar100")
    parser.add_argument("--batches", type=int, default=4, help="of each network and size")
    arguments = parser.parse_args()
    run = Run("class_counts", arguments)
    for network, size, has_bias, found in cases(run, 1 if arguments.quick else arguments.batches):
        add_rows(run, network, size, has_bias, found)
    run.finish("Examples of each class from one float32 gradient of a batch, hard labels", COLUMNS)


if __name__ == "__main__":
    main()
