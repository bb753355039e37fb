"""Clients with dense layers for `dense_layers.py`: networks, images, labels and float32 gradients, and the judge."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.spatial.distance import cdist

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.layers import DenseLayers, dense_layers

__all__ = [
    "DenseClient",
    "best_deviations",
    "convolved",
    "draw",
    "draw_labels",
    "fit",
    "gradients",
    "judge",
    "noise_deviation",
    "with_noise",
]

DECIBELS, LABEL_ERROR, SPURIOUS_DECIBELS = 80.0, 1e-5, 40.0
# Of g = p - y, largest entry: below it an example leaves nothing in the gradient.
ZERO_GRADIENT = 1e-6


@dataclass(frozen=True)
class DenseClient:
    """A network z = W^T h + b with an activation after each layer but the last; biases None where it has none."""

    kernels: list[np.ndarray]
    biases: list[np.ndarray | None]
    activation: str


def draw(widths: list[int], deviation: float | None, bias: bool, activation: str, seed: int) -> DenseClient:
    """PyTorch's own initial weights, uniform within 1/sqrt(inputs); or N(0, deviation^2)."""
    generator = np.random.default_rng(seed)
    kernels: list[np.ndarray] = []
    biases: list[np.ndarray | None] = []
    for inputs, outputs in pairwise(widths):
        both = np.empty((inputs + 1, outputs))
        both[:] = (
            generator.uniform(-1, 1, both.shape) / np.sqrt(inputs)
            if deviation is None
            else generator.normal(size=both.shape) * deviation
        )
        kernels.append(both[:-1].astype(np.float32))
        biases.append(both[-1].astype(np.float32) if bias else None)
    return DenseClient(kernels, biases, activation)


def draw_labels(classes: np.ndarray, number: int, family: str, generator: np.random.Generator) -> np.ndarray:
    """(B, C) float32; of mixup those of neighbours in the batch order, shares U(0.3, 0.7) of this generator."""
    labels = np.eye(number, dtype=np.float32)[classes]
    if family == "smoothing":
        return np.asarray(0.9 * labels + np.float32(0.1 / number), np.float32)
    if family == "mixup":
        share = generator.uniform(0.3, 0.7, (len(labels) // 2, 1)).astype(np.float32)
        return share * labels[::2] + (1 - share) * labels[1::2]
    return labels


def convolved(images: np.ndarray, seed: int) -> np.ndarray:
    """(B, 400): what the convolutions of PyTorch's tutorial network, with its initial weights, make of 32x32 images."""
    import torch  # noqa: PLC0415 - optional

    torch.manual_seed(seed)
    pool = [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 5), *pool, torch.nn.Conv2d(6, 16, 5), *pool, torch.nn.Flatten())
    with torch.no_grad():
        return np.asarray(network(torch.tensor(images).permute(0, 3, 1, 2)).numpy())


def gradients(client: DenseClient, inputs: np.ndarray, labels: np.ndarray, dtype: Any = np.float32) -> DenseLayers:
    """What a server sees: the gradient of the mean cross-entropy, by PyTorch if it is installed, else by jax."""
    parameters = [
        (kernel.astype(dtype), None if bias is None else bias.astype(dtype))
        for kernel, bias in zip(client.kernels, client.biases, strict=True)
    ]
    make = _by_torch if find_spec("torch") and client.activation == "relu" else _by_jax
    found = make(parameters, client.activation, inputs.astype(dtype), labels.astype(dtype))
    kernel_gradients, bias_gradients = [kernel for kernel, _ in found], [bias for _, bias in found]
    activations = [client.activation] * (len(parameters) - 1)
    return dense_layers(client.kernels, client.biases, kernel_gradients, bias_gradients, activations)


def _by_torch(parameters: list[Any], activation: str, inputs: np.ndarray, labels: np.ndarray) -> list[Any]:
    import torch  # noqa: PLC0415 - optional

    held = [[None if array is None else torch.tensor(array, requires_grad=True) for array in own] for own in parameters]
    hidden = torch.tensor(inputs)
    for place, (kernel, bias) in enumerate(held):
        hidden = hidden @ kernel if bias is None else hidden @ kernel + bias
        if place < len(held) - 1:
            hidden = torch.relu(hidden)
    torch.nn.functional.cross_entropy(hidden, torch.tensor(labels)).backward()
    return [tuple(None if tensor is None else tensor.grad.numpy() for tensor in own) for own in held]


def train_by_torch(
    client: DenseClient,
    names: list[str],
    inputs: np.ndarray,
    labels: np.ndarray,
    epochs: int,
    minibatch_size: int,
    rate: float,
    momentum: float,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters before and after epochs of `torch.optim.SGD` on minibatches, ReLU between; in linen's layout."""
    import torch  # noqa: PLC0415 - optional

    torch.manual_seed(seed)
    dense = []
    for kernel, bias in zip(client.kernels, client.biases, strict=True):
        layer = torch.nn.Linear(*kernel.shape, bias=bias is not None)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(kernel.T))
            if bias is not None:
                layer.bias.copy_(torch.tensor(bias))
        dense.append(layer)
    network = torch.nn.Sequential(*(part for layer in dense for part in (layer, torch.nn.ReLU())))[:-1]

    def tree() -> dict[str, Any]:
        return {
            name: {"kernel": layer.weight.detach().numpy().T.copy(), "bias": layer.bias.detach().numpy().copy()}
            for name, layer in zip(names, dense, strict=True)
        }

    sent = tree()
    optimiser = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
    images, targets = torch.tensor(inputs), torch.tensor(labels, dtype=torch.float32)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(minibatch_size):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(images[chosen]), targets[chosen]).backward()
            optimiser.step()
    return sent, tree()


