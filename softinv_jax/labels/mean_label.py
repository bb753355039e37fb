"""The mean label of many examples behind one gradient, from a head with a bias.

The bias gradient is mean p - mean y, exactly. So the mean label is known as well as the mean prediction is. Row j of
the gradient is dL/db_j times the mean feature, but for what the examples of class j differ from the others: every row
is an estimate of the mean feature, the rows of classes that nobody has the best ones. The scatter of the rows about
their best common feature says how far that feature can be trusted, and how much the predictions of single examples
scatter.

The idea to divide rows by the bias gradient is from Ma et al., Instance-wise Batch Label Restoration via Gradients in
Federated Learning (iLRG), ICLR 2023. The weights, the deviations and the second order are not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student_t

from softinv_jax.labels.verdicts import MeanLabel

__all__ = ["mean_label"]

ROUNDS = 6
# What rows of classes that nobody has still scatter by: features and predictions of one example go together.
SHARED = 0.02
# What the rows stand for is a model of the examples: its correction is trusted to this many times its own size.
DOUBT = 2.0
# Student's t at what six deviations are to hold, 99.99 %, over six.
FREEDOMS = np.geomspace(0.5, 100, 60)
EXCESS = np.maximum(student_t.ppf(1 - 0.5e-4, FREEDOMS) / 6, 1.0)
# Rows that decide the feature by themselves show no scatter of their own.
LARGEST_LEVERAGE = 0.95


def mean_label(
    weight: jax.Array, gradient: jax.Array, bias: jax.Array, bias_gradient: jax.Array, examples: jax.Array | float
) -> MeanLabel:
    """Mean label and its deviations.

    Args:
      weight, gradient: (C, d) float64 W and dL/dW, of the mean over the examples. bias, bias_gradient: (C,).
      examples: () how many there are, or at least are.

    Returns:
      (C,) and (C,) float64. Deviations hold the errors of the mean feature and of the second order in how much single
      examples differ from it.
    """
    start = gradient.T @ bias_gradient / jnp.maximum(jnp.sum(bias_gradient**2), 1e-300)

    def reweigh(_: int, feature: jax.Array) -> jax.Array:
        return _common_feature(gradient, bias_gradient, _row_variance(weight, bias, bias_gradient, feature))[0]

    feature = jax.lax.fori_loop(0, ROUNDS, reweigh, start)
    variance = _row_variance(weight, bias, bias_gradient, feature)
    feature, shares, leverage = _common_feature(gradient, bias_gradient, variance)
    logits = weight @ feature + bias
    prediction = jax.nn.softmax(logits)
    scatter = gradient - bias_gradient[:, None] * feature[None, :]
    scatter = scatter / (1 - jnp.minimum(leverage, LARGEST_LEVERAGE))[:, None]
    moved = scatter @ weight.T  # (C, C) of the logits, by the scatter of each row.

    def prediction_with(shift: jax.Array) -> jax.Array:
        return jax.nn.softmax(logits[None, :] + shift, axis=1)

    # What each row, were it another one of its kind, would have made of the mean feature.
    of_feature = jnp.sum((prediction_with(moved * shares[:, None]) - prediction[None, :]) ** 2, axis=0)
    # A row of a class that n of B examples have scatters by sqrt(n) / B of what one example does.
    share = jnp.maximum(prediction - bias_gradient, 0.5 / examples)
    single = moved * jnp.sqrt(examples / share)[:, None]
    either_way = (prediction_with(single) + prediction_with(-single)) / 2
    bend = share @ (either_way - prediction[None, :]) / jnp.sum(share)
    # The kinds of examples that the rows stand for are few: where they change the whole, they are wrong in part.
    whole = (prediction + bend) * jnp.sum(jnp.abs(bend))
    # As many rows as really count are few independent estimates, whose scatter is itself uncertain: Student's t.
    freedom = 1 / jnp.maximum(jnp.sum(leverage**2), 1e-300) - 1
    excess = jnp.interp(freedom, jnp.asarray(FREEDOMS), jnp.asarray(EXCESS))
    deviation = jnp.sqrt(excess**2 * of_feature + DOUBT**2 * (bend**2 + whole**2))
    return MeanLabel(prediction + bend - bias_gradient, deviation)


def _row_variance(weight: jax.Array, bias: jax.Array, bias_gradient: jax.Array, feature: jax.Array) -> jax.Array:
    """(C,) how much each row scatters, in units of one example's features over the batch size."""
    prediction = jax.nn.softmax(weight @ feature + bias)
    return jnp.maximum(prediction - bias_gradient, 0.0) + SHARED * prediction


def _common_feature(
    gradient: jax.Array, bias_gradient: jax.Array, variance: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(d,) the feature that explains the rows best, (C,) the share of each row in it, and (C,) its leverage."""
    weights = bias_gradient / jnp.maximum(variance, 1e-300)
    total = jnp.maximum(jnp.sum(weights * bias_gradient), 1e-300)
    return gradient.T @ weights / total, weights / total, weights * bias_gradient / total
