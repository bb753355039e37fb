"""The equation in one unknown that a last-layer gradient leaves, and how exactly it can be known.

With G = u v^T, |v| = 1, the feature is x = lambda v and the soft label

    y = softmax(lambda z + b) - kappa u,        z = W v.

kappa turns u into dL/dz. Without a bias and with the gradient's scale known, kappa = 1 / lambda (Wang, Liang, He, ICLR
2024, section 3); with an unknown scale kappa is a second unknown; with a bias lambda is known.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "TOLERANCE",
    "DirectionNoise",
    "ScalarEquation",
    "Unknowns",
    "either",
    "label_deviation",
    "probabilities",
    "with_client_error",
]

# Two quantities agree when they differ by at most this many standard deviations. By chance a Gaussian error
# exceeds six in 2 of 10^9 cases: below one miss in a thousand samples of a thousand classes.
TOLERANCE = 6.0


class Unknowns(NamedTuple):
    """What is to be found beside the label.

    Python bools make a program for one case; traced ones make one program that serves every case.

    Attributes:
      scalar: lambda, unless the head has a bias.
      scale: kappa independently of lambda, where the gradient is known only up to a factor.
    """

    scalar: bool | jax.Array
    scale: bool | jax.Array


def either(flag: bool | jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """`yes` where the flag is true, else `no`; a Python flag keeps the other out of the program."""
    if isinstance(flag, bool):
        return yes if flag else no
    return jnp.where(flag, yes, no)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScalarEquation:
    """All arrays float64.

    Attributes:
      direction: (C,) z = W v.
      offset: (C,) b, the head's bias; zeros without one.
      left: (C,) u, with G = u v^T and |v| = 1.
      left_deviation: (C,) standard deviation of additive noise on u; zero for rounding alone.
      direction_deviation: (C,) standard deviation of z from additive noise on v; zero for rounding alone.
      weight_norm: (C,) |W_j|, which sets the rounding of the client's logits.
      roundoff: () unit roundoff of the gradient's dtype.
      logit_error: () standard deviation of what the client's own arithmetic, or parameters that are not quite those
        given, add to each logit; zero unless it is assumed.
      known_scalar: () lambda where the head has a bias, else NaN.
    """

    direction: jax.Array
    offset: jax.Array
    left: jax.Array
    left_deviation: jax.Array
    direction_deviation: jax.Array
    weight_norm: jax.Array
    roundoff: jax.Array
    logit_error: jax.Array
    known_scalar: jax.Array


class DirectionNoise(NamedTuple):
    """Covariance of the errors of z that noise on v makes, root root^T + diag(rest); float64.

    Attributes:
      root: (C, M). rest: (C,), or None where the root has all of it.
    """

    root: jax.Array
    rest: jax.Array | None


def probabilities(equation: ScalarEquation, scalar: jax.Array) -> jax.Array:
    """softmax(lambda z + b): (..., C) for lambda of shape (...)."""
    direction = jnp.broadcast_to(equation.direction, (*scalar.shape, equation.direction.size))
    offset = jnp.broadcast_to(equation.offset, direction.shape)
    return jax.nn.softmax(scalar[..., None] * direction + offset, axis=-1)


def with_client_error(equation: ScalarEquation, size: jax.Array) -> ScalarEquation:
    """The equation of a client whose logits, and whose dL/dz relatively, err by so much (TF32, bfloat16 autocast)."""
    return replace(
        equation,
        logit_error=size,
        left_deviation=jnp.hypot(equation.left_deviation, size * jnp.abs(equation.left)),
    )


def label_deviation(
    equation: ScalarEquation, scalar: jax.Array, factor: jax.Array, prediction: jax.Array, label: jax.Array
) -> jax.Array:
    """Standard deviation of each entry of y at given lambda and kappa, before their own errors.

    Three sources: the client rounds y and p - y; it rounds its logits, or computes them from less exact numbers, which
    p carries as a relative error; and additive noise on u and v. The partial sums of a length-d dot product grow like a
    random walk: in the worst order of summation, one by one, that costs 0.41 unit roundoffs of |W_j| |x|.

    Shapes: lambda, kappa (...); prediction and label (..., C). Returns (..., C).
    """
    like = prediction.shape
    scale = jnp.abs(scalar)[..., None]
    # Squares are summed as they are (no hypot): in float64 none of these can under- or overflow.
    rounding = equation.roundoff * (1 + 0.41 * scale * jnp.broadcast_to(equation.weight_norm, like))
    logit_square = (
        rounding**2 + equation.logit_error**2 + (scale * jnp.broadcast_to(equation.direction_deviation, like)) ** 2
    )
    noise = factor[..., None] * jnp.broadcast_to(equation.left_deviation, like)
    return jnp.sqrt(logit_square * prediction**2 + (equation.roundoff * label) ** 2 + noise**2)
