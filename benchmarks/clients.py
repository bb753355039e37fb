"""The clients under attack: their data, networks and last-layer gradients, alike in all benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.atomic_file import write_atomically
from softinv_jax.client import (
    ImageDataset,
    LeNet,
    SoftLabelBatch,
    initialise,
    initialise_fan_in,
    load_photographs,
    load_tfds,
    per_sample_last_layer_gradients,
    train,
)

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")
TRAINING_EXAMPLES = 20_000
TEST_EXAMPLES = 2_000
EPOCHS = 5


def load_data(
    arguments: argparse.Namespace, image_size: int | None = None
) -> tuple[ImageDataset, ImageDataset, np.ndarray]:
    """Training and test data as `--dataset` and `--data-dir` say; the test images, normalised as the training's.

    A data set that was prepared without its training split gives halves of its test split. `--images-file` takes the
    test images from there, and from the training data no more than their statistics: those images stand for both.
    """
    if getattr(arguments, "images_file", None):
        held = load_images(arguments.images_file)
        return held, held, np.asarray(held.normalised())
    if arguments.dataset == "photographs":
        size = {} if image_size is None else {"image_size": image_size}
        training, test = load_photographs(split="train", **size), load_photographs(split="test", **size)
        return training, test, test.with_statistics_of(training).normalised()
    load = partial(load_tfds, arguments.dataset, data_dir=arguments.data_dir, image_size=image_size)
    limit = TRAINING_EXAMPLES if image_size is None else TEST_EXAMPLES
    if getattr(arguments, "full", False):
        limit = None
    try:
        training, test = load("train", limit=limit), load("test", limit=TEST_EXAMPLES)
    except ValueError as error:
        if "no split='train'" not in str(error):
            raise
        training, test = load("test[50%:]", limit=limit), load("test[:50%]", limit=TEST_EXAMPLES)
    return training, test, test.with_statistics_of(training).normalised()


def save_images(path: Path, training: ImageDataset, test: ImageDataset) -> None:
    """Write test images and the training images' statistics to an .npz file for `load_images`."""
    arrays = {
        "images": test.images,
        "classes": test.classes,
        "class_names": np.array(test.class_names),
        "name": np.array(test.name),
        "mean": np.array(training.mean),
        "std": np.array(training.std),
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load_images(path: Path) -> ImageDataset:
    """What `save_images` wrote."""
    with np.load(path, allow_pickle=False) as held:
        mean, std = (tuple(float(value) for value in held[name]) for name in ("mean", "std"))
        names = tuple(str(name) for name in held["class_names"])
        return ImageDataset(held["images"], held["classes"], names, str(held["name"]), mean, std)


def networks(arguments: argparse.Namespace, training: Any) -> Iterator[tuple[str, int, LeNet, Any]]:
    """Name, number of classes, network and parameters of each LeNet that `--classes` and `--networks` ask for."""
    shape = training.images.shape[1:]
    for number_of_classes in arguments.classes:
        if "untrained" in arguments.networks:
            network = LeNet(number_of_classes)
            yield "untrained", number_of_classes, network, initialise(network, jax.random.key(0), shape)
    for family in ("smoothing", "mixup"):
        if family in arguments.networks:
            network = LeNet(training.number_of_classes)
            start = initialise_fan_in(network, jax.random.key(1), shape)
            result = train(
                jax.random.key(2),
                network,
                start,
                training.normalised(),
                training.classes,
                number_of_classes=training.number_of_classes,
                family=family,
                epochs=getattr(arguments, "training_epochs", EPOCHS),
            )
            yield f"trained with {family}", training.number_of_classes, network, result.parameters


@partial(jax.jit, static_argnames="network")
def _features(network: Any, variables: Any, images: jax.Array) -> jax.Array:
    return network.apply(variables, images, method="features")


def head_and_features(
    network: Any, parameters: Any, images: jax.Array, batch_statistics: Any = None, pieces: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Weight (C, d) of the last layer, and what goes into it, (N, d), computed in so many equal pieces."""
    variables = {"params": parameters, "batch_stats": batch_statistics or {}}
    parts = [_features(network, variables, part) for part in jnp.split(images, pieces)]
    return jnp.asarray(parameters["head"]["kernel"]).T, jnp.concatenate(parts)


def last_layer(network: LeNet, parameters: Any, batch: SoftLabelBatch) -> tuple[np.ndarray, jax.Array]:
    """Weight (C, d) and the clients' last-layer gradients (N, C, d)."""
    weight, features = head_and_features(network, parameters, batch.images)
    return np.asarray(weight), per_sample_last_layer_gradients(weight, features, batch.labels).weight
