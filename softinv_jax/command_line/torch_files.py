"""--torch-model FILE.py:NAME: a PyTorch module of the user's own code, with the parameters that clients were sent."""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from softinv_jax.command_line.console import InputError, input_errors

if TYPE_CHECKING:
    from softinv_jax.frameworks.parameter_files import Tree
    from softinv_jax.frameworks.torch_model import TorchModel

__all__ = ["add_torch_options", "check_torch_options", "image_shape", "read_torch_gradients", "read_torch_model"]


_OPTIONS = {"torch_arguments": None, "evaluation_mode": False, "dropout_seed": None}


def add_torch_options(parser: argparse.ArgumentParser) -> None:
    """Add what `read_torch_model` reads, except --parameters and --key."""
    group = parser.add_argument_group("a PyTorch module of your own (docs/your-model.md); FILE.py is run")
    group.add_argument(
        "--torch-model", metavar="FILE.py:NAME", help="the class, a function that makes the module, or the module"
    )
    group.add_argument(
        "--torch-arguments", metavar="JSON", help="""what NAME is called with: '{"width": 64}', or a list ({})"""
    )
    group.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="height and width of the images, or one side of square ones",
    )
    group.add_argument("--channels", type=int, default=3, help="of the images: 1 for gray ones (3)")
    group.add_argument(
        "--evaluation-mode", action="store_true", help="clients took their step in module.eval() (module.train())"
    )
    group.add_argument(
        "--dropout-seed",
        type=int,
        metavar="SEED",
        help="of torch.manual_seed just before the step, if dropout is on",
    )


def check_torch_options(arguments: argparse.Namespace) -> None:
    """Before jax is loaded: what needs no look at the files.

    Raises:
      InputError: for options that go with --torch-model, where that is not given.
    """
    if arguments.torch_model is not None and arguments.image_size is None:
        raise InputError("--torch-model needs --image-size, such as --image-size 32, or height and width")
    for number in [*(arguments.image_size or []), arguments.channels]:
        if number < 1:
            name = "channels" if number == arguments.channels else "image-size"
            raise InputError(f"--{name} {number}: give 1 or more")
    if len(arguments.image_size or []) > 2:
        raise InputError(f"--image-size {' '.join(map(str, arguments.image_size))}: give height and width, or one side")
    for option, default in _OPTIONS.items():
        if arguments.torch_model is None and getattr(arguments, option) != default:
            raise InputError(f"--{option.replace('_', '-')} describes a PyTorch module; give --torch-model with it")


