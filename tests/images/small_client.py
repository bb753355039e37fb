"""A small network, a crop of a real photograph, and the gradient that a client uploads for it."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from skimage import data

SHAPE = (6, 6, 3)
CLASSES, HIDDEN = 5, 24


def features_fn(parameters: Any, image: jax.Array) -> jax.Array:
    """(6, 6, 3) -> (HIDDEN,): 2x2 convolution of stride 2 with 16 channels, sigmoid, dense, sigmoid."""
    patches = image.reshape(3, 2, 3, 2, 3).transpose(0, 2, 1, 3, 4).reshape(9, 12)
    hidden = jax.nn.sigmoid(patches @ parameters["conv"]["kernel"] + parameters["conv"]["bias"][None])
    return jax.nn.sigmoid(hidden.reshape(-1) @ parameters["dense"]["kernel"] + parameters["dense"]["bias"])


def apply_fn(parameters: Any, image: jax.Array) -> jax.Array:
    return features_fn(parameters, image) @ parameters["head"]["kernel"]


@dataclass(frozen=True)
class Client:
    parameters: Any
    images: np.ndarray
    labels: np.ndarray
    gradients: Any
    features: np.ndarray
    low: np.ndarray
    high: np.ndarray


@jax.jit
def gradient_of(parameters: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Gradient of the mean loss of a batch; written without the package."""

    def loss(candidate: Any) -> jax.Array:
        logits = jnp.stack([apply_fn(candidate, image) for image in images])
        return -jnp.sum(labels * jax.nn.log_softmax(logits)) / len(images)

    return jax.grad(loss)(parameters)


@functools.cache
def make_client() -> Client:
    """Three crops of photographs with soft labels; each gradient by itself."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.uniform(-0.5, 0.5, shape).astype(np.float32)

    parameters = {
        "conv": {"kernel": draw(12, 16), "bias": draw(16)},
        "dense": {"kernel": draw(144, HIDDEN), "bias": draw(HIDDEN)},
        "head": {"kernel": draw(HIDDEN, CLASSES)},
    }
    photographs = (data.astronaut()[60:120:10, 200:260:10], data.chelsea()[100:160:10, 100:160:10])
    crops = np.stack([*photographs, data.coffee()[150:210:10, 250:310:10]]) / 255.0
    mean, deviation = crops.mean(axis=(0, 1, 2)), crops.std(axis=(0, 1, 2))
    images = ((crops - mean) / deviation).astype(np.float32)
    labels = np.array([[0.8, 0.05, 0.05, 0.05, 0.05], [0, 0.3, 0, 0.7, 0], [0, 0, 1, 0, 0]], np.float32)
    gradients = [gradient_of(parameters, image[None], label[None]) for image, label in zip(images, labels, strict=True)]
    return Client(
        parameters,
        images,
        labels,
        jax.tree.map(lambda *leaves: np.stack(leaves), *gradients),
        np.stack([features_fn(parameters, image) for image in images]),
        (-mean / deviation).astype(np.float32),
        ((1 - mean) / deviation).astype(np.float32),
    )
