"""How far a recovered label and feature are from the truth; for evaluation only, no attack sees the truth."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["LabelError", "feature_error", "label_error"]


class LabelError(NamedTuple):
    """Errors of N labels; NaN where nothing was recovered.

    Attributes:
      largest: (N,) largest absolute error of an entry.
      squared: (N,) sum of the squared errors of the entries.
    """

    largest: NDArray[np.float64]
    squared: NDArray[np.float64]


def label_error(recovered: ArrayLike, true: ArrayLike) -> LabelError:
    """Errors of recovered labels, example by example.

    Args:
      recovered: (N, C); a row with a NaN counts as not recovered.
      true: (N, C).

    Raises:
      ValueError: if the shapes differ or are not (N, C).
    """
    recovered, true = _two_tables(recovered, true, "(N, C)")
    difference = recovered - true
    return LabelError(largest=np.max(np.abs(difference), axis=1), squared=np.sum(difference**2, axis=1))


def feature_error(recovered: ArrayLike, true: ArrayLike) -> NDArray[np.float64]:
    """Relative errors |recovered - true| / |true| of features, (N,); NaN where nothing was recovered.

    Args:
      recovered: (N, d). true: (N, d); a zero feature gives 0 if it is recovered exactly and infinity otherwise.

    Raises:
      ValueError: if the shapes differ or are not (N, d).
    """
    recovered, true = _two_tables(recovered, true, "(N, d)")
    error, size = np.linalg.norm(recovered - true, axis=1), np.linalg.norm(true, axis=1)
    of_zero = np.where(error > 0, np.inf, error)  # Keeps NaN.
    return np.where(size > 0, error / np.where(size > 0, size, 1.0), of_zero)


def _two_tables(recovered: ArrayLike, true: ArrayLike, shape: str) -> tuple[np.ndarray, np.ndarray]:
    # float64, so that the difference of two nearly equal float32 numbers is exact.
    recovered, true = np.asarray(recovered, np.float64), np.asarray(true, np.float64)
    if recovered.ndim != 2 or recovered.shape != true.shape or recovered.shape[1] == 0:
        raise ValueError(f"recovered and true must have one shape {shape}, but have {recovered.shape} and {true.shape}")
    return recovered, true
