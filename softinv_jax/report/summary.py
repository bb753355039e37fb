"""What a recovery says, for JSON and for people."""

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.labels.assumptions import Loss, explain_assumptions
from softinv_jax.labels.verdicts import LabelKind, Recovery, Verdict
from softinv_jax.versions import package_versions

__all__ = [
    "assumption_notes",
    "batch_summary",
    "batch_table",
    "describe_format",
    "recovery_summary",
    "recovery_table",
]

LISTED = 12


def recovery_summary(recovery: Recovery) -> dict[str, Any]:
    """Counts and one entry for each gradient, in types JSON has: null stands for what is not known or not finite.

    Args:
      recovery: with a leading axis N.
    """
    verdicts, kinds = np.asarray(recovery.verdict), np.asarray(recovery.format.kind)
    return {
        "verdicts": {
            verdict.name.lower(): int(np.sum(verdicts == verdict))
            for verdict in Verdict
            if verdict != Verdict.NOT_FOUND  # Only of batches.
        },
        "kinds": {kind.name.lower(): int(np.sum(kinds == kind)) for kind in LabelKind},
        "assumptions": _words(np.asarray(recovery.assumptions.refuted), np.asarray(recovery.assumptions.rests_on)),
        "versions": package_versions(),
        "samples": _samples(recovery),
    }


def _words(refuted: np.ndarray, rests_on: np.ndarray) -> list[dict[str, Any]]:
    """Every assumption that is refuted or relied on in any gradient: code, sentence, remedy and how often."""
    counts: dict[str, dict[str, Any]] = {}
    for key, codes in (("refuted", refuted), ("relied_on", rests_on)):
        for code in codes.tolist():
            for one in explain_assumptions(code):
                entry = counts.setdefault(one.code, {**one._asdict(), "refuted": 0, "relied_on": 0})
                entry[key] += 1
    return list(counts.values())


def assumption_notes(summary: dict[str, Any]) -> list[str]:
    """What a summary says of assumptions, in lines for people: first what is refuted, with the remedy."""
    words = summary.get("assumptions", [])
    notes = [f"{one['refuted']} x {one['code']}: {one['sentence']} {one['remedy']}" for one in words if one["refuted"]]
    relied = [one["code"].replace("_", " ") for one in words if one["relied_on"]]
    if relied:
        count = max(one["relied_on"] for one in words)
        notes.append(f"{count} conditional: right if these are as told, which nothing confirms: {', '.join(relied)}.")
    return notes


