"""Last-layer features: multiples of rows of the gradient, made when somebody asks for them.

With G = u v^T the feature is x = lambda v, and v is a sum of the gradient's own rows: C coefficients say which. So N
features need no N x d numbers before they are wanted. Under noise the label's structure corrects the feature by a
combination of the rows of W, which are at hand as well.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import in_float64
from softinv_jax.observation.head import Observation, append_bias

__all__ = ["FeatureSource", "Held", "feature_of", "features_of"]

CHUNK_BYTES = 32 * 2**20
# v has length 1 but for rounding; gradients that were overwritten since give anything.
LENGTH_TOLERANCE = 1e-2


class Held:
    """An observation that results refer to without copying it; equal only to itself, as jax asks of static data."""

    def __init__(self, observation: Observation) -> None:
        self.observation = observation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FeatureSource:
    """x = length coefficients^T G - pull^T W, for one example or along leading axes.

    Attributes:
      coefficients: (C,) of the rows of G that make v of length 1. length: () NaN where there is no feature.
      pull: (C,) of the rows of W, or None for zeros.
      example: () int32 index among the gradients of the observation, or None before there are several.
      held: static; the observation, or None.
    """

    coefficients: jax.Array
    length: jax.Array
    pull: jax.Array | None
    example: jax.Array | None = None
    held: Held | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features."""
        features = () if self.held is None else self.held.observation.weight.shape[1:]
        return (*self.length.shape, *features)


def feature_of(observation: Observation, source: FeatureSource) -> jax.Array:
    """x, (d,) float64, of one example."""
    weight, gradient = append_bias(observation)
    direction = jnp.sum(source.coefficients[:, None] * gradient.astype(jnp.float64), axis=0)
    feature = source.length * direction
    if source.pull is not None:
        feature = feature - source.pull.astype(jnp.float64) @ weight.astype(jnp.float64)
    return feature if observation.bias is None else feature[:-1]


def features_of(source: FeatureSource) -> Any:
    """(..., d) in the dtype of the source: on the device where the gradients are there, else NumPy.

    Raises:
      ValueError: where NumPy gradients have been changed since they were recovered.
    """
    assert source.held is not None and source.example is not None
    observation = source.held.observation
    if isinstance(observation.weight_gradient, jax.Array) and isinstance(source.length, jax.Array):
        return _on_device(source, observation)
    return _on_host(jax.tree.map(np.asarray, source), observation)


@in_float64
def _on_device(source: FeatureSource, observation: Observation) -> jax.Array:
    example = np.asarray(jax.device_get(source.example))
    gradients = observation.weight_gradient, observation.bias_gradient
    if example.ndim != 1 or not np.array_equal(example, np.arange(len(gradients[0]))):
        gradients = jax.tree.map(lambda array: array[example], gradients)
    return _many(FeatureSource(source.coefficients, source.length, source.pull), observation, gradients)


@jax.jit
def _many(source: FeatureSource, observation: Observation, gradients: tuple) -> jax.Array:
    def one(source: FeatureSource, gradients: tuple) -> jax.Array:
        seen = Observation(observation.weight, gradients[0], observation.bias, gradients[1])
        return feature_of(seen, source).astype(source.length.dtype)

    for _ in range(source.length.ndim):
        one = jax.vmap(one)
    return one(source, gradients)


def _on_host(source: FeatureSource, observation: Observation) -> np.ndarray:
    shape, dtype = source.shape, source.length.dtype
    flat = jax.tree.map(lambda leaf: np.reshape(leaf, (-1, *leaf.shape[source.length.ndim :])), source)
    weight = np.asarray(observation.weight, np.float64)
    features = np.empty((len(flat.length), shape[-1]), dtype)
    step = max(CHUNK_BYTES // (8 * weight.size), 1)
    for start in range(0, len(features), step):
        rows = slice(start, start + step)
        example, coefficients = flat.example[rows], flat.coefficients[rows].astype(np.float64)
        direction = _combined(coefficients, np.asarray(observation.weight_gradient), example)
        square = np.sum(direction**2, axis=1)
        if observation.bias_gradient is not None:
            square += np.sum(coefficients * np.asarray(observation.bias_gradient, np.float64)[example], axis=1) ** 2
        told = np.isfinite(flat.length[rows])
        changed = told & ~(np.abs(np.sqrt(square) - 1) < LENGTH_TOLERANCE)
        if changed.any():
            raise ValueError(
                f"the gradient of example {int(example[np.argmax(changed)])} was overwritten after it was recovered,"
                " and its feature is made from it: ask for .feature before, or give a copy of the gradients"
            )
        features[rows] = flat.length[rows, None] * direction
        if flat.pull is not None:
            features[rows] -= flat.pull[rows].astype(np.float64) @ weight
    return features.reshape(shape)


def _combined(coefficients: np.ndarray, gradients: np.ndarray, example: np.ndarray) -> np.ndarray:
    """(n, d) float64 sums of rows; where one row is all of the sum, it alone is read."""
    if np.all(np.count_nonzero(coefficients, axis=1) <= 1):
        row = np.argmax(coefficients != 0, axis=1)
        return coefficients[np.arange(len(row)), row][:, None] * gradients[example, row].astype(np.float64)
    return np.matmul(coefficients[:, None, :], gradients[example].astype(np.float64))[:, 0]
