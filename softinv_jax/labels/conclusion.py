"""The verdict on one gradient, from its reading and the explanation that was found, and the result that carries it."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from softinv_jax.labels.assumptions import Assumption, Loss
from softinv_jax.labels.closed_form import closed_form
from softinv_jax.labels.consensus import Consensus
from softinv_jax.labels.explanations import SHARP_LABEL, is_unbalanced
from softinv_jax.labels.features import FeatureSource
from softinv_jax.labels.label_format import read_format, structured_label
from softinv_jax.labels.losses import Outcome
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.scalar_equation import (
    TOLERANCE,
    probabilities,
)
from softinv_jax.labels.verdicts import (
    Assumptions,
    Candidates,
    Evidence,
    LabelFormat,
    LabelKind,
    MeanLabel,
    Recovery,
    Verdict,
)

__all__ = ["Asked", "conclude"]

# Beyond what TF32 does to logits of size 10, or bfloat16 to those of size 1.
LARGE_LOGIT_ERROR = 2.0**-8
WEIGHTED = (Loss.WEIGHTED_CROSS_ENTROPY, Loss.WEIGHTED_TEMPERED_CROSS_ENTROPY)
TEMPERED = (Loss.TEMPERED_CROSS_ENTROPY, Loss.WEIGHTED_TEMPERED_CROSS_ENTROPY)
SIGMOIDS = (Loss.BINARY_CROSS_ENTROPY, Loss.WEIGHTED_BINARY_CROSS_ENTROPY)


class Asked(NamedTuple):
    """What is static of a verdict.

    Attributes:
      has_bias, told_scale: of the observation. is_published: the method is a published baseline's, which shows nothing
        but its own answer. approximate: the gradient stands for one that was not observed exactly. is_softmax: the loss
      may be one.
    """

    has_bias: bool
    told_scale: bool
    is_published: bool
    approximate: bool
    is_softmax: bool


class _Finding(NamedTuple):
    """What is said of one gradient: the explanation told, and () flags.

    Attributes:
      best: the explanation. prediction: (C,) p at it. structured: its label has the structure that was found.
      conditional: the label in closed form, which nothing confirms. unique, ambiguous: see `Verdict`.
      refuted: int32. dismissed: what is refuted leaves nothing to tell.
    """

    best: Consensus
    prediction: jax.Array
    structured: jax.Array
    conditional: jax.Array
    unique: jax.Array
    ambiguous: jax.Array
    refuted: jax.Array
    dismissed: jax.Array


def conclude(reading: Reading, outcome: Outcome, asked: Asked) -> Recovery:
    """The verdict, with its evidence.

    Args:
      reading: of one gradient. outcome: the explanations of it. asked: static.

    Returns:
      A `Recovery` without its mean label; of its feature what it is made from.
    """
    finding = _weigh(reading, outcome, asked)
    verdict = _verdict(reading, finding)
    recovered = verdict >= Verdict.AMBIGUOUS
    label = _told_label(finding, outcome)

    def known(values: jax.Array) -> jax.Array:
        return jnp.where(recovered, values, jnp.nan)

    best, found = finding.best, outcome.explanations.found
    kept = outcome.listed & reading.has_signal & ~finding.dismissed
    return Recovery(
        label=known(label),
        stored_feature=_feature(reading, finding, outcome, known(best.scalar)),
        scalar=known(best.scalar),
        scale=known(_scale(best, outcome, asked)),
        format=_format(reading, finding, label, recovered, outcome),
        verdict=verdict,
        interval=jnp.full((2,), jnp.nan),
        candidates=Candidates(
            scalar=jnp.where(kept, found.scalar, jnp.nan),
            scale=jnp.where(kept, 1 / (found.factor * found.scalar), jnp.nan),
            label=jnp.where(kept[:, None], found.label, jnp.nan),
            surprise=jnp.where(kept, found.surprise, jnp.nan),
        ),
        evidence=_evidence(reading, finding, label, recovered),
        assumptions=_assumptions(reading, finding, outcome, verdict),
        mean=MeanLabel(jnp.full_like(label, jnp.nan), jnp.full_like(label, jnp.nan)),
    )


def _feature(reading: Reading, finding: _Finding, outcome: Outcome, scalar: jax.Array) -> FeatureSource:
    """lambda v, less what the label's structure says of its error, which is orthogonal to v."""
    pull = outcome.explanations.feature_pull
    if pull is None:
        return FeatureSource(reading.coefficients, scalar, None)
    # What a structure that does not fit would say of the feature is nothing.
    pull = jnp.where(finding.structured, finding.best.scalar**2 * reading.feature_variance * pull, 0.0)
    return FeatureSource(reading.coefficients, scalar + jnp.sum(pull * reading.equation.direction), pull)


