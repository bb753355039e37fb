"""The paper's own search: the scalar at which all but the largest one or two label entries vary least.

Wang, Liang, He, ICLR 2024, section 3: variance of all but the top entry for label smoothing (and hard labels), of all
but the top two for mixup; the format must be told. Their search is L-BFGS from +1 and -1 with particle swarms as
fallback; here L-BFGS runs from many starting points at once, compiled, and the lowest valid end point is taken.
The loss tends to zero as lambda grows (y tends to one-hot), so a small loss alone proves nothing: the verdict comes
from the same certificate as for `exact`.
"""

import jax
import jax.numpy as jnp
import optax

from softinv_jax.float64 import argmin, sort
from softinv_jax.labels.scalar_equation import ScalarEquation

__all__ = ["FORMATS", "minimise_variance", "variance_loss"]

FORMATS = {"smoothing": 1, "mixup": 2}
STEPS = 12
SETTLING = 6
STARTS = 16


def variance_loss(equation: ScalarEquation, scalar: jax.Array, excluded: int) -> jax.Array:
    """Variance of all but the `excluded` largest entries of y(lambda) (paper, section 3.3); () for () lambda."""
    prediction = jax.nn.softmax(scalar * equation.direction + equation.offset)
    label = prediction - equation.left / scalar
    kept = sort(label)[: label.size - excluded]
    return jnp.mean((kept - jnp.mean(kept)) ** 2)


def minimise_variance(equation: ScalarEquation, excluded: int) -> tuple[jax.Array, jax.Array]:
    """L-BFGS (optax, with zoom line search) on log |lambda| from starting points of both signs.

    Args:
      equation: the scalar equation of a bias-free head with known scale.
      excluded: static, 1 for smoothing and hard labels, 2 for mixup.

    Returns:
      () lambda and () its loss: the lowest of the end points whose label lies in [0, 1] up to 1e-3, followed to
      its minimum.
    """
    magnitudes = _starting_magnitudes(equation)
    starts = jnp.concatenate([magnitudes, magnitudes])
    signs = jnp.concatenate([jnp.ones(STARTS), -jnp.ones(STARTS)])
    scalars = jax.vmap(lambda start, sign: _descend(equation, start, sign, excluded))(starts, signs)

    def settle(_: int, at: jax.Array) -> jax.Array:
        return jax.vmap(lambda scalar: _settle(equation, scalar, excluded))(at)

    scalars = jax.lax.fori_loop(0, SETTLING, settle, scalars)
    losses = jax.vmap(lambda scalar: variance_loss(equation, scalar, excluded))(scalars)
    # Beyond the starting points the loss only falls to zero with the prediction's last doubt.
    inside = jnp.abs(scalars) <= 2 * jnp.exp(magnitudes[-1])
    valid = jax.vmap(lambda scalar: _is_label(equation, scalar))(scalars)
    best = argmin(jnp.where(valid & inside, losses, jnp.inf))
    return scalars[best], losses[best]


def _starting_magnitudes(equation: ScalarEquation) -> jax.Array:
    """(STARTS,) log |lambda|: logit ranges of 0.1 to 300, flatter and sharper than any trained network predicts."""
    spread = jnp.max(equation.direction) - jnp.min(equation.direction)
    spread = jnp.where(spread > 0, spread, 1.0)
    return jnp.log(jnp.geomspace(0.1, 300.0, STARTS)) - jnp.log(spread)


def _descend(equation: ScalarEquation, start: jax.Array, sign: jax.Array, excluded: int) -> jax.Array:
    """() the scalar of the lowest loss on the way of L-BFGS from one start."""
    optimiser = optax.lbfgs(
        memory_size=5, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=5, initial_guess_strategy="one")
    )

    def loss(log_magnitude: jax.Array) -> jax.Array:
        # The logarithm of the loss has the same minima and a useful slope near them.
        value = variance_loss(equation, sign * jnp.exp(log_magnitude), excluded)
        return jnp.log(value + 1e-30)

    value_and_gradient = optax.value_and_grad_from_state(loss)

    def step(_: int, carry: tuple) -> tuple:
        position, state, best, lowest = carry
        value, gradient = value_and_gradient(position, state=state)
        better = value < lowest
        best, lowest = jnp.where(better, position, best), jnp.where(better, value, lowest)
        updates, state = optimiser.update(gradient, state, position, value=value, grad=gradient, value_fn=loss)
        moved = optax.apply_updates(position, updates)
        return jnp.where(jnp.isfinite(moved), moved, position), state, best, lowest

    carry = (start, optimiser.init(start), start, jnp.full((), jnp.inf))
    _, _, best, _ = jax.lax.fori_loop(0, STEPS, step, carry)
    return sign * jnp.exp(best)


def _label(equation: ScalarEquation, scalar: jax.Array) -> jax.Array:
    return jax.nn.softmax(scalar * equation.direction + equation.offset) - equation.left / scalar


def _is_label(equation: ScalarEquation, scalar: jax.Array) -> jax.Array:
    label = _label(equation, scalar)
    return jnp.all((label > -1e-3) & (label < 1 + 1e-3))


def _settle(equation: ScalarEquation, scalar: jax.Array, excluded: int) -> jax.Array:
    """Gauss-Newton: the loss is a sum of squares, and L-BFGS on its logarithm stops short of the minimum."""

    def residual(at: jax.Array) -> jax.Array:
        label = _label(equation, at)
        kept = sort(label)[: label.size - excluded]
        return kept - jnp.mean(kept)

    value, slope = jax.jvp(residual, (scalar,), (jnp.ones(()),))
    moved = scalar - jnp.sum(value * slope) / jnp.sum(slope**2)
    better = jnp.sum(residual(moved) ** 2) < jnp.sum(value**2)
    return jnp.where(better, moved, scalar)
