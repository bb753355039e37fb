"""Entrywise activation functions, with what an observer uses of them: inverse, range, and the values of the slope."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["ACTIVATIONS", "ActivationFunction", "open_gates"]


class ActivationFunction(NamedTuple):
    """A function of one number, and its inverse on what it can be.

    Attributes:
      apply: the function. invert: its inverse; where it is flat at a limit, of what lies between the limits; None where
        it falls and rises.
      low, high: infimum and supremum of its values.
      one_to_one: False where inputs that differ can have one value.
      slopes: (lower, upper), the two values that its derivative takes, or None where it takes others.
    """

    apply: Callable[[jax.Array], jax.Array]
    invert: Callable[[jax.Array], jax.Array] | None
    low: float
    high: float
    one_to_one: bool = True
    slopes: tuple[float, float] | None = None


def _identity(values: jax.Array) -> jax.Array:
    return values


LEAK = 0.01  # flax's and PyTorch's default slope.

ACTIVATIONS: dict[str, ActivationFunction] = {
    "identity": ActivationFunction(_identity, _identity, -jnp.inf, jnp.inf),
    "sigmoid": ActivationFunction(jax.nn.sigmoid, jax.scipy.special.logit, 0.0, 1.0),
    "tanh": ActivationFunction(jnp.tanh, jnp.arctanh, -1.0, 1.0),
    "softplus": ActivationFunction(jax.nn.softplus, lambda a: a + jnp.log(-jnp.expm1(-a)), 0.0, jnp.inf),
    "elu": ActivationFunction(jax.nn.elu, lambda a: jnp.where(a > 0, a, jnp.log1p(jnp.minimum(a, 0.0))), -1.0, jnp.inf),
    "leaky_relu": ActivationFunction(
        jax.nn.leaky_relu, lambda a: jnp.where(a > 0, a, a / LEAK), -jnp.inf, jnp.inf, slopes=(LEAK, 1.0)
    ),
    "relu": ActivationFunction(jax.nn.relu, _identity, 0.0, jnp.inf, one_to_one=False, slopes=(0.0, 1.0)),
    # Not one to one: both fall before they rise. gelu is PyTorch's default, gelu_tanh flax's.
    "gelu": ActivationFunction(lambda z: jax.nn.gelu(z, approximate=False), None, -0.17, jnp.inf, one_to_one=False),
    "gelu_tanh": ActivationFunction(lambda z: jax.nn.gelu(z, approximate=True), None, -0.17, jnp.inf, one_to_one=False),
    "silu": ActivationFunction(jax.nn.silu, None, -0.2785, jnp.inf, one_to_one=False),
    "relu6": ActivationFunction(jax.nn.relu6, _identity, 0.0, 6.0, one_to_one=False, slopes=(0.0, 1.0)),
    "hard_tanh": ActivationFunction(jax.nn.hard_tanh, _identity, -1.0, 1.0, one_to_one=False, slopes=(0.0, 1.0)),
}


def open_gates(function: str, before: jax.Array) -> jax.Array:
    """Where the derivative has the larger of its two values, as booleans; before: what enters the activation."""
    slopes = ACTIVATIONS[function].slopes
    assert slopes is not None
    slope = jax.grad(lambda values: jnp.sum(ACTIVATIONS[function].apply(values)))(before)
    return slope > (slopes[0] + slopes[1]) / 2