def _weigh(reading: Reading, outcome: Outcome, asked: Asked) -> _Finding:
    """Whether the explanation is told, and what of the assumptions does not hold."""
    found = outcome.explanations.found
    best: Consensus = jax.tree.map(lambda leaf: leaf[0], found)
    structured = outcome.listed[0]
    sigmoids = _is_one_of(outcome.loss, SIGMOIDS)
    # Errors of coarse quantisation follow the entries: no deviation holds for sure.
    coarse = reading.leftover.on_grid & ~reading.is_rounding
    ambiguous, unique, conditional = jnp.any(outcome.listed), outcome.unique & ~coarse, jnp.zeros((), bool)
    if asked.is_published:
        structured, ambiguous, unique = (jnp.asarray(flag) for flag in (True, True, False))
    contradicted = jnp.zeros((), bool)
    if asked.has_bias and asked.told_scale and not asked.is_published:
        plain, closed, contradicted = closed_form(reading, outcome, sigmoids)
        # What moves over several steps can leave [0, 1] a little.
        contradicted = contradicted & (not asked.approximate)
        told = (~outcome.scale & ~outcome.scalar) | sigmoids
        conditional = ~unique & told & closed & ~contradicted
        best = jax.tree.map(lambda a, b: jnp.where(conditional & ~structured, a, b), plain, best)
        sharp = TOLERANCE * jnp.max(best.label_deviation) <= SHARP_LABEL
        ambiguous, conditional = (ambiguous & closed) | (conditional & ~sharp), conditional & sharp
    supple = unique & _is_supple(best, outcome, asked, reading.leftover.few_digits & ~reading.is_rounding)
    unique, conditional = unique & ~supple, conditional | supple
    refuted, dismissed = _refuted(reading, outcome, asked, contradicted)
    prediction = probabilities(reading.equation, best.scalar)
    logits = best.scalar * reading.equation.direction + reading.equation.offset
    prediction = jnp.where(sigmoids, jax.nn.sigmoid(logits), prediction)
    # A feature beyond the range of the result's dtype was no client's, and could not be reported.
    possible = jnp.abs(best.scalar) <= reading.longest
    sure = ~dismissed & reading.has_signal & (possible | asked.is_published)
    if asked.approximate:
        ambiguous = ambiguous | unique | conditional
        unique = conditional = jnp.zeros((), bool)
    return _Finding(
        best, prediction, structured, conditional & sure, unique & sure, ambiguous & sure, refuted, dismissed
    )


def _is_supple(best: Consensus, outcome: Outcome, asked: Asked, few_digits: jax.Array) -> jax.Array:
    """() bool: the loss that was found has so much freedom that others have nearly the same gradients.

    A factor that nobody told, or logits that err: focal loss and class weights give every label but a hard one shares
    of their own. (Where one class alone is singled out over zero, kappa u is p outside it, whatever the factor.) A
    factor and a temperature: squared error, for one.
    """
    smoothed = jnp.abs(best.level) > TOLERANCE * best.level_deviation
    hard = ~smoothed & (jnp.sum(~best.agreeing) == 1)
    found_factor = outcome.scale & ~hard if asked.told_scale else jnp.zeros((), bool)
    errs = jnp.where(few_digits, outcome.logit_error > LARGE_LOGIT_ERROR, outcome.logit_error > 0)
    found_factor = found_factor | (errs & outcome.scalar & ~hard)
    # Arithmetic in half precision bends the equation as another loss would.
    found_factor = found_factor | (few_digits & (outcome.loss != Loss.CROSS_ENTROPY))
    both = outcome.scalar & outcome.scale if asked.has_bias else jnp.zeros((), bool)
    return (found_factor | both) & ~_is_one_of(outcome.loss, SIGMOIDS)


