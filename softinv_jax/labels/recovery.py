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
from softinv_jax.labels.explanations import is_unbalanced
from softinv_jax.labels.features import FeatureSource, feature_of
from softinv_jax.labels.independent import explain_independent_outputs
from softinv_jax.labels.interval import feasible_interval
from softinv_jax.labels.losses import LossName, Outcome, Trial, judge, search_losses, trials_for
from softinv_jax.labels.mean_label import mean_label
from softinv_jax.labels.published import explain_by_sign, explain_by_variance
from softinv_jax.labels.reading import Reading, read_gradient
from softinv_jax.labels.scalar_equation import TOLERANCE, Unknowns
from softinv_jax.labels.variance import FORMATS
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, append_bias, observe
from softinv_jax.observation.leftover import count_examples
from softinv_jax.observation.rank_one import significant_rounding

__all__ = [
    "LossName",
    "Method",
    "Stages",
    "check_single",
    "complete",
    "count_several",
    "in_kept_dtype",
    "interval_of",
    "is_independent",
    "is_of_several",
    "is_open_question",
    "may_be_independent",
    "or_independent",
    "read",
    "recover",
    "search",
    "softmax_trials",
    "stages_for",
    "unexplained",
    "verdict_of",
]

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
    check_single(observation)
    stages = stages_for(observation, method, unknown_scale, label_format, thorough, loss, approximate=approximate)
    return complete(observation, search(read(observation, stages), stages), stages)


def check_single(observation: Observation) -> None:
    """Raise ValueError where an observation is not of one gradient."""
    if observation.weight_gradient.ndim != 2:
        raise ValueError(
            f"recover takes one example, but weight_gradient has shape {observation.weight_gradient.shape};"
            " use recover_many or jax.vmap"
        )


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
    method: Method = "exact",
    unknown_scale: bool = False,
    label_format: Literal["smoothing", "mixup"] | None = None,
    thorough: bool = True,
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
def read(observation: Observation, stages: Stages) -> Reading:
    """First stage: everything of size d."""
    return read_gradient(observation, told_scale=stages.told_scale, thorough=stages.thorough)


@partial(jax.jit, static_argnums=1)
def search(reading: Reading, stages: Stages) -> Recovery:
    """Second stage: a `Recovery` with what its feature is made from."""
    recovery = verdict_of(reading, _explain(reading, stages), stages)
    if is_open_question(stages):
        recovery = jax.lax.cond(
            recovery.verdict == Verdict.UNIDENTIFIABLE,
            lambda: replace(recovery, interval=interval_of(reading, stages)),
            lambda: recovery,
        )
    return recovery


def verdict_of(reading: Reading, outcome: Outcome, stages: Stages) -> Recovery:
    """What is told of an outcome."""
    asked = Asked(
        has_bias=stages.has_bias,
        told_scale=stages.told_scale,
        is_published=stages.method == "idlg",
        approximate=stages.approximate,
        is_softmax=stages.loss != "binary_cross_entropy" and reading.equation.left.size > 1,
    )
    return conclude(reading, outcome, asked)


def is_open_question(stages: Stages) -> bool:
    """Whether the interval of every possible lambda is asked for, where none is singled out."""
    return stages.thorough and stages.method == "exact"


def interval_of(reading: Reading, stages: Stages) -> jax.Array:
    """(2,) every lambda that gives a valid label."""
    return feasible_interval(reading.equation, _told_unknowns(stages))


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
    trials = softmax_trials(reading.equation.left.size, stages)
    if not stages.thorough and trials:
        first = trials[0]
        free = Unknowns(first.scalar, first.scale)
        outcome = judge(reading, explain_by_consensus(reading.equation, free), free, first.loss)
        return outcome._replace(unique=outcome.unique & reading.is_rounding)  # Noise is for the thorough search.
    outcome = search_losses(reading, trials) if trials else unexplained(reading, stages)
    if not may_be_independent(stages):
        return outcome
    if is_independent(reading.equation.left.size, stages):
        return or_independent(reading, outcome, stages)
    hopeless = outcome.unique | ~is_unbalanced(reading.equation)
    return jax.lax.cond(hopeless, lambda: outcome, lambda: or_independent(reading, outcome, stages))


def softmax_trials(classes: int, stages: Stages) -> tuple[Trial, ...]:
    """The softmax losses to try; none where there are too few classes, or the loss is no softmax."""
    trials = trials_for(stages.loss, has_bias=stages.has_bias, told_scale=stages.told_scale)
    return trials if classes >= 3 else ()


def unexplained(reading: Reading, stages: Stages) -> Outcome:
    """The outcome where no softmax is tried."""
    return unexplained_outcome(reading.equation, LISTED, _told_unknowns(stages), Loss.CROSS_ENTROPY)


def may_be_independent(stages: Stages) -> bool:
    """Whether independent sigmoids are tried where no softmax explains the gradient, or could."""
    return stages.loss in ("auto", "binary_cross_entropy")


def is_independent(classes: int, stages: Stages) -> bool:
    """Whether independent sigmoids are all there is to try."""
    return stages.loss == "binary_cross_entropy" or classes == 1


def or_independent(reading: Reading, outcome: Outcome, stages: Stages) -> Outcome:
    """What independent sigmoids make of the gradient, if that is anything, or else the outcome as it is."""
    found = explain_independent_outputs(reading, told_scale=stages.told_scale, has_bias=stages.has_bias, listed=LISTED)
    better = found.unique | is_independent(reading.equation.left.size, stages)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, outcome)


@partial(jax.jit, static_argnums=2)
def complete(observation: Observation, recovery: Recovery, stages: Stages) -> Recovery:
    """Last stage: the feature, the number of examples, and everything in the gradient's dtype (float32 at least)."""
    source = recovery.stored_feature
    assert isinstance(source, FeatureSource)
    recovery = replace(recovery, stored_feature=feature_of(observation, source))
    if stages.thorough:
        recovery = jax.lax.cond(is_of_several(recovery), partial(count_several, observation), lambda one: one, recovery)
    return in_kept_dtype(recovery, observation.weight_gradient.dtype)


def in_kept_dtype(recovery: Recovery, dtype: jnp.dtype) -> Recovery:
    """Everything in the gradient's dtype, float32 at least."""
    kept = jnp.promote_types(dtype, jnp.float32)
    return jax.tree.map(lambda leaf: leaf.astype(kept) if leaf.dtype == jnp.float64 else leaf, recovery)


def is_of_several(recovery: Recovery) -> jax.Array:
    """() bool: of a thorough recovery, the gradient holds several examples, which are to be counted."""
    return (recovery.assumptions.examples == 0) & (recovery.verdict != Verdict.NO_SIGNAL)


def count_several(observation: Observation, recovery: Recovery) -> Recovery:
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
