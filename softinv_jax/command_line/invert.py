"""`softinv invert`: from a model's PARAMETERS.npz and GRADIENTS.npz to the clients' images."""

import argparse
import json
import re
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from softinv_jax.command_line.argument_types import ACTIVATION_NAMES, batch_size
from softinv_jax.command_line.console import (
    InputError,
    Report,
    input_errors,
    person_console,
    progress_report,
    result_console,
)
from softinv_jax.command_line.update_options import add_update_options, check_update_options

if TYPE_CHECKING:
    from softinv_jax.audit.models import Model
    from softinv_jax.command_line.model_files import Tree
    from softinv_jax.images.layer_chain import Chain
    from softinv_jax.images.verdicts import ImageRecovery
    from softinv_jax.observation.updates import ObservedUpdate

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

In place of gradients, what clients sent back, for lenet, fcn4 and mlp: --updated AFTER [AFTER ...], one for each
client. Files with PyTorch's names and layout are converted; --rename gives layers the names used here (body.0=conv1);
those of mlp are told by their shapes.

Updates of several steps (--local-steps K, --learning-rate told) on one example each, for lenet, fcn4 and mlp: the
client is run on guesses of the example until one explains the update to its last digit (docs/local_steps.md).
On several examples (--batch-size B or auto, also in minibatches of --minibatch-size b), for mlp with ReLU: by its first
layer, whatever the rate and the order; the labels are exact where every step is on all examples.

exact     layer by layer, for networks that are a chain of invertible layers (lenet, fcn4, mlp): no iteration over
          images, usually exact to well below a gray level; says so where it is not
