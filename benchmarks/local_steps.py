"""What do several local steps cost? Labels from the parameters before and after K steps on one example, LeNet.

    python benchmarks/local_steps.py [--images 20] [--head-bias] [--unknown-rate] [--quick | --full] [--seeds 5]

A client trains an untrained LeNet (C = 10, float32) on one photograph for K steps of plain gradient descent and sends
its parameters back. The observer is told K and the learning rate (or not the rate: --unknown-rate), and takes the
average gradient of the K steps for the gradient at the parameters it sent. Half of the labels are smoothed, half mixed.
Counted for each K and rate: verdicts; labels called unique that are wrong by more than ten of their own deviations; how
often the largest entry of the label is right; the median over examples of the largest error of the label, where one is
given. Failures are never redrawn. There is one network: `--seeds` has no effect.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from runner import Run, option_parser

from softinv_jax import observe_update, recover_update
from softinv_jax.client import LeNet, apply_function, initialise, load_photographs, sample_batch
from softinv_jax.client.gradients import cross_entropy

STEPS = (1, 2, 4, 8)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
FORMATS = ("smoothing", "mixup")
CLASSES = 10


def clients(network: Any, parameters: Any, images: Any, labels: Any, steps: int, rate: float) -> Any:
    """The parameters that each client sends back, with a leading axis."""
    apply_fn = apply_function(network)

    def loss(candidate: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(apply_fn(candidate, image), label)

    def train(image: jax.Array, label: jax.Array) -> Any:
        trained = parameters
        for _ in range(steps):
            gradient = jax.grad(loss)(trained, image, label)
            trained = jax.tree.map(lambda value, change: value - rate * change, trained, gradient)
        return trained

    return jax.device_get(jax.jit(jax.vmap(train))(images, labels))


def measure(parameters: Any, returned: Any, labels: np.ndarray, steps: int, rate: float, known: bool) -> dict[str, Any]:
    """One row. The truth is used here only."""
    found = []
    for index in range(len(labels)):
        after = jax.tree.map(lambda leaf, index=index: leaf[index], returned)
        update = observe_update(parameters, after, learning_rate=rate if known else None, local_steps=steps)
        found.append(recover_update(update))
    verdicts = np.array([str(one.verdict_name) for one in found])
    recovered = np.stack([one.label for one in found])
    errors = np.abs(recovered - labels).max(axis=1)
    deviations = np.array([one.evidence.label_deviation.max() for one in found])
    given = np.isfinite(errors)
    right = np.argmax(np.where(given[:, None], recovered, 0), axis=1) == np.argmax(labels, axis=1)
    return {
        "steps": steps,
        "rate": rate,
        "verdicts": {str(name): int(np.sum(verdicts == name)) for name in np.unique(verdicts)},
        "wrong_unique": int(np.sum((verdicts == "unique") & (errors > 1e-6 + 10 * deviations))),
        "largest_entry_right": int(np.sum(right & given)),
        "examples": len(labels),
        "median_error": float(np.median(errors[given])) if given.any() else None,
    }


COLUMNS = {
    "K": lambda row: row["steps"],
    "rate": lambda row: f"{row['rate']:g}",
    "verdicts": lambda row: ", ".join(f"{count} {name}" for name, count in row["verdicts"].items()),
    "wrong unique": lambda row: row["wrong_unique"],
    "largest entry right": lambda row: f"{row['largest_entry_right']} of {row['examples']}",
    "median error": lambda row: "-" if row["median_error"] is None else f"{row['median_error']:.1e}",
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    parser.add_argument("--images", type=int, help="half of them with smoothed, half with mixed labels")
    parser.add_argument("--head-bias", action="store_true")
    parser.add_argument("--unknown-rate", action="store_true", help="the observer is not told the learning rate")
    arguments = parser.parse_args()
    run = Run("local_steps", arguments)
    count = arguments.images or run.size(2, 20, 100)
    data = load_photographs(split="test", per_class=10)
    network = LeNet(CLASSES, head_bias=arguments.head_bias)
    parameters = jax.device_get(initialise(network, jax.random.key(0), data.images.shape[1:]))
    batches = [
        sample_batch(jax.random.key(3), family, data.normalised(), data.classes, CLASSES, size)
        for family, size in zip(FORMATS, (count - count // 2, count // 2), strict=True)
    ]
    images, labels = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("images", "labels"))
    for steps in STEPS[: run.size(1, len(STEPS), len(STEPS))]:
        for rate in RATES:
            returned = clients(network, parameters, images, labels, steps, rate)
            run.add(**measure(parameters, returned, labels, steps, rate, not arguments.unknown_rate))
    known = "not told" if arguments.unknown_rate else "told"
    run.finish(f"Labels behind K local steps, LeNet on photographs, learning rate {known}", COLUMNS)


if __name__ == "__main__":
    main()
