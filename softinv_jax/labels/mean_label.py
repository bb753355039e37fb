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
# Student's t at what six deviations are to hold, 99.99 %, over six.
FREEDOMS = np.geomspace(0.5, 100, 60)
EXCESS = np.maximum(student_t.ppf(1 - 0.5e-4, FREEDOMS) / 6, 1.0)
# Rows that decide the feature by themselves show no scatter of their own.
LARGEST_LEVERAGE = 0.95
PREDICTION_ROUNDS = 8
KNOWN = 2.0  # Standard deviations by which the logit of an example that is known already lies higher.
ALONE = 0.9  # Examples: of a class with fewer there is one at most.
ROUNDING = 2.0**-23  # Of the client, in single precision.


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
    # As many rows as really count are few independent estimates, whose scatter is itself uncertain: Student's t.
    freedom = 1 / jnp.maximum(jnp.sum(leverage**2), 1e-300)
    excess = jnp.interp(freedom, jnp.asarray(FREEDOMS), jnp.asarray(EXCESS))
    mean, error = _mean_prediction(logits, moved, bias_gradient, examples)
    label = mean - bias_gradient
    rounding = ROUNDING * ((1 + jnp.max(jnp.abs(logits))) * (mean + jnp.abs(label)) + 1 / examples)
    return MeanLabel(label, jnp.sqrt(excess**2 * of_feature + error**2 + rounding**2))


def _mean_prediction(
    logits: jax.Array, moved: jax.Array, bias_gradient: jax.Array, examples: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """(C,) mean of the softmax over examples whose logits differ, and (C,) how far it can be off.

    With share n_c / B of class c, whose logits are off the mean by m_c, and prediction p_k of the examples of class k,

        scatter of row c  =  sum_k n_k / B p_kc m_k - n_c / B m_c.

    Solved for m in rounds. Within a class examples scatter as much as n_c of them make the mean of a class scatter.
    """
    prediction = jax.nn.softmax(logits)
    present = 0.25 / examples

    def around(mean: jax.Array, offsets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        share = mean - bias_gradient
        share = jnp.where(share > present, share, 0.0)
        within = jnp.sqrt(jnp.maximum(examples * share - 1, 0.0))[:, None]
        middle = jax.nn.softmax(logits[None, :] + offsets, axis=1)
        higher = jax.nn.softmax(logits[None, :] + offsets * (1 + within), axis=1)
        lower = jax.nn.softmax(logits[None, :] + offsets * (1 - within), axis=1)
        return share, middle, higher, lower

    def improve(_: int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, _before, offsets = state
        share, middle, higher, lower = around(mean, offsets)
        other = middle.T @ (share[:, None] * offsets) - moved
        offsets = jnp.where(share[:, None] > 0, other / jnp.maximum(share, present)[:, None], 0.0)
        share, middle, higher, lower = around(mean, offsets)
        return share @ (higher + lower) / (2 * jnp.maximum(jnp.sum(share), present)), mean, offsets

    start = (prediction, prediction, jnp.zeros_like(moved))
    mean, before, offsets = jax.lax.fori_loop(0, PREDICTION_ROUNDS, improve, start)
    share, middle, higher, lower = around(mean, offsets)
    unseen = share @ jnp.abs((higher + lower) / 2 - middle)
    whole = mean * jnp.sum(unseen)
    hidden = _hidden(share, logits, offsets, examples)
    return mean, jnp.sqrt(unseen**2 + whole**2 + hidden**2) + jnp.abs(mean - before)


def _hidden(share: jax.Array, logits: jax.Array, offsets: jax.Array, examples: jax.Array | float) -> jax.Array:
    """(C,) what examples that have next to no gradient do to the mean prediction.

    The network knows their class already: where a class has more than one example, those it knows go unseen behind
    those it does not. How far its logit rises for them is told by how it scatters among the classes.

    Args:
      share: (C,) of each class. logits: (C,) of the mean. offsets: (C, C) from them, of the examples of each class.
    """
    weights = share / jnp.maximum(jnp.sum(share), 1e-300)
    rise = jnp.diagonal(offsets)
    scatter = jnp.sqrt(weights @ (rise - weights @ rise) ** 2)
    odds = logits - jax.nn.logsumexp(logits)
    odds = odds - jnp.log(-jnp.expm1(jnp.minimum(odds, -1e-12)))  # Logit of the class against all others.
    known = jax.nn.sigmoid(odds + rise + KNOWN * scatter) - jax.nn.sigmoid(odds + rise)
    more = jnp.maximum(share - ALONE / examples, 0.0)
    of_own = jnp.sqrt(more / examples) * known
    # What is added to one class is missing from the others.
    return of_own + jnp.exp(logits - jax.nn.logsumexp(logits)) * jnp.sqrt(jnp.sum(of_own**2))


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
