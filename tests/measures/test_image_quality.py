"""Measures of images against scikit-image on real photographs, and batches matched against every permutation."""

import warnings
from itertools import permutations

import numpy as np
import pytest
import skimage.metrics

from softinv_jax.client import load_photographs
from softinv_jax.measures.image_quality import match_images, peak_signal_to_noise_ratio, structural_similarity

NAN = float("nan")


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Photographs, and what is left of them under noise of several strengths."""
    true = load_photographs(per_class=1, image_size=40).images[:, :33].astype(np.float32) / 255
    generator = np.random.default_rng(0)
    strength = np.geomspace(1e-4, 0.3, len(true)).reshape(-1, 1, 1, 1)
    recovered = np.clip(true + strength * generator.normal(size=true.shape), 0, 1).astype(np.float32)
    return recovered, true


def test_scikit_images_values(pairs) -> None:
    recovered, true = pairs
    ratio = [skimage.metrics.peak_signal_noise_ratio(b, a, data_range=1) for a, b in zip(recovered, true, strict=True)]
    similarity = [
        skimage.metrics.structural_similarity(
            a, b, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(recovered, true, strict=True)
    ]
    # scikit-image stays in float32, ours is float64.
    np.testing.assert_allclose(peak_signal_to_noise_ratio(recovered, true), ratio, rtol=1e-4)
    np.testing.assert_allclose(structural_similarity(recovered, true), similarity, atol=1e-4)
    assert np.ptp(similarity) > 0.3
    assert np.ptp(ratio) > 40
    assert peak_signal_to_noise_ratio(recovered[3], true[3]) == peak_signal_to_noise_ratio(recovered, true)[3]
    assert structural_similarity(recovered[3], true[3]) == structural_similarity(recovered, true)[3]


def test_values_by_hand() -> None:
    true = np.zeros((12, 12, 1))
    assert peak_signal_to_noise_ratio(true + 0.1, true).shape == ()
    np.testing.assert_allclose(peak_signal_to_noise_ratio(true + 0.1, true), 20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peak_signal_to_noise_ratio(true, true) == np.inf
    np.testing.assert_allclose(structural_similarity(true, true), 1.0)
    # Two constant images: only the term of the means is left, (2 m n + c) / (m^2 + n^2 + c) with c = 0.01^2.
    np.testing.assert_allclose(structural_similarity(true + 0.1, true + 0.2), (0.04 + 1e-4) / (0.05 + 1e-4), rtol=1e-6)


def test_values_outside_the_scale_are_clipped(pairs) -> None:
    recovered, true = pairs
    wide = 3 * recovered - 1
    for measure in (peak_signal_to_noise_ratio, structural_similarity):
        np.testing.assert_array_equal(measure(wide, true), measure(np.clip(wide, 0, 1), true))


def test_matching_has_the_least_error_of_all_permutations() -> None:
    generator = np.random.default_rng(1)
    true = generator.uniform(size=(5, 4, 3, 3))
    # So noisy that the nearest recovered image is not always the one that belongs.
    recovered = generator.permutation(true) + generator.normal(size=true.shape)
    clipped = np.clip(recovered, 0, 1)
    best = min(permutations(range(5)), key=lambda order: np.mean((clipped[list(order)] - true) ** 2))
    np.testing.assert_array_equal(match_images(recovered, true), best)


def test_photographs_are_matched_and_what_is_not_recovered_is_not(pairs) -> None:
    recovered, true = pairs
    order = np.random.default_rng(2).permutation(len(true))
    shuffled = recovered[order]
    np.testing.assert_array_equal(shuffled[match_images(shuffled, true)], recovered)
    shuffled[[2, 5]] = NAN
    expected = np.argsort(order)
    expected[order[[2, 5]]] = -1
    np.testing.assert_array_equal(match_images(shuffled, true), expected)
    np.testing.assert_array_equal(match_images(shuffled[:1], true[order[:1]]), [0])
    np.testing.assert_array_equal(match_images(np.full_like(true, NAN), true), np.full(len(true), -1))
    np.testing.assert_array_equal(match_images(shuffled[:0], true), np.full(len(true), -1))


@pytest.mark.parametrize("measure", [peak_signal_to_noise_ratio, structural_similarity])
def test_bad_images_are_refused(measure) -> None:
    image = np.zeros((12, 12, 3))
    with pytest.raises(ValueError, match=r"\(12, 12, 3\) and \(12, 11, 3\)"):
        measure(image, image[:, :11])
    with pytest.raises(ValueError, match=r"\(12, 12\)"):
        measure(image[..., 0], image[..., 0])
    with pytest.raises(ValueError, match=r"true must be floating.* uint8"):
        measure(image, image.astype(np.uint8))
    with pytest.raises(ValueError, match="recovered has 432 entries that are NaN or infinite"):
        measure(np.full_like(image, NAN), image)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        structural_similarity(image[:10], image[:10])


def test_bad_batches_are_refused() -> None:
    images = np.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\) and \(2, 4, 3, 3\)"):
        match_images(images, images[:, :, :3])
    with pytest.raises(ValueError, match="true has 96 entries"):
        match_images(images, np.full_like(images, NAN))
    with pytest.raises(ValueError, match="recovered has 48 entries"):
        match_images(np.stack([images[0], np.full_like(images[0], np.inf)]), images)
    with pytest.raises(ValueError, match="recovered must be floating"):
        match_images(images.astype(int), images)
