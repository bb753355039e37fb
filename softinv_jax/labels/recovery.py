"""`recover`: from the gradient of one last layer to soft label, feature, scale and verdict."""

from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from softinv_jax.float64 import in_float64, sort
from softinv_jax.labels.consensus import Consensus, polish_consensus
from softinv_jax.labels.exact import Explanations, explain_by_consensus, explain_thoroughly
from softinv_jax.labels.hard_label import odd_class
from softinv_jax.labels.interval import feasible_interval
from softinv_jax.labels.label_format import read_format, structured_label
from softinv_jax.labels.reading import Reading, feature_along, read_gradient
from softinv_jax.labels.scalar_equation import (
    TOLERANCE,
    ScalarEquation,
    Unknowns,
    label_deviation,
    probabilities,
)
from softinv_jax.labels.variance import FORMATS, minimise_variance
from softinv_jax.labels.verdicts import Candidates, Evidence, LabelFormat, LabelKind, Recovery, Verdict
from softinv_jax.observation.head import Observation, observe

__all__ = ["Method", "Stages", "complete", "read", "recover", "search", "stages_for"]

Method = Literal["exact", "variance", "idlg"]

# An explanation counts as unique only if a dense label would show as much agreement in one case of a million, and
# is listed at all only from one in a hundred on.
UNIQUE_SURPRISE = 13.8
LISTED_SURPRISE = 4.6
# Six deviations of every label entry of a unique label: its first digit is certain, and does not hinge on one class.
SHARP_LABEL = 0.1


@in_float64
def recover(
    observation: Observation,
    *,
    method: Method = "exact",
    unknown_scale: bool = False,
    label_format: Literal["smoothing", "mixup"] | None = None,
    thorough: bool = True,
) -> Recovery:
    """Recover the soft label and last-layer feature of one example from its last-layer gradient.

    Pure; works under `jax.jit` and `jax.vmap` with `method`, `unknown_scale`, `label_format` and `thorough` static, and
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
    stages = stages_for(observation, method, unknown_scale, label_format, thorough)
    reading, right = read(observation, stages)
    return complete(observation, right, reading.right_norm, *search(reading, stages))


class Stages(NamedTuple):
    """What is static of a recovery: see `recover`."""

    unknowns: Unknowns
    method: Method
    label_format: Literal["smoothing", "mixup"] | None
    thorough: bool


def stages_for(
    observation: Observation,
    method: Method,
    unknown_scale: bool,
    label_format: Literal["smoothing", "mixup"] | None,
    thorough: bool,
) -> Stages:
    """The checked options of `recover`.

    Raises:
      ValueError: for an unknown method, or one that does not apply to the head.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    has_bias = observation.bias is not None
    if method == "variance":
        if label_format not in FORMATS:
            raise ValueError(f"method 'variance' needs label_format, one of {tuple(FORMATS)}, not {label_format!r}")
        if has_bias or unknown_scale:
            raise ValueError("method 'variance' needs a bias-free head and a known scale; use method 'exact'")
    elif label_format is not None:
        raise ValueError(f"label_format is for method 'variance' only; {method!r} needs none")
    return Stages(Unknowns(scalar=not has_bias, scale=unknown_scale), method, label_format, thorough)


# Compiled by themselves where they are called by themselves: taken operation by operation, a search takes seconds.
@partial(jax.jit, static_argnums=1)
def read(observation: Observation, stages: Stages) -> tuple[Reading, jax.Array]:
    """First stage: everything of size d."""
    return read_gradient(observation, stages.unknowns, thorough=stages.thorough)


@partial(jax.jit, static_argnums=1)
def search(reading: Reading, stages: Stages) -> tuple[Recovery, jax.Array | None]:
    """Second stage: a `Recovery` without its feature, and what the label says of the feature's error."""
    unknowns, method, label_format, thorough = stages
    equation = reading.equation
    if method == "idlg":
        explanations = _hard_explanation(reading, unknowns)
    elif method == "variance":
        assert label_format is not None
        explanations = _variance_explanation(equation, FORMATS[label_format], unknowns)
    elif thorough:
        explanations = explain_thoroughly(
            equation, reading.direction_covariance, reading.factor_variance, reading.is_rounding, unknowns
        )
    else:
        explanations = explain_by_consensus(equation, unknowns)
    return _conclude(reading, explanations, unknowns, method, thorough)


@jax.jit
def complete(
    observation: Observation, right: jax.Array, norm: jax.Array, recovery: Recovery, pull: jax.Array | None
) -> Recovery:
    """Last stage: the feature, and everything in the gradient's dtype (float32 at least)."""
    recovery = replace(recovery, feature=feature_along(observation, right, norm, recovery.scalar, pull))
    kept = jnp.promote_types(observation.weight_gradient.dtype, jnp.float32)
    return jax.tree.map(lambda leaf: leaf.astype(kept) if leaf.dtype == jnp.float64 else leaf, recovery)