def _logits(parameters: list[Any], activation: str, inputs: jax.Array) -> jax.Array:
    hidden = inputs
    for place, (kernel, bias) in enumerate(parameters):
        hidden = jnp.matmul(hidden, kernel, precision="highest") + (0 if bias is None else bias[None])
        if place < len(parameters) - 1:
            hidden = ACTIVATIONS[activation].apply(hidden)
    return hidden


def _by_jax(parameters: list[Any], activation: str, inputs: np.ndarray, labels: np.ndarray) -> list[Any]:
    def loss(parameters: list[Any]) -> jax.Array:
        return optax.softmax_cross_entropy(_logits(parameters, activation, jnp.asarray(inputs)), labels).mean()

    with jax.enable_x64(inputs.dtype == np.float64):
        return [tuple(None if leaf is None else np.asarray(leaf) for leaf in own) for own in jax.grad(loss)(parameters)]


def fit(client: DenseClient, inputs: np.ndarray, classes: np.ndarray, epochs: int, seed: int) -> DenseClient:
    """The network after some epochs of Adam on hard labels, minibatches of 64."""
    optimiser = optax.adam(1e-3)
    parameters: Any = list(zip(client.kernels, client.biases, strict=True))
    state = optimiser.init(parameters)

    @jax.jit
    def step(parameters: Any, state: Any, images: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
        def loss(parameters: Any) -> jax.Array:
            logits = _logits(parameters, client.activation, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        updates, state = optimiser.update(jax.grad(loss)(parameters), state)
        return optax.apply_updates(parameters, updates), state

    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(inputs))
        for start in range(0, len(inputs) - 63, 64):
            own = order[start : start + 64]
            parameters, state = step(parameters, state, inputs[own], classes[own])
    kernels = [np.asarray(kernel) for kernel, _ in parameters]
    return DenseClient(kernels, [None if bias is None else np.asarray(bias) for _, bias in parameters], "relu")


def with_noise(layers: DenseLayers, relative: float, seed: int) -> DenseLayers:
    """The same with Gaussian noise on every entry, so much of the whole gradient's root mean square, float32."""
    generator = np.random.default_rng(seed)
    deviation = noise_deviation(layers, relative)

    def noisy(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else (array + deviation * generator.normal(size=array.shape)).astype(np.float32)

    kernel_gradients: list[Any] = [noisy(array) for array in layers.kernel_gradients]
    bias_gradients = [noisy(array) for array in layers.bias_gradients]
    return dense_layers(layers.kernels, layers.biases, kernel_gradients, bias_gradients, layers.activations)


def noise_deviation(layers: DenseLayers, relative: float) -> float:
    """So much of the whole gradient's root mean square."""
    held = [*layers.kernel_gradients, *(bias for bias in layers.bias_gradients if bias is not None)]
    return float(relative * np.sqrt(sum(np.sum(array**2) for array in held) / sum(array.size for array in held)))


def best_deviations(client: DenseClient, inputs: np.ndarray, labels: np.ndarray, deviation: float) -> np.ndarray:
    """(B,) of an unbiased estimate of each input, root mean square over its entries: the Cramer-Rao bound at the truth.

    Of inputs and labels (entries that sum to 1, else free) together, with every gate as it is and noise of that
    deviation on every entry of the gradient. Small cases only: the Jacobian is dense.
    """
    size, width = inputs.shape
    classes = labels.shape[1]

    def everything(unknowns: jax.Array) -> jax.Array:
        images = unknowns[: size * width].reshape(size, width)
        free = unknowns[size * width :].reshape(size, classes - 1)
        targets = jnp.concatenate([free, 1 - free.sum(axis=1, keepdims=True)], axis=1)
        parameters = [(jnp.asarray(kernel, images.dtype), bias) for kernel, bias in held]

        def loss(parameters: Any) -> jax.Array:
            return optax.softmax_cross_entropy(_logits(parameters, client.activation, images), targets).mean()

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(loss)(parameters))])

    with jax.enable_x64(True):
        held = [
            (kernel.astype(np.float64), None if bias is None else jnp.asarray(bias, np.float64))
            for kernel, bias in zip(client.kernels, client.biases, strict=True)
        ]
        truth = np.concatenate([inputs.ravel(), labels[:, :-1].ravel()]).astype(np.float64)
        jacobian = np.asarray(jax.jacfwd(everything)(jnp.asarray(truth)))
    factor = np.linalg.qr(jacobian, mode="r")
    inverse = np.linalg.inv(factor)
    variance = np.sum(inverse**2, axis=1)[: size * width].reshape(size, width)
    return np.asarray(deviation * np.sqrt(variance.mean(axis=1)))


