"""`softinv audit`: what a training system gives away, and what would stop it, as a folder with report.html."""

import argparse
import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softinv_jax.command_line.argument_types import DATASET_HELP
from softinv_jax.command_line.console import InputError, input_errors, progress_report, result_console
from softinv_jax.command_line.outputs import check_apart, check_folder, make_folder, write_atomically, write_npz
from softinv_jax.command_line.torch_files import add_torch_options, check_torch_options
from softinv_jax.command_line.update_options import add_update_options, check_update_options

if TYPE_CHECKING:
    from softinv_jax.audit.cells import Cell
    from softinv_jax.audit.settings import AuditSettings

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Attack clients of a training system without and with defences, and write what leaks to a folder:
  report.html    findings in plain words, threat model, curves, images; one file, opens offline, prints
  results.json   every figure
  figures/       the pictures

The system is a network of softinv (untrained, trained for some epochs, or with your own --parameters) and a data set.
The attack is told neither the label format nor the defence. An interrupted audit goes on where it was: finished parts
are kept in the folder's cells/ and used again when the settings are the same.

With --updated the folder reports what real updates of your own model give away (docs/frameworks.md): PyTorch,
safetensors or npz files, one for each client; nobody needs to know their labels. With --torch-model as well the report
shows images (docs/your-model.md). --torch-model without --updated attacks clients of that module."""

_EPILOG = """\
examples:
  softinv audit --quick                                      a few minutes, offline, an untrained LeNet
  softinv audit --network lenet --epochs 15 --samples 100    a trained network
  softinv audit --config audit.toml --out june               settings from a file; docs/audit.md says which
  softinv audit --parameters server.pt --updated client1.pt client2.pt --learning-rate 0.1
  softinv audit --torch-model model.py:Net --image-size 32 --parameters server.pt --updated client1.pt \\
                --learning-rate 0.1                          labels and images of a PyTorch model of yours"""

# Option -> field of AuditSettings.
_FIELDS = {
    "title": "title",
    "network": "network",
    "epochs": "epochs",
    "dataset": "dataset",
    "data_dir": "data_dir",
    "label_format": "label_format",
    "samples": "samples",
    "images": "images",
    "seed": "seed",
}


def add_parser(commands: "argparse._SubParsersAction") -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "audit",
        help="report what a training system gives away, and what would stop it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="softinv-audit", metavar="FOLDER", help="made if need be (softinv-audit)")
    parser.add_argument("--config", metavar="FILE.toml", help="settings; options on the command line go before them")
    parser.add_argument("--quick", action="store_true", help="24 clients and four defences at three strengths")
    parser.add_argument("--title", help="of the report")
    parser.add_argument("--network", metavar="NAME", help="lenet, fcn4, resnet18, ... (lenet)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of training before the attack; 0: untrained (0)")
    parser.add_argument("--dataset", metavar="NAME", help=DATASET_HELP)
    parser.add_argument("--data-dir", metavar="FOLDER", help="where TFDS data sets were prepared")
    parser.add_argument("--label-format", metavar="NAME", help="of the clients: hard, smoothing, mixup, ... (hard)")
    parser.add_argument("--unknown-scale", action="store_true", help="the observer does not know the learning rate")
    parser.add_argument("--samples", type=int, metavar="N", help="clients for every defence and strength (100)")
    parser.add_argument("--images", type=int, metavar="N", help="of how many the image is inverted as well (3)")
    parser.add_argument("--seed", type=int, help="the same gives the same audit (0)")
    parser.add_argument(
        "--defences", nargs="+", metavar="NAME", help="swept over their usual strengths; docs/audit.md lists them"
    )
    parser.add_argument(
        "--parameters", metavar="FILE", help="of the network (npz by layer); with --updated: of any model of yours"
    )
    parser.add_argument("--head", metavar="NAME", help="last dense layer, where shapes do not tell it; with --updated")
    parser.add_argument(
        "--batch-size", default="1", metavar="B|auto", help="examples behind each update; with --updated"
    )
    parser.add_argument("--json", action="store_true", help="print results.json on stdout, and nothing else there")
    parser.add_argument(
        "--match-steps",
        type=int,
        default=0,
        metavar="N",
        help="of gradient matching, for likenesses of images that the layers do not determine (0: none)",
    )
    add_torch_options(parser)
    add_update_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
      InputError: for anything the user can put right.
    """
    check_update_options(arguments)
    check_torch_options(arguments)
    folder = Path(arguments.out)
    check_folder(arguments.out)
    results_file, report_file = folder / "results.json", folder / "report.html"
    inputs = [arguments.config, arguments.parameters, *(arguments.updated or [])]
    check_apart({"results.json": str(results_file), "report.html": str(report_file)}, inputs)
    if arguments.updated is not None:
        from softinv_jax.command_line.audit_updates import report_updates  # noqa: PLC0415 - load jax

        results, pages, pictures = report_updates(arguments)
    else:
        for option in ("head", "batch_size", "match_steps"):
            if getattr(arguments, option) not in (None, "1", 0):
                raise InputError(f"--{option.replace('_', '-')} goes with --updated")
        results, pages, pictures = _report_system(arguments, folder)
    text = json.dumps(results, allow_nan=False, indent=1) + "\n"
    make_folder(folder / "figures")
    written = [_write(folder / "figures" / f"{name}.png", png) for name, png in pictures.items()]
    # The report last: where it is, it is whole, and so is everything it was made of.
    page = pages.encode("utf-8", "backslashreplace")  # Names of files need not be UTF-8.
    written += [_write(results_file, text.encode()), _write(report_file, page)]
    if arguments.json:
        print(text, end="")
        return
    console = result_console()
    for sentence in results["findings"]:
        console.print(f"* {sentence}", markup=False)
    console.print(f"\nThe report: {written[-1]}", markup=False, soft_wrap=True)


