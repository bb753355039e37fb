"""The demo's images: one client of each label format, whose image comes back from its gradient."""

from typing import Any

import jax
import numpy as np

from softinv_jax.client.datasets import ImageDataset
from softinv_jax.client.gradients import per_sample_model_gradients
from softinv_jax.client.networks import LeNet, apply_function
from softinv_jax.command_line.experiment import Examples
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import lenet_chain
from softinv_jax.images.verdicts import image_verdict_names
from softinv_jax.labels.verdicts import Recovery
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio
from softinv_jax.report.image_figures import ImageExample

__all__ = ["images_sentence", "recover_images"]


def recover_images(
    parameters: Any, examples: Examples, recovery: Recovery, private: ImageDataset
) -> tuple[list[ImageExample], list[dict[str, Any]]]:
    """Invert the gradient of the first example of each label format; none is chosen by how well it goes.

    Args:
      parameters: of a LeNet. recovery: of the heads of all examples' gradients on it.
      private: the data set the examples' images are normalised with.

    Returns:
      What to draw, and for each: label_format, verdict, psnr in decibels (None where there is no image), residual,
      expected_error.
    """
    formats = list(dict.fromkeys(examples.label_format.tolist()))
    chosen = np.array([np.flatnonzero(examples.label_format == name)[0] for name in formats])
    images, labels = examples.images[chosen], examples.labels[chosen]
    network = LeNet(private.number_of_classes)
    gradients = per_sample_model_gradients(apply_function(network), parameters, images, labels)
    heads = jax.tree.map(lambda leaf: leaf[chosen], recovery)
    result = invert(
        lenet_chain(), jax.device_get(parameters), jax.device_get(gradients), private.images.shape[1:], heads=heads
    )
    original, recovered = (np.asarray(private.denormalise(array)) for array in (images, result.images[:, 0]))
    shown, rows = [], []
    for index, name in enumerate(formats):
        verdict = str(image_verdict_names(result.verdict[index, 0]))
        quality = None
        if np.all(np.isfinite(recovered[index])):
            quality = float(peak_signal_to_noise_ratio(recovered[index], original[index]))
        note = "" if quality is None else f"PSNR {quality:.0f} dB"
        shown.append(ImageExample(name.replace("_", " "), original[index], recovered[index], verdict, note))
        numbers = {"residual": result.residual[index], "expected_error": result.expected_error[index, 0]}
        finite = {key: float(value) if np.isfinite(value) else None for key, value in numbers.items()}
        rows.append({"label_format": name, "verdict": verdict, "psnr": quality, **finite})
    return shown, rows


def images_sentence(rows: list[dict[str, Any]]) -> str:
    """What the whole gradient gives away, in a sentence."""
    exact = [row["psnr"] for row in rows if row["verdict"] == "exact"]
    quality = f" ({min(exact):.0f} dB or better)" if exact else ""
    return (
        f"From the gradient of the whole network, {len(exact)} of {len(rows)} images come back exactly{quality};"
        " where the label is dense, the last-layer feature is not known, and neither is the image."
    )
