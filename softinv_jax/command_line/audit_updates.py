"""`softinv audit --updated`: a report on what real clients' updates give away; nobody needs to know their labels."""

import argparse
import dataclasses
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.command_line.console import InputError, Report, input_errors, progress_report
from softinv_jax.command_line.update_files import observe_heads, read_updates
from softinv_jax.images.objective import MatchingSettings
from softinv_jax.images.verdicts import ImageVerdict, image_verdict_names
from softinv_jax.inversions import Inversion, invert_observed
from softinv_jax.observation.head import Observation
from softinv_jax.observation.updates import ObservedUpdate
from softinv_jax.recoveries import BatchSize, as_approximate, recover_many
from softinv_jax.report.audit_report import UpdateRow, render_updates_report
from softinv_jax.report.image_figures import recovered_images_figure
from softinv_jax.report.summary import assumption_notes, batch_summary, describe_format, recovery_summary
from softinv_jax.whole_models import find_dense_end, recover_update

if TYPE_CHECKING:
    from softinv_jax.frameworks.torch_model import TorchModel

__all__ = ["report_updates"]

SHOWN = 64  # Images in the report.
TITLE = "What these updates give away"
_OF_A_SYSTEM = (
    "config",
    "quick",
    "network",
    "epochs",
    "dataset",
    "data_dir",
    "label_format",
    "samples",
    "images",
    "defences",
    "seed",
    "unknown_scale",
)


def report_updates(arguments: argparse.Namespace) -> tuple[dict[str, Any], str, dict[str, bytes]]:
    """Read the updates, recover their labels, and their images where the model is told, and describe them.

    Returns:
      What goes into results.json, the page, and pictures by name.

    Raises:
      InputError: one line that names what is wrong and the remedy.
    """
    _check(arguments)
    size = _batch_size(arguments.batch_size)
    model = None
    if arguments.torch_model is not None:
        from softinv_jax.command_line.torch_files import image_shape, read_torch_model  # noqa: PLC0415 - optional

        model = read_torch_model(arguments, image_shape(arguments))
    updates = read_updates(arguments) if model is None else read_updates(arguments, model.tree)
    observation = observe_heads(updates, arguments.head)
    known = arguments.learning_rate is not None
    total = len(updates)
    with progress_report() as report, input_errors():
        report(0, total, "recovering")
        options: dict[str, Any] = {"progress": lambda done, of: report(done, of, "recovering")}
        if size == 1:
            # The rounding of the parameters is noise: only the thorough search knows what to do with it.
            options["approximate"] = arguments.local_steps > 1
            summary = recovery_summary(recover_many(observation, thorough=True, unknown_scale=not known, **options))
        else:
            summary = batch_summary(_recover_batches(updates, observation, size, arguments.head, options))
        images = None if model is None else _invert(model, updates, size, arguments, report)
    names = [Path(path).name for path in arguments.updated]
    rows = _single_rows(names, summary) if size == 1 else _batch_rows(names, summary)
    statement = updates[0].statement
    findings = _findings(rows, total, summary["verdicts"], arguments.local_steps, images) + assumption_notes(summary)
    settings = {
        "parameters": Path(arguments.parameters).name,
        "updates": total,
        "batch size": arguments.batch_size,
        "classes": observation.weight.shape[0],
        "features": observation.weight.shape[1],
        "learning rate": arguments.learning_rate if known else "not known; recovered with each label",
    }
    assumptions = (
        ("Observer", "an honest-but-curious server that sees each client's update by itself (no secure aggregation)"),
        ("Parameters", "known exactly: the server sent them"),
        ("Update", statement),
        ("Batch size", "told" if size != "auto" else "not told: taken from the rank of each update"),
        ("Label format", "not told; a label is taken to be equal on all but a few classes"),
        ("Data", "no prior knowledge of images or labels"),
    )
    versions = summary.pop("versions")
    advice = _advice(summary["verdicts"], images)
    pictures = {} if images is None else _pictures(images)
    page = render_updates_report(
        arguments.title or TITLE, findings, rows, assumptions, settings, versions, advice=advice, pictures=pictures
    )
    results = {
        "findings": findings,
        "advice": advice,
        "settings": settings,
        "assumptions": dict(assumptions),
        "versions": versions,
    }
    if images is not None:
        results["images"] = {"method": images.method, "reason": images.reason or None, "verdicts": _counts(images)}
    return results | summary, page, pictures


