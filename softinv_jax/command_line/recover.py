"""`softinv recover`: from OBSERVATION.npz to RECOVERY.npz and a summary."""

import argparse
import json
import os
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from softinv_jax.command_line.argument_types import ACTIVATION_NAMES, batch_size
from softinv_jax.command_line.console import InputError, Report, progress_report, result_console
from softinv_jax.command_line.parts_folder import claim_parts, remove_parts
from softinv_jax.command_line.update_options import add_update_options, check_update_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from softinv_jax.batches.batch_recovery import BatchRecovery
    from softinv_jax.batches.class_counts import ClassCounts
    from softinv_jax.labels.verdicts import Recovery
    from softinv_jax.observation.head import Observation
    from softinv_jax.observation.updates import ObservedUpdate

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Compute the soft labels and last-layer features behind gradients of a last dense layer z = W x + b.

OBSERVATION.npz, as np.savez writes it, holds (C classes, d features, N gradients of one example each)
  weight           (C, d)               W, as the server knows it
  weight_gradient  (C, d) or (N, C, d)  what the clients sent
  bias             (C,)                 for a head with a bias only, and then
  bias_gradient    (C,) or (N, C)       with it

In place of gradients, the model before and after a client's training: --parameters BEFORE --updated AFTER [AFTER ...],
one AFTER for each client. The head is found by shape and name; without --learning-rate the scale is unknown. Batches
that the head cannot tell apart are told apart by the dense layers before it, where there are some.

RECOVERY.npz holds, with NaN where nothing is recovered,
  labels (N, 1, C), features (N, 1, d), scale (N,)
  verdict (N, 1)         unique, conditional (right if what `rests_on` names is as told), ambiguous, unidentifiable,
                         refuted (`refuted` names what was told and is not so), no_signal, or (of a batch) not_found
  residual (N, 1)        relative distance between the gradient and what the recovery predicts
  loss, refuted, rests_on (N, 1), examples (N,), mean_labels (N, C): what is taken for granted, and of several examples
                         taken for one how many there are and the mean of their labels
  label_deviation (N, 1, C), kind, singled_out, weights, smoothing, scalar, interval, candidate_labels, ...

With --batch-size B each gradient is the mean (or --reduction sum) over B examples, and the axis of length 1 has length
B: labels (N, B, C), features (N, B, d), verdict, residual, misfit and surprise (N, B), singled_out (N, B, 2), factor
(N, B), rank and joint_misfit (N,). As many examples as classes or more are told apart by dense layers before the head
(--parameters and --updated), never by a head alone. Where there are none: mean_labels, interval (N, C, 2) and count
(N, C) of hard labels, -1 where it cannot be known.