matching  makes the gradient of a dummy image resemble the one observed: any network, slow, approximate
auto      exact where the network is a chain and its layers are determined, each or together, else matching

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
    parser.add_argument("--model", required=True, choices=MODEL_NAMES, help="the network")
    parser.add_argument("--parameters", required=True, metavar="PARAMETERS.npz", help="the model the client was sent")
    parser.add_argument("--gradients", metavar="GRADIENTS.npz", help="what clients sent back")
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
        "--image-size", type=int, metavar="PIXELS", help="side of the square images (the network's usual)"
    )
    parser.add_argument("--channels", type=int, default=3, help="of the images (3)")
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
    add_update_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the subcommand.

    Raises:
      InputError: for anything the user can put right; nothing has then been written.
    """
    _check_options(arguments)
    import jax  # noqa: PLC0415

    from softinv_jax.audit import models  # noqa: PLC0415 - load jax
    from softinv_jax.command_line import model_files, outputs  # noqa: PLC0415

    model = _mlp(arguments) if arguments.model == models.MLP else models.MODELS[arguments.model]
    if arguments.method == "exact" and model.chain is None:
        chains = ", ".join([*(name for name, other in models.MODELS.items() if other.chain is not None), models.MLP])
        raise InputError(f"--method exact needs a chain of layers ({chains}); use --method matching")
    written = [path for path in (arguments.out, arguments.figure) if path is not None]
    for path in written:
        outputs.check_writable(path)
    inputs = [arguments.parameters, arguments.gradients, *(arguments.updated or [])]
    outputs.check_apart({"--out": arguments.out, "--figure": arguments.figure}, inputs)
    size = arguments.image_size or model.image_size
    shape = (size, size, arguments.channels)
    updates = None
    if arguments.updated is None:
        parameters, statistics = model_files.read_parameters(arguments.parameters)
        gradients = model_files.read_gradients(arguments.gradients, parameters, arguments.parameters)
    else:
        updates = _read_updates(arguments, model, shape)
        parameters, statistics = updates[0].parameters, {}
        gradients = jax.tree.map(lambda *leaves: np.stack(leaves), *(update.gradients for update in updates))

    start = time.perf_counter()
    with progress_report() as report:
        try:
            method, result = _recover(arguments, model, parameters, statistics, gradients, shape, report, updates)
            if arguments.refine is not None:
                result = _refine(arguments.refine, model, parameters, statistics, gradients, result, report)
        except ValueError as error:
            raise InputError(str(error)) from error
    seconds = time.perf_counter() - start
    arrays = _arrays(result)
    outputs.write_npz(arguments.out, arrays)
    if arguments.figure is not None:
        from softinv_jax.report.image_figures import recovered_images_figure  # noqa: PLC0415

        figure = recovered_images_figure(arrays["images"], arrays["verdict"].tolist())
        outputs.write_atomically(arguments.figure, lambda file: figure.savefig(file, format="png"))
    summary = _summary(arguments, method, arrays, seconds, None if updates is None else updates[0].statement)
    if arguments.json:
        print(json.dumps(summary, allow_nan=False, indent=1))
    console = person_console() if arguments.json else result_console()
    counts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items() if count)
    # What the average of several steps is worth does not matter where the steps themselves are solved.
    if updates is not None and method != "client":
        console.print(updates[0].statement, markup=False)
    console.print(f"{len(arrays['images'])} images by {method}: {counts}.", markup=False)
    console.print(f"Everything is in {' and '.join(written)}.", markup=False, soft_wrap=True)


def _check_options(arguments: argparse.Namespace) -> None:
    """Before jax is loaded: what needs no look at the files."""
    check_update_options(arguments)
    if (arguments.gradients is None) == (arguments.updated is None):
        raise InputError("give either --gradients GRADIENTS.npz or --updated AFTER")
    if arguments.updated is None and arguments.rename:
        raise InputError("--rename is for --updated")
    if not all(old and new for old, _, new in _renamed(arguments)):
        raise InputError(f"--rename {' '.join(arguments.rename)}: give OLD=NEW, such as body.0=conv1")
    if arguments.activation is not None and arguments.model != "mlp":
        raise InputError(f"--activation is for --model mlp; {arguments.model} has its own")
    if arguments.batch_size == "auto" and arguments.model not in ("fcn4", "mlp"):
        raise InputError(f"--batch-size auto is for fcn4 and mlp; give the number for {arguments.model}")
    if arguments.batch_size == "auto" and arguments.method == "matching":
        raise InputError("--batch-size auto needs --method exact; matching must be told the number")
    for option in ("channels", "steps", "restarts", "image_size", "refine"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: give 1 or more")


def _mlp(arguments: argparse.Namespace) -> "Model":
    """The network that the layers of --parameters make."""
    from softinv_jax.audit import models  # noqa: PLC0415
    from softinv_jax.frameworks.parameter_files import flat, read_parameter_file, trained_layers  # noqa: PLC0415

    with input_errors():
        tree = trained_layers(read_parameter_file(arguments.parameters, arguments.key))
        arrays = flat(tree)
        if arguments.updated is not None and not arguments.rename and not re.search(r"\bdense\d", " ".join(arrays)):
            arguments.rename = _in_order(tree)
    names = {old.replace(".", "/"): new for old, _, new in _renamed(arguments)}
    layers = {name.rpartition("/")[0] for name in arrays}
    with input_errors(f"{arguments.parameters}: "):
        return models.mlp([names.get(layer, layer) for layer in layers], arguments.activation or "relu")


def _in_order(tree: "Tree") -> list[str]:
    """--rename for layers of other names, such as PyTorch's numbers: by their shapes, the head last."""
    from softinv_jax.whole_models import find_dense_end  # noqa: PLC0415

    old = [name.replace("/", ".") for name in find_dense_end(tree)]
    new = [*(f"dense{place + 1}" for place in range(len(old) - 1)), "head"]
    return [f"{one}={other}" for one, other in zip(old, new, strict=True)]