def judge(
    layers: DenseLayers, place: int, truth: np.ndarray, labels: np.ndarray, found: np.ndarray, told: np.ndarray | None
) -> dict[str, Any]:
    """Counts for one batch. The truth is used here only.

    Args:
      layers: the network. place: the layer whose inputs were found. truth: (B, d) the first layer's inputs.
      labels: (B, C). found: (n, d') what is claimed. told: (n, C) its labels, or None where only inputs are judged.

    Returns:
      live: examples that leave something in the gradient. images, labels, both: how many different ones of those are
      right. claimed, spurious: how many are claimed, and match none. nearest, error: (n,) index of the example and root
      mean square error of the inputs. label_error: (n,), NaN if not told.
    """
    hidden = np.asarray(truth, np.float64)
    live = np.abs(layers.predictions(0, hidden) - labels).max(axis=1) > ZERO_GRADIENT
    for index in range(place):
        hidden = layers.activate(index, layers.output(index, hidden))
    if not len(found):
        nothing = dict.fromkeys(("images", "labels", "both", "claimed", "spurious"), 0)
        empty = np.zeros(0)
        return nothing | {"live": int(live.sum()), "nearest": empty.astype(int), "error": empty, "label_error": empty}
    distance = cdist(found, hidden) / np.sqrt(hidden.shape[1])
    nearest = np.argmin(distance, axis=1)
    error = np.min(distance, axis=1)
    decibels = -20 * np.log10(np.maximum(error, 1e-30) / np.ptp(hidden))
    label_error = np.full(len(found), np.nan) if told is None else np.abs(told - labels[nearest]).max(axis=1)
    seen, named = decibels > DECIBELS, label_error < LABEL_ERROR

    def different(right: np.ndarray) -> int:
        return len(set(nearest[right & live[nearest]]))

    return {
        "live": int(live.sum()),
        "images": different(seen),
        "labels": different(named & (decibels > SPURIOUS_DECIBELS)),
        "both": different(seen & named),
        "claimed": len(found),
        "spurious": int(np.sum(decibels < SPURIOUS_DECIBELS)),
        "nearest": nearest,
        "error": error,
        "label_error": label_error,
    }