def _report_system(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str, dict[str, bytes]]:
    from softinv_jax.audit.run import audit  # noqa: PLC0415 - load jax
    from softinv_jax.audit.system import make_system, system_of_network  # noqa: PLC0415
    from softinv_jax.report.audit_figures import audit_figures  # noqa: PLC0415
    from softinv_jax.report.audit_report import render_report  # noqa: PLC0415
    from softinv_jax.report.figures import figure_png  # noqa: PLC0415

    settings = _settings(arguments)
    parameters, statistics, model = None, None, None
    if arguments.torch_model is not None:
        from softinv_jax.command_line.torch_files import image_shape, read_torch_model  # noqa: PLC0415 - optional

        if arguments.parameters is None:
            raise InputError("--torch-model needs --parameters, what the module holds")
        if arguments.network is not None:
            raise InputError("give either --network or --torch-model")
        model = read_torch_model(arguments, image_shape(arguments))
    elif arguments.parameters is not None:
        from softinv_jax.command_line.model_files import read_parameters  # noqa: PLC0415

        parameters, statistics = read_parameters(arguments.parameters)
    with progress_report(stages_without_terminal=True) as report:
        report(0, 1, "reading images and preparing the network")
        try:
            if model is None:
                system = make_system(settings, parameters, statistics)
            else:
                name = arguments.torch_model.rpartition(":")[2]
                system = system_of_network(settings, name, model.network, model.network_parameters)
        except (ValueError, FileNotFoundError) as error:
            raise InputError(error) from error
        with input_errors():
            result = audit(settings, system, cells=_KeptCells(folder / "cells"), progress=report)
    pictures = {name: figure_png(figure) for name, figure in audit_figures(result).items()}
    return result.to_json(), render_report(result, pictures), pictures


def _settings(arguments: argparse.Namespace) -> "AuditSettings":
    from softinv_jax.audit.settings import (  # noqa: PLC0415 - loads jax
        AuditSettings,
        default_sweeps,
        quick_settings,
        settings_from_toml,
    )

    settings = AuditSettings()
    if arguments.config is not None:
        try:
            text = Path(arguments.config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise InputError(f"{arguments.config}: cannot be read ({reason}); give a TOML file") from error
        with input_errors(f"{arguments.config}: "):
            settings = settings_from_toml(text)
    changes = {field: getattr(arguments, option) for option, field in _FIELDS.items()}
    changes = {field: value for field, value in changes.items() if value is not None}
    if arguments.unknown_scale:
        changes["scale_known"] = False
    with input_errors():
        if arguments.defences is not None:
            changes["sweeps"] = default_sweeps(tuple(arguments.defences))
        if "samples" in changes and "images" not in changes:
            changes["images"] = min(settings.images, changes["samples"])
        settings = dataclasses.replace(settings, **changes)
        return quick_settings(settings) if arguments.quick else settings


class _KeptCells(MutableMapping[str, "Cell"]):
    """Finished cells as npz files in a folder, one each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def __getitem__(self, name: str) -> "Cell":
        try:
            with open(self._path(name), "rb") as file:
                return dict(np.load(file, allow_pickle=False))
        except (OSError, ValueError, zipfile.BadZipFile) as error:  # Not there, or spoilt: computed again.
            raise KeyError(name) from error

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def __setitem__(self, name: str, cell: "Cell") -> None:
        make_folder(self._folder)
        write_npz(str(self._path(name)), cell)

    def __delitem__(self, name: str) -> None:
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._folder.glob("*.npz"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _write(path: Path, content: bytes) -> str:
    write_atomically(os.fspath(path), lambda file: file.write(content))
    return os.fspath(path)
