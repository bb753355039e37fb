"""The published count of instances, rendered in NumPy: the peer of the benchmark of class counts.

Source of the procedure: Ma, Sun, Cui, Li, Guan and Liu, "Instance-wise Batch Label Restoration via Gradients in
Federated Learning" (iLRG), ICLR 2023, section 4. Only the procedure is theirs: the code is our own and copies none of
theirs.

Row c of dL/dW over entry c of dL/db stands for the mean feature of the examples of class c, and the softmax of its
logits for their mean prediction p_c. The B examples have n_c of each class, so that

    sum_c n_c = B,        sum_c n_c p_c - n = B dL/db,

C + 1 linear equations, solved by the pseudoinverse; negative numbers become 0, the others are rounded.
"""

from __future__ import annotations

import numpy as np

__all__ = ["count_published"]

LARGEST_RATIO = 1e10  # Of a row whose entry of dL/db is nought.


def count_published(
    weight: np.ndarray, gradient: np.ndarray, bias: np.ndarray, bias_gradient: np.ndarray, batch_size: int
) -> np.ndarray:
    """(C,) int, how many examples each class has, from (C, d) W and dL/dW and (C,) b and dL/db."""
    weight, gradient, bias, bias_gradient = (
        np.asarray(array, np.float64) for array in (weight, gradient, bias, bias_gradient)
    )
    entry = np.where(bias_gradient == 0, 1e-64, bias_gradient)
    features = np.clip(gradient / entry[:, None], -LARGEST_RATIO, LARGEST_RATIO)
    logits = features @ weight.T + bias
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    predictions = powers / powers.sum(axis=1, keepdims=True)  # (C of the row, C).
    left = np.concatenate([np.ones((1, len(bias))), predictions.T - np.eye(len(bias))])
    right = np.concatenate([[batch_size], batch_size * bias_gradient])
    counts = np.round(np.maximum(np.linalg.pinv(left) @ right, 0)).astype(int)
    return np.where(counts <= batch_size, counts, 0)