def _invert(
    model: "TorchModel", updates: list[ObservedUpdate], size: BatchSize, arguments: argparse.Namespace, report: Report
) -> Inversion:
    matching = MatchingSettings(steps=arguments.match_steps) if arguments.match_steps else None
    network = dataclasses.replace(model.network, head=arguments.head)
    return invert_observed(network, updates, batch_size=size, matching=matching, progress=report)


def _counts(images: Inversion) -> dict[str, int]:
    """Images by verdict, the best first; without those there are none of."""
    verdicts = images.recovery.verdict
    counts = {kind.name.lower(): int(np.sum(verdicts == kind)) for kind in reversed(ImageVerdict)}
    return {name: count for name, count in counts.items() if count}


def _pictures(images: Inversion) -> dict[str, bytes]:
    recovery = images.recovery
    shown = recovery.images.reshape(-1, *recovery.images.shape[2:])[:SHOWN]
    if not np.any(np.isfinite(shown)):
        return {}
    buffer = io.BytesIO()
    names = image_verdict_names(recovery.verdict.ravel()[:SHOWN]).tolist()
    recovered_images_figure(shown, names).savefig(buffer, format="png")
    return {"images": buffer.getvalue()}


def _image_findings(images: Inversion) -> list[str]:
    counts, total = _counts(images), images.recovery.verdict.size
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


def _advice(verdicts: dict[str, int], images: Inversion | None) -> list[str]:
    """What to do next, as far as the findings suggest it."""
    counts = {} if images is None else _counts(images)
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


def _recover_batches(
    updates: list[ObservedUpdate], observation: Observation, size: BatchSize, head: str | None, options: dict[str, Any]
) -> list[BatchRecovery]:
    """The batch behind each update: by the dense layers that the model ends in, or by its head where that is all."""
    first = updates[0]
    found: list[Any] = []
    if len(find_dense_end(first.parameters, head=head)) > 1:
        for number, update in enumerate(updates):
            options["progress"](number, len(updates))
            found.append(recover_update(update, batch_size=size, head=head))
    else:
        together: list[Any] = recover_many(observation, batch_size=size, unknown_scale=not first.scale_known, **options)
        found = together if first.exact else [as_approximate(one) for one in together]
    batches = [one for one in found if isinstance(one, BatchRecovery)]
    if len(batches) < len(found):
        raise InputError(
            f"--batch-size {size}: with {observation.weight.shape[-2]} classes nothing tells so many examples apart;"
            " softinv recover gives their mean label and counts of classes"
        )
    return batches


def _check(arguments: argparse.Namespace) -> None:
    if arguments.parameters is None:
        raise InputError("--updated needs --parameters, the model the clients were sent")
    for option in _OF_A_SYSTEM:
        if getattr(arguments, option) not in (None, False):
            raise InputError(f"--{option.replace('_', '-')} is for a system to simulate; leave it out with --updated")


def _batch_size(text: str) -> BatchSize:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch-size {text}: give a positive integer, or auto")
    return int(text)


def _single_rows(names: list[str], summary: dict[str, Any]) -> list[UpdateRow]:
    rows = []
    for name, sample in zip(names, summary["samples"], strict=True):
        kind = sample["kind"].replace("_", " ")
        rows.append(
            UpdateRow(name, sample["verdict"], describe_format(sample), kind, _known(sample["label_deviation"]), "")
        )
    return rows


def _batch_rows(names: list[str], summary: dict[str, Any]) -> list[UpdateRow]:
    rows = []
    for name, batch in zip(names, summary["batches"], strict=True):
        for number, one in enumerate(batch["examples"]):
            entries = ", ".join(f"class {c}: {w:.4f}" for c, w in zip(one["classes"], one["weights"], strict=True))
            known = _known(one["label_deviation"])
            rows.append(UpdateRow(f"{name}, example {number + 1}", one["verdict"], entries or "-", "", known, ""))
    return rows


def _known(deviation: float | None) -> str:
    if deviation is None or not math.isfinite(deviation):
        return "-"
    return "exact" if deviation == 0 else f"every entry to ±{deviation:.0e}"


def _findings(
    rows: list[UpdateRow], updates: int, verdicts: dict[str, int], local_steps: int, images: Inversion | None
) -> list[str]:
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
