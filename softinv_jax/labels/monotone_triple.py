"""One triple of classes gives exactly one scalar: the monotone function behind format-free recovery.

Take three classes with distinct logit directions z_j > z_l > z_m on which the soft label is equal. The
label and every factor on the gradient cancel from

    (u_j - u_l) / (u_l - u_m) = (e^(lambda z_j) - e^(lambda z_l)) / (e^(lambda z_l) - e^(lambda z_m)).

Written with the gaps a = z_j - z_l and b = z_l - z_m, the logarithm of the right-hand side is

    F(lambda) = log(a / b) + K(lambda a) - K(-lambda b),        K(t) = log((e^t - 1) / t),

where K is the cumulant generating function of the uniform distribution on [0, 1]. Its derivative K' is the
mean of the exponentially tilted uniform distribution, hence in (0, 1), so that

    F'(lambda) = a K'(lambda a) + b K'(-lambda b) > 0.

F rises strictly from minus to plus infinity: the equation F(lambda) = tau has exactly one root. The proof, and
what follows from it for whole labels, is in docs/uniqueness.md.
"""

import jax
import jax.numpy as jnp

__all__ = ["log_ratio", "log_ratio_slope", "solve_log_ratio", "tilted_mean", "uniform_cumulant"]

# Newton's method on F is quadratic, and F is nearly linear outside |lambda| max(a, b) < 10: from the bracket below,
# eight steps leave a relative error of at most 1e-10 over gap ratios of e^12, and nearly always none.
NEWTON_STEPS = 8


def _cumulant_and_mean(argument: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K(t) and K'(t) from one exponential; K(-t) = K(t) - t and K'(t) = 1 - K'(-t)."""
    magnitude = jnp.abs(argument)
    small = magnitude < 1e-2
    safe = jnp.where(small, 1.0, magnitude)
    fall = -jnp.expm1(-safe) / safe
    square = magnitude * magnitude
    value = jnp.where(small, magnitude * (-0.5 + magnitude / 24 - magnitude * square / 2880), jnp.log(fall))
    mean = jnp.where(small, 0.5 + magnitude / 12 - magnitude * square / 720, (1.0 / fall - 1.0) / safe)
    return value + jnp.maximum(argument, 0.0), jnp.where(argument < 0, 1.0 - mean, mean)


def uniform_cumulant(argument: jax.Array) -> jax.Array:
    """K(t) = log((e^t - 1) / t), with K(0) = 0, without overflow or cancellation for any t."""
    return _cumulant_and_mean(argument)[0]


def tilted_mean(argument: jax.Array) -> jax.Array:
    """K'(t) = 1 / (1 - e^-t) - 1 / t, in (0, 1): the mean of the uniform distribution tilted by e^(t x)."""
    return _cumulant_and_mean(argument)[1]


def log_ratio(scalar: jax.Array, upper_gap: jax.Array, lower_gap: jax.Array) -> jax.Array:
    """F(lambda) for the gaps a = z_j - z_l > 0 and b = z_l - z_m > 0; all arrays of one shape."""
    return jnp.log(upper_gap / lower_gap) + uniform_cumulant(scalar * upper_gap) - uniform_cumulant(-scalar * lower_gap)


def log_ratio_slope(scalar: jax.Array, upper_gap: jax.Array, lower_gap: jax.Array) -> jax.Array:
    """F'(lambda) > 0."""
    return upper_gap * tilted_mean(scalar * upper_gap) + lower_gap * tilted_mean(-scalar * lower_gap)


def solve_log_ratio(target: jax.Array, upper_gap: jax.Array, lower_gap: jax.Array) -> jax.Array:
    """The one lambda with F(lambda) = target, by Newton's method kept inside a bracket.

    With D = target - log(a / b): K' lies in (1/2, 1) right of zero and in (0, 1/2) left of it, so the slope of F
    lies between a/2 and a + b/2 for lambda > 0 and between b/2 and b + a/2 for lambda < 0, and the root between
    D over the one and D over the other. A fixed number of steps suits `vmap`: no lane waits for another.

    Args:
      target: tau = log((u_j - u_l) / (u_l - u_m)), any shape.
      upper_gap: a > 0, same shape. lower_gap: b > 0, same shape.

    Returns:
      lambda, same shape. NaN where target is NaN.
    """
    distance = target - jnp.log(upper_gap / lower_gap)
    leading = jnp.where(distance > 0, upper_gap, lower_gap)
    trailing = jnp.where(distance > 0, lower_gap, upper_gap)
    one_end = distance / (leading + trailing / 2)
    other_end = 2 * distance / leading
    lower, upper = jnp.minimum(one_end, other_end), jnp.maximum(one_end, other_end)

    offset = jnp.log(upper_gap / lower_gap) - target

    def step(_: int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        scalar, low, high = state
        (upper_value, upper_mean), (lower_value, lower_mean) = (
            _cumulant_and_mean(scalar * upper_gap),
            _cumulant_and_mean(-scalar * lower_gap),
        )
        excess = offset + upper_value - lower_value
        low = jnp.where(excess < 0, scalar, low)
        high = jnp.where(excess > 0, scalar, high)
        proposal = scalar - excess / (upper_gap * upper_mean + lower_gap * lower_mean)
        inside = (proposal >= low) & (proposal <= high)
        return jnp.where(inside, proposal, (low + high) / 2), low, high

    start = 2 * distance / (leading + trailing)  # The root of the tangent at zero.
    scalar, _, _ = jax.lax.fori_loop(0, NEWTON_STEPS, step, (jnp.clip(start, lower, upper), lower, upper))
    return scalar
