"""How like the private images the recovered ones are; for evaluation only, no attack sees the truth."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from skimage.metrics import structural_similarity as scikit_image_structural_similarity

__all__ = ["check_image_pairs", "match_images", "peak_signal_to_noise_ratio", "structural_similarity"]

_WINDOW = 11


def peak_signal_to_noise_ratio(recovered: ArrayLike, true: ArrayLike) -> NDArray[np.float64]:
    """Return -10 log10 of the mean squared error over pixels and channels, decibels; infinite for identical images.

    Args:
      recovered: (H, W, channels) or (N, H, W, channels), on the scale [0, 1]; what lies outside is clipped.
      true: likewise, the same shape.

    Returns:
      () or (N,) float64.

    Raises:
      ValueError: on shapes that differ or are no images, integers, or entries that are not finite.
    """
    recovered, true = check_image_pairs(recovered, true)
    error = np.mean((recovered - true) ** 2, axis=(-3, -2, -1))
    with np.errstate(divide="ignore"):
        return np.asarray(-10.0 * np.log10(error))


def structural_similarity(recovered: ArrayLike, true: ArrayLike) -> NDArray[np.float64]:
    """Return the structural similarity with a Gaussian window (11x11, sigma 1.5), averaged over pixels and channels.

    Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", IEEE TIP 2004; computed by scikit-image.

    Args:
      recovered: (H, W, channels) or (N, H, W, channels), on the scale [0, 1]; what lies outside is clipped.
      true: likewise, the same shape; sides of at least 11 pixels.

    Returns:
      () or (N,) float64, 1 for identical images.

    Raises:
      ValueError: on shapes that differ or are no images, integers, entries that are not finite, or sides below 11.
    """
    recovered, true = check_image_pairs(recovered, true, smallest=_WINDOW)
    shape = recovered.shape[-3:]
    values = [
        scikit_image_structural_similarity(
            first,
            second,
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for first, second in zip(recovered.reshape(-1, *shape), true.reshape(-1, *shape), strict=True)
    ]
    return np.asarray(values, np.float64).reshape(recovered.shape[:-3])


def match_images(recovered: ArrayLike, true: ArrayLike) -> NDArray[np.int64]:
    """Say which recovered image belongs to which true one: the pairs whose mean squared errors have the least sum.

    A batch's gradient does not tell the order of its examples. Needs the truth: for evaluation only.

    Args:
      recovered: (M, H, W, channels), on the scale [0, 1]; what lies outside is clipped. An image with a NaN counts
        as not recovered and is matched with none.
      true: (N, H, W, channels).

    Returns:
      (N,) int: for each true image the index of the recovered one, -1 where there is none.

    Raises:
      ValueError: on shapes that do not fit, integers, infinite entries, or a NaN in `true`.
    """
    recovered, true = _floating("recovered", recovered), _floating("true", true)
    if recovered.ndim != 4 or true.ndim != 4 or recovered.shape[1:] != true.shape[1:] or 0 in true.shape[1:]:
        raise ValueError(
            "recovered (M, H, W, channels) and true (N, H, W, channels) must have images of one shape, but have shapes"
            f" {recovered.shape} and {true.shape}"
        )
    found = np.flatnonzero(~np.isnan(recovered).any(axis=(1, 2, 3)))
    candidates, true = _clipped("recovered", recovered[found]), _clipped("true", true)
    errors = np.array([np.mean((candidate[None] - true) ** 2, axis=(1, 2, 3)) for candidate in candidates])
    rows, columns = linear_sum_assignment(errors.reshape(len(candidates), len(true)))
    matched = np.full(len(true), -1, np.int64)
    matched[columns] = found[rows]
    return matched


def check_image_pairs(
    recovered: ArrayLike, true: ArrayLike, smallest: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both as float64, clipped to [0, 1].

    Raises:
      ValueError: unless both are finite, floating, of one shape (H, W, channels) or (N, H, W, channels), with sides of
        at least `smallest` pixels.
    """
    recovered, true = _floating("recovered", recovered), _floating("true", true)
    if recovered.shape != true.shape or recovered.ndim not in (3, 4) or 0 in recovered.shape:
        raise ValueError(
            "recovered and true must have one shape, (H, W, channels) or (N, H, W, channels), but have shapes"
            f" {recovered.shape} and {true.shape}"
        )
    if min(recovered.shape[-3:-1]) < smallest:
        raise ValueError(f"images must have sides of at least {smallest} pixels, but have shape {recovered.shape}")
    return _clipped("recovered", recovered), _clipped("true", true)


def _floating(name: str, images: ArrayLike) -> np.ndarray:
    array = np.asarray(images)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must be floating, on the scale [0, 1], but its dtype is {array.dtype}; divide 8-bit images by 255"
        )
    return array


def _clipped(name: str, images: np.ndarray) -> NDArray[np.float64]:
    bad = int(np.sum(~np.isfinite(images)))
    if bad:
        raise ValueError(f"{name} has {bad} entries that are NaN or infinite; leave out images that were not recovered")
    return np.clip(images.astype(np.float64), 0.0, 1.0)
