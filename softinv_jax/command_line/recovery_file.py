"""RECOVERY.npz: what the gradients gave away, as arrays."""

import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts
from softinv_jax.labels.assumptions import Loss, explain_assumptions
from softinv_jax.labels.verdicts import LabelKind, Recovery, verdict_names

__all__ = ["assumption_codes", "batch_arrays", "counts_arrays", "kind_names", "loss_names", "recovery_arrays"]


def kind_names(codes: object) -> np.ndarray:
    """Label kinds of any shape as lower-case strings."""
    return np.array([kind.name.lower() for kind in LabelKind])[np.asarray(codes)]


def loss_names(codes: object) -> np.ndarray:
    """Losses of any shape as lower-case strings."""
    return np.array([loss.name.lower() for loss in Loss])[np.asarray(codes)]


def assumption_codes(flags: object) -> np.ndarray:
    """(N,) `Assumption` flags as codes with commas between."""
    return np.array([",".join(one.code for one in explain_assumptions(code)) for code in np.asarray(flags).tolist()])


def counts_arrays(counts: list[ClassCounts]) -> dict[str, np.ndarray]:
    """The arrays of RECOVERY.npz for gradients of batches that nothing tells apart.

    Returns:
      mean_labels and mean_label_deviation (N, C), interval (N, C, 2), count and likeliest_count (N, C), -1 for unknown,
      certainty (N, C) and hard_labels (N,).
    """
    return {
        "mean_labels": np.stack([one.label for one in counts]),
        "mean_label_deviation": np.stack([one.deviation for one in counts]),
        "interval": np.stack([one.interval for one in counts]),
        "count": np.stack([one.count for one in counts]),
        "likeliest_count": np.stack([one.likeliest for one in counts]),
        "certainty": np.stack([one.certainty for one in counts]),
        "hard_labels": np.array([one.is_whole for one in counts]),
    }


def recovery_arrays(recovery: Recovery) -> dict[str, np.ndarray]:
    """The arrays of RECOVERY.npz.

    Each gradient is that of one example, so that the axis of the examples behind one gradient has length 1.

    Args:
      recovery: of N gradients.

    Returns:
      labels (N, 1, C), features (N, 1, d), scale (N,), verdict (N, 1) and residual (N, 1); and, in the same order,
      label_deviation (N, 1, C) one standard deviation, kind (N, 1), singled_out (N, 1, K) the classes singled out
      (-1 for none), weights (N, 1, K), smoothing (N, 1), scalar (N, 1), interval (N, 2), and the explanations
      considered, candidate_labels (N, M, C) and candidate_scalars (N, M). What is taken for granted: loss (N, 1),
      temperature (N, 1), refuted and rests_on (N, 1), codes with commas between; examples (N,) that stand out, and
      mean_labels and mean_label_deviation (N, C) where they are several. NaN where nothing is recovered.
    """
    per_gradient = {"scale": recovery.scale, "interval": recovery.interval}
    per_gradient |= {
        "candidate_labels": recovery.candidates.label,
        "candidate_scalars": recovery.candidates.scalar,
        "examples": recovery.assumptions.examples,
        "mean_labels": recovery.mean.label,
        "mean_label_deviation": recovery.mean.deviation,
    }
    deviation = np.asarray(recovery.evidence.label_deviation)
    label = np.asarray(recovery.label)
    per_example = {
        "labels": label,
        "features": recovery.feature,
        "verdict": verdict_names(recovery.verdict),
        "residual": recovery.evidence.residual,
        "label_deviation": np.where(np.isnan(label), np.nan, deviation).astype(label.dtype),
        "kind": kind_names(recovery.format.kind),
        "singled_out": recovery.format.classes,
        "weights": recovery.format.weights,
        "smoothing": recovery.format.smoothing,
        "scalar": recovery.scalar,
        "loss": loss_names(recovery.assumptions.loss),
        "temperature": recovery.assumptions.temperature,
        "refuted": assumption_codes(recovery.assumptions.refuted),
        "rests_on": assumption_codes(recovery.assumptions.rests_on),
    }
    arrays = {name: np.asarray(array)[:, None] for name, array in per_example.items()}
    return arrays | {name: np.asarray(array) for name, array in per_gradient.items()}


def batch_arrays(recoveries: list[BatchRecovery]) -> dict[str, np.ndarray]:
    """The arrays of RECOVERY.npz for the gradients of batches.

    Args:
      recoveries: of N gradients. Where they differ in the number of examples, B is the largest, and what is beyond
        a gradient's own is NaN with an empty verdict.

    Returns:
      labels (N, B, C), features (N, B, d), verdict, residual (of the whole gradient), misfit and surprise (N, B),
      label_deviation (N, B, C), singled_out (N, B, 2), factor (N, B), scale, rank and joint_misfit (N,), loss and
      refuted (N,), codes with commas between.
    """
    examples = max(len(one.verdict) for one in recoveries)

    def padded(values: np.ndarray, fill: object) -> np.ndarray:
        missing = [(0, examples - len(values))] + [(0, 0)] * (values.ndim - 1)
        return np.pad(values, missing, constant_values=fill)  # type: ignore[call-overload]

    def stacked(name: str, fill: object = np.nan) -> np.ndarray:
        return np.stack([padded(np.asarray(getattr(one, name)), fill) for one in recoveries])

    return {
        "labels": stacked("label"),
        "features": stacked("feature"),
        "verdict": np.stack([padded(verdict_names(one.verdict), "") for one in recoveries]),
        "residual": np.stack([padded(np.full(len(one.verdict), one.residual), np.nan) for one in recoveries]),
        "misfit": stacked("misfit"),
        "surprise": stacked("surprise"),
        "label_deviation": stacked("label_deviation"),
        "singled_out": stacked("targets", -1),
        "factor": stacked("factor"),
        "loss": loss_names([one.loss for one in recoveries]),
        "refuted": assumption_codes([one.refuted for one in recoveries]),
        "scale": np.array([one.scale for one in recoveries]),
        "rank": np.array([one.rank for one in recoveries]),
        "joint_misfit": np.array([one.joint_misfit for one in recoveries]),
    }