def _variance_explanation(equation: ScalarEquation, excluded: int, unknowns: Unknowns) -> Explanations:
    scalar, _ = minimise_variance(equation, excluded)
    label = jax.nn.softmax(scalar * equation.direction) - equation.left / scalar
    kept = sort(label)[: label.size - excluded]
    # The certificate is the consensus around the minimum; the label stays that of the minimum itself.
    deviation = jnp.std(kept) + 1e-6 * (jnp.abs(label) + jnp.abs(equation.left / scalar))
    found = polish_consensus(equation, scalar, 1 / scalar, jnp.mean(kept), deviation, unknowns)
    same = jnp.abs(found.scalar - scalar) <= 1e-3 * jnp.abs(scalar)
    found = replace(
        found,
        scalar=scalar,
        factor=1 / scalar,
        label=label,
        surprise=jnp.where(same, found.surprise, -jnp.inf),
        fits=found.fits & same,
    )
    return _single(found)


def _hard_explanation(reading: Reading, unknowns: Unknowns) -> Explanations:
    equation = reading.equation
    chosen = odd_class(equation.left, reading.total)
    label = jax.nn.one_hot(chosen, equation.left.size, dtype=jnp.float64)
    one = jnp.ones(())
    scalar = equation.known_scalar if not unknowns.scalar else jnp.full((), jnp.nan)
    found = polish_consensus(equation, one, one, jnp.zeros(()), jnp.full_like(label, jnp.inf), unknowns, steps=0)
    found = replace(
        found,
        scalar=scalar,
        factor=1 / scalar,
        label=label,
        label_deviation=jnp.full_like(label, jnp.nan),
        scalar_deviation=jnp.full((), jnp.nan),
        level=jnp.zeros(()),
        agreeing=label == 0,
        # Assumed, not shown.
        surprise=jnp.zeros(()),
        informative=jnp.zeros((), jnp.int32),
        misfit=jnp.full((), jnp.nan),
    )
    return _single(found)


def _single(found: Consensus) -> Explanations:
    stacked = jax.tree.map(lambda leaf: leaf[None], found)
    return Explanations(stacked, jnp.asarray(False), None)


