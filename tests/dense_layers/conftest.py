"""A client with dense layers, and what is claimed of its gradient against the truth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import softmax

from softinv_jax import Verdict
from softinv_jax.dense_layers.layers import DenseLayers, dense_layers
from softinv_jax.dense_layers.recovery import DenseRecovery

SLOPES = {"relu": (0.0, 1.0), "leaky_relu": (0.01, 1.0)}


@dataclass(frozen=True)
class DenseClient:
    """One gradient, and what it was made of: inputs of every layer, and the loss's derivatives by their outputs."""

    layers: DenseLayers
    hidden: list[np.ndarray]
    deltas: list[np.ndarray]
    labels: np.ndarray

    @property
    def inputs(self) -> np.ndarray:
        return self.hidden[0]

    def replaced(
        self, gradients: Sequence[np.ndarray], bias_gradients: Sequence[np.ndarray | None], **others: Sequence
    ) -> DenseLayers:
        """The layers with other gradients, kernels, biases or activations."""
        parts = {"kernels": self.layers.kernels, "biases": self.layers.biases, "activations": self.layers.activations}
        parts |= others
        return DenseLayers(
            tuple(parts["kernels"]),
            tuple(parts["biases"]),
            tuple(gradients),
            tuple(bias_gradients),
            tuple(parts["activations"]),
            self.layers.dtype,
        )


def make_client(
    widths: Sequence[int] = (96, 64, 6),
    batch_size: int = 4,
    seed: int = 0,
    *,
    bias: bool = True,
    activation: str = "relu",
    labels: str | np.ndarray = "hard",
    inputs: np.ndarray | None = None,
    noise: float = 0.0,
    factor: float = 1.0,
    dropout: float = 0.0,
    loss: str = "cross-entropy",
    dtype: type = np.float32,
) -> DenseClient:
    """The gradient of a mean loss, computed in `dtype`; noise: relative to the root mean square of all entries.

    labels: hard, dense, or (B, C). factor: on the gradient. loss: or squared, of the logits.
    """
    generator = np.random.default_rng(seed)
    kernels, biases = [], []
    for before, after in pairwise(widths):
        bound = np.sqrt(3 / before)
        kernels.append(generator.uniform(-bound, bound, (before, after)).astype(dtype))
        biases.append(generator.uniform(-0.1, 0.1, after).astype(dtype) * (1 if bias else 0))
    if inputs is None:
        inputs = generator.normal(0.1, 1, (batch_size, widths[0]))
    inputs = inputs.astype(dtype)
    number, classes = len(inputs), widths[-1]
    if isinstance(labels, str):
        chosen = np.eye(classes)[generator.integers(0, classes, number)]
        labels = chosen if labels == "hard" else generator.dirichlet(np.ones(classes), number)
    labels = labels.astype(dtype)
    low, high = SLOPES[activation]
    hidden, slopes = [inputs], []
    for place, (kernel, offset) in enumerate(zip(kernels, biases, strict=True)):
        values = hidden[-1] @ kernel + offset
        if place < len(kernels) - 1:
            slope = np.where(values > 0, high, low).astype(dtype)
            if dropout:
                slope *= (generator.random(slope.shape) > dropout) / dtype(1 - dropout)
            slopes.append(slope)
            hidden.append(values * slope)
    delta = softmax(values, axis=1) - labels if loss == "cross-entropy" else 2 * (values - labels)
    deltas = [delta.astype(dtype)]
    for kernel, slope in zip(kernels[:0:-1], slopes[::-1], strict=True):
        deltas.insert(0, (deltas[0] @ kernel.T) * slope)
    share = dtype(factor / number)
    gradients = [own.T @ (delta * share) for own, delta in zip(hidden, deltas, strict=True)]
    offsets = [(delta * share).sum(axis=0) for delta in deltas]
    if noise:
        entries = np.concatenate([leaf.ravel() for leaf in gradients + offsets])
        size = noise * float(np.sqrt(np.mean(entries**2)))
        gradients = [leaf + (size * generator.standard_normal(leaf.shape)).astype(dtype) for leaf in gradients]
        offsets = [leaf + (size * generator.standard_normal(leaf.shape)).astype(dtype) for leaf in offsets]
    layers = dense_layers(
        kernels,
        biases if bias else [None] * len(kernels),
        gradients,
        offsets if bias else [None] * len(kernels),
        [activation] * (len(kernels) - 1),
    )
    return DenseClient(layers, hidden, deltas, labels)


def check_dense(
    found: DenseRecovery, inputs: np.ndarray, labels: np.ndarray, deviations: float = 6.0
) -> tuple[int, np.ndarray]:
    """Assert that all that is claimed is true; returns how many inputs are given, and which example each row is.

    inputs: of the layer `found.layer`. A row of inputs must be an example, within so many of its own deviations, and no
    example twice; the label likewise; and no label is given without a claim.
    """
    given = np.isfinite(found.inputs).all(axis=1)
    assert given.sum() <= len(np.unique(inputs, axis=0))
    place = np.full(len(given), -1)
    for row in np.flatnonzero(given):
        distance = np.sqrt(np.mean((found.inputs[row] - inputs) ** 2, axis=1))
        place[row] = np.argmin(distance)
        # What is returned in float32 is rounded once more.
        rounded = np.finfo(found.inputs.dtype).eps * np.sqrt(np.mean(inputs[place[row]] ** 2))
        assert distance.min() < deviations * found.input_deviation[row] + rounded
        assert found.input_deviation[row] < 0.2 * np.sqrt(np.mean(inputs[place[row]] ** 2))
    assert len(set(place[given])) == given.sum()
    claimed = found.verdict >= Verdict.AMBIGUOUS
    assert not np.any(claimed & ~given)
    assert np.isnan(found.label[~claimed]).all()
    for row in np.flatnonzero(claimed & (found.verdict != Verdict.AMBIGUOUS)):
        error = np.abs(found.label[row] - labels[place[row]])
        assert np.all(error < deviations * found.label_deviation[row] + np.finfo(found.label.dtype).eps)
    return int(given.sum()), place


@pytest.fixture(scope="session")
def dense_client() -> Callable[..., DenseClient]:
    """`dense_client(widths, batch_size, seed, ...)`: see `make_client`."""
    return make_client


@pytest.fixture(scope="session")
def assert_dense_honest() -> Callable[..., tuple[int, np.ndarray]]:
    return check_dense