def _renamed(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    return [rename.partition("=") for rename in arguments.rename]


def _read_updates(arguments: argparse.Namespace, model: "Model", shape: tuple[int, int, int]) -> "list[ObservedUpdate]":
    from softinv_jax.command_line import update_files  # noqa: PLC0415

    if model.chain is None:
        raise InputError(f"--updated is for chains of layers (lenet, fcn4), not {arguments.model}")
    names = {old: new for old, _, new in _renamed(arguments)}
    return update_files.read_updates(arguments, update_files.chain_tree(model.chain, shape, names))


def _recover(
    arguments: argparse.Namespace,
    model: "Model",
    parameters: "Tree",
    statistics: "Tree",
    gradients: "Tree",
    shape: tuple[int, int, int],
    report: Report,
    updates: "list[ObservedUpdate] | None",
) -> "tuple[str, ImageRecovery]":
    from softinv_jax.images.determinacy import is_determined  # noqa: PLC0415
    from softinv_jax.images.inversion import invert, match  # noqa: PLC0415

    unknown_scale = arguments.unknown_scale or (updates is not None and not updates[0].scale_known)
    if unknown_scale and arguments.refine is not None:
        raise ValueError("--refine compares gradients with their scale; leave it out, or divide by the factor")
    if model.chain is not None and arguments.method != "matching":
        examples = 1 if arguments.batch_size == "auto" else arguments.batch_size
        determined = is_determined(model.chain, parameters, shape, examples)
        if updates is not None and _tells_steps(arguments, model.chain, determined):
            from softinv_jax.local_training.recovery import invert_updates  # noqa: PLC0415

            return "client", invert_updates(
                model.chain,
                updates,
                shape,
                batch_size=arguments.batch_size,
                progress=lambda done, total: report(done, total, "running the client on guesses"),
            )
        if arguments.method == "exact" or determined:
            heads = None
            if updates is not None and arguments.batch_size == 1:
                from softinv_jax.command_line.update_files import observe_heads  # noqa: PLC0415
                from softinv_jax.recoveries import recover_many  # noqa: PLC0415

                # With the noise that the parameters' rounding is known to leave, which gradients alone do not tell.
                heads = recover_many(
                    observe_heads(updates, "head"),
                    unknown_scale=unknown_scale,
                    approximate=not updates[0].exact,
                    thorough=True,
                )
            result = invert(
                model.chain,
                parameters,
                gradients,
                shape,
                batch_size=arguments.batch_size,
                unknown_scale=unknown_scale,
                heads=heads,
                progress=lambda done, total: report(done, total, "inverting layer by layer"),
            )
            return "exact", result
    if unknown_scale:
        raise ValueError("--unknown-scale needs --method exact: matching compares gradients with their scale")
    from softinv_jax.images.objective import MatchingSettings  # noqa: PLC0415

    result = match(
        _apply_function(model, parameters, statistics),
        parameters,
        gradients,
        shape,
        batch_size=arguments.batch_size,
        settings=MatchingSettings(steps=arguments.steps),
        restarts=arguments.restarts,
        progress=lambda done, total: report(done, total, "matching gradients"),
    )
    return "matching", result


def _tells_steps(arguments: argparse.Namespace, chain: "Chain", determined: bool) -> bool:
    """Whether updates of several steps can be solved as such.

    Several examples: lenet has too few equations for them. mlp with ReLU tells them apart by its first layer; with
    others its dense layers tell more apart in the average gradient than the head, with which running the client begins.
    """
    from softinv_jax.local_training.first_layer import begins_dense  # noqa: PLC0415

    if arguments.local_steps == 1 or arguments.method != "auto":
        return False
    if begins_dense(chain):
        return arguments.learning_rate is not None or arguments.batch_size != 1
    return bool(determined and arguments.learning_rate is not None and arguments.batch_size == 1)


def _apply_function(model: "Model", parameters: "Tree", statistics: "Tree") -> Any:
    from softinv_jax.client.networks import apply_function  # noqa: PLC0415

    if model.network is None:
        assert model.chain is not None
        from softinv_jax.images.layer_chain import apply_chain  # noqa: PLC0415

        return partial(apply_chain, model.chain)
    head = parameters.get("head", {})
    kernel = head.get("kernel") if isinstance(head, dict) else None
    if not isinstance(kernel, np.ndarray) or kernel.ndim != 2:
        raise ValueError("the parameters have no head/kernel (d, C)")
    return apply_function(model.network(kernel.shape[1], head_bias="bias" in head), statistics)


def _refine(
    steps: int,
    model: "Model",
    parameters: "Tree",
    statistics: "Tree",
    gradients: "Tree",
    result: "ImageRecovery",
    report: Report,
) -> "ImageRecovery":
    from softinv_jax.images.refinement import refine  # noqa: PLC0415

    report(0, len(result.images), "refining")
    return refine(
        _apply_function(model, parameters, statistics),
        parameters,
        gradients,
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
    arguments: argparse.Namespace, method: str, arrays: dict[str, np.ndarray], seconds: float, statement: str | None
) -> dict[str, Any]:
    from softinv_jax.images.verdicts import ImageVerdict  # noqa: PLC0415

    names = [verdict.name.lower() for verdict in reversed(ImageVerdict)]
    residual = arrays["residual"][np.isfinite(arrays["residual"])]
    return {
        "model": arguments.model,
        "parameters": arguments.parameters,
        "gradients": arguments.gradients,
        "updated": arguments.updated,
        "update": statement,
        "out": arguments.out,
        "method": method,
        "refining_steps": arguments.refine,
        "batch_size": arguments.batch_size,
        "images": len(arrays["images"]),
        "verdicts": {name: int(np.sum(arrays["verdict"] == name)) for name in names},
        "largest_residual": float(residual.max()) if residual.size else None,
        "seconds": round(seconds, 3),
    }
