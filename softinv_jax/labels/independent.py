"""Independent sigmoids (binary cross-entropy over C outputs): labels of zeros and ones, as many ones as there are.

    dL/dz_j = s (sigmoid(z_j) - y_j),        z = lambda W v,        kappa u = sigmoid(lambda W v) - y

An entry of u has the sign of its label, 0 or 1, turned by the sign of lambda. So |kappa u_j| is sigmoid(z_j) or
1 - sigmoid(z_j): C equations for kappa, and for lambda where no bias tells it. Nothing else makes them agree. Without a
bias, (x, y) and (-x, 1 - y) have the same gradient; features that are never negative, as after ReLU, tell which.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.float64 import argmin
from softinv_jax.labels.assumptions import Loss
from softinv_jax.labels.consensus import Consensus, independent_classes
from softinv_jax.labels.explanations import SHARP_LABEL, UNIQUE_SURPRISE, Explanations, is_unbalanced
from softinv_jax.labels.losses import Outcome
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import TOLERANCE, ScalarEquation, label_deviation

__all__ = ["explain_independent_outputs"]

STARTS = 48
STEPS = 24


class _Fit(NamedTuple):
    """One solution; () but for the classes. `used`: (C,) bool, entries that stand out of their own errors."""

    scalar: jax.Array
    factor: jax.Array
    scalar_deviation: jax.Array
    factor_deviation: jax.Array
    label: jax.Array
    deviation: jax.Array
    used: jax.Array
    misfit: jax.Array
    step: jax.Array


def explain_independent_outputs(reading: Reading, *, told_scale: bool, has_bias: bool, listed: int) -> Outcome:
    """The zeros and ones that explain the gradient, if any do.

    Args:
      reading: of one gradient. told_scale, has_bias: static. The scale that is told is that of the mean over the C
        outputs, PyTorch's default. listed: static, how many explanations to make room for.
    """
    equation = reading.equation
    if has_bias:
        fit = _fit(equation, equation.known_scalar, free=False)
        alone = jnp.asarray(True)
    else:
        fit, alone = _fit_scalar(equation, reading.feature_sign)
    explanations = _described(equation, fit, free=not has_bias)
    loss = jnp.int32(Loss.WEIGHTED_BINARY_CROSS_ENTROPY)
    if told_scale:
        loss = jnp.where(_is_mean(equation, fit), jnp.int32(Loss.BINARY_CROSS_ENTROPY), loss)
    else:
        loss = jnp.int32(Loss.BINARY_CROSS_ENTROPY)
    surprise = explanations.surprise
    sharp = TOLERANCE * jnp.max(explanations.label_deviation) <= SHARP_LABEL
    # Without a bias nothing but the sign of the features tells a label from its complement.
    turned = jnp.asarray(has_bias) | (reading.feature_sign != 0)
    shown = explanations.fits & (surprise >= UNIQUE_SURPRISE) & is_unbalanced(equation)
    unique = shown & sharp & alone & turned
    first = jnp.arange(listed, dtype=jnp.int32) == 0
    found = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (listed, *leaf.shape)), explanations)
    return Outcome(
        explanations=Explanations(found, jnp.zeros((), bool), jnp.zeros_like(equation.left), jnp.asarray(jnp.inf)),
        listed=shown & first,
        scalar=jnp.asarray(not has_bias),
        scale=jnp.asarray(True),
        loss=loss,
        unique=unique,
        logit_error=jnp.zeros(()),
    )


def _is_mean(equation: ScalarEquation, fit: _Fit) -> jax.Array:
    """Whether kappa is that of the mean over the outputs, or of their sum."""
    relative = TOLERANCE * fit.factor_deviation / jnp.abs(fit.factor) + 1e-6
    over = fit.factor * fit.scalar
    classes = 1.0 * equation.left.size
    return (jnp.abs(over / classes - 1) <= relative) | (jnp.abs(over - 1) <= relative)


def _fit(equation: ScalarEquation, scalar: jax.Array, *, free: bool) -> _Fit:
    """kappa from all entries at one lambda, by weighted least squares in its logarithm."""
    orientation = jnp.where(scalar < 0, -1.0, 1.0)
    gradient = orientation * equation.left
    label = (gradient < 0).astype(jnp.float64)
    turned = jnp.where(label > 0, -1.0, 1.0)
    logits = scalar * equation.direction + equation.offset
    expected = jax.nn.sigmoid(turned * logits)
    prediction = jax.nn.sigmoid(logits)
    size = jnp.abs(equation.left)
    mean = jnp.sum(expected) / jnp.where(jnp.sum(size) > 0, jnp.sum(size), 1.0)
    # An error of a logit reaches its own sigmoid with the sigmoid's slope.
    deviation = label_deviation(equation, scalar, mean, prediction * (1 - prediction), label)
    deviation = jnp.hypot(deviation, equation.roundoff * expected)
    used = (expected > TOLERANCE * deviation) & (size > 0)
    relative = jnp.where(used, deviation / jnp.where(used, expected, 1.0), 1.0)
    weights = jnp.where(used, 1 / relative**2, 0.0)
    total = jnp.maximum(jnp.sum(weights), 1e-300)
    distance = jnp.where(used, jnp.log(jnp.where(used, expected, 1.0) / jnp.where(used, size, 1.0)), 0.0)
    level = jnp.sum(weights * distance) / total
    residual = jnp.where(used, (distance - level) / relative, 0.0)
    freedom = jnp.maximum(jnp.sum(used) - 1 - int(free), 1)
    slope = jnp.where(used, turned * equation.direction * (1 - expected), 0.0)
    centred = slope - jnp.sum(weights * slope) / total
    information = jnp.sum(weights * centred**2)
    return _Fit(
        scalar=scalar,
        factor=orientation * jnp.exp(level),
        scalar_deviation=jax.lax.rsqrt(jnp.maximum(information, 1e-300)) if free else jnp.zeros(()),
        factor_deviation=jnp.exp(level) * jax.lax.rsqrt(total),
        label=label,
        deviation=deviation,
        used=used,
        misfit=jnp.sum(residual**2) / freedom,
        step=jnp.where(information > 0, -jnp.sum(weights * centred * (distance - level)) / information, 0.0),
    )


def _fit_scalar(equation: ScalarEquation, feature_sign: jax.Array) -> tuple[_Fit, jax.Array]:
    """lambda too, from many starts of the sign that the features tell; and () bool, whether no other start fits."""
    spread = jnp.max(jnp.abs(equation.direction))
    magnitudes = jnp.geomspace(0.02, 300.0, STARTS) / jnp.where(spread > 0, spread, 1.0)
    sign = jnp.where(feature_sign < 0, -1.0, 1.0)

    def refine(start: jax.Array) -> _Fit:
        def step(_: int, scalar: jax.Array) -> jax.Array:
            return _moved(_fit(equation, scalar, free=True))

        return _fit(equation, jax.lax.fori_loop(0, STEPS, step, sign * start), free=True)

    fits = jax.vmap(refine)(magnitudes)
    cost = jnp.where(jnp.isfinite(fits.misfit), fits.misfit, jnp.inf)
    best = argmin(cost)
    chosen = jax.tree.map(lambda leaf: leaf[best], fits)
    apart = jnp.abs(fits.scalar - chosen.scalar) > TOLERANCE * (fits.scalar_deviation + chosen.scalar_deviation)
    return chosen, ~jnp.any((cost <= (TOLERANCE / 2) ** 2) & apart)


def _moved(fit: _Fit) -> jax.Array:
    """() lambda after a Gauss-Newton step, at most a halving or a doubling."""
    reach = jnp.abs(fit.scalar)
    return fit.scalar + jnp.clip(fit.step, -reach / 2, reach)


def _described(equation: ScalarEquation, fit: _Fit, *, free: bool) -> Consensus:
    """The fit as a `Consensus`: the zeros are the classes that agree."""
    classes = fit.label.size
    margin = TOLERANCE * fit.deviation
    size = jnp.abs(fit.factor * equation.left)
    # Outputs of one logit and one label agree at every lambda alike; a label is 0 or 1, and an entry at most 1.
    independent, _ = independent_classes(size + 2 * fit.label, margin, fit.used)
    # Either of two values would have done.
    nats = jnp.log(jnp.maximum(jnp.minimum(0.5, size) / (2 * margin), 1.0)) - jnp.log(2.0)
    nats = jnp.where(independent, jnp.maximum(nats, 0.0), 0.0)
    surprise = jnp.sum(nats) - (1 + int(free)) * jnp.max(nats)
    label_deviation_ = jnp.hypot(fit.deviation, size * fit.factor_deviation / jnp.abs(fit.factor))
    agreeing = fit.label == 0
    fits = fit.misfit <= (TOLERANCE / 2) ** 2
    # What drowns in its own errors has a sign by accident.
    fits = fits & jnp.all(fit.used | (fit.deviation * TOLERANCE < 0.5))
    zero = jnp.zeros(())
    return Consensus(
        scalar=fit.scalar,
        factor=fit.factor,
        level=zero,
        scalar_deviation=fit.scalar_deviation,
        factor_deviation=fit.factor_deviation,
        level_deviation=zero,
        agreeing=agreeing,
        label=fit.label,
        label_deviation=label_deviation_,
        deviation_without_one=label_deviation_,
        surprise=jnp.where(fits, surprise, jnp.minimum(surprise, 0.0)),
        informative=jnp.sum(independent, dtype=jnp.int32),
        levels=jnp.int32(classes),
        fits=fits,
        misfit=fit.misfit,
    )
