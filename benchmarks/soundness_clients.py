"""Clients of every kind, in plain float32 NumPy: a last layer's gradient under other losses, steps and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Cell", "Clients", "draw", "logit_gradient"]


@dataclass(frozen=True)
class Cell:
    """One setting.

    Attributes:
      name: of the row. loss: see `logit_gradient`. bias: of the head. classes, features: C and d.
      kind: of the features: relu, signed, parallel (nearly the same in all examples), sigmoid.
      label: hard, smoothing, mixup, five_way, dense, multi (several ones).
      examples: behind one gradient. told: the batch size that is told. steps: of local training, not told.
      optimiser: sgd, adam, sign. sent: float32, bfloat16, float16, float64, product, delta32, delta_bfloat16.
      arithmetic: of the client's forward pass: float32, tf32, bfloat16. noise: relative to the largest entry.
      unknown_scale: told to the observer. spoilt: rows zeroed, pruned, quantised, stale, or nothing.
      factor: what the gradient is multiplied with, untold. fan_in: weights as PyTorch draws them, or U(-0.5, 0.5).
    """

    name: str
    loss: str = "cross_entropy"
    bias: bool = False
    classes: int = 10
    features: int = 64
    kind: str = "relu"
    label: str = "smoothing"
    examples: int = 1
    told: int = 1
    steps: int = 1
    optimiser: str = "sgd"
    sent: str = "float32"
    arithmetic: str = "float32"
    noise: float = 0.0
    unknown_scale: bool = False
    spoilt: str = ""
    factor: float = 1.0
    fan_in: bool = False


@dataclass(frozen=True)
class Clients:
    """weight (C, d), bias (C,), gradients (N, C, d) and (N, C), labels (N, B, C)."""

    weight: np.ndarray
    bias: np.ndarray | None
    gradient: np.ndarray
    bias_gradient: np.ndarray | None
    label: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def logit_gradient(loss: str, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """dL/dz of one example's loss for logits and labels (..., C), in the dtype of the logits."""
    if loss.startswith("temperature"):
        temperature = z.dtype.type(float(loss.removeprefix("temperature")))
        return (softmax(z / temperature) - y) / temperature
    return LOSSES[loss](z, y)


