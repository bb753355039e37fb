"""`softinv audit --updated`: a report on what real clients' updates give away; nobody needs to know their labels."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts
from softinv_jax.command_line import update_words as words
from softinv_jax.command_line.console import InputError, Report, input_errors, progress_report
from softinv_jax.command_line.update_files import observe_heads, read_updates
from softinv_jax.images.objective import MatchingSettings
from softinv_jax.images.verdicts import image_verdict_names
from softinv_jax.inversions import Inversion, invert_observed
from softinv_jax.observation.head import Observation
from softinv_jax.observation.updates import ObservedUpdate
from softinv_jax.recoveries import BatchSize, recover_many
from softinv_jax.report.audit_report import render_updates_report
from softinv_jax.report.counts_summary import counts_summary
from softinv_jax.report.figures import figure_png
from softinv_jax.report.image_figures import recovered_images_figure
from softinv_jax.report.summary import assumption_notes, batch_summary, recovery_summary
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
    counts: list[ClassCounts] = []
    with progress_report() as report, input_errors():
        report(0, total, "recovering")
        options: dict[str, Any] = {"progress": lambda done, of: report(done, of, "recovering")}
        if size == 1:
            # The rounding of the parameters is noise: only the thorough search knows what to do with it.
            options["approximate"] = arguments.local_steps > 1
            summary = recovery_summary(recover_many(observation, thorough=True, unknown_scale=not known, **options))
        else:
            activation = "auto" if model is None else model.dense_activation
            found = _recover_batches(updates, observation, size, arguments.head, activation, options)
            counts = [one for one in found if isinstance(one, ClassCounts)]
            summary = batch_summary([one for one in found if isinstance(one, BatchRecovery)])
            if counts:
                summary["counts"] = counts_summary(counts)["batches"]
        images = None
        if model is not None and not counts:
            images = _invert(model, updates, size, arguments, report)
    names = [Path(path).name for path in arguments.updated]
    rows = words.single_rows(names, summary) if size == 1 else words.batch_rows(names, found, summary)
    statement = updates[0].statement
    findings = words.findings(rows, total, summary["verdicts"], arguments.local_steps, images) + assumption_notes(
        summary
    )
    if counts:
        findings = [*words.count_findings(counts), *(findings if len(counts) < total else [])]
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
    advice = words.advice(summary["verdicts"], images)
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
        results["images"] = {
            "method": images.method,
            "reason": images.reason or None,
            "verdicts": words.image_counts(images),
        }
    return results | summary, page, pictures


def _invert(
    model: "TorchModel", updates: list[ObservedUpdate], size: BatchSize, arguments: argparse.Namespace, report: Report
) -> Inversion:
    matching = MatchingSettings(steps=arguments.match_steps) if arguments.match_steps else None
    network = dataclasses.replace(model.network, head=arguments.head)
    return invert_observed(network, updates, batch_size=size, matching=matching, progress=report)


def _pictures(images: Inversion) -> dict[str, bytes]:
    recovery = images.recovery
    shown = recovery.images.reshape(-1, *recovery.images.shape[2:])[:SHOWN]
    if not np.any(np.isfinite(shown)):
        return {}
    names = image_verdict_names(recovery.verdict.ravel()[:SHOWN]).tolist()
    return {"images": figure_png(recovered_images_figure(shown, names))}


def _recover_batches(
    updates: list[ObservedUpdate],
    observation: Observation,
    size: BatchSize,
    head: str | None,
    activation: str,
    options: dict[str, Any],
) -> "list[BatchRecovery | ClassCounts]":
    """The batch behind each update: by the dense layers that the model ends in, or by its head where that is all."""
    first = updates[0]
    if len(find_dense_end(first.parameters, head=head)) < 2 and first.exact:
        together: Any = recover_many(observation, batch_size=size, unknown_scale=not first.scale_known, **options)
        return list(together)
    found: list[Any] = []
    for number, update in enumerate(updates):
        options["progress"](number, len(updates))
        found.append(recover_update(update, batch_size=size, head=head, activation=activation))
    return found


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
