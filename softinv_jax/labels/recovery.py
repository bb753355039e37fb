"""`recover`: from the gradient of one last layer to soft label, feature, scale and verdict."""

from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from softinv_jax.float64 import in_float64
from softinv_jax.labels.assumptions import Loss
from softinv_jax.labels.closed_form import unexplained_outcome
from softinv_jax.labels.conclusion import Asked, conclude
from softinv_jax.labels.exact import LISTED, explain_by_consensus
from softinv_jax.labels.independent import explain_independent_outputs
from softinv_jax.labels.interval import feasible_interval
from softinv_jax.labels.losses import LossName, Outcome, judge, search_losses, trials_for
from softinv_jax.labels.mean_label import mean_label
from softinv_jax.labels.published import explain_by_sign, explain_by_variance
from softinv_jax.labels.reading import Reading, feature_along, read_gradient
from softinv_jax.labels.scalar_equation import TOLERANCE, Unknowns
from softinv_jax.labels.variance import FORMATS
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, append_bias, observe
from softinv_jax.observation.leftover import count_examples
from softinv_jax.observation.rank_one import significant_rounding

__all__ = ["LossName", "Method", "Stages", "complete", "read", "recover", "search", "stages_for"]

Method = Literal["exact", "variance", "idlg"]


@in_float64
def recover(
    observation: Observation,
    *,
    method: Method = "exact",
    unknown_scale: bool = False,
    label_format: Literal["smoothing", "mixup"] | None = None,
    loss: LossName = "auto",
    approximate: bool = False,
    thorough: bool = True,
) -> Recovery:
    """Recover the soft label and last-layer feature of one example from its last-layer gradient.

    Pure; works under `jax.jit` and `jax.vmap` with all options static, and
    compiles itself where it is called by itself: the first call for a shape takes seconds, the next milliseconds.
    Computes in float64 without touching the caller's configuration (to `jit` or `vmap` it yourself over float64
    gradients, enable x64: jax casts the arguments to 32 bits otherwise). For thousands of examples use
    `recover_many`, which tries the fast search first.

    Args:
      observation: one example, `weight_gradient` (C, d); see `observe`.
      method: `exact`, format-free: the scalar on which most triples of classes agree (docs/uniqueness.md);
        `variance`, the paper's loss (Wang, Liang, He, ICLR 2024, section 3), for bias-free heads and a known
        scale; `idlg`, hard labels by the sign of the gradient (Zhao, Mopuri, Bilen, 2020).
      unknown_scale: the gradient is known only up to a non-zero factor (learning rate, sum or mean reduction, sign).
      label_format: for `variance` only, which must be told: `smoothing` or `mixup`.
      loss: `auto` tries, after cross-entropy at the scale told, cross-entropy with a factor of its own (class weights,
        focal loss with hard labels, another rate), with a temperature, with both, and independent sigmoids; or the name
        of the one it is (see `softinv_jax.labels.assumptions.Loss`). Others than cross-entropy take `thorough`.
      approximate: the gradient stands for one that was not observed exactly, as the average over several local steps
        does: what is left beyond one outer product is taken for noise, and nothing is called unique.
      thorough: search exhaustively where that is possible, list other candidates, give the feasible interval where
        nothing is unique, and use maximum likelihood under noise. False is several times faster and enough for
        almost every noiseless gradient; what it calls unique is unique.

    Returns:
      A `Recovery`; label (C,), feature (d,).

    Raises:
      ValueError: for arrays `observe` refuses, an unknown method, or a method that does not apply to the head.
    """
    observation = observe(**vars(observation))
    if observation.weight_gradient.ndim != 2:
        raise ValueError(
            f"recover takes one example, but weight_gradient has shape {observation.weight_gradient.shape};"
            " use recover_many or jax.vmap"
        )
    stages = stages_for(observation, method, unknown_scale, label_format, thorough, loss, approximate=approximate)
    reading, right = read(observation, stages)
    return complete(observation, right, reading.right_norm, *search(reading, stages))


class Stages(NamedTuple):
    """What is static of a recovery: see `recover`."""

    has_bias: bool
    told_scale: bool
    method: Method
    label_format: Literal["smoothing", "mixup"] | None
    loss: LossName
    approximate: bool
    thorough: bool


