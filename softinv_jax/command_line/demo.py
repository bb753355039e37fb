"""`softinv demo`: from images to a table, five pictures and the numbers behind them."""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softinv_jax.command_line.argument_types import DATASET_HELP
from softinv_jax.command_line.console import InputError, person_console, progress_report, result_console
from softinv_jax.command_line.outputs import check_folder, make_folder

if TYPE_CHECKING:
    from softinv_jax.client.datasets import ImageDataset
    from softinv_jax.report.tables import DemoRow

__all__ = ["add_parser", "interpretation", "run"]

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup", "k_way_mixup", "cutmix", "dense")
SCALES = {"known": (True,), "unknown": (False,), "both": (True, False)}
PHOTOGRAPHS = "photographs"
IMAGES_READ = 5000

_DESCRIPTION = """\
Play client and server on real images: a small network (LeNet), untrained and briefly trained; clients that compute
one gradient each with a hard, soft or dense label; and the attack, which sees the last layer's weights and gradient
and nothing else. It is not told the label format and, in half of the runs, not the gradient's scale. Last, one
gradient of a batch of four images, whose labels have four formats;
from the gradient of the whole network, images; and all of 32 images from one gradient of a network of dense layers.
The truth is used for errors only."""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "demo",
        help="attack a small network on real photographs and show what leaks",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="softinv-demo", metavar="FOLDER", help="for the results (softinv-demo)")
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="gradients of each label format (100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same demo (0)")
    parser.add_argument(
        "--dataset",
        default=PHOTOGRAPHS,
        metavar="NAME",
        help=DATASET_HELP,
    )
    parser.add_argument("--data-dir", metavar="FOLDER", help="where the TFDS data set was prepared")
    parser.add_argument(
        "--epochs", type=int, default=10, metavar="N", help="of training (10); 0 leaves the trained network out"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="FORMAT", help=f"among {', '.join(FORMATS)}"
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="both", help="what the attack knows of it (both)")
    parser.add_argument("--json", action="store_true", help="print results.json on stdout, and nothing else there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
      InputError: for anything the user can put right.
    """
    _check(arguments)
    start = time.perf_counter()
    # What follows loads jax, flax and matplotlib.
    from softinv_jax.command_line import demo_batch, demo_dense, demo_files, demo_images, experiment  # noqa: PLC0415
    from softinv_jax.report.tables import demo_tables  # noqa: PLC0415
    from softinv_jax.versions import package_versions  # noqa: PLC0415

    folder = Path(arguments.out)
    check_folder(arguments.out)
    settings = experiment.Settings(
        samples=arguments.samples,
        seed=arguments.seed,
        epochs=arguments.epochs,
        label_formats=tuple(dict.fromkeys(arguments.formats)),
        scales_known=SCALES[arguments.scale],
    )
    with progress_report(stages_without_terminal=True) as report:
        report(0, 1, "reading images")
        train_data, private = _load(arguments)
        networks, accuracy = experiment.prepare_networks(settings, train_data, report)
        examples, outcomes = experiment.run_experiment(settings, private, networks, report)
        rows = experiment.score(examples, outcomes)
        batch = experiment.attack_one_batch(settings, private, networks, report)
        sentence = interpretation(rows)
        batch_results = None
        if batch is not None:
            batch_results = demo_batch.batch_results(batch)
            sentence += " " + demo_batch.batch_sentence(batch_results)
        report(0, 1, "inverting whole gradients, layer by layer")
        pictures, image_results = demo_images.recover_images(
            networks["untrained"], examples, outcomes[0].recovery, private
        )
        sentence += " " + demo_images.images_sentence(image_results)
        report(0, 1, "inverting one gradient of 32 images")
        larger = demo_dense.attack_dense_batch(experiment.stage_key(settings, 7), private)
        sentence += " " + demo_dense.dense_sentence(larger.results)
        results = {
            "dataset": private.name,
            "classes": list(private.class_names),
            "settings": dataclasses.asdict(settings),
            "training_accuracy": accuracy,
            "rows": [dataclasses.asdict(row) for row in rows],
            "first_run_seconds": [round(outcome.first_seconds, 2) for outcome in outcomes],
            "batch": batch_results,
            "images": image_results,
            "larger_batch": larger.results,
            "interpretation": sentence,
            "versions": package_versions(),
        }
        make_folder(folder)
        files = demo_files.write_files(folder, examples, outcomes, batch, pictures, larger.pictures, private, results)
    if arguments.json:
        print(json.dumps(results, allow_nan=False, indent=1))
    console = person_console() if arguments.json else result_console()
    console.print(demo_tables(rows))
    console.print(f"\n{sentence}", markup=False)
    seconds = time.perf_counter() - start
    listed = "".join(f"\n  {file}" for file in files)
    console.print(f"\n{seconds:.0f} seconds in all. Pictures and numbers:{listed}", markup=False, soft_wrap=True)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.samples < 1:
        raise InputError(f"--samples {arguments.samples}: give 1 or more")
    if arguments.epochs < 0:
        raise InputError(f"--epochs {arguments.epochs}: give 0 or more")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed}: give a number from 0 to 2^32 - 1")
    if arguments.data_dir is not None and arguments.dataset == PHOTOGRAPHS:
        raise InputError("--data-dir is for a TFDS data set; name it with --dataset, for example --dataset cifar10")


def _load(arguments: argparse.Namespace) -> "tuple[ImageDataset, ImageDataset]":
    """Images to train on, and those the clients keep private; both with the statistics of the former."""
    from softinv_jax.client.dataset_names import load_public_and_private  # noqa: PLC0415

    try:
        # Without training, photographs to train on only give the mean and deviation of the pixels.
        return load_public_and_private(
            arguments.dataset,
            data_dir=arguments.data_dir,
            image_size=32,
            limit=IMAGES_READ,
            crops=(200 if arguments.epochs else 20, 50),
            seed=arguments.seed,
        )
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"--dataset {arguments.dataset}: {error}") from error


def interpretation(rows: "Sequence[DemoRow]") -> str:
    """What leaks and what does not, in a sentence each."""
    dense = [row for row in rows if row.label_format == "dense"]
    structured = [row for row in rows if row.label_format != "dense"]
    sentences = []
    if structured:
        recovered, total = sum(row.recovered for row in structured), sum(row.total for row in structured)
        wrong = sum(row.wrong for row in structured)
        errors = [row.largest_label_error for row in structured if row.largest_label_error is not None]
        accuracy = f" (largest error {max(errors):.0e})" if errors else ""
        names = ", ".join(dict.fromkeys(row.label_format.replace("_", " ") for row in structured))
        sentences.append(
            f"What leaks: {recovered:,} of {total:,} gradients of structured labels ({names}) give away their"
            f" label{accuracy} and last-layer feature, to an observer who is not told the label's format;"
            f" {wrong or 'none'} of these claims {'is' if wrong == 1 else 'are'} wrong."
        )
    if dense:
        total = sum(row.total for row in dense)
        open_cases = sum(row.verdicts["unidentifiable"] for row in dense)
        sentences.append(
            f"What does not: of {total:,} dense labels (every entry free) {open_cases:,} are unidentifiable, because"
            " a whole range of labels explains the gradient; softinv says so instead of guessing."
        )
    return " ".join(sentences)