def _samples(recovery: Recovery) -> list[dict[str, Any]]:
    label_format, evidence = recovery.format, recovery.evidence
    is_known = np.isfinite(np.asarray(recovery.label)).all(axis=-1)
    deviation = np.where(is_known, np.max(np.asarray(evidence.label_deviation), axis=-1), np.nan)
    classes = [[c for c in row if c >= 0] for row in np.asarray(label_format.classes).tolist()]
    weights = [row[: len(c)] for row, c in zip(_numbers(label_format.weights), classes, strict=True)]
    columns = {
        "index": list(range(len(classes))),
        "verdict": [Verdict(code).name.lower() for code in np.asarray(recovery.verdict).tolist()],
        "kind": [LabelKind(code).name.lower() for code in np.asarray(label_format.kind).tolist()],
        "classes": classes,
        "weights": weights,
        "smoothing": _numbers(label_format.smoothing),
        "label_deviation": _numbers(deviation),
        "scalar": _numbers(recovery.scalar),
        "scale": _numbers(recovery.scale),
        "interval": _numbers(recovery.interval),
        "agreeing_classes": np.asarray(evidence.agreeing).tolist(),
        "surprise": _numbers(evidence.surprise),
        "residual": _numbers(evidence.residual),
        "loss": [Loss(code).name.lower() for code in np.asarray(recovery.assumptions.loss).tolist()],
        "temperature": _numbers(recovery.assumptions.temperature),
        "refuted": _codes(recovery.assumptions.refuted),
        "rests_on": _codes(recovery.assumptions.rests_on),
        "examples": np.asarray(recovery.assumptions.examples).tolist(),
        "mean_label": _numbers(recovery.mean.label),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _codes(flags: object) -> list[list[str]]:
    return [[one.code for one in explain_assumptions(code)] for code in np.asarray(flags).tolist()]


def _numbers(values: object) -> list:
    """Nested lists with None for everything JSON has no number for."""
    array = np.asarray(values, np.float64)
    objects = array.astype(object)
    objects[~np.isfinite(array)] = None
    return objects.tolist()


def describe_format(sample: dict[str, Any]) -> str:
    """A label in words, from an entry of `recovery_summary`."""
    if sample["kind"] in ("unknown", "dense"):
        return {"unknown": "-", "dense": "dense: no class is singled out"}[sample["kind"]]
    shares = zip(sample["classes"], sample["weights"], strict=True)
    parts = [f"class {c}" if len(sample["classes"]) == 1 else f"class {c} {share or 0:.1%}" for c, share in shares]
    words = f"{sample['kind'].replace('_', ' ')}: {', '.join(parts) or 'all classes alike'}"
    smoothing = sample["smoothing"] or 0.0
    return f"{words}; smoothing {smoothing:.3f}" if smoothing > 0 else words


def recovery_table(summary: dict[str, Any]) -> Table:
    """The summary for people: verdicts counted, and the first few labels."""
    columns: dict[str, JustifyMethod] = {
        "gradient": "right",
        "verdict": "left",
        "label": "left",
        "standard\ndeviation": "right",
    }
    table = _empty_table(f"{len(summary['samples'])} gradients", summary["verdicts"], columns, len(summary["samples"]))
    for sample in summary["samples"][:LISTED]:
        deviation = sample["label_deviation"]
        table.add_row(
            str(sample["index"]),
            sample["verdict"].replace("_", " "),
            _describe(sample),
            "-" if deviation is None else f"{deviation:.0e}",
        )
    return table


def _describe(sample: dict[str, Any]) -> str:
    """The label in words; of several examples how many, and of another loss its name."""
    if "one_example" in sample["refuted"]:
        return f"{sample['examples']} or more examples: not one"
    if sample["verdict"] == "refuted":
        hinted = f" (class {sample['classes'][0]} by its sign)" if sample["classes"] else ""
        return f"not as told: {', '.join(sample['refuted']).replace('_', ' ')}{hinted}"
    words = describe_format(sample)
    return words if sample["loss"] in ("cross_entropy", "unknown") else f"{words}; {sample['loss'].replace('_', ' ')}"


def _empty_table(subject: str, verdicts: dict[str, int], columns: dict[str, JustifyMethod], rows: int) -> Table:
    """A table that counts the verdicts in its title and says how many of its rows will not be listed."""
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in verdicts.items() if count)
    table = Table(title=f"{subject}: {counts}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    if rows > LISTED:
        table.caption, table.caption_justify = f"and {rows - LISTED} more", "left"
    return table


def batch_summary(recoveries: list[BatchRecovery]) -> dict[str, Any]:
    """Counts and one entry for each gradient of a batch, in types JSON has."""
    verdicts = np.concatenate([np.empty(0, int), *(one.verdict for one in recoveries)])
    return {
        "verdicts": {verdict.name.lower(): int(np.sum(verdicts == verdict)) for verdict in Verdict},
        "assumptions": _words(np.array([one.refuted for one in recoveries], int), np.zeros(0, int)),
        "versions": package_versions(),
        "batches": [
            {
                "index": index,
                "rank": one.rank,
                "loss": Loss(one.loss).name.lower(),
                "refuted": _codes([one.refuted])[0],
                "factors": _numbers(one.factor),
                "scale": _numbers(one.scale),
                "residual": _numbers(one.residual),
                "joint_misfit": _numbers(one.joint_misfit),
                "examples": [
                    {
                        "verdict": Verdict(code).name.lower(),
                        "classes": [int(c) for c in targets if c >= 0],
                        "weights": [float(label[c]) for c in targets if c >= 0],
                        "label_deviation": _numbers(np.max(deviation)),
                    }
                    for code, targets, label, deviation in zip(
                        one.verdict.tolist(), one.targets, one.label, one.label_deviation, strict=True
                    )
                ],
            }
            for index, one in enumerate(recoveries)
        ],
    }


def batch_table(summary: dict[str, Any]) -> Table:
    """The summary of batches for people: each example's verdict and the classes it singles out."""
    rows = [
        (batch["index"], number, one) for batch in summary["batches"] for number, one in enumerate(batch["examples"])
    ]
    columns: dict[str, JustifyMethod] = {
        "gradient": "right",
        "example": "right",
        "verdict": "left",
        "label entries singled out": "left",
    }
    subject = f"{len(summary['batches'])} gradients of batches"
    table = _empty_table(subject, summary["verdicts"], columns, len(rows))
    for index, number, one in rows[:LISTED]:
        entries = ", ".join(f"class {c}: {w:.4f}" for c, w in zip(one["classes"], one["weights"], strict=True))
        table.add_row(str(index), str(number), one["verdict"].replace("_", " "), entries or "-")
    return table
