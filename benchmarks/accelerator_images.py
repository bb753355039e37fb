"""Sections of `accelerator.py` on images: layer by layer, by matching, and the published attacks beside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from accelerator_labels import Case
from accelerator_session import Session, best_of

from softinv_jax.client import (
    ImageDataset,
    LeNet,
    apply_function,
    initialise,
    load_photographs,
    per_sample_model_gradients,
    sample_batch,
)
from softinv_jax.images.inversion import invert
from softinv_jax.images.layer_chain import lenet_chain
from softinv_jax.images.matching import match_gradients
from softinv_jax.images.objective import MatchingSettings
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.measures.image_quality import peak_signal_to_noise_ratio

CLASSES, SIDE = 10, 32
WAVES = 5  # Of a smooth random field, along each axis.


def smooth_fields(examples: int, seed: int = 0) -> ImageDataset:
    """8-bit images (N, 32, 32, 3) of a few random waves each: a stand-in where no images are at hand."""
    rng = np.random.default_rng(seed)
    place = np.arange(SIDE) / SIDE
    waves = np.cos(np.pi * np.arange(WAVES)[:, None] * (place[None] + rng.uniform(size=(examples, 3, 2, 1, 1))))
    size = rng.normal(size=(examples, 3, WAVES, WAVES)) / (1 + np.arange(WAVES)[:, None] + np.arange(WAVES))
    field = np.einsum("ncij,ncih,ncjw->nhwc", size, waves[:, :, 0], waves[:, :, 1])
    low, high = field.min(axis=(1, 2, 3), keepdims=True), field.max(axis=(1, 2, 3), keepdims=True)
    images = np.rint(255 * (field - low) / (high - low)).astype(np.uint8)
    classes = np.arange(examples, dtype=np.int32) % CLASSES
    return ImageDataset.from_images(images, classes, tuple(map(str, range(CLASSES))), "smooth random fields")


class Victim:
    """An untrained LeNet and the gradients of images with smoothed labels, made when first asked for."""

    def __init__(self, examples: int) -> None:
        self.examples = examples
        self.network = LeNet(CLASSES)
        self.apply = apply_function(self.network)
        self.shape = (SIDE, SIDE, 3)

    @cached_property
    def data(self) -> ImageDataset:
        try:
            return load_photographs(per_class=max(20, self.examples // CLASSES + 1))
        except (ImportError, OSError):  # scikit-image, or its photographs, are not there.
            return smooth_fields(max(200, self.examples))

    @cached_property
    def parameters(self) -> Any:
        return initialise(self.network, jax.random.key(0), self.shape)

    @cached_property
    def batch(self) -> Any:
        data = self.data
        return sample_batch(jax.random.key(1), "smoothing", data.normalised(), data.classes, CLASSES, self.examples)

    @cached_property
    def gradients(self) -> Any:
        images, labels = self.batch.images, self.batch.labels
        return jax.block_until_ready(per_sample_model_gradients(self.apply, self.parameters, images, labels))


def exact_row(victim: Victim) -> dict[str, Any]:
    """All images in one call of `invert`."""
    parameters, gradients = victim.parameters, victim.gradients
    timing = best_of(lambda: invert(lenet_chain(), parameters, gradients, victim.shape), runs=3)
    original, recovered = (
        np.asarray(victim.data.denormalise(images)) for images in (victim.batch.images, timing.result.images[:, 0])
    )
    found = np.all(np.isfinite(recovered), axis=(1, 2, 3))
    quality = np.zeros(victim.examples)  # An image that is not found counts as 0 dB.
    quality[found] = peak_signal_to_noise_ratio(recovered[found], original[found])
    exact = int(np.sum(timing.result.verdict[:, 0] == ImageVerdict.EXACT))
    row = timing.row(victim.examples, "images") | {"milliseconds": 1e3 * timing.best / victim.examples, "per": "image"}
    quality_row = {"median_psnr": float(np.median(quality)), "worst_psnr": float(quality.min()), "exact": exact}
    note = f"{victim.data.name}: PSNR {np.median(quality):.0f} dB, worst {quality.min():.0f}; {exact} exact"
    return row | quality_row | {"note": note}


def measure_exact(session: Session, examples: int) -> None:
    """Images layer by layer."""
    case = f"LeNet, {examples} images"
    session.measure("exact images", case, "invert", lambda: exact_row(Victim(examples)))


def matching_row(images: int, restarts: int, steps: int) -> dict[str, Any]:
    """Milliseconds of one Adam step of all, start and end of the optimisation shared out."""
    victim, settings = Victim(images), MatchingSettings(steps=steps)
    gradients, labels = victim.gradients, victim.batch.labels

    def run() -> Any:
        return match_gradients(
            victim.apply,
            victim.parameters,
            gradients,
            victim.shape,
            jax.random.key(0),
            labels=labels,
            settings=settings,
            restarts=restarts,
        )

    timing = best_of(run, runs=3)
    row = timing.row(images * restarts * steps, "image steps")
    return row | {"milliseconds": 1e3 * timing.best / steps, "per": "step"}


def measure_matching(session: Session, images: int, restarts: int, steps: int) -> None:
    """Gradient matching, all at once."""
    case = f"LeNet, {images} x {restarts} restarts"
    session.measure("matching", case, "match_gradients, Adam", lambda: matching_row(images, restarts, steps))


def on_torch_device(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a peer on torch's CUDA device where there is one, if it takes a device."""
    import torch  # noqa: PLC0415 - optional

    if "device" in inspect.signature(function).parameters:
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return function(*arguments, **options)


