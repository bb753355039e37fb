"""`softinv invert`: from a model's parameters, and gradients or updates, to the clients' images."""

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from softinv_jax.command_line.argument_types import ACTIVATION_NAMES, batch_size
from softinv_jax.command_line.console import (
    InputError,
    Report,
    person_console,
    progress_report,
    result_console,
)
from softinv_jax.command_line.torch_files import add_torch_options, check_torch_options
from softinv_jax.command_line.update_options import add_update_options, check_update_options

if TYPE_CHECKING:
    from softinv_jax.command_line.invert_sources import Source
    from softinv_jax.images.verdicts import ImageRecovery
    from softinv_jax.inversions import Inversion

__all__ = ["add_parser", "run"]

# The parser must not load flax; that these are the names of `models.MODELS`, and `MLP`, is tested.
MODEL_NAMES = ("lenet", "fcn4", "mlp", "alexnet", "resnet18", "resnet18-cifar", "resnet50")

_DESCRIPTION = """\
Recover the images behind gradients of a whole model, and the labels with them; the label format is not told.

PARAMETERS.npz and GRADIENTS.npz hold arrays named as flax linen does, parts joined by "/": conv1/kernel (height,
width, channels in, channels out), conv1/bias, head/kernel (d, C). Gradients have the same names and shapes, with a
leading axis N for several. Running statistics of batch normalisation are parameters under batch_stats/.

mlp is dense layers dense1, dense2, ... and head, as many as the files have, with --activation between. Its layers, and
fcn4's, tell the examples of a batch apart whatever the number of classes: --batch-size B, or auto.

--torch-model FILE.py:NAME is any PyTorch module of yours, and FILE.py is run. Its files are what torch.save wrote, or
alike; layers need no description: where they are a chain of convolutions, pooling, dense layers and activations, that
is read off the module (docs/your-model.md).

In place of gradients, what clients sent back, for lenet, fcn4, mlp and PyTorch modules: --updated AFTER [AFTER ...],
one for each client. For the built-in networks, files with PyTorch's names and layout are converted; --rename gives
layers the names used here (body.0=conv1); those of mlp are told by their shapes.

Updates of several steps (--local-steps K, --learning-rate told) on one example each, for lenet, fcn4 and mlp: the
client is run on guesses of the example until one explains the update to its last digit (docs/local_steps.md).
On several examples (--batch-size B or auto, also in minibatches of --minibatch-size b), for mlp with ReLU: by its first
layer, whatever the rate and the order; the labels are exact where every step is on all examples.

exact     layer by layer, or all layers together, for networks that are a chain of layers (lenet, fcn4, mlp, many
          PyTorch modules): usually exact to well below a gray level; says so where it is not
matching  makes the gradient of a dummy image resemble the one observed: any network, slow, approximate
auto      exact where the network is a chain and its layers are determined, each or together; else matching, with
          what the layers give of labels

IMAGES.npz holds, for M = N * B images (the B of one gradient together; NaN where nothing is recovered),
  images (M, H, W, channels) on the scale of the model's input, labels (M, C), residual (M,) relative distance between
  the gradient of the images and the one observed, expected_error (M,) root mean square, on the images' scale
  verdict (M,)  exact, approximate, inconsistent, undetermined or not_found; label_verdict (M,) as of softinv recover"""