def _conclude(
    reading: Reading, explanations: Explanations, unknowns: Unknowns, method: str, thorough: bool
) -> tuple[Recovery, jax.Array | None]:
    equation, feature_variance = reading.equation, reading.feature_variance
    best: Consensus = jax.tree.map(lambda leaf: leaf[0], explanations.found)
    number_of_classes = equation.left.size
    closed_form = not unknowns.scalar and not unknowns.scale
    found = explanations.found
    # Noise can leave too little of the structure to tell it from an accident; the likeliest label is still listed.
    listed = (found.surprise >= LISTED_SURPRISE) | (found.fits & ~reading.is_rounding)
    count = jnp.sum(best.agreeing)
    # docs/uniqueness.md: any other lambda on which as many classes agree would share three distinguishable ones with
    # these (two where lambda is known and only kappa is not), and three have one root.
    shared = 3 if unknowns.scalar else 2
    by_theorem = best.informative - (number_of_classes - count) >= shared
    # A rival that a dense label would show a million times more often is none.
    rivals = listed & _contradict(found, unknowns) & (found.surprise > best.surprise - UNIQUE_SURPRISE)
    sharp = jnp.all(TOLERANCE * best.deviation_without_one <= SHARP_LABEL)
    unique = listed[0] & (best.surprise >= UNIQUE_SURPRISE) & ~jnp.any(rivals) & sharp
    unique = unique & (by_theorem | explanations.exhaustive)
    signal = reading.has_signal
    structured = listed[0]
    if method == "idlg":
        structured = jnp.asarray(True)
        ambiguous, unique = signal, jnp.asarray(False)
    elif closed_form:
        plain = _without_structure(best, equation, feature_variance)
        best = jax.tree.map(partial(jnp.where, structured | reading.is_rounding), best, plain)
        # A structure that an accident might show settles nothing that y = p - kappa u leaves open.
        sharp = TOLERANCE * jnp.max(plain.label_deviation) <= SHARP_LABEL
        # Beyond that, lambda could be anything.
        known_length = TOLERANCE * jnp.abs(best.scalar) * jnp.sqrt(feature_variance) <= 1
        ambiguous = signal & known_length & jnp.all(jnp.isfinite(best.label))
        unique = ambiguous & (reading.is_rounding | unique | sharp)
    else:
        ambiguous = jnp.any(listed)
    if method != "idlg":
        # A feature beyond the range of the result's dtype was no client's, and could not be reported.
        possible = jnp.abs(best.scalar) <= reading.longest
        ambiguous, unique = ambiguous & possible, unique & possible
    verdict = jnp.where(ambiguous, jnp.int32(Verdict.AMBIGUOUS), jnp.int32(Verdict.UNIDENTIFIABLE))
    verdict = jnp.where(unique, jnp.int32(Verdict.UNIQUE), verdict)
    verdict = jnp.where(signal, verdict, jnp.int32(Verdict.NO_SIGNAL))
    recovered = verdict >= Verdict.AMBIGUOUS

    label = best.label
    shaped = structured_label(best.label, best.label_deviation, best.agreeing, best.level)
    label = jnp.where(structured, shaped, label)

    prediction = jax.nn.softmax(best.scalar * equation.direction + equation.offset)
    expected = (prediction - label) / best.factor
    square = jnp.sum(equation.left**2)
    mismatch = jnp.sqrt(jnp.sum((equation.left - expected) ** 2) / jnp.where(square == 0, 1.0, square))
    interval = jnp.full((2,), jnp.nan)
    if thorough and method == "exact":
        interval = feasible_interval(equation, unknowns)
        interval = jnp.where(verdict == Verdict.UNIDENTIFIABLE, interval, jnp.nan)

    def known(values: jax.Array) -> jax.Array:
        return jnp.where(recovered, values, jnp.nan)

    smoothed = best.level > TOLERANCE * best.level_deviation
    label_format = read_format(label, best.agreeing, smoothed)
    dense = LabelFormat(
        kind=jnp.int32(LabelKind.DENSE),
        classes=jnp.full_like(label_format.classes, -1),
        weights=jnp.zeros_like(label_format.weights),
        count=jnp.int32(number_of_classes),
        smoothing=jnp.zeros(()),
    )
    label_format = jax.tree.map(lambda a, b: jnp.where(structured, a, b), label_format, dense)
    label_format = replace(
        label_format,
        kind=jnp.where(recovered, label_format.kind, jnp.int32(LabelKind.UNKNOWN)),
        classes=jnp.where(recovered, label_format.classes, -1),
        count=jnp.where(recovered, label_format.count, 0),
        weights=known(label_format.weights),
        smoothing=known(label_format.smoothing),
    )
    pull = explanations.feature_pull
    if pull is not None:
        # What a structure that does not fit would say of the feature is nothing.
        pull = jnp.where(structured, best.scalar**2 * feature_variance * pull, 0.0)
    kept = listed & signal
    recovery = Recovery(
        label=known(label),
        feature=jnp.zeros((0,)),
        scalar=known(best.scalar),
        scale=known(1 / (best.factor * best.scalar)) if unknowns.scale else known(jnp.ones(())),
        format=label_format,
        verdict=verdict,
        interval=interval,
        candidates=Candidates(
            scalar=jnp.where(kept, found.scalar, jnp.nan),
            scale=jnp.where(kept, 1 / (found.factor * found.scalar), jnp.nan),
            label=jnp.where(kept[:, None], found.label, jnp.nan),
            surprise=jnp.where(kept, found.surprise, jnp.nan),
        ),
        evidence=Evidence(
            agreeing=count.astype(jnp.int32),
            informative=best.informative,
            distinct_logits=best.levels,
            surprise=best.surprise,
            misfit=best.misfit,
            scalar_deviation=best.scalar_deviation,
            label_deviation=best.label_deviation,
            rank_one_residual=reading.residual,
            is_noiseless=reading.is_rounding,
            residual=known(jnp.hypot(mismatch, reading.residual)),
        ),
    )
    return recovery, pull


def _without_structure(best: Consensus, equation: ScalarEquation, feature_variance: jax.Array) -> Consensus:
    """y = p - kappa u as it is, and how exactly: for a known lambda, under noise that hides the label's structure."""
    prediction = probabilities(equation, best.scalar)
    label = prediction - best.factor * equation.left
    deviation = label_deviation(equation, best.scalar, best.factor, prediction, label)
    deviation = jnp.sqrt(deviation**2 + feature_variance * equation.left**2)
    return replace(best, label=label, label_deviation=deviation)


def _contradict(found: Consensus, unknowns: Unknowns) -> jax.Array:
    """(K,) bool: the explanation's lambda (kappa where lambda is known) lies beyond its errors from the first one's."""
    value, deviation = found.scalar, found.scalar_deviation
    if not unknowns.scalar:
        value, deviation = found.factor, found.factor_deviation
    return jnp.abs(value - value[0]) > TOLERANCE * (deviation + deviation[0])