A file larger than a quarter of the memory, or any with --chunk, is read and recovered in parts, kept in
RECOVERY.npz.parts until all are done: the same command takes up a run that was stopped."""

# Of the machine's memory: the result and the work need some as well.
LARGEST_SHARE = 0.25


def add_parser(commands: "argparse._SubParsersAction") -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "recover",
        help="recover soft labels and features from gradients in a file",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("observation", nargs="?", metavar="OBSERVATION.npz", help="what the server saw")
    parser.add_argument("--out", required=True, metavar="RECOVERY.npz", help="where to write the result")
    parser.add_argument(
        "--unknown-scale",
        action="store_true",
        help="the gradients carry an unknown factor (learning rate, sum or mean, sign): recover it too",
    )
    parser.add_argument(
        "--method",
        choices=("exact", "variance", "idlg"),
        default="exact",
        help="exact: any label format, without being told which (default). variance: the loss of Wang, Liang and He"
        " (2024), which must be told the format. idlg: hard labels by sign (Zhao, Mopuri and Bilen, 2020)",
    )
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=1,
        metavar="B",
        help="each gradient is the mean over B examples; auto: as many as its numerical rank (default: 1)",
    )
    parser.add_argument(
        "--loss",
        choices=(
            "auto",
            "cross_entropy",
            "weighted_cross_entropy",
            "tempered_cross_entropy",
            "binary_cross_entropy",
        ),
        default="auto",
        help="of the clients. auto (default): cross-entropy; where the gradient says otherwise, times a factor (class"
        " weights, focal loss, another rate), with a temperature, or independent sigmoids",
    )
    parser.add_argument(
        "--reduction",
        choices=("mean", "sum"),
        default="mean",
        help="whether a gradient is the mean over its batch or the sum, for --batch-size (mean)",
    )
    parser.add_argument(
        "--chunk", type=_chunk, metavar="N", help="read and recover N gradients at a time; can be resumed"
    )
    parser.add_argument("--label-format", choices=("smoothing", "mixup"), help="the format for --method variance")
    parser.add_argument("--parameters", metavar="BEFORE", help="the model the clients were sent, for --updated")
    parser.add_argument(
        "--activation",
        choices=("auto", *ACTIVATION_NAMES),
        metavar="NAME",
        help="between the dense layers of --updated, for batches that the head cannot tell apart: auto (tries the usual"
        " ones), " + ", ".join(ACTIVATION_NAMES),
    )
    parser.add_argument("--head", metavar="LAYER", help="the last dense layer, where --updated leaves it open")
    add_update_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON summary on stdout, and nothing else there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
      InputError: for anything the user can put right; nothing has then been written.
    """
    # A learning rate that is not known is an unknown factor.
    arguments.unknown_scale |= arguments.updated is not None and arguments.learning_rate is None
    _check_method(arguments)
    from softinv_jax.command_line import observation_file, outputs, recovery_file  # noqa: PLC0415 - load jax

    inputs = [arguments.observation, arguments.parameters, *(arguments.updated or [])]
    outputs.check_apart({"--out": arguments.out}, inputs)
    statement, in_parts, updates = None, False, None
    if arguments.updated is None:
        in_parts = arguments.batch_size == 1 and (arguments.chunk is not None or _is_large(arguments.observation))
        observation = observation_file.read_observation(arguments.observation, mapped=in_parts)
    else:
        from softinv_jax.command_line import update_files  # noqa: PLC0415

        updates = update_files.read_updates(arguments)
        observation, statement = update_files.observe_heads(updates, arguments.head), updates[0].statement
    if observation.bias is not None and arguments.method == "variance":
        raise InputError("--method variance needs a head without bias; use --method exact")
    outputs.check_writable(arguments.out)
    source = {"observation": arguments.observation}
    if statement is not None:
        source = {"parameters": arguments.parameters, "updated": arguments.updated, "update": statement}

    if arguments.batch_size != 1:
        _recover_batches(arguments, observation, source, updates)
        return
    start = time.perf_counter()
    examples = observation.weight_gradient.shape[0]
    with claim_parts(_parts_folder(arguments)) if in_parts else nullcontext():
        with progress_report() as report:
            report(0, examples, "compiling for this shape")
            recovery = (_recover_in_parts if in_parts else _recover_whole)(arguments, observation, report)
        seconds = time.perf_counter() - start
        outputs.write_npz(arguments.out, recovery_file.recovery_arrays(recovery))
        if in_parts:
            remove_parts(_parts_folder(arguments))

    from softinv_jax.report.summary import recovery_summary, recovery_table  # noqa: PLC0415

    summary = recovery_summary(recovery)
    context = source | {
        "out": arguments.out,
        "examples": examples,
        "classes": observation.weight.shape[0],
        "features": observation.weight.shape[1],
        "bias": observation.bias is not None,
        "dtype": str(observation.weight_gradient.dtype),
        "method": arguments.method,
        "label_format": arguments.label_format,
        "scale": "unknown" if arguments.unknown_scale else "known",
        "seconds": round(seconds, 3),
    }
    _show(arguments, context, summary, recovery_table)


def _recover_whole(arguments: argparse.Namespace, observation: "Observation", report: Report) -> "Recovery":
    from softinv_jax.recoveries import recover_many  # noqa: PLC0415

    return recover_many(
        observation,
        thorough=arguments.updated is not None,  # The parameters' rounding is noise.
        progress=lambda done, total: report(done, total, "recovering"),
        **_options(arguments),
    )


def _recover_in_parts(arguments: argparse.Namespace, observation: "Observation", report: Report) -> "Recovery":
    from softinv_jax.streaming import read_recovery, recover_stream  # noqa: PLC0415

    folder = _parts_folder(arguments)
    try:
        recover_stream(
            observation.weight,
            observation.weight_gradient,
            folder,
            bias=observation.bias,
            bias_gradient=observation.bias_gradient,
            chunk=arguments.chunk,
            progress=lambda done, total: report(done, total, "recovering"),
            **_options(arguments),
        )
        return read_recovery(folder)
    except ValueError as error:
        raise InputError(f"{arguments.observation}: {error}") from error


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "method": arguments.method,
        "unknown_scale": arguments.unknown_scale,
        "label_format": arguments.label_format,
        "loss": arguments.loss,
        "approximate": arguments.local_steps > 1,
    }


def _parts_folder(arguments: argparse.Namespace) -> str:
    return f"{arguments.out}.parts"


def _is_large(path: str) -> bool:
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return os.path.getsize(path) > LARGEST_SHARE * memory
    except (OSError, ValueError, AttributeError):  # No such file, or a system that does not say.
        return False


