"""The options that describe an update; the parser must not load jax."""

import argparse

from softinv_jax.command_line.console import InputError

__all__ = ["add_update_options", "check_update_options"]

_DEFAULTS = {
    "key": None,
    "learning_rate": None,
    "local_steps": 1,
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "proximal": 0.0,
    "minibatch_size": None,
}


def add_update_options(parser: argparse.ArgumentParser) -> None:
    """Add what `update_files.read_updates` reads, except --parameters."""
    group = parser.add_argument_group("updates in place of gradients (docs/frameworks.md)")
    group.add_argument(
        "--updated",
        nargs="+",
        metavar="AFTER",
        help="what each client sent back: .npz, .safetensors, or of PyTorch (.pt, .pth, ...)",
    )
    group.add_argument(
        "--key", metavar="NAME", help="which of several models in the files, such as model_state_dict; joined by /"
    )
    group.add_argument("--learning-rate", type=float, metavar="RATE", help="of the clients; left out, it is not known")
    group.add_argument("--local-steps", type=int, default=1, metavar="K", help="steps on the same examples (1)")
    group.add_argument(
        "--minibatch-size", type=int, metavar="b", help="examples in each of the steps, in any order (all of them)"
    )
    group.add_argument("--momentum", type=float, default=0.0, metavar="M", help="from a fresh optimiser (0)")
    group.add_argument("--dampening", type=float, default=0.0, metavar="D", help="of the momentum (0)")
    group.add_argument("--nesterov", action="store_true", help="Nesterov's form of the momentum")
    group.add_argument("--weight-decay", type=float, default=0.0, metavar="W", help="needs --learning-rate (0)")
    group.add_argument("--proximal", type=float, default=0.0, metavar="MU", help="of FedProx, with --local-steps (0)")


def check_update_options(arguments: argparse.Namespace) -> None:
    """Before jax is loaded: what needs no look at the files.

    Raises:
      InputError: for options that go with --updated, where that is not given.
    """
    if arguments.updated is not None:
        return
    for option, default in _DEFAULTS.items():
        if getattr(arguments, option) != default:
            raise InputError(f"--{option.replace('_', '-')} describes an update; give --updated with it")
