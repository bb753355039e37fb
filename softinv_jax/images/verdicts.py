"""What an image recovery claims, and the result that carries the claim with its evidence."""

import enum
from dataclasses import dataclass

import numpy as np

__all__ = ["EXPLAINED", "ImageRecovery", "ImageVerdict", "image_verdict_names", "judge_image"]

GRAY_LEVELS = 255
# Misfit of all equations, in units of the gradient's rounding, up to which they are met to the last digit: the client
# rounds every product of a sum, which makes a few units. Wrong images leave thousands.
EXPLAINED = 4.0


class ImageVerdict(enum.IntEnum):
    """How sure a recovered image is.

    Attributes:
      NOT_FOUND: its last-layer feature was not recovered; there is no image.
      UNDETERMINED: a layer has fewer independent equations than unknowns: one of many images that fit.
      INCONSISTENT: the image's own gradient is not the one observed (another model, noise, or too ill-conditioned).
      APPROXIMATE: its gradient is the one observed, but the expected error exceeds half a gray level of 8 bits.
      EXACT: its gradient is the one observed, every layer is determined, and the expected error is below that.
    """

    NOT_FOUND = 0
    UNDETERMINED = 1
    INCONSISTENT = 2
    APPROXIMATE = 3
    EXACT = 4


def image_verdict_names(codes: object) -> np.ndarray:
    """Verdict codes of any shape as lower-case strings."""
    return np.array([verdict.name.lower() for verdict in ImageVerdict])[np.asarray(codes)]


def judge_image(determined: bool, distance: float, error: float, image: np.ndarray, roundoff: float) -> ImageVerdict:
    """The verdict on an image that was found.

    Args:
      determined: whether every layer has equations enough. distance: relative, of its gradient and the one observed.
      error: root mean square to expect. image: for its range. roundoff: of the gradient's dtype.
    """
    if not determined or not np.all(np.isfinite(image)):
        return ImageVerdict.UNDETERMINED
    # Agreement in half of the digits of the gradient's dtype: no other image has that by accident.
    if not distance <= np.sqrt(roundoff):
        return ImageVerdict.INCONSISTENT
    return ImageVerdict.EXACT if error <= np.ptp(image) / (2 * GRAY_LEVELS) else ImageVerdict.APPROXIMATE


@dataclass(frozen=True)
class ImageRecovery:
    """What N gradients of B examples each give away; NumPy arrays.

    Attributes:
      images: (N, B, H, W, channels) on the scale of the model's input; NaN where not found.
      labels: (N, B, C) and features: (N, B, d) they rest on. label_verdict: (N, B) int32, a `labels.verdicts.Verdict`.
      verdict: (N, B) int32, an `ImageVerdict`.
      residual: (N,) relative distance between the gradient of the images and the one observed: the largest over the
        parameters, or of all of them together where images were matched and not refined; NaN where not all examples
        were found.
      expected_error: (N, B) root mean square over the image's entries that the gradient's rounding leads one to expect;
        of the layer-by-layer inversion, before any refinement.
      condition: (N, L) of each layer's equations, in the order of `layers`, scaled to columns of length one; as far as
        the solver met it. misfit: (N, L) root mean square residual of each layer in standard deviations.
      layers: names, from the last before the head to the first.
    """

    images: np.ndarray
    labels: np.ndarray
    features: np.ndarray
    label_verdict: np.ndarray
    verdict: np.ndarray
    residual: np.ndarray
    expected_error: np.ndarray
    condition: np.ndarray
    misfit: np.ndarray
    layers: tuple[str, ...]
