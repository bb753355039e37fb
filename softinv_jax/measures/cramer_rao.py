"""The Cramer-Rao bound: how well any unbiased observer could know the label from a noisy gradient."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["label_bound"]


def label_bound(
    weight: ArrayLike, feature: ArrayLike, label: ArrayLike, targets: ArrayLike, noise: float
) -> NDArray[np.float64]:
    """Covariance bound of the label from G = g x^T + Gaussian noise on a bias-free head.

    The unknowns are the d features and the weights of the `targets`; all other classes share what is left, which
    is what an observer assumes who is told nothing but that most classes are equal. The Fisher information of
    vec(g x^T) in both has closed blocks. Needs the truth: for evaluation only.

    Args:
      weight: (C, d) head weight. feature: (d,) true feature. label: (C,) true soft label.
      targets: (k,) int, the classes the label singles out, k >= 1.
      noise: standard deviation of each gradient entry.

    Returns:
      (C, C) float64: no unbiased estimate of the label has a smaller covariance.
    """
    weight, feature, label = (np.asarray(value, np.float64) for value in (weight, feature, label))
    number_of_classes = weight.shape[0]
    logits = weight @ feature
    prediction = np.exp(logits - logits.max())
    prediction /= prediction.sum()
    gradient = prediction - label
    slope = np.diag(prediction) - np.outer(prediction, prediction)
    by_target = np.eye(number_of_classes)[:, np.asarray(targets)] - 1 / number_of_classes
    sloped = slope @ weight
    square = feature @ feature
    cross = np.outer(sloped.T @ gradient, feature)
    feature_block = square * sloped.T @ sloped + cross + cross.T + gradient @ gradient * np.eye(feature.size)
    mixed_block = -(square * sloped.T @ by_target + np.outer(feature, gradient @ by_target))
    target_block = square * by_target.T @ by_target
    information = target_block - mixed_block.T @ np.linalg.solve(feature_block, mixed_block)
    return noise**2 * by_target @ np.linalg.inv(information) @ by_target.T