def image_shape(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """(H, W, channels), of options that `check_torch_options` has seen."""
    return arguments.image_size[0], arguments.image_size[-1], arguments.channels


def read_torch_model(arguments: argparse.Namespace, image_shape: tuple[int, int, int]) -> "TorchModel":
    """The module that --torch-model names, holding the arrays of --parameters.

    Raises:
      InputError: one line that names the file or option, what is wrong, and the remedy.
    """
    try:
        from softinv_jax.frameworks.torch_model import torch_model  # noqa: PLC0415 - optional
    except ImportError as error:
        raise InputError(f"--torch-model {error}") from error
    from softinv_jax.frameworks.parameter_files import read_parameter_file  # noqa: PLC0415 - loads jax

    module = _make_module(arguments.torch_model, arguments.torch_arguments)
    with input_errors():
        arrays = read_parameter_file(arguments.parameters, arguments.key)
    _fill(module, arrays, arguments.parameters, arguments.torch_model)
    module.train(not arguments.evaluation_mode)
    try:
        with input_errors(f"{arguments.torch_model}: "), _standard_output_kept():
            model = torch_model(module, image_shape, dropout_seed=arguments.dropout_seed)
            _ = model.network  # Compared with torch now, not in the middle of the work.
    except ImportError as error:  # What is no chain needs torchax too.
        raise InputError(f"{arguments.torch_model}: {model.not_a_chain}; such a module {error}") from error
    return model


def read_torch_gradients(arguments: argparse.Namespace, model: "TorchModel") -> "tuple[Tree, Tree]":
    """Parameters, and gradients with a leading axis N, as the model's network takes them.

    --gradients holds arrays named as the module's, each like its parameter or with a leading axis N.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    import jax  # noqa: PLC0415

    from softinv_jax.frameworks.parameter_files import read_parameter_file  # noqa: PLC0415

    with input_errors():
        held = read_parameter_file(arguments.parameters, arguments.key)
        given = read_parameter_file(arguments.gradients, arguments.key)
    with input_errors(f"{arguments.gradients}: "):
        trained = [name for name in given if name in held]
        counts = {given[name].shape[0] for name in trained if given[name].ndim == held[name].ndim + 1}
        alone = [name for name in trained if given[name].ndim == held[name].ndim]
        if len(counts) > 1 or (counts and alone):
            raise ValueError("arrays differ in the number of gradients; give all the same leading axis N, or none")
        rows = [given] if not counts else [_row(given, trained, index) for index in range(counts.pop())]
        trees = [model.tree(row) for row in rows]
        return model.tree(held), jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _row(arrays: Mapping[str, np.ndarray], names: list[str], index: int) -> dict[str, np.ndarray]:
    return {name: arrays[name][index] for name in names}


def _make_module(named: str, given: str | None) -> Any:
    import torch  # noqa: PLC0415

    path, separator, name = named.rpartition(":")
    if not separator or not path or not name:
        raise InputError(f"--torch-model {named}: give FILE.py:NAME, such as model.py:Net")
    if not os.path.isfile(path):
        raise InputError(f"--torch-model {named}: {path}: no such file")
    try:
        options = json.loads(given) if given is not None else {}
    except json.JSONDecodeError as error:
        raise InputError(
            f"--torch-arguments {given}: not JSON ({error}); give '{{\"width\": 64}}' or '[64]'"
        ) from error
    if not isinstance(options, dict | list):
        raise InputError(f"--torch-arguments {given}: give an object of names and values, or a list")
    found = getattr(_run_file(path), name, None)
    if found is None:
        raise InputError(f"--torch-model {named}: {path} defines no {name}")
    if not isinstance(found, torch.nn.Module):
        try:
            with _standard_output_kept():
                found = found(*options) if isinstance(options, list) else found(**options)
        except Exception as error:  # The user's own code.
            told = f"{type(error).__name__}: {error}"
            raise InputError(f"--torch-model {named}: making it fails ({told}); see --torch-arguments") from error
    if not isinstance(found, torch.nn.Module):
        raise InputError(f"--torch-model {named}: gives a {type(found).__name__}, not a torch.nn.Module")
    return found


def _run_file(path: str) -> Any:
    folder, file = os.path.split(os.path.abspath(path))
    spec = importlib.util.spec_from_file_location(os.path.splitext(file)[0], path)
    if spec is None or spec.loader is None:
        raise InputError(f"--torch-model: {path} is no Python file; give FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    # As `python FILE.py` would find what lies beside it.
    sys.path.insert(0, folder)
    sys.modules[spec.name] = module
    try:
        with _standard_output_kept():
            spec.loader.exec_module(module)
    except Exception as error:  # The user's own code.
        raise InputError(f"{path}: running it fails ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
    return module


@contextlib.contextmanager
def _standard_output_kept() -> Iterator[None]:
    """What the user's code prints goes where it does not mix with --json."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _fill(module: Any, arrays: Mapping[str, np.ndarray], path: str, named: str) -> None:
    import torch  # noqa: PLC0415

    state = module.state_dict()
    needed = {name for name, value in state.items() if value.is_floating_point()}
    for kind, names in (("lacks", needed - set(arrays)), ("also holds", set(arrays) - set(state))):
        if names:
            listed = ", ".join(sorted(names)[:6])
            raise InputError(f"{path}: {kind} {listed}, other than {named}; give the file of this model")
    for name in sorted(needed):
        if tuple(state[name].shape) != arrays[name].shape:
            raise InputError(
                f"{path}: {name} has shape {arrays[name].shape}, but {tuple(state[name].shape)} in {named}; see"
                " --torch-arguments"
            )
    values = {name: torch.from_numpy(np.asarray(arrays[name], np.float64)).to(state[name].dtype) for name in needed}
    module.load_state_dict(values, strict=False)
