"""The perceptual distance against its definition in NumPy, with random weights."""

import numpy as np
import pytest

from softinv_jax.client import load_photographs
from softinv_jax.measures.perceptual import WEIGHT_SHAPES, perceptual_distance


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {}
    for name, shape in WEIGHT_SHAPES.items():
        spread = 1 / np.sqrt(np.prod(shape[1:]))
        arrays[name] = (spread * generator.normal(size=shape)).astype(np.float32)
        if name.startswith("lin"):
            arrays[name] = np.abs(arrays[name])
    return arrays


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    true = load_photographs(per_class=1, image_size=40).images[:3, :35].astype(np.float32) / 255
    return np.clip(true + 0.1 * np.random.default_rng(1).normal(size=true.shape), 0, 1), true


def windows(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """(channels, H', W', size, size)."""
    return np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def naive_features(weights: dict[str, np.ndarray], image: np.ndarray) -> list[np.ndarray]:
    """Channels first, as the source has them; image (H, W, 3) on the scale [0, 1]."""
    hidden = np.moveaxis(image.astype(np.float64), -1, 0) * 2 - 1
    hidden -= np.array([-0.030, -0.088, -0.188])[:, None, None]
    hidden /= np.array([0.458, 0.448, 0.450])[:, None, None]
    outputs = []
    for place, stride, padding, pool in (
        (0, 4, 2, False),
        (3, 1, 2, True),
        (6, 1, 1, True),
        (8, 1, 1, False),
        (10, 1, 1, False),
    ):
        if pool:
            hidden = windows(hidden, 3, 2).max(axis=(-1, -2))
        kernel, bias = (weights[f"features.{place}.{part}"].astype(np.float64) for part in ("weight", "bias"))
        padded = np.pad(hidden, ((0, 0), (padding, padding), (padding, padding)))
        patches = windows(padded, kernel.shape[-1], stride)
        hidden = np.maximum(np.tensordot(kernel, patches, ([1, 2, 3], [0, 3, 4])) + bias[:, None, None], 0)
        outputs.append(hidden)
    return outputs


def naive_distance(weights: dict[str, np.ndarray], first: np.ndarray, second: np.ndarray) -> float:
    total = 0.0
    for layer, (one, other) in enumerate(
        zip(naive_features(weights, first), naive_features(weights, second), strict=True)
    ):
        units = [features / (np.sqrt(np.sum(features**2, axis=0)) + 1e-10) for features in (one, other)]
        importance = weights[f"lin{layer}.model.1.weight"].reshape(-1, 1, 1)
        total += np.sum(importance * (units[0] - units[1]) ** 2, axis=0).mean()
    return total


def test_distance_is_its_definition(weights, pairs) -> None:
    recovered, true = pairs
    expected = [naive_distance(weights, first, second) for first, second in zip(recovered, true, strict=True)]
    found = perceptual_distance(weights, recovered, true)
    # Float32 through five layers of up to 3456 terms.
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    single = perceptual_distance(weights, recovered[1], true[1])
    assert single.shape == ()
    np.testing.assert_allclose(single, expected[1], rtol=1e-3)
    # Squares of float32 rounding: the compiler may round the two copies differently.
    np.testing.assert_allclose(perceptual_distance(weights, true, true), np.zeros(3), atol=1e-12)
    wide = 3 * recovered - 1
    np.testing.assert_array_equal(
        perceptual_distance(weights, wide, true), perceptual_distance(weights, np.clip(wide, 0, 1), true)
    )


def test_bad_input_is_refused(weights, pairs) -> None:
    recovered, true = pairs
    with pytest.raises(ValueError, match=r"weights lack features\.0\.bias.*they have none"):
        perceptual_distance({}, recovered, true)
    with pytest.raises(ValueError, match=r"lin2\.model\.1\.weight must have shape \(1, 384, 1, 1\).* \(384,\)"):
        perceptual_distance(weights | {"lin2.model.1.weight": np.ones(384)}, recovered, true)
    with pytest.raises(ValueError, match="at least 31 pixels"):
        perceptual_distance(weights, recovered[:, :30], true[:, :30])
    with pytest.raises(ValueError, match="3 channels"):
        perceptual_distance(weights, recovered[..., :1], true[..., :1])
    with pytest.raises(ValueError, match="NaN"):
        perceptual_distance(weights, np.full_like(true, np.nan), true)