def _chunk(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _recover_batches(
    arguments: argparse.Namespace,
    observation: "Observation",
    source: dict[str, Any],
    updates: "list[ObservedUpdate] | None",
) -> None:
    from softinv_jax.batches.batch_recovery import BatchRecovery  # noqa: PLC0415
    from softinv_jax.batches.class_counts import ClassCounts  # noqa: PLC0415
    from softinv_jax.command_line import outputs, recovery_file  # noqa: PLC0415
    from softinv_jax.recoveries import recover_many  # noqa: PLC0415
    from softinv_jax.report.counts_summary import counts_summary, counts_table  # noqa: PLC0415
    from softinv_jax.report.summary import batch_summary, batch_table  # noqa: PLC0415

    start = time.perf_counter()
    gradients = observation.weight_gradient.shape[0]
    with progress_report() as report:
        report(0, gradients, "recovering batches")
        try:
            recoveries = (
                _of_updates(arguments, updates, report)
                if updates is not None
                else recover_many(
                    observation,
                    batch_size=arguments.batch_size,
                    reduction=arguments.reduction,
                    unknown_scale=arguments.unknown_scale,
                    loss=arguments.loss,
                    progress=lambda done, total: report(done, total, "recovering batches"),
                )
            )
        except ValueError as error:
            raise InputError(str(error)) from error
    seconds = time.perf_counter() - start
    batches = [one for one in recoveries if isinstance(one, BatchRecovery)]
    counts = [one for one in recoveries if isinstance(one, ClassCounts)]
    arrays = recovery_file.counts_arrays(counts) if counts else recovery_file.batch_arrays(batches)
    outputs.write_npz(arguments.out, arrays)
    summary = counts_summary(counts) if counts else batch_summary(batches)
    context = source | {
        "out": arguments.out,
        "gradients": gradients,
        "classes": observation.weight.shape[0],
        "features": observation.weight.shape[1],
        "batch_size": arguments.batch_size,
        "reduction": arguments.reduction,
        "scale": "unknown" if arguments.unknown_scale else "known",
        "seconds": round(seconds, 3),
    }
    _show(arguments, context, summary, counts_table if counts else batch_table)


def _of_updates(
    arguments: argparse.Namespace, updates: "list[ObservedUpdate]", report: Report
) -> "list[BatchRecovery | ClassCounts]":
    """Of whole models: by the head, or by the dense layers before it."""
    from softinv_jax.whole_models import recover_update  # noqa: PLC0415

    recoveries: list[Any] = []
    for update in updates:
        recoveries.append(
            recover_update(
                update,
                batch_size=arguments.batch_size,
                reduction=arguments.reduction,
                head=arguments.head,
                loss=arguments.loss,
                activation=arguments.activation or "auto",
            )
        )
        report(len(recoveries), len(updates), "recovering batches")
    return recoveries


def _show(
    arguments: argparse.Namespace,
    context: dict[str, Any],
    summary: dict[str, Any],
    table: "Callable[[dict[str, Any]], Table]",
) -> None:
    """The result on standard output: JSON and nothing else, or a table and where the rest is."""
    if arguments.json:
        print(json.dumps(context | summary, allow_nan=False, indent=1))
        return
    console = result_console()
    if "update" in context:
        console.print(context["update"], markup=False)
    console.print(table(summary))
    from softinv_jax.report.summary import assumption_notes  # noqa: PLC0415

    for note in assumption_notes(summary):
        console.print(note, markup=False)
    console.print(f"Everything is in {arguments.out}.", markup=False, soft_wrap=True)


def _check_update(arguments: argparse.Namespace) -> None:
    if arguments.updated is None and (arguments.parameters is not None or arguments.head is not None):
        raise InputError("--parameters and --head go with --updated; give what the clients sent back")
    if arguments.activation is not None and (arguments.updated is None or arguments.batch_size == 1):
        raise InputError("--activation is for --updated with --batch-size; the head alone has none")
    if (arguments.observation is None) == (arguments.updated is None):
        raise InputError("give either OBSERVATION.npz, or --parameters BEFORE and --updated AFTER")
    if arguments.updated is not None and arguments.chunk is not None:
        raise InputError("--chunk is for OBSERVATION.npz; leave it out with --updated")
    if arguments.updated is not None and arguments.parameters is None:
        raise InputError("--updated needs --parameters, the model the clients were sent")


def _check_method(arguments: argparse.Namespace) -> None:
    """Before jax is loaded: what needs no look at the files."""
    check_update_options(arguments)
    _check_update(arguments)
    if arguments.method == "variance" and arguments.label_format is None:
        raise InputError("--method variance must be told --label-format smoothing or mixup; or use --method exact")
    if arguments.method == "variance" and arguments.unknown_scale:
        raise InputError("--method variance needs a known scale; use --method exact with --unknown-scale")
    if arguments.batch_size != 1 and arguments.method != "exact":
        raise InputError("--batch-size needs --method exact")
    if arguments.method != "exact" and arguments.loss not in ("auto", "cross_entropy"):
        raise InputError(f"--loss {arguments.loss} needs --method exact")
    if arguments.batch_size != 1 and arguments.loss in ("tempered_cross_entropy", "binary_cross_entropy"):
        raise InputError(f"--loss {arguments.loss} is for gradients of one example each; leave out --batch-size")
    if arguments.batch_size != 1 and arguments.chunk is not None:
        raise InputError("--chunk is for gradients of one example each; leave out --batch-size or --chunk")
    if arguments.batch_size == 1 and arguments.reduction != "mean":
        raise InputError("--reduction is for --batch-size: mean and sum are the same for one example")
    if arguments.method != "variance" and arguments.label_format is not None:
        raise InputError(f"--label-format is for --method variance only; {arguments.method} needs none")
