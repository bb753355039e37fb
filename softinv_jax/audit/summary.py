"""The figures of one cell: counts with Wilson intervals, medians with distribution-free ones, means with errors."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from softinv_jax.audit.cells import Cell, Composition
from softinv_jax.images.verdicts import ImageVerdict, image_verdict_names
from softinv_jax.labels.explanations import SHARP_LABEL
from softinv_jax.labels.verdicts import Verdict

__all__ = ["CellSummary", "Estimate", "Share", "share", "summarise"]


@dataclass(frozen=True)
class Share:
    """count of total, and the 95 % Wilson interval of the probability behind it."""

    count: int
    total: int
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, None where too few values allow none; count values went in."""

    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class CellSummary:
    """What one defence at one strength lets through.

    Attributes:
      composition: (defence, strength) in the order applied; empty without a defence.
      certain: verdict `unique`, and every entry of the label right to 0.1, which that verdict promises.
      wrong: verdict `unique`, and some entry is not. likely: verdict `ambiguous`, and the best candidate right to 0.1.
      class_found: the heaviest class of the label is known.
      verdicts, image_verdicts: counts by name.
      label_error: median over the labels given of the largest error of an entry. feature_error: median relative error.
      psnr: mean over the images given, decibels. images: how many were tried.
      cosine: mean cosine between what is sent and the gradient: what the defence leaves of it.
      epsilon: of DP-SGD, for the settings' run; None otherwise, or without dp-accounting.
    """

    composition: Composition
    certain: Share
    wrong: Share
    likely: Share
    class_found: Share
    verdicts: dict[str, int]
    image_verdicts: dict[str, int]
    label_error: Estimate
    feature_error: Estimate
    psnr: Estimate
    images: int
    cosine: Estimate
    epsilon: float | None


def share(flags: np.ndarray) -> Share:
    """Share of true entries of (N,) flags, N >= 1."""
    count, total = int(np.sum(flags)), len(flags)
    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return Share(count, total, float(interval.low), float(interval.high))


def summarise(composition: Composition, cell: Cell, epsilon: float | None = None) -> CellSummary:
    """Summarise what `run_cells` measured."""
    verdict, names = cell["verdict"], image_verdict_names(cell["image_verdict"])
    near = np.nan_to_num(cell["label_error"], nan=np.inf) <= SHARP_LABEL
    tried = bool(len(names)) and bool(np.any(np.isfinite(cell["psnr"])) or np.any(cell["image_tried"]))
    return CellSummary(
        composition=composition,
        certain=share((verdict == Verdict.UNIQUE) & near),
        wrong=share((verdict == Verdict.UNIQUE) & ~near),
        likely=share((verdict == Verdict.AMBIGUOUS) & near),
        class_found=share(cell["class_found"]),
        verdicts={
            kind.name.lower(): int(np.sum(verdict == kind)) for kind in reversed(Verdict) if kind != Verdict.NOT_FOUND
        },
        image_verdicts={kind.name.lower(): int(np.sum(names == kind.name.lower())) for kind in reversed(ImageVerdict)}
        if tried
        else {},
        label_error=_median(cell["label_error"]),
        feature_error=_median(cell["feature_error"]),
        psnr=_mean(cell["psnr"]),
        images=len(names) if tried else 0,
        cosine=_mean(cell["cosine"]),
        epsilon=epsilon,
    )


def _median(values: np.ndarray) -> Estimate:
    known = values[np.isfinite(values)]
    if not known.size:
        return Estimate(None, None, None, 0)
    interval = stats.quantile_test(known, q=float(np.median(known)), p=0.5).confidence_interval(0.95)
    low, high = (float(bound) if np.isfinite(bound) else None for bound in interval)
    return Estimate(float(np.median(known)), low, high, int(known.size))


def _mean(values: np.ndarray) -> Estimate:
    known = np.asarray(values[np.isfinite(values)], np.float64)
    if not known.size:
        return Estimate(None, None, None, 0)
    mean = float(np.mean(known))
    if known.size == 1:
        return Estimate(mean, None, None, 1)
    half = float(stats.t.ppf(0.975, known.size - 1) * stats.sem(known))
    return Estimate(mean, mean - half, mean + half, int(known.size))