def published_label_row(examples: int) -> dict[str, Any]:
    """The published label recovery, one gradient after the other, without its particle swarms (a minute each)."""
    from published_procedure import MIXUP_SETTINGS, recover_published  # noqa: PLC0415 - needs the extra peers

    weight, labels, gradients = (np.asarray(array) for array in Case(10, 768, examples).clients)
    options = {"excluded": 2, "settings": MIXUP_SETTINGS, "swarm": False}

    def run() -> list[Any]:
        return [on_torch_device(recover_published, weight, gradient, **options) for gradient in gradients]

    timing = best_of(run, runs=1)
    errors = [np.abs(found.label - label).max() for found, label in zip(timing.result, labels, strict=True)]
    right = sum(bool(error < 1e-3) for error in errors)
    return timing.row(examples, "labels") | {"note": f"{right} of {examples} right, format told"}


def published_image_row(attack: str, steps: int) -> dict[str, Any]:
    """Milliseconds a step of a published image attack, one image."""
    import published_images as peers  # noqa: PLC0415 - needs the extra peers
    import torch  # noqa: PLC0415

    victim, shape = Victim(1), (1, 3, SIDE, SIDE)
    first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), victim.gradients)
    parameters = on_torch_device(peers.torch_arrays, jax.tree.map(np.asarray, victim.parameters))
    arrays = on_torch_device(peers.torch_arrays, first)
    observed, label = [arrays[name] for name in sorted(arrays)], np.array(victim.batch.labels[0])
    box = (-2 * np.ones(3), 2 * np.ones(3))
    torch.manual_seed(0)

    def run() -> np.ndarray:
        if attack == "deep_leakage":
            return on_torch_device(peers.deep_leakage, parameters, observed, shape, CLASSES, steps=steps)
        return on_torch_device(
            peers.inverting_gradients, parameters, observed, shape, label, *box, steps=steps, variation=1e-2
        )

    timing = best_of(run, runs=2)
    return timing.row(steps, "steps") | {"milliseconds": 1e3 * timing.best / steps, "per": "step"}


def measure_peers(session: Session, labels: int, steps: int) -> None:
    """The published attacks, in PyTorch."""
    what = "PyTorch, one at a time"
    session.measure("peers", f"label recovery, {labels} gradients", what, lambda: published_label_row(labels))
    for attack, title in (("inverting_gradients", "Inverting Gradients, Adam"), ("deep_leakage", "DLG, L-BFGS")):
        count = steps if attack == "inverting_gradients" else max(steps // 10, 1)
        session.measure("peers", title, what, lambda a=attack, c=count: published_image_row(a, c))
