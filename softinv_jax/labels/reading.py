"""What one gradient says, read once: the scalar equation and its noise, apart from the d entries of the feature.

The search for the label needs nothing of size d, so that one compiled search serves every head with as many classes.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from softinv_jax.labels.hard_label import odd_class
from softinv_jax.labels.scalar_equation import TOLERANCE, ScalarEquation
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

__all__ = ["Reading", "feature_along", "read_gradient"]

DRIFTING_SUM = 5.0
# Entries of either sign would all have one in a case of a million.
SIGNED_ENTRIES = 20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """Everything about one gradient but the direction v of its feature. float64 except for the flags.

    Attributes:
      equation: the scalar equation.
      direction_covariance: (C, C) of z from the noise on v; (0, 0) where it was not read thoroughly: at C = 1000 it is
        as large as the gradient.
      feature_variance: () of each entry of v. factor_variance: () of kappa, where a bias tells it.
      right_norm: () length of v as it is kept. longest: () the lambda beyond which a feature leaves the range of the
        result's dtype. total: () sum of the entries of v / |v|; with a bias the last one, of the constant feature 1.
      feature_sign: () 1 or -1 where no entry of v is of the other sign beyond its error (ReLU, sigmoid); else 0.
      residual: () see `RankOneFactors`. is_rounding: () bool, likewise.
      has_signal: () bool, the gradient is more than noise of the size measured would be.
      leftover: what is beyond one outer product; where it was not read thoroughly, nothing.
      one_size: () bool, the entries are signs; false where it was not read thoroughly.
      hinted_class: () int32, the class whose row has the odd sign.
    """

    equation: ScalarEquation
    direction_covariance: jax.Array
    feature_variance: jax.Array
    factor_variance: jax.Array
    right_norm: jax.Array
    longest: jax.Array
    total: jax.Array
    feature_sign: jax.Array
    residual: jax.Array
    is_rounding: jax.Array
    has_signal: jax.Array
    leftover: Leftover
    one_size: jax.Array
    hinted_class: jax.Array


def read_gradient(observation: Observation, *, told_scale: bool, thorough: bool) -> tuple[Reading, jax.Array]:
    """Factors, scalar equation and noise of one gradient.

    Args:
      observation: one example. told_scale, thorough: static.

    Returns:
      The reading, and v in the gradient's dtype, of length `right_norm`: (d,), or (d + 1,) with a bias.
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
        matrix, rounding = gradient.astype(jnp.float64), significant_rounding(gradient)
        noise = None if observation.noise is None else observation.noise.astype(jnp.float64)
        leftover = describe_leftover(matrix, factors.left, right, rounding, noise, has_bias=has_bias)
        one_size = is_one_size(matrix)
        # Half precision errs in proportion to each entry: most where the feature is strong, which counts most.
        profile = jnp.where(leftover.few_digits, jnp.sqrt(1.0 * right.size) * jnp.abs(right), 1.0)
        factors = replace(factors, row_noise=factors.row_noise * jnp.sqrt(jnp.sum((profile * right) ** 2)))
    square = jnp.sum(factors.left**2)
    feature_variance = jnp.sum((factors.left * factors.row_noise) ** 2) / jnp.where(square == 0, 1.0, square) ** 2
    equation, covariance = _scalar_equation(weight, factors, right, feature_variance, profile, has_bias, thorough)
    # The last entry of v is read from the bias's column alone, whatever noise that has.
    of_bias = feature_variance * (leftover.bias_excess * profile[-1]) ** 2
    total = right[-1] if has_bias else jnp.sum(right)
    reading = Reading(
        equation=equation,
        direction_covariance=covariance,
        feature_variance=feature_variance,
        # With a bias, kappa is the last entry of v, unless it is an unknown of its own.
        factor_variance=of_bias if has_bias and told_scale else jnp.zeros_like(feature_variance),
        right_norm=norm,
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
    return reading, factors.right


def _common_sign(right: jax.Array, variance: jax.Array) -> jax.Array:
    """() 1, -1, or 0 where entries of either sign stand out, or too few of any to tell by."""
    reach = TOLERANCE * jnp.sqrt(variance)
    above, below = jnp.sum(right > reach), jnp.sum(right < -reach)
    told = above + below >= SIGNED_ENTRIES
    return jnp.where(told & (below == 0), 1.0, jnp.where(told & (above == 0), -1.0, 0.0))


def _nothing_left() -> Leftover:
    no = jnp.zeros((), bool)
    return Leftover(stands_out=no, rows_alike=no, deleted=no, few_digits=no, on_grid=no, bias_excess=jnp.ones(()))


def feature_along(
    observation: Observation, right: jax.Array, norm: jax.Array, scalar: jax.Array, pull: jax.Array | None
) -> jax.Array:
    """x = lambda v, (d,) float64, less what the label's structure says of its error.

    Args:
      right, norm: of `read_gradient`. scalar: () lambda; NaN gives NaN. pull: (C,) by class, or None.
    """
    right = right.astype(jnp.float64) / norm
    feature = scalar * right
    if pull is not None:
        weight, _ = append_bias(observation)
        pulled = pull @ weight.astype(jnp.float64)
        feature = feature - (pulled - right * jnp.sum(right * pulled))
    return feature if observation.bias is None else feature[:-1]


def _scalar_equation(
    weight: jax.Array,
    factors: RankOneFactors,
    right: jax.Array,
    feature_variance: jax.Array,
    profile: jax.Array,
    has_bias: bool,
    thorough: bool,
) -> tuple[ScalarEquation, jax.Array]:
    """The scalar equation, and the covariance of z from the noise on v: (C, C), or (0, 0) where not `thorough`."""
    weight64 = weight.astype(jnp.float64)
    direction = weight64 @ right
    weight_norm = jnp.sqrt(jnp.sum(weight64**2, axis=1))
    if thorough:
        # A client that sums nearly constant features one by one rounds in one direction for long: up to 7 unit
        # roundoffs of |W_j| |x| were seen where independent roundings would have cost 0.4. The fast search expects
        # the latter, and leaves what does not fit to this one.
        weight_norm = jnp.where(factors.is_rounding, DRIFTING_SUM * weight_norm, weight_norm)
    number_of_classes = direction.size
    zeros = jnp.zeros((number_of_classes,))
    scalar = 1.0 / right[-1] if has_bias else jnp.asarray(jnp.nan, jnp.float64)
    covariance = jnp.zeros((0, 0))
    direction_deviation = zeros
    if thorough:
        if has_bias:
            # The last entry of x is 1 exactly, so that an error of v there rescales all of it.
            tied = weight64.at[:, -1].add(-scalar * direction)
        else:
            tied = weight64 - direction[:, None] * right[None, :]
        tied = tied * profile[None, :]
        covariance = feature_variance * (tied @ tied.T)
        direction_deviation = jnp.sqrt(jnp.maximum(jnp.diag(covariance), 0.0))
    equation = ScalarEquation(
        direction=direction,
        offset=zeros,
        left=factors.left,
        left_deviation=factors.row_noise,
        direction_deviation=direction_deviation,
        weight_norm=weight_norm,
        roundoff=factors.client_rounding,
        logit_error=jnp.zeros(()),
        known_scalar=scalar,
    )
    return equation, covariance


def _has_signal(factors: RankOneFactors, features: int) -> jax.Array:
    """Whether the leading singular value exceeds what noise of the measured size alone would have."""
    number_of_classes = factors.left.size
    noise = jnp.sqrt(jnp.mean(factors.row_noise**2))
    # The largest singular value of C x d noise is sigma (sqrt C + sqrt d), up to a small spread.
    edge = 1.1 * noise * (jnp.sqrt(1.0 * number_of_classes) + jnp.sqrt(1.0 * features))
    strongest = jnp.max(jnp.abs(factors.left))
    return (strongest > 0) & (jnp.sqrt(jnp.sum(factors.left**2)) > edge)