def stages_for(
    observation: Observation,
    method: Method,
    unknown_scale: bool,
    label_format: Literal["smoothing", "mixup"] | None,
    thorough: bool,
    loss: LossName = "auto",
    *,
    approximate: bool = False,
) -> Stages:
    """The checked options of `recover`.

    Raises:
      ValueError: for an unknown method or loss, or one that does not apply to the head.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    if loss not in get_args(LossName):
        raise ValueError(f"loss must be one of {', '.join(get_args(LossName))}, not {loss!r}")
    has_bias, classes = observation.bias is not None, observation.weight.shape[0]
    if method == "variance":
        if label_format not in FORMATS:
            raise ValueError(f"method 'variance' needs label_format, one of {tuple(FORMATS)}, not {label_format!r}")
        if has_bias or unknown_scale:
            raise ValueError("method 'variance' needs a bias-free head and a known scale; use method 'exact'")
    elif label_format is not None:
        raise ValueError(f"label_format is for method 'variance' only; {method!r} needs none")
    if method != "exact" and (loss not in ("auto", "cross_entropy") or classes < 3):
        raise ValueError(f"method {method!r} is for cross-entropy over 3 classes or more; use method 'exact'")
    if classes == 1 and loss not in ("auto", "binary_cross_entropy"):
        raise ValueError(f"one output has no softmax; its loss is binary_cross_entropy, not {loss!r}")
    return Stages(has_bias, not unknown_scale, method, label_format, loss, approximate, thorough)


# Compiled by themselves where they are called by themselves: taken operation by operation, a search takes seconds.
@partial(jax.jit, static_argnums=1)
def read(observation: Observation, stages: Stages) -> tuple[Reading, jax.Array]:
    """First stage: everything of size d."""
    return read_gradient(observation, told_scale=stages.told_scale, thorough=stages.thorough)


@partial(jax.jit, static_argnums=1)
def search(reading: Reading, stages: Stages) -> tuple[Recovery, jax.Array | None]:
    """Second stage: a `Recovery` without its feature, and what the label says of the feature's error."""
    asked = Asked(
        has_bias=stages.has_bias,
        told_scale=stages.told_scale,
        is_published=stages.method == "idlg",
        approximate=stages.approximate,
        is_softmax=stages.loss != "binary_cross_entropy" and reading.equation.left.size > 1,
    )
    recovery, pull = conclude(reading, _explain(reading, stages), asked)
    if stages.thorough and stages.method == "exact":
        interval = feasible_interval(reading.equation, _told_unknowns(stages))
        is_open = recovery.verdict == Verdict.UNIDENTIFIABLE
        recovery = replace(recovery, interval=jnp.where(is_open, interval, jnp.nan))
    return recovery, pull


def _told_unknowns(stages: Stages) -> Unknowns:
    return Unknowns(scalar=not stages.has_bias, scale=not stages.told_scale)


def _explain(reading: Reading, stages: Stages) -> Outcome:
    unknowns = _told_unknowns(stages)
    if stages.method == "idlg":
        return judge(reading, explain_by_sign(reading, unknowns), unknowns, Loss.CROSS_ENTROPY)
    if stages.method == "variance":
        assert stages.label_format is not None
        explanations = explain_by_variance(reading, FORMATS[stages.label_format], unknowns)
        return judge(reading, explanations, unknowns, Loss.CROSS_ENTROPY)
    trials = trials_for(stages.loss, has_bias=stages.has_bias, told_scale=stages.told_scale)
    classes = reading.equation.left.size
    if not stages.thorough and trials and classes >= 3:
        first = trials[0]
        free = Unknowns(first.scalar, first.scale)
        outcome = judge(reading, explain_by_consensus(reading.equation, free), free, first.loss)
        return outcome._replace(unique=outcome.unique & reading.is_rounding)  # Noise is for the thorough search.
    if trials and classes >= 3:
        outcome = search_losses(reading, trials)
    else:
        outcome = unexplained_outcome(reading.equation, LISTED, unknowns, Loss.CROSS_ENTROPY)
    if stages.loss not in ("auto", "binary_cross_entropy"):
        return outcome
    return _or_independent(reading, outcome, stages)


def _or_independent(reading: Reading, outcome: Outcome, stages: Stages) -> Outcome:
    """The outcome as it is where a softmax explains the gradient; else what independent sigmoids make of it."""
    alone = stages.loss == "binary_cross_entropy" or reading.equation.left.size == 1

    def independent() -> Outcome:
        found = explain_independent_outputs(
            reading, told_scale=stages.told_scale, has_bias=stages.has_bias, listed=LISTED
        )
        better = found.unique | alone
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, outcome)

    if alone:
        return independent()
    return jax.lax.cond(outcome.unique, lambda: outcome, independent)


@jax.jit
def complete(
    observation: Observation, right: jax.Array, norm: jax.Array, recovery: Recovery, pull: jax.Array | None
) -> Recovery:
    """Last stage: the feature, the number of examples, and everything in the gradient's dtype (float32 at least)."""
    kept = jnp.promote_types(observation.weight_gradient.dtype, jnp.float32)
    recovery = replace(recovery, feature=feature_along(observation, right, norm, recovery.scalar, pull))
    if pull is not None:  # The search was thorough.
        several = recovery.assumptions.examples == 0
        several = several & (recovery.verdict != Verdict.NO_SIGNAL)
        recovery = jax.lax.cond(several, partial(_of_several, observation), lambda one: one, recovery)
    return jax.tree.map(lambda leaf: leaf.astype(kept) if leaf.dtype == jnp.float64 else leaf, recovery)


def _of_several(observation: Observation, recovery: Recovery) -> Recovery:
    """The recovery with how many examples stand out, and the mean of their labels."""
    _, gradient = append_bias(observation)
    gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    examples = count_examples(gradient.astype(jnp.float64), significant_rounding(gradient))
    recovery = replace(recovery, assumptions=replace(recovery.assumptions, examples=examples))
    if observation.bias is None or observation.bias_gradient is None:
        return recovery
    # Where as many stand out as there are classes, there may be any number.
    classes = observation.weight.shape[0]
    likely = jnp.where(examples >= classes - 1, 4.0 * classes, jnp.maximum(1.0 * examples, 2.0))
    weight, gradient, bias, bias_gradient = (
        jnp.asarray(array, jnp.float64)
        for array in (
            observation.weight,
            observation.weight_gradient,
            observation.bias,
            observation.bias_gradient,
        )
    )
    mean = mean_label(weight, gradient, bias, bias_gradient, likely)
    # At another scale, or of several steps, it would be no label.
    reach = TOLERANCE * mean.deviation
    is_label = jnp.all((mean.label >= -reach) & (mean.label <= 1 + reach))
    return replace(recovery, mean=jax.tree.map(lambda leaf: jnp.where(is_label, leaf, jnp.nan), mean))
