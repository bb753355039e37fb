"""--parameters BEFORE --updated AFTER ...: what clients sent back, in place of gradients."""

import argparse
from collections.abc import Callable

import numpy as np

from softinv_jax.command_line.console import InputError, input_errors
from softinv_jax.frameworks.parameter_files import Tree, flat, read_parameter_file, trained_layers
from softinv_jax.images.layer_chain import Chain
from softinv_jax.observation.head import Observation, stack_observations
from softinv_jax.observation.updates import ObservedUpdate, observe_update, observe_update_head

__all__ = ["chain_tree", "observe_heads", "read_updates"]

ToTree = Callable[[dict[str, np.ndarray]], Tree]


def chain_tree(chain: Chain, image_shape: tuple[int, int, int], names: dict[str, str]) -> ToTree:
    """For the layers of a chain: linen's layout, PyTorch's turned into it (told by arrays named `....weight`)."""
    from softinv_jax.frameworks.torch_layout import linen_from_torch_chain  # noqa: PLC0415

    def convert(arrays: dict[str, np.ndarray]) -> Tree:
        if any(name.endswith(".weight") for name in arrays):
            return linen_from_torch_chain(arrays, chain, image_shape, names=names)
        return trained_layers(arrays)

    return convert


def read_updates(arguments: argparse.Namespace, to_tree: ToTree = trained_layers) -> list[ObservedUpdate]:
    """Read the files and take each update for a gradient.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    before = _read_tree(arguments.parameters, to_tree, arguments.key)
    updates = []
    for path in arguments.updated:
        after = _read_tree(path, to_tree, arguments.key)
        differing = sorted(set(flat(before)) ^ set(flat(after)))
        if differing:
            raise InputError(f"{path}: must hold the arrays of {arguments.parameters}; differs in {differing[0]}")
        with input_errors(f"{path}: "):
            updates.append(
                observe_update(
                    before,
                    after,
                    learning_rate=arguments.learning_rate,
                    local_steps=arguments.local_steps,
                    momentum=arguments.momentum,
                    dampening=arguments.dampening,
                    nesterov=arguments.nesterov,
                    weight_decay=arguments.weight_decay,
                    proximal=arguments.proximal,
                    minibatch_size=arguments.minibatch_size,
                )
            )
    return updates


def observe_heads(updates: list[ObservedUpdate], head: str | None) -> Observation:
    """The heads of all updates, gradients and noise with a leading axis.

    Raises:
      InputError: if no head is found, or several are.
    """
    with input_errors("--head: " if head else ""):
        return stack_observations([observe_update_head(update, name=head) for update in updates])


def _read_tree(path: str, to_tree: ToTree, key: str | None) -> Tree:
    with input_errors():
        arrays = read_parameter_file(path, key)
    with input_errors(f"{path}: "):
        return to_tree(arrays)
