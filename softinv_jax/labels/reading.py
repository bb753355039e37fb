"""What one gradient says, read once: the scalar equation and its noise, apart from the d entries of the feature.

The search for the label needs nothing of size d, so that one compiled search serves every head with as many classes.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from softinv_jax.labels.hard_label import odd_class
from softinv_jax.labels.scalar_equation import TOLERANCE, DirectionNoise, ScalarEquation
from softinv_jax.linear_algebra import root_of_semidefinite
from softinv_jax.observation.head import Observation, append_bias
from softinv_jax.observation.leftover import Leftover, describe_leftover, is_one_size
from softinv_jax.observation.rank_one import (
    RankOneFactors,
    average_rows,
    dominant_factors,
    leading_singular_factors,
    significant_rounding,
    with_known_noise,
)

__all__ = ["Reading", "read_gradient"]

DRIFTING_SUM = 5.0
CORRELATED_CLASSES = 32
# Entries of either sign would all have one in a case of a million.
SIGNED_ENTRIES = 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """Everything about one gradient but the d entries of its feature. float64 except for the flags.

    Attributes:
      equation: the scalar equation.
      direction_noise: of z from the noise on v; without columns where it was not read thoroughly.
      feature_variance: () of each entry of v. factor_variance: () of kappa, where a bias tells it.
      coefficients: (C,) of the rows of the gradient that make v. longest: () the lambda beyond which a feature leaves
        the range of the result's dtype. total: () sum of the entries of v; with a bias the last one, of the constant
        feature 1.
      feature_sign: () 1 or -1 where no entry of v is of the other sign beyond its error (ReLU, sigmoid); else 0.
      residual: () see `RankOneFactors`. is_rounding: () bool, likewise.
      has_signal: () bool, the gradient is more than noise of the size measured would be.
      leftover: what is beyond one outer product; where it was not read thoroughly, nothing.
      one_size: () bool, the entries are signs; false where it was not read thoroughly.
      hinted_class: () int32, the class whose row has the odd sign.
    """

    equation: ScalarEquation
    direction_noise: DirectionNoise
    feature_variance: jax.Array
    factor_variance: jax.Array
    coefficients: jax.Array
    longest: jax.Array
    total: jax.Array
    feature_sign: jax.Array
    residual: jax.Array
    is_rounding: jax.Array
    has_signal: jax.Array
    leftover: Leftover
    one_size: jax.Array
    hinted_class: jax.Array


def read_gradient(observation: Observation, *, told_scale: bool, thorough: bool) -> Reading:
    """Factors, scalar equation and noise of one gradient.

    Args:
      observation: one example. told_scale, thorough: static.
    """
    has_bias = observation.bias is not None
    weight, gradient = append_bias(observation)
    # Half precision is noise on single precision: its rounding is too coarse to be told from anything else.
    gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    factors = dominant_factors(gradient)
    if thorough:
        factors = leading_singular_factors(gradient, factors)
    elif has_bias:
        factors = average_rows(gradient, factors)
    if observation.noise is not None:
        factors = with_known_noise(factors, observation.noise)
    norm = jnp.where(factors.right_norm == 0, 1.0, factors.right_norm)
    right = factors.right.astype(jnp.float64) / norm
    leftover, one_size, profile = _nothing_left(), jnp.zeros((), bool), jnp.ones_like(right)
    if thorough:
        rounding = significant_rounding(gradient)
        noise = None if observation.noise is None else observation.noise.astype(jnp.float64)
        leftover = describe_leftover(gradient, factors.left, right, rounding, noise, has_bias=has_bias)
        one_size = is_one_size(gradient)
        # Half precision errs in proportion to each entry: most where the feature is strong, which counts most.
        profile = jnp.where(leftover.few_digits, jnp.sqrt(1.0 * right.size) * jnp.abs(right), 1.0)
        factors = replace(factors, row_noise=factors.row_noise * jnp.sqrt(jnp.sum((profile * right) ** 2)))
    square = jnp.sum(factors.left**2)
    feature_variance = jnp.sum((factors.left * factors.row_noise) ** 2) / jnp.where(square == 0, 1.0, square) ** 2
    equation = _scalar_equation(weight, factors, right, has_bias, thorough)
    noise_on_z = DirectionNoise(jnp.zeros((weight.shape[0], 0)), None)
    if thorough:
        noise_on_z, deviation = _direction_noise(weight, equation, right, profile, feature_variance, has_bias)
        equation = replace(equation, direction_deviation=deviation)
    # The last entry of v is read from the bias's column alone, whatever noise that has.
    of_bias = feature_variance * (leftover.bias_excess * profile[-1]) ** 2
    total = right[-1] if has_bias else jnp.sum(right)
    return Reading(
        equation=equation,
        direction_noise=noise_on_z,
        feature_variance=feature_variance,
        # With a bias, kappa is the last entry of v, unless it is an unknown of its own.
        factor_variance=of_bias if has_bias and told_scale else jnp.zeros_like(feature_variance),
        coefficients=factors.coefficients / norm,
        longest=float(jnp.finfo(gradient.dtype).max) / jnp.maximum(jnp.max(jnp.abs(right)), 1e-300),
        total=total,
        feature_sign=_common_sign(right, feature_variance),
        residual=factors.residual,
        is_rounding=factors.is_rounding,
        has_signal=_has_signal(factors, right.size),
        leftover=leftover,
        one_size=one_size,
        hinted_class=odd_class(factors.left, total),
    )


def _common_sign(right: jax.Array, variance: jax.Array) -> jax.Array:
    """() 1, -1, or 0 where entries of either sign stand out, or too few of any to tell by."""
    reach = TOLERANCE * jnp.sqrt(variance)
    above, below = jnp.sum(right > reach), jnp.sum(right < -reach)
    told = above + below >= SIGNED_ENTRIES
    return jnp.where(told & (below == 0), 1.0, jnp.where(told & (above == 0), -1.0, 0.0))


def _nothing_left() -> Leftover:
    no = jnp.zeros((), bool)
    return Leftover(stands_out=no, rows_alike=no, deleted=no, few_digits=no, on_grid=no, bias_excess=jnp.ones(()))


def _scalar_equation(
    weight: jax.Array, factors: RankOneFactors, right: jax.Array, has_bias: bool, thorough: bool
) -> ScalarEquation:
    """The scalar equation, so far without the noise of z."""
    weight64 = weight.astype(jnp.float64)
    direction = weight64 @ right
    weight_norm = jnp.sqrt(jnp.sum(weight64**2, axis=1))
    if thorough:
        # A client that sums nearly constant features one by one rounds in one direction for long: up to 7 unit
        # roundoffs of |W_j| |x| were seen where independent roundings would have cost 0.4. The fast search expects
        # the latter, and leaves what does not fit to this one.
        weight_norm = jnp.where(factors.is_rounding, DRIFTING_SUM * weight_norm, weight_norm)
    zeros = jnp.zeros((direction.size,))
    return ScalarEquation(
        direction=direction,
        offset=zeros,
        left=factors.left,
        left_deviation=factors.row_noise,
        direction_deviation=zeros,
        weight_norm=weight_norm,
        roundoff=factors.client_rounding,
        logit_error=jnp.zeros(()),
        known_scalar=1.0 / right[-1] if has_bias else jnp.asarray(jnp.nan, jnp.float64),
    )


def _direction_noise(
    weight: jax.Array,
    equation: ScalarEquation,
    right: jax.Array,
    profile: jax.Array,
    feature_variance: jax.Array,
    has_bias: bool,
) -> tuple[DirectionNoise, jax.Array]:
    """Covariance of z from the noise on v, and (C,) its deviations.

    Errors of two logits go together as their rows of W do. That is kept for the classes that can hold much of the
    softmax, those with the largest logits (of either sign, where the sign of lambda is not known); all others are taken
    as independent: their entries are too small for it to matter.
    """
    classes, direction = weight.shape[0], equation.direction

    def tied(rows: jax.Array, along: jax.Array) -> jax.Array:
        if has_bias:
            # The last entry of x is 1 exactly, so that an error of v there rescales all of it.
            rows = rows.astype(jnp.float64).at[:, -1].add(-equation.known_scalar * along)
        else:
            rows = rows.astype(jnp.float64) - along[:, None] * right[None, :]
        return rows * profile[None, :]

    variance = feature_variance * jnp.sum(tied(weight, direction) ** 2, axis=1)
    if classes <= CORRELATED_CLASSES:
        rows = tied(weight, direction)
        root = root_of_semidefinite(feature_variance * (rows @ rows.T))
        return DirectionNoise(root, None), jnp.sqrt(variance)
    # float32 is enough to pick classes.
    logits = (equation.known_scalar * direction if has_bias else direction).astype(jnp.float32)
    if has_bias:
        chosen = jax.lax.top_k(logits, CORRELATED_CLASSES)[1]
    else:
        ends = [jax.lax.top_k(sign * logits, CORRELATED_CLASSES // 2)[1] for sign in (1, -1)]
        chosen = jnp.concatenate(ends)
    rows = tied(weight[chosen], direction[chosen])
    own = root_of_semidefinite(feature_variance * (rows @ rows.T))
    root = jnp.zeros((classes, CORRELATED_CLASSES)).at[chosen].set(own, mode="promise_in_bounds", unique_indices=True)
    return DirectionNoise(root, variance.at[chosen].set(0.0, mode="promise_in_bounds")), jnp.sqrt(variance)


def _has_signal(factors: RankOneFactors, features: int) -> jax.Array:
    """Whether the leading singular value exceeds what noise of the measured size alone would have."""
    number_of_classes = factors.left.size
    noise = jnp.sqrt(jnp.mean(factors.row_noise**2))
    # The largest singular value of C x d noise is sigma (sqrt C + sqrt d), up to a small spread.
    edge = 1.1 * noise * (jnp.sqrt(1.0 * number_of_classes) + jnp.sqrt(1.0 * features))
    strongest = jnp.max(jnp.abs(factors.left))
    return (strongest > 0) & (jnp.sqrt(jnp.sum(factors.left**2)) > edge)
