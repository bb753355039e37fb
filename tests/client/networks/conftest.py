"""Layers by their definition, in NumPy and float64, for one image (H, W, channels)."""

from types import SimpleNamespace

import numpy as np
import pytest


def windows(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """(H', W', channels, size, size)."""
    return np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))[::stride, ::stride]


def pad(image: np.ndarray, border: int, value: float = 0.0) -> np.ndarray:
    return np.pad(image, ((border, border), (border, border), (0, 0)), constant_values=value)


def convolve(image: np.ndarray, layer: dict, stride: int = 1, padding: int = 0) -> np.ndarray:
    kernel = np.asarray(layer["kernel"], np.float64)
    result = np.einsum("ijcab,abck->ijk", windows(pad(image, padding), len(kernel), stride), kernel)
    return result + np.asarray(layer.get("bias", 0.0), np.float64)


def max_pool(image: np.ndarray, padding: int = 0) -> np.ndarray:
    return windows(pad(image, padding, -np.inf), 3, 2).max(axis=(-1, -2))


def normalise(image: np.ndarray, layer: dict, statistics: dict) -> np.ndarray:
    scale, bias = (np.asarray(layer[name], np.float64) for name in ("scale", "bias"))
    mean, variance = (np.asarray(statistics[name], np.float64) for name in ("mean", "var"))
    return (image - mean) / np.sqrt(variance + 1e-5) * scale + bias


@pytest.fixture(scope="session")
def naive() -> SimpleNamespace:
    return SimpleNamespace(convolve=convolve, max_pool=max_pool, normalise=normalise)
