"""Peers for `dense_layers.py`, written from what their papers say: peeling, and SPEAR's sampling."""

from __future__ import annotations

import time

import numpy as np

from softinv_jax.dense_layers.layers import DenseLayers

__all__ = ["peeling", "spear"]

# Of a row's bias gradient and of the distance from the column space, relative.
PEELING_TOLERANCE = 1e-3
SAME = 1e-3
# Of the largest entry: what counts as a zero; submatrices at a time; the share of zeros that a direction needs.
SPEAR_ZERO, SPEAR_AT_ONCE, SPEAR_SHARE = 1e-4, 512, 0.2


def peeling(layers: DenseLayers, batch_size: int, dtype: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    """Rows with one active example divided by the bias gradient, a hard label fitted, subtracted, and again.

    Shariati and Meybodi, Gradient inversion via LT codes, 2026. An example is taken where the label explains the row's
    bias gradient and its delta lies in the column space of what the server received. Only for networks with biases.

    Returns:
      Inputs (n, d) and labels (n, C).
    """
    rest, bias = layers.kernel_gradients[0].T.astype(dtype), layers.bias_gradients[0]
    classes = layers.number_of_classes
    if bias is None:
        raise ValueError("peeling divides by the bias gradient, and the first layer has no bias")
    bias = bias.astype(dtype)
    least = 1e-6 * float(np.abs(bias).max())
    space = np.linalg.svd(rest.astype(np.float64), full_matrices=False)[0][:, :batch_size]
    inputs: list[np.ndarray] = []
    named: list[int] = []
    while len(inputs) < batch_size:
        units = np.flatnonzero(np.abs(bias) > least)
        candidates = (rest[units] / bias[units, None]).astype(np.float64)
        before = layers.before(0, candidates)
        opened = before[0][np.arange(len(units)), units] > 0
        units, candidates, before = units[opened], candidates[opened], [part[opened] for part in before]
        if not len(units):
            break
        predictions = layers.predictions(0, candidates)
        misfits = np.empty((len(units), classes))
        for label in range(classes):
            delta = layers.backward(0, before, predictions - np.eye(classes)[label])[0]
            own = delta[np.arange(len(units)), units] / batch_size
            misfits[:, label] = np.abs(own - bias[units]) / np.abs(bias[units])
        best = misfits.argmin(axis=1)
        deltas = layers.backward(0, before, predictions - np.eye(classes)[best])[0] / batch_size
        outside = np.linalg.norm(deltas - (deltas @ space) @ space.T, axis=1)
        misfit = np.maximum(misfits.min(axis=1), outside / np.maximum(np.linalg.norm(deltas, axis=1), 1e-30))
        number = len(inputs)
        for row in np.argsort(misfit):
            if misfit[row] > PEELING_TOLERANCE or len(inputs) == batch_size:
                break
            candidate = candidates[row]
            if any(np.linalg.norm(candidate - held) < SAME * np.linalg.norm(held) for held in inputs):
                continue
            inputs.append(candidate)
            named.append(int(best[row]))
            rest = rest - np.outer(deltas[row], candidate).astype(dtype)
            bias = bias - deltas[row].astype(dtype)
        if len(inputs) == number:
            break
    if not inputs:
        return np.zeros((0, rest.shape[1])), np.zeros((0, classes))
    return np.stack(inputs), np.eye(classes)[named]


def spear(layers: DenseLayers, batch_size: int, seconds: float, seed: int) -> np.ndarray:
    """Directions of the low-rank factor with many zeros, from random B - 1 of its rows; the sparsest independent ones.

    Dimitrov et al., SPEAR, NeurIPS 2024: sampling, filtering and the greedy choice. Only for networks with biases:
    their gradients give the scale.

    Returns:
      Inputs (B, d), or (0, d) if fewer than B independent directions were found in that time.
    """
    gradient, bias = layers.kernel_gradients[0].T, layers.bias_gradients[0]
    if bias is None:
        raise ValueError("SPEAR takes the scale from the bias gradient, and the first layer has no bias")
    both = np.concatenate([gradient, bias[:, None]], axis=1)
    left, values, _ = np.linalg.svd(both, full_matrices=False)
    factor = left[:, :batch_size] * values[:batch_size]
    generator = np.random.default_rng(seed)
    end = time.perf_counter() + seconds
    kept: list[np.ndarray] = []
    sizes: list[int] = []
    rank = 0
    while time.perf_counter() < end and rank < batch_size:
        chosen = np.argsort(generator.random((SPEAR_AT_ONCE, len(factor))), axis=1)[:, : batch_size - 1]
        null = np.linalg.svd(factor[chosen], full_matrices=True)[2][:, -1]
        deltas = null @ factor.T
        zeros = np.abs(deltas) < SPEAR_ZERO * np.abs(deltas).max(axis=1, keepdims=True)
        for index in np.flatnonzero(zeros.sum(axis=1) > batch_size - 1 + SPEAR_SHARE * len(factor)):
            if not any(abs(null[index] @ other) > 1 - 1e-6 for other in kept):
                kept.append(null[index])
                sizes.append(int(zeros[index].sum()))
        chosen_directions: list[np.ndarray] = []
        for index in np.argsort(sizes)[::-1]:
            trial = np.stack([*chosen_directions, kept[index]])
            if np.linalg.svd(trial, compute_uv=False)[-1] > 1e-6:
                chosen_directions.append(kept[index])
        rank = len(chosen_directions)
    if rank < batch_size:
        return np.zeros((0, gradient.shape[1]))
    deltas = factor @ np.stack(chosen_directions[:batch_size], axis=1)
    scaled = np.linalg.lstsq(deltas, both, rcond=None)[0]
    return np.asarray(scaled[:, :-1] / scaled[:, -1:])
