"""The demo's batch: four photographs, each with a label of another format, in one averaged gradient."""

import itertools
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from softinv_jax.batches.batch_recovery import recover_batch
from softinv_jax.client.datasets import ImageDataset
from softinv_jax.client.gradients import cross_entropy
from softinv_jax.client.networks import LeNet, apply_function
from softinv_jax.client.soft_labels import sample_batch
from softinv_jax.labels.verdicts import verdict_names
from softinv_jax.observation.head import observe_head
from softinv_jax.report.figures import LabelExample, labels_figure

__all__ = ["BATCH_FORMATS", "BatchOutcome", "attack_batch", "batch_figure", "batch_results", "batch_sentence"]

BATCH_FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")
# With fewer classes one example's equation no longer determines it (docs/batches.md).
FEWEST_CLASSES = 2 * len(BATCH_FORMATS) + 2


@dataclass(frozen=True)
class BatchOutcome:
    """One attack on one gradient of the mean loss over a batch, in the order of the true examples.

    Attributes:
      network: which. images: (B, H, W, 3) normalised. labels: (B, C), the truth.
      recovered: (B, C), NaN where not found. verdict: (B,) names. seconds: of the attack, with compilation.
    """

    network: str
    images: np.ndarray
    labels: np.ndarray
    recovered: np.ndarray
    verdict: np.ndarray
    seconds: float


def attack_batch(key: jax.Array, private: ImageDataset, name: str, parameters: Any) -> BatchOutcome | None:
    """Draw a batch, compute its gradient, and recover its labels, of which the attack is told nothing.

    Args:
      private: the client's images. name, parameters: the network, a LeNet.

    Returns:
      What came of it; None for a data set with too few classes.
    """
    if private.number_of_classes < FEWEST_CLASSES:
        return None
    pool = private.normalised()
    drawn = [
        sample_batch(jax.random.fold_in(key, place), family, pool, private.classes, private.number_of_classes, 1)
        for place, family in enumerate(BATCH_FORMATS)
    ]
    images, labels = (
        jnp.concatenate(parts) for parts in zip(*((one.images, one.labels) for one in drawn), strict=True)
    )
    apply = apply_function(LeNet(private.number_of_classes))

    def loss(parameters: Any) -> jax.Array:
        return jnp.mean(jax.vmap(cross_entropy)(jax.vmap(partial(apply, parameters))(images), labels))

    gradient = jax.jit(jax.grad(loss))(parameters)
    start = time.perf_counter()
    recovery = recover_batch(observe_head(parameters, gradient), len(BATCH_FORMATS))
    seconds = time.perf_counter() - start
    order = _matching(recovery.label, np.asarray(labels))
    return BatchOutcome(
        network=name,
        images=np.asarray(images),
        labels=np.asarray(labels),
        recovered=recovery.label[order],
        verdict=verdict_names(recovery.verdict[order]),
        seconds=seconds,
    )


def _matching(recovered: np.ndarray, true: np.ndarray) -> list[int]:
    """The order in which the recovered labels, which come in none, are nearest to the true ones."""
    distance = np.nan_to_num(np.max(np.abs(true[:, None] - recovered[None]), axis=2), nan=1.0)
    rows = np.arange(len(true))
    orders = itertools.permutations(range(len(true)))
    return list(min(orders, key=lambda order: distance[rows, list(order)].sum()))


def batch_results(outcome: BatchOutcome) -> dict[str, Any]:
    """For results.json."""
    error = np.max(np.abs(outcome.recovered - outcome.labels), axis=1)
    return {
        "network": outcome.network,
        "label_formats": list(BATCH_FORMATS),
        "verdicts": outcome.verdict.tolist(),
        "true_labels": np.round(outcome.labels.astype(np.float64), 8).tolist(),
        "recovered_labels": [
            np.round(label.astype(np.float64), 8).tolist() if np.isfinite(label).all() else None
            for label in outcome.recovered
        ],
        "label_errors": [float(one) if np.isfinite(one) else None for one in error],
        "seconds": round(outcome.seconds, 2),
    }


def batch_sentence(results: dict[str, Any]) -> str:
    """What one gradient of a batch gives away."""
    errors = [error for error in results["label_errors"] if error is not None]
    accuracy = f" (largest error {max(errors):.0e})" if errors else ""
    names = ", ".join(name.replace("_", " ") for name in results["label_formats"])
    return (
        f"A batch: the gradient of the mean loss over {len(results['label_formats'])} images ({names}) gives away"
        f" {len(errors) or 'none'} of their labels{accuracy}; it is told only how many images there are."
    )


def batch_figure(outcome: BatchOutcome, private: ImageDataset) -> Figure:
    """Images, true labels and recovered ones."""
    shown = [
        LabelExample(
            title=family.replace("_", " ").capitalize(),
            verdict=str(verdict).replace("_", " "),
            image=np.asarray(private.denormalise(image)),
            true=label,
            recovered=recovered,
            note="no label is claimed",
        )
        for family, verdict, image, label, recovered in zip(
            BATCH_FORMATS, outcome.verdict, outcome.images, outcome.labels, outcome.recovered, strict=True
        )
    ]
    caption = f"A batch's labels, and what its one gradient gives away ({outcome.network} LeNet, {private.name})"
    return labels_figure(shown, private.class_names, caption)
