"""The terms of gradient matching against plain NumPy in float64."""

import jax
import numpy as np
import pytest
from skimage import data

from softinv_jax.images.distances import cosine, l2, layerwise_cosine, norm, total_variation


def draw_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "conv": {"kernel": rng.normal(size=(3, 3, 2)), "bias": 1e-3 * rng.normal(size=2)},
        "head": 10 * rng.normal(size=(4, 5)),
    }


def flat(tree: dict) -> np.ndarray:
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def naive_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - (a.ravel() @ b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b))


def test_distances_are_their_definitions() -> None:
    a, b = draw_tree(0), draw_tree(1)
    np.testing.assert_allclose(l2(a, b), np.sum((flat(a) - flat(b)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(cosine(a, b), naive_cosine(flat(a), flat(b)), rtol=1e-5)
    layers = [naive_cosine(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    np.testing.assert_allclose(layerwise_cosine(a, b), np.mean(layers), rtol=1e-5)
    np.testing.assert_allclose(norm(a), np.linalg.norm(flat(a)), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e25])
def test_cosine_ignores_scale_and_sees_tiny_angles(scale: float) -> None:
    a = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    b = (a + 1e-5 * np.random.default_rng(1).normal(size=1000)).astype(np.float32)
    scaled = (np.float32(scale) * a).astype(np.float32)
    np.testing.assert_allclose(
        cosine(scaled, b), naive_cosine(scaled.astype(np.float64), b.astype(np.float64)), rtol=0.05
    )


@pytest.mark.parametrize("distance", [l2, cosine, layerwise_cosine])
def test_zeros_give_finite_slopes(distance) -> None:
    a = draw_tree(0)
    zero = jax.tree.map(np.zeros_like, a)
    for pair in ((zero, a), (a, zero), (zero, zero)):
        value, slope = jax.value_and_grad(distance)(*pair)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_layers_that_are_zero_are_left_out() -> None:
    a, b = draw_tree(0), draw_tree(1)
    b["head"] = np.zeros_like(b["head"])
    np.testing.assert_allclose(layerwise_cosine(a, b), layerwise_cosine(a["conv"], b["conv"]), rtol=1e-6)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_total_variation_is_its_definition(batch: tuple) -> None:
    images = np.stack([data.astronaut()[:20, :30], data.astronaut()[100:120, 100:130]])[: 2 if batch else 1]
    images = (images / 255.0).astype(np.float32)
    down = np.abs(images[:, 1:] - images[:, :-1]).mean()
    across = np.abs(images[:, :, 1:] - images[:, :, :-1]).mean()
    np.testing.assert_allclose(total_variation(images if batch else images[0]), down + across, rtol=1e-5)


def test_one_pixel_does_not_vary() -> None:
    assert total_variation(np.ones((1, 1, 3), np.float32)) == 0
