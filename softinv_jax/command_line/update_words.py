"""What real updates give away, in rows and sentences: for the report of `softinv audit --updated`."""

import math
from typing import Any

import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.inversions import Inversion
from softinv_jax.report.audit_report import UpdateRow
from softinv_jax.report.summary import describe_format

__all__ = ["advice", "batch_rows", "count_findings", "findings", "image_counts", "single_rows"]


def single_rows(names: list[str], summary: dict[str, Any]) -> list[UpdateRow]:
    """One an update, for updates of one example."""
    rows = []
    for name, sample in zip(names, summary["samples"], strict=True):
        kind = sample["kind"].replace("_", " ")
        rows.append(
            UpdateRow(name, sample["verdict"], describe_format(sample), kind, _known(sample["label_deviation"]), "")
        )
    return rows


def batch_rows(
    names: list[str], found: "list[BatchRecovery | ClassCounts]", summary: dict[str, Any]
) -> list[UpdateRow]:
    """One an example, or one an update where nothing tells its examples apart."""
    rows, batches = [], iter(summary["batches"])
    for name, one in zip(names, found, strict=True):
        if isinstance(one, ClassCounts):
            rows.append(_count_row(name, one))
            continue
        for number, example in enumerate(next(batches)["examples"]):
            entries = zip(example["classes"], example["weights"], strict=True)
            label = ", ".join(f"class {c}: {w:.4f}" for c, w in entries) or "-"
            known = _known(example["label_deviation"])
            rows.append(UpdateRow(f"{name}, example {number + 1}", example["verdict"], label, "", known, ""))
    return rows


def _count_row(name: str, counts: ClassCounts) -> UpdateRow:
    known = np.where(counts.count >= 0, counts.count, counts.likeliest)
    numbers = ", ".join(f"class {c}: {known[c]}" for c in np.flatnonzero(known > 0))
    sure = int(np.sum(counts.count >= 0))
    certainty = f"{sure} of {len(known)} classes for sure" if sure else "the likeliest numbers"
    return UpdateRow(name, "counted" if sure else "likely", numbers or "-", "numbers of examples", certainty, "")


def count_findings(counts: list[ClassCounts]) -> list[str]:
    """Of updates whose examples nothing tells apart."""
    classes = sum(len(one.count) for one in counts)
    sure = sum(int(np.sum(one.count >= 0)) for one in counts)
    updates = f"{len(counts)} update{'s' * (len(counts) != 1)}"
    findings = [
        f"Behind {updates} there are more examples than anything tells apart: what is known is how many there are of"
        f" each class, for sure of {sure} of {classes} classes."
    ]
    if sure < classes:
        findings.append(
            "Elsewhere the likeliest numbers are shown. They are no proof, but mostly right to a few examples"
            " (docs/counts.md)."
        )
    findings.append("No image is told from such an update.")
    return findings


def _known(deviation: float | None) -> str:
    if deviation is None or not math.isfinite(deviation):
        return "-"
    return "exact" if deviation == 0 else f"every entry to ±{deviation:.0e}"


def findings(
    rows: list[UpdateRow], updates: int, verdicts: dict[str, int], local_steps: int, images: Inversion | None
) -> list[str]:
    """What leaks, in sentences.

    Args:
      rows: one an example. updates: how many. verdicts: examples by verdict of the label.
      images: what was found of them, where the model was told.
    """
    certain, several = verdicts.get("unique", 0), verdicts.get("ambiguous", 0)
    sent = f"{updates} update{'s' * (updates != 1)}"
    examples = f"{len(rows)} examples behind {sent}" if len(rows) != updates else sent
    findings = [f"The labels of {certain} of {examples} leak with certainty: only one explains each."]
    conditional = verdicts.get("conditional", 0)
    if conditional:
        findings.append(f"{conditional} more leak if loss, scale and parameters are as told, which nothing confirms.")
    if several:
        findings.append(f"{several} more are narrowed down to a few labels, of which the likeliest is shown.")
    if local_steps > 1:
        findings.append(
            "After several local steps an update is no gradient: no label is called certain here. Labels and images may"
            " still follow exactly: softinv invert solves the steps themselves (docs/local_steps.md)."
        )
    claimed = ("unique", "conditional", "ambiguous")
    rest = {name: count for name, count in verdicts.items() if count and name not in claimed}
    if rest:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in rest.items())
        findings.append(f"Of the rest nothing is claimed: {counts}.")
    if images is not None:
        return findings + _image_findings(images)
    if certain + conditional + several:
        findings.append(
            "With a label comes the input of the last layer, and, in a chain of invertible layers, the image"
            " (softinv invert)."
        )
    return findings


def image_counts(images: Inversion) -> dict[str, int]:
    """Images by verdict, the best first; without those there are none of."""
    verdicts = images.recovery.verdict
    counts = {kind.name.lower(): int(np.sum(verdicts == kind)) for kind in reversed(ImageVerdict)}
    return {name: count for name, count in counts.items() if count}


def _image_findings(images: Inversion) -> list[str]:
    counts, total = image_counts(images), images.recovery.verdict.size
    exact, near = counts.get("exact", 0), counts.get("approximate", 0)
    findings = [f"{exact} of {total} images come back exactly."] if exact else []
    if near:
        findings.append(f"{near} of {total} images come back nearly: their gradient is the one sent.")
    if images.reason:
        findings.append(f"{images.reason} No image can be told for sure from one such update.")
    if images.method == "matching":
        findings.append(
            "The pictures shown are the best likenesses that gradient matching found; nothing says how like they are."
        )
    if not findings:
        findings.append(f"Of {total} images none is known.")
    return findings


def advice(verdicts: dict[str, int], images: Inversion | None) -> list[str]:
    """What to do next, as far as the findings suggest it."""
    counts = {} if images is None else image_counts(images)
    leaks = verdicts.get("unique", 0) + verdicts.get("conditional", 0) + counts.get("exact", 0)
    advice = []
    if leaks:
        advice.append(
            "Do not let a server see single updates: with secure aggregation it sees sums over many clients only."
        )
        advice.append(
            "Where it must see them, add noise as DP-SGD does. softinv audit --defences differential_privacy"
            " gaussian_noise measures, on a network of yours, from which strength on nothing is certain any more."
        )
        advice.append(
            "Larger batches and more local steps make it harder, but are no protection by themselves: audit again"
            " with --batch-size and --local-steps as your clients use them."
        )
    else:
        advice.append(
            "That nothing is certain here says nothing of other updates: audit those of smaller batches, of fewer local"
            " steps and of the first rounds, which give away most."
        )
    if images is None:
        advice.append(
            "Give --torch-model FILE.py:NAME and --image-size, to see what these updates give away of images."
        )
    elif images.reason:
        advice.append(
            "Wider first layers have more equations than images have unknowns: audit again if you change them."
        )
    return advice
