"""The factor that all examples of a gradient share, from labels that have one level on several classes.

With g = c (p - y), two classes at the same level of y give p_i - p_j = (g_i - g_j) / c. Pairs of other classes give
anything: the factor is where many pairs agree, of whatever examples.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["CommonScale", "common_scale"]

# Pairs of classes looked at, of each example; and the relative error up to which one counts.
PAIRS = 200
LARGEST_ERROR = 0.05
# Agreeing pairs, beyond ten times as many as chance would bring together.
FEWEST = 10
WIDTH = 4.0


class CommonScale(NamedTuple):
    """c, and its standard deviation."""

    value: float
    deviation: float


def common_scale(
    prediction: np.ndarray, gradient: np.ndarray, prediction_error: np.ndarray, gradient_error: np.ndarray
) -> CommonScale | None:
    """The factor on which pairs of classes agree; None where they do not. All arrays (k, C)."""
    classes = prediction.shape[1]
    first, second = np.triu_indices(classes, 1)
    if len(first) > PAIRS:
        chosen = np.random.default_rng(0).choice(len(first), PAIRS, replace=False)
        first, second = first[chosen], second[chosen]
    rise = gradient[:, first] - gradient[:, second]
    run = prediction[:, first] - prediction[:, second]
    with np.errstate(all="ignore"):
        slope = run / rise
        error = np.hypot(prediction_error[:, first], prediction_error[:, second])
        error = np.hypot(error, np.abs(slope) * np.hypot(gradient_error[:, first], gradient_error[:, second]))
        error = error / np.abs(rise)
        good = np.isfinite(slope) & (slope != 0) & (error < LARGEST_ERROR * np.abs(slope))
    slope, error = slope[good], error[good]
    if len(slope) < FEWEST:
        return None
    order = np.argsort(slope)
    slope, error = slope[order], error[order]
    low = np.searchsorted(slope, slope - WIDTH * error, side="left")
    high = np.searchsorted(slope, slope + WIDTH * error, side="right")
    # As often as slopes of this size are met, spread evenly over it.
    chance = len(slope) * 2 * WIDTH * error / np.abs(slope)
    excess = (high - low) - 10 * chance
    best = int(np.argmax(excess))
    if excess[best] < FEWEST:
        return None
    members = slice(low[best], high[best])
    weights = 1 / error[members] ** 2
    value = float(np.sum(weights * slope[members]) / np.sum(weights))
    # Pairs share classes: as many are independent as there are classes.
    deviation = float(np.sqrt(classes / np.sum(weights)))
    return CommonScale(1 / value, deviation / value**2)
