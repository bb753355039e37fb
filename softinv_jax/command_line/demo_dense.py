"""The demo's larger batch: 32 images behind one gradient of a network with dense layers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from softinv_jax.client.datasets import ImageDataset
from softinv_jax.client.gradients import cross_entropy
from softinv_jax.client.soft_labels import sample_batch
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import fcn_chain
from softinv_jax.images.verdicts import image_verdict_names
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio
from softinv_jax.report.image_figures import ImageExample

__all__ = ["DenseBatch", "attack_dense_batch", "dense_sentence"]

BATCH, WIDTH, SHOWN = 32, 400, 8
FORMATS = ("hard", "mixup")


@dataclass(frozen=True)
class DenseBatch:
    """What came of it: pictures of the first few images, and numbers for results.json."""

    pictures: list[ImageExample]
    results: dict[str, Any]


def attack_dense_batch(key: jax.Array, private: ImageDataset) -> DenseBatch:
    """Draw a batch of half hard and half mixup labels, compute its gradient, and invert it; formats are not told."""
    keys = jax.random.split(key, 1 + len(FORMATS))
    pool = private.normalised()
    drawn = [
        sample_batch(one, family, pool, private.classes, private.number_of_classes, BATCH // len(FORMATS))
        for one, family in zip(keys[1:], FORMATS, strict=True)
    ]
    images, labels = (
        jnp.concatenate(parts) for parts in zip(*((one.images, one.labels) for one in drawn), strict=True)
    )
    inputs = images.reshape(BATCH, -1)
    parameters = _parameters(keys[0], (inputs.shape[1], WIDTH, private.number_of_classes))

    def loss(parameters: Any) -> jax.Array:
        hidden = jax.nn.relu(_dense(parameters["dense1"], inputs))
        logits = _dense(parameters["head"], hidden)
        return jnp.mean(jax.vmap(cross_entropy)(logits, labels))

    gradients = jax.tree.map(lambda leaf: np.asarray(leaf)[None], jax.jit(jax.grad(loss))(parameters))
    found = invert(
        fcn_chain(1, "relu"), jax.device_get(parameters), gradients, private.images.shape[1:], batch_size=BATCH
    )
    recovered = found.images[0].reshape(BATCH, -1)
    distance = cdist(np.asarray(inputs), np.where(np.isfinite(recovered), recovered, 0))
    order = linear_sum_assignment(distance)[1]
    return _outcome(private, np.asarray(images), np.asarray(labels), found, order)


def _dense(layer: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    return inputs @ layer["kernel"] + layer["bias"][None]


def _parameters(key: jax.Array, widths: tuple[int, ...]) -> dict[str, dict[str, jax.Array]]:
    """PyTorch's own initial weights: uniform within 1/sqrt(inputs)."""
    parameters = {}
    names = [*(f"dense{place}" for place in range(1, len(widths) - 1)), "head"]
    for place, name in enumerate(names):
        inputs, outputs = widths[place : place + 2]
        drawn = jax.random.uniform(jax.random.fold_in(key, place), (inputs + 1, outputs), minval=-1, maxval=1)
        parameters[name] = {"kernel": drawn[:-1] / np.sqrt(inputs), "bias": drawn[-1] / np.sqrt(inputs)}
    return parameters


def _outcome(
    private: ImageDataset, images: np.ndarray, labels: np.ndarray, found: Any, order: np.ndarray
) -> DenseBatch:
    verdicts = [str(name) for name in image_verdict_names(found.verdict[0][order])]
    original, recovered = (np.asarray(private.denormalise(array)) for array in (images, found.images[0][order]))
    quality = [
        float(peak_signal_to_noise_ratio(got, true)) if np.isfinite(got).all() else None
        for got, true in zip(recovered, original, strict=True)
    ]
    label_errors = np.abs(found.labels[0][order] - labels).max(axis=1)
    pictures = [
        ImageExample(f"Image {place + 1}", original[place], recovered[place], verdicts[place], _note(quality[place]))
        for place in range(SHOWN)
    ]
    results = {
        "network": f"dense layers {WIDTH} and {private.number_of_classes}, ReLU",
        "label_formats": list(FORMATS),
        "verdicts": verdicts,
        "psnr": quality,
        "label_errors": [float(error) if np.isfinite(error) else None for error in label_errors],
    }
    return DenseBatch(pictures, results)


def _note(quality: float | None) -> str:
    return "" if quality is None else f"PSNR {quality:.0f} dB"


def dense_sentence(results: dict[str, Any]) -> str:
    """What one gradient of a larger batch gives away."""
    exact = [
        psnr for psnr, verdict in zip(results["psnr"], results["verdicts"], strict=True) if verdict == "exact" and psnr
    ]
    errors = [error for error in results["label_errors"] if error is not None]
    quality = f" ({min(exact):.0f} dB or better)" if exact else ""
    accuracy = f" (largest error {max(errors):.0e})" if errors else ""
    return (
        f"A larger batch: one gradient of {len(results['verdicts'])} images from {results['network']} gives"
        f" away {len(exact) or 'none'} of them exactly{quality}, and {len(errors) or 'none'} of their labels{accuracy}."
    )