def _is_one_of(loss: jax.Array, losses: tuple[Loss, ...]) -> jax.Array:
    return jnp.any(jnp.stack([loss == one for one in losses]))


def _refuted(reading: Reading, outcome: Outcome, asked: Asked, contradicted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """() int32 `Assumption` flags of what the gradient contradicts; () bool, whether that leaves nothing to tell."""
    left = reading.equation.left
    unbalanced = is_unbalanced(reading.equation) & asked.is_softmax
    unexplained = ~outcome.unique
    empty = jnp.any(left == 0) & (unbalanced | contradicted)
    one_size = reading.one_size & (unbalanced | ~reading.is_rounding)
    beyond = (reading.leftover.stands_out | reading.leftover.rows_alike) & ~reading.is_rounding
    deleted = (reading.leftover.deleted & ~reading.is_rounding) | (empty & unexplained)
    several = beyond & ~reading.leftover.deleted & ~one_size
    if asked.approximate:
        several = jnp.zeros_like(several)
    sigmoids = _is_one_of(outcome.loss, SIGMOIDS)
    found_other = outcome.unique & ~sigmoids
    weighted = _is_one_of(outcome.loss, WEIGHTED)
    tempered = _is_one_of(outcome.loss, TEMPERED)
    flags = {
        Assumption.SOFTMAX: (unbalanced & unexplained & ~empty) | (sigmoids & outcome.unique),
        Assumption.LABEL_RANGE: contradicted & unexplained & ~unbalanced & ~empty,
        Assumption.LOSS: tempered & found_other,
        Assumption.SCALE: weighted & found_other & asked.told_scale,
        Assumption.PARAMETERS: (outcome.logit_error > 0) & outcome.listed[0],
        Assumption.ONE_EXAMPLE: several,
        Assumption.GRADIENT: one_size,
        Assumption.ALL_ENTRIES: deleted & ~one_size,
    }
    codes = sum(jnp.where(held, jnp.int32(flag), jnp.int32(0)) for flag, held in flags.items())
    nothing_left = several | one_size | deleted | (unexplained & (unbalanced | contradicted))
    if asked.is_published:
        return jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    return jnp.where(reading.has_signal, codes, jnp.int32(0)), nothing_left & reading.has_signal


def _verdict(reading: Reading, finding: _Finding) -> jax.Array:
    verdict = jnp.where(finding.ambiguous, jnp.int32(Verdict.AMBIGUOUS), jnp.int32(Verdict.UNIDENTIFIABLE))
    verdict = jnp.where(finding.conditional, jnp.int32(Verdict.CONDITIONAL), verdict)
    verdict = jnp.where(finding.unique, jnp.int32(Verdict.UNIQUE), verdict)
    verdict = jnp.where(finding.dismissed, jnp.int32(Verdict.REFUTED), verdict)
    return jnp.where(reading.has_signal, verdict, jnp.int32(Verdict.NO_SIGNAL))


def _told_label(finding: _Finding, outcome: Outcome) -> jax.Array:
    best = finding.best
    shaped = structured_label(best.label, best.label_deviation, best.agreeing, best.level)
    as_it_is = ~finding.structured | _is_one_of(outcome.loss, SIGMOIDS)
    return jnp.where(as_it_is, best.label, shaped)


def _scale(best: Consensus, outcome: Outcome, asked: Asked) -> jax.Array:
    """The factor between the observed gradient and dL/dW; of sigmoids, dL/dW of the mean over the outputs."""
    sigmoids = _is_one_of(outcome.loss, SIGMOIDS)
    classes = jnp.where(sigmoids, 1.0 * best.label.size, 1.0)
    free = 1 / (best.factor * best.scalar) * classes
    if not asked.told_scale:
        return free
    # Where lambda is free and kappa follows from it, the scale is the one told.
    return jnp.where(outcome.scale, free, jnp.ones(()))


def _format(
    reading: Reading, finding: _Finding, label: jax.Array, recovered: jax.Array, outcome: Outcome
) -> LabelFormat:
    best = finding.best
    smoothed = best.level > TOLERANCE * best.level_deviation
    shaped = read_format(label, best.agreeing, smoothed)
    sigmoids = _is_one_of(outcome.loss, SIGMOIDS)
    several = sigmoids & (shaped.count != 1)
    shaped = replace(shaped, kind=jnp.where(several, jnp.int32(LabelKind.MULTI_LABEL), shaped.kind))
    dense = LabelFormat(
        kind=jnp.int32(LabelKind.DENSE),
        classes=jnp.full_like(shaped.classes, -1),
        weights=jnp.zeros_like(shaped.weights),
        count=jnp.int32(label.size),
        smoothing=jnp.zeros(()),
    )
    told = jax.tree.map(lambda a, b: jnp.where(finding.structured, a, b), shaped, dense)
    unknown = LabelFormat(
        kind=jnp.int32(LabelKind.UNKNOWN),
        classes=jnp.full_like(shaped.classes, -1),
        weights=jnp.full_like(shaped.weights, jnp.nan),
        count=jnp.int32(0),
        smoothing=jnp.full((), jnp.nan),
    )
    # Of signs the class is left: the one row that points the other way.
    hinted = reading.one_size & (reading.hinted_class >= 0)
    first = jnp.arange(shaped.classes.size, dtype=jnp.int32) == 0
    unknown = replace(unknown, classes=jnp.where(hinted & first, reading.hinted_class, unknown.classes))
    return jax.tree.map(lambda a, b: jnp.where(recovered, a, b), told, unknown)


def _evidence(reading: Reading, finding: _Finding, label: jax.Array, recovered: jax.Array) -> Evidence:
    equation, best = reading.equation, finding.best
    expected = (finding.prediction - label) / best.factor
    square = jnp.sum(equation.left**2)
    mismatch = jnp.sqrt(jnp.sum((equation.left - expected) ** 2) / jnp.where(square == 0, 1.0, square))
    return Evidence(
        agreeing=jnp.sum(best.agreeing).astype(jnp.int32),
        informative=best.informative,
        distinct_logits=best.levels,
        surprise=best.surprise,
        misfit=best.misfit,
        scalar_deviation=best.scalar_deviation,
        label_deviation=best.label_deviation,
        rank_one_residual=reading.residual,
        is_noiseless=reading.is_rounding,
        residual=jnp.where(recovered, jnp.hypot(mismatch, reading.residual), jnp.nan),
    )


def _assumptions(reading: Reading, finding: _Finding, outcome: Outcome, verdict: jax.Array) -> Assumptions:
    told = verdict >= Verdict.AMBIGUOUS
    in_closed_form = jnp.int32(Assumption.LOSS | Assumption.SCALE | Assumption.PARAMETERS)
    rests_on = jnp.where(finding.structured, jnp.int32(Assumption.LOSS), in_closed_form)
    tempered = _is_one_of(outcome.loss, TEMPERED)
    temperature = jnp.where(tempered, reading.equation.known_scalar / finding.best.scalar, 1.0)
    several = (finding.refuted & jnp.int32(Assumption.ONE_EXAMPLE)) != 0
    return Assumptions(
        loss=jnp.where(told, outcome.loss, jnp.int32(Loss.UNKNOWN)),
        temperature=jnp.where(told, temperature, jnp.nan),
        logit_error=jnp.where(told, outcome.logit_error, jnp.nan),
        refuted=finding.refuted,
        rests_on=jnp.where(verdict == Verdict.CONDITIONAL, rests_on, jnp.int32(0)),
        # Several are counted where the whole gradient is at hand.
        examples=jnp.where(several | (verdict == Verdict.NO_SIGNAL), jnp.int32(0), jnp.int32(1)),
    )