def add_parser(commands: "argparse._SubParsersAction") -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "invert",
        help="recover images from gradients of a whole model",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=MODEL_NAMES, help="the network; or --torch-model, below")
    parser.add_argument("--parameters", required=True, metavar="PARAMETERS", help="the model the client was sent")
    parser.add_argument("--gradients", metavar="GRADIENTS", help="what clients sent back")
    parser.add_argument("--out", required=True, metavar="IMAGES.npz", help="where to write the result")
    parser.add_argument("--method", choices=("exact", "matching", "auto"), default="auto", help="see above (auto)")
    parser.add_argument(
        "--activation", choices=ACTIVATION_NAMES, metavar="NAME", help="of mlp (relu): " + ", ".join(ACTIVATION_NAMES)
    )
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default=1,
        metavar="B",
        help="examples behind each gradient (1); auto, for fcn4 and mlp: as many as its rank shows",
    )
    parser.add_argument(
        "--unknown-scale", action="store_true", help="the gradients carry an unknown factor; for exact only"
    )
    parser.add_argument("--steps", type=int, default=4800, metavar="N", help="of matching (4800)")
    parser.add_argument("--restarts", type=int, default=1, metavar="N", help="of matching, from other noise (1)")
    parser.add_argument(
        "--refine",
        type=int,
        metavar="N",
        help="polish the images by up to N steps of second order; for networks without ReLU, some seconds a step",
    )
    parser.add_argument("--figure", metavar="FILE.png", help="draw the images")
    parser.add_argument("--json", action="store_true", help="print a JSON summary on stdout, and nothing else there")
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW", help="names of layers in --updated")
    add_torch_options(parser)
    add_update_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
      InputError: for anything the user can put right; nothing has then been written.
    """
    _check_options(arguments)
    from softinv_jax.command_line import invert_sources, outputs  # noqa: PLC0415 - load jax

    written = [path for path in (arguments.out, arguments.figure) if path is not None]
    for path in written:
        outputs.check_writable(path)
    inputs = [arguments.parameters, arguments.gradients, *(arguments.updated or [])]
    outputs.check_apart({"--out": arguments.out, "--figure": arguments.figure}, inputs)
    source = invert_sources.read_source(arguments)
    statement = None if source.updates is None else source.updates[0].statement

    start = time.perf_counter()
    with progress_report() as report:
        try:
            found = _invert(arguments, source, report)
            result = found.recovery
            if arguments.refine is not None:
                result = _refine(arguments.refine, source, result, report)
        except ValueError as error:
            raise InputError(str(error)) from error
    seconds = time.perf_counter() - start
    arrays = _arrays(result)
    outputs.write_npz(arguments.out, arrays)
    if arguments.figure is not None:
        from softinv_jax.report.image_figures import recovered_images_figure  # noqa: PLC0415

        figure = recovered_images_figure(arrays["images"], arrays["verdict"].tolist())
        outputs.write_atomically(arguments.figure, lambda file: figure.savefig(file, format="png"))
    summary = _summary(arguments, found, arrays, seconds, statement)
    if arguments.json:
        print(json.dumps(summary, allow_nan=False, indent=1))
    console = person_console() if arguments.json else result_console()
    counts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items() if count)
    # What the average of several steps is worth does not matter where the steps themselves are solved.
    if statement is not None and found.method != "client":
        console.print(statement, markup=False)
    if found.reason:
        console.print(found.reason, markup=False)
    console.print(f"{len(arrays['images'])} images by {found.method}: {counts}.", markup=False)
    console.print(f"Everything is in {' and '.join(written)}.", markup=False, soft_wrap=True)


def _check_options(arguments: argparse.Namespace) -> None:
    """Before jax is loaded: what needs no look at the files."""
    check_update_options(arguments)
    check_torch_options(arguments)
    own = arguments.torch_model is not None
    if own == (arguments.model is not None):
        raise InputError("give either --model NAME or --torch-model FILE.py:NAME")
    if (arguments.gradients is None) == (arguments.updated is None):
        raise InputError("give either --gradients GRADIENTS or --updated AFTER")
    if arguments.rename and (arguments.updated is None or own):
        raise InputError("--rename is for --updated with --model")
    for rename in arguments.rename:
        old, _, new = rename.partition("=")
        if not old or not new:
            raise InputError(f"--rename {rename}: give OLD=NEW, such as body.0=conv1")
    if arguments.activation is not None and arguments.model != "mlp":
        raise InputError(f"--activation is for --model mlp; {arguments.model or arguments.torch_model} has its own")
    if arguments.batch_size == "auto" and arguments.model not in ("fcn4", "mlp", None):
        raise InputError(f"--batch-size auto is for fcn4 and mlp; give the number for {arguments.model}")
    if arguments.batch_size == "auto" and arguments.method == "matching":
        raise InputError("--batch-size auto needs --method exact; matching must be told the number")
    if arguments.unknown_scale and arguments.updated is not None:
        raise InputError("--unknown-scale is for --gradients; with --updated leave --learning-rate out")
    for option in ("steps", "restarts", "refine"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: give 1 or more")


def _invert(arguments: argparse.Namespace, source: "Source", report: Report) -> "Inversion":
    from softinv_jax.images.objective import MatchingSettings  # noqa: PLC0415
    from softinv_jax.inversions import invert_gradients, invert_observed  # noqa: PLC0415

    if arguments.refine is not None and (arguments.unknown_scale or not source.scale_known):
        raise ValueError("--refine compares gradients with their scale; leave it out, or divide by the factor")
    options: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "method": arguments.method,
        "matching": MatchingSettings(steps=arguments.steps),
        "restarts": arguments.restarts,
        "progress": report,
    }
    if source.updates is not None:
        return invert_observed(source.network, source.updates, **options)
    return invert_gradients(
        source.network, source.parameters, source.gradients, unknown_scale=arguments.unknown_scale, **options
    )


def _refine(steps: int, source: "Source", result: "ImageRecovery", report: Report) -> "ImageRecovery":
    from softinv_jax.images.refinement import refine  # noqa: PLC0415

    report(0, len(result.images), "refining")
    return refine(
        source.network.apply_fn,
        source.parameters,
        source.gradients,
        result,
        steps=steps,
        progress=lambda done, total: report(done, total, "refining"),
    )


def _arrays(result: "ImageRecovery") -> dict[str, np.ndarray]:
    """IMAGES.npz: one row an image."""
    from softinv_jax.images.verdicts import image_verdict_names  # noqa: PLC0415
    from softinv_jax.labels.verdicts import verdict_names  # noqa: PLC0415

    examples = result.verdict.shape[1]
    rows = {
        "images": result.images,
        "labels": result.labels,
        "features": result.features,
        "verdict": image_verdict_names(result.verdict),
        "label_verdict": verdict_names(result.label_verdict),
        "expected_error": result.expected_error,
    }
    arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in rows.items()}
    # Of all images of a gradient together.
    return arrays | {"residual": np.repeat(result.residual, examples)}


def _summary(
    arguments: argparse.Namespace,
    found: "Inversion",
    arrays: dict[str, np.ndarray],
    seconds: float,
    statement: str | None,
) -> dict[str, Any]:
    from softinv_jax.images.verdicts import ImageVerdict  # noqa: PLC0415

    names = [verdict.name.lower() for verdict in reversed(ImageVerdict)]
    residual = arrays["residual"][np.isfinite(arrays["residual"])]
    return {
        "model": arguments.model or arguments.torch_model,
        "parameters": arguments.parameters,
        "gradients": arguments.gradients,
        "updated": arguments.updated,
        "update": statement,
        "out": arguments.out,
        "method": found.method,
        "reason": found.reason or None,
        "refining_steps": arguments.refine,
        "batch_size": arguments.batch_size,
        "images": len(arrays["images"]),
        "verdicts": {name: int(np.sum(arrays["verdict"] == name)) for name in names},
        "largest_residual": float(residual.max()) if residual.size else None,
        "seconds": round(seconds, 3),
    }