def _focal(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """gamma 2: L = -sum_j y_j (1 - p_j)^2 log p_j."""
    p = softmax(z)
    inner = y * (2 * (1 - p) * np.log(p) * p - (1 - p) ** 2)
    return inner - p * inner.sum(axis=-1, keepdims=True)


def _squared_softmax(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = softmax(z)
    inner = z.dtype.type(2 / z.shape[-1]) * (p - y)
    return p * (inner - (p * inner).sum(axis=-1, keepdims=True))


def _class_weights(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    weighted = np.linspace(0.5, 2, z.shape[-1]).astype(z.dtype) * y
    return softmax(z) * weighted.sum(axis=-1, keepdims=True) - weighted


def _logit_adjustment(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    prior = np.linspace(1, 5, z.shape[-1]).astype(z.dtype)
    return softmax(z + np.log(prior / prior.sum())) - y


def _entropy(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cross-entropy less 0.1 times the entropy of the prediction."""
    p = softmax(z)
    entropy = -(p * np.log(p)).sum(axis=-1, keepdims=True)
    return p - y + z.dtype.type(0.1) * p * (np.log(p) + entropy)


def _distillation(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Half of the label from a teacher's softmax."""
    return softmax(z) - (y + softmax(np.cos(3 * z))) / 2


LOSSES = {
    "cross_entropy": lambda z, y: softmax(z) - y,
    "bce_mean": lambda z, y: (sigmoid(z) - y) / z.dtype.type(z.shape[-1]),
    "bce_sum": lambda z, y: sigmoid(z) - y,
    "focal": _focal,
    "squared_softmax": _squared_softmax,
    "squared_logits": lambda z, y: z.dtype.type(2 / z.shape[-1]) * (z - y),
    "class_weights": _class_weights,
    "logit_adjustment": _logit_adjustment,
    "entropy": _entropy,
    "distillation": _distillation,
}


def draw_labels(rng: np.random.Generator, kind: str, count: int, classes: int) -> np.ndarray:
    order = np.argsort(rng.random((count, classes)), axis=1)
    units = np.eye(classes)[order]
    ways = min(5, classes)
    strength, share = rng.uniform(0.05, 0.5, (count, 1)), rng.uniform(0.1, 0.9, (count, 1))
    make = {
        "hard": lambda: units[:, 0],
        "smoothing": lambda: (1 - strength) * units[:, 0] + strength / classes,
        "mixup": lambda: share * units[:, 0] + (1 - share) * units[:, 1],
        "five_way": lambda: np.einsum("nk,nkc->nc", rng.dirichlet(np.full(ways, 5.0), count), units[:, :ways]),
        "dense": lambda: rng.dirichlet(np.ones(classes), count),
        "multi": lambda: (rng.random((count, classes)) < 0.3).astype(float),
    }
    return make[kind]()


def draw_features(rng: np.random.Generator, kind: str, count: int, examples: int, features: int) -> np.ndarray:
    normal = rng.normal(size=(count, examples, features))
    if kind == "parallel":
        return np.maximum(rng.normal(size=(count, 1, features)) + 0.02 * normal, 0)
    if kind == "sigmoid":
        return sigmoid(normal)
    return normal if kind == "signed" else np.maximum(normal, 0)


def rounded(values: np.ndarray, digits: int) -> np.ndarray:
    """float32 values with so many binary digits after the first."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2.0 ** (digits + 1)) / 2.0 ** (digits + 1), exponent).astype(np.float32)


DIGITS = {"tf32": 10, "bfloat16": 7, "float16": 10}


def draw(cell: Cell, count: int, seed: int) -> Clients:
    """So many gradients of one setting, all of one head."""
    rng = np.random.default_rng([seed, sum(map(ord, cell.name))])
    bound = 1 / np.sqrt(cell.features) if cell.fan_in else 0.5
    weight = rng.uniform(-bound, bound, (cell.classes, cell.features)).astype(np.float32)
    bias = rng.uniform(-bound, bound, cell.classes).astype(np.float32)
    if not cell.bias:
        bias = np.zeros_like(bias)
    label = draw_labels(rng, cell.label, count * cell.examples, cell.classes)
    label = label.reshape(count, cell.examples, cell.classes)
    x = draw_features(rng, cell.kind, count, cell.examples, cell.features).astype(np.float32)
    parameters = np.concatenate([weight, bias[:, None]], axis=1)
    used = parameters
    if cell.spoilt == "stale":
        used = parameters * (1 + 1e-3 * rng.normal(size=parameters.shape)).astype(np.float32)
    gradient = _local_training(cell, used, x, label.astype(np.float32), rng)
    gradient = _spoil(cell, gradient, rng)
    gradient = _send(cell, gradient, parameters)
    if not cell.bias:
        return Clients(weight, None, gradient[..., :-1], None, label)
    return Clients(weight, bias, gradient[..., :-1], gradient[..., -1], label)


def _local_training(
    cell: Cell, parameters: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(N, C, d + 1) the sum of the gradients of the steps, as float32 clients compute them."""
    rate = np.float32(0.01)
    current = np.broadcast_to(parameters, (len(x), *parameters.shape)).copy()
    total = np.zeros(current.shape, np.float64 if cell.sent == "product" else np.float32)
    for step in range(cell.steps):
        # Layers below move too, and with them the features.
        moved = x if step == 0 else x * (1 + 0.01 * rng.normal(size=x.shape)).astype(np.float32)
        full = np.concatenate([moved, np.ones((*moved.shape[:-1], 1), np.float32)], axis=-1)
        inputs, head = full, current
        if cell.arithmetic in DIGITS:
            inputs, head = rounded(full, DIGITS[cell.arithmetic]), rounded(current, DIGITS[cell.arithmetic])
            inputs = np.concatenate([inputs[..., :-1], full[..., -1:]], axis=-1)
        z = np.einsum("nbd,ncd->nbc", inputs, head)
        if cell.arithmetic == "bfloat16":
            z = rounded(z, 7)
        g = logit_gradient(cell.loss, z, y) * np.float32(cell.factor)
        if cell.arithmetic in DIGITS:
            g = rounded(g, DIGITS[cell.arithmetic])
        wide = np.float64 if cell.sent == "product" else np.float32
        mean = np.einsum("nbc,nbd->ncd", g.astype(wide), inputs.astype(wide)) / wide(cell.examples)
        if cell.arithmetic == "bfloat16":
            mean = rounded(mean, 7)
        total += mean
        current = current - rate * mean.astype(np.float32)
    return total


def _spoil(cell: Cell, gradient: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    largest = np.abs(gradient).max(axis=(1, 2), keepdims=True)
    if cell.optimiser == "adam":
        gradient = (gradient / (np.abs(gradient) + np.float32(1e-8))).astype(np.float32)
    if cell.optimiser == "sign":
        gradient = np.sign(gradient)
    if cell.noise:
        gradient = gradient + (cell.noise * largest * rng.normal(size=gradient.shape)).astype(gradient.dtype)
    if cell.spoilt.startswith("rows"):
        size = np.linalg.norm(gradient, axis=2)
        order = np.argsort(size, axis=1)[:, : int(cell.spoilt.removeprefix("rows"))]
        gradient = gradient.copy()
        np.put_along_axis(gradient, order[:, :, None], 0, axis=1)
    if cell.spoilt == "pruned":
        size = np.where(gradient == 0, np.nan, np.abs(gradient))  # Dead features have nothing to prune.
        threshold = np.nanmedian(size, axis=(1, 2), keepdims=True)
        gradient = np.where(np.abs(gradient) > threshold, gradient, 0)
    if cell.spoilt == "quantised":
        step = largest / 127
        gradient = (np.round(gradient / step) * step).astype(np.float32)
    return gradient


def _send(cell: Cell, gradient: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    if cell.sent in ("bfloat16", "float16"):
        if cell.sent == "float16":
            return gradient.astype(np.float16).astype(np.float32)
        return rounded(gradient, 7)
    if cell.sent == "float64":
        return gradient.astype(np.float64)
    if cell.sent.startswith("delta"):
        after = parameters - np.float32(0.01) * gradient
        after = rounded(after, 7) if cell.sent == "delta_bfloat16" else after
        return ((parameters.astype(np.float64) - after.astype(np.float64)) / 0.01).astype(np.float32)
    return gradient
