"""What `softinv invert` is given: a network, with gradients or updates, as the library takes them."""

import argparse
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from softinv_jax.audit import models
from softinv_jax.audit.models import Model
from softinv_jax.client.networks import apply_function
from softinv_jax.command_line import model_files, torch_files, update_files
from softinv_jax.command_line.console import InputError, input_errors
from softinv_jax.frameworks.parameter_files import Tree, flat, read_parameter_file, trained_layers
from softinv_jax.inversions import Network, stack_gradients
from softinv_jax.observation.updates import ObservedUpdate
from softinv_jax.whole_models import find_dense_end

__all__ = ["Source", "read_source"]


@dataclass(frozen=True)
class Source:
    """A network; its parameters and N gradients, as it takes them; the updates these were made of, or None."""

    network: Network
    parameters: Tree
    gradients: Tree
    updates: list[ObservedUpdate] | None

    @property
    def scale_known(self) -> bool:
        """As far as the updates tell."""
        return self.updates is None or self.updates[0].scale_known


def read_source(arguments: argparse.Namespace) -> Source:
    """Read the files that the options name.

    Raises:
      InputError: one line that names the file or option, what is wrong, and the remedy.
    """
    if arguments.torch_model is None:
        return _of_built_in(arguments)
    model = torch_files.read_torch_model(arguments, torch_files.image_shape(arguments))
    if arguments.method == "exact" and model.chain is None:
        raise InputError(f"--method exact needs a chain of layers: {model.not_a_chain}; use --method matching")
    if arguments.updated is not None:
        return _of_updates(model.network, update_files.read_updates(arguments, model.tree))
    parameters, gradients = torch_files.read_torch_gradients(arguments, model)
    return Source(model.network, parameters, gradients, None)


def _of_updates(network: Network, updates: list[ObservedUpdate]) -> Source:
    return Source(network, updates[0].parameters, stack_gradients(updates), updates)


def _of_built_in(arguments: argparse.Namespace) -> Source:
    model = _mlp(arguments) if arguments.model == models.MLP else models.MODELS[arguments.model]
    if arguments.method == "exact" and model.chain is None:
        chains = ", ".join([*(name for name, other in models.MODELS.items() if other.chain is not None), models.MLP])
        raise InputError(f"--method exact needs a chain of layers ({chains}); use --method matching")
    sides = arguments.image_size or [model.image_size]
    shape = (sides[0], sides[-1], arguments.channels)
    if arguments.updated is not None:
        if model.chain is None:
            raise InputError(f"--updated is for chains of layers (lenet, fcn4, mlp), not {arguments.model}")
        to_tree = update_files.chain_tree(model.chain, shape, {old: new for old, _, new in _renamed(arguments)})
        return _of_updates(Network(shape, model.chain), update_files.read_updates(arguments, to_tree))
    parameters, statistics = model_files.read_parameters(arguments.parameters)
    gradients = model_files.read_gradients(arguments.gradients, parameters, arguments.parameters)
    with input_errors():
        function = None if model.chain is not None else _function(model, parameters, statistics)
    return Source(Network(shape, model.chain, function), parameters, gradients, None)


def _function(model: Model, parameters: Tree, statistics: Tree) -> Any:
    assert model.network is not None
    head = parameters.get("head", {})
    kernel = head.get("kernel") if isinstance(head, dict) else None
    if not isinstance(kernel, np.ndarray) or kernel.ndim != 2:
        raise ValueError("the parameters have no head/kernel (d, C)")
    return apply_function(model.network(kernel.shape[1], head_bias="bias" in head), statistics)


def _mlp(arguments: argparse.Namespace) -> Model:
    """The network that the layers of --parameters make."""
    with input_errors():
        tree = trained_layers(read_parameter_file(arguments.parameters, arguments.key))
        arrays = flat(tree)
        if arguments.updated is not None and not arguments.rename and not re.search(r"\bdense\d", " ".join(arrays)):
            arguments.rename = _in_order(tree)
    names = {old.replace(".", "/"): new for old, _, new in _renamed(arguments)}
    layers = {name.rpartition("/")[0] for name in arrays}
    with input_errors(f"{arguments.parameters}: "):
        return models.mlp([names.get(layer, layer) for layer in layers], arguments.activation or "relu")


def _in_order(tree: Tree) -> list[str]:
    """--rename for layers of other names, such as PyTorch's numbers: by their shapes, the head last."""
    old = [name.replace("/", ".") for name in find_dense_end(tree)]
    new = [*(f"dense{place + 1}" for place in range(len(old) - 1)), "head"]
    return [f"{one}={other}" for one, other in zip(old, new, strict=True)]


def _renamed(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    return [rename.partition("=") for rename in arguments.rename]
