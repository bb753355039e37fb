"""The chain of layers that a PyTorch module is, read off what it computes; or why it is none.

`torch.export` runs the module once on a stand-in and lists its operations, whatever its classes are called.
Needs torch: pip install 'softinv_jax[torch]'.
"""

import io
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from softinv_jax.activations import LEAK
from softinv_jax.frameworks.npz_file import first_line
from softinv_jax.images.layer_chain import Activation, Chain, Convolution, Dense, Flatten, Layer, Pool, check_chain

try:
    import torch
except ImportError as error:
    raise ImportError("needs torch 2.8 or newer; pip install 'softinv_jax[torch]'") from error

__all__ = ["NotAChainError", "read_chain"]

_SAME = ("clone", "contiguous", "detach", "alias", "lift_fresh_copy")
_RESHAPING = ("view", "reshape", "flatten", "_unsafe_view", "squeeze", "unsqueeze")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_ACTIVATIONS = ("relu", "sigmoid", "tanh", "silu", "relu6")
# Activations with numbers of their own, and those for which this package knows them.
_WITH_NUMBERS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("leaky_relu", {"negative_slope": LEAK}, "leaky_relu"),
    ("elu", {"alpha": 1, "scale": 1, "input_scale": 1}, "elu"),
    ("softplus", {"beta": 1}, "softplus"),
    ("gelu", {"approximate": "none"}, "gelu"),
    ("gelu", {"approximate": "tanh"}, "gelu_tanh"),
    ("hardtanh", {"min_val": -1, "max_val": 1}, "hard_tanh"),
    ("hardtanh", {"min_val": 0, "max_val": 6}, "relu6"),
)


class NotAChainError(ValueError):
    """The module computes something that is no chain of layers; the message names the operation."""


def read_chain(module: "torch.nn.Module", image_shape: tuple[int, int, int]) -> Chain:
    """The chain, its layers named as the module's, parts joined by "/".

    Logarithms of a softmax at the end are left out: the cross-entropy of what enters them is the same.

    Args:
      module: takes (N, channels, H, W) and returns logits (N, C). image_shape: (H, W, channels).

    Raises:
      NotAChainError: naming the operation.
    """
    height, width, channels = image_shape
    kind = next((value.dtype for value in module.parameters()), torch.float32)
    try:
        with _silence():
            program = torch.export.export(module, (torch.zeros(1, channels, height, width, dtype=kind),))
    except Exception as error:  # Whatever forward raises, and torch's own.
        raise NotAChainError(f"torch.export cannot follow it: {first_line(error)}") from error
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
    value = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in names][-1]
    layers: list[Layer] = []
    while (node := _only_user(value)).op != "output":
        if _operation(node) != "log_softmax" or _only_user(node).op != "output":
            layers += _layers_of(node, value, names, frozen)
        value = node
    try:
        check_chain(tuple(layers))
    except ValueError as error:
        raise NotAChainError(str(error)) from error
    return tuple(layers)


@contextmanager
def _silence() -> Iterator[None]:
    """The error says what torch logs and prints at length."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _only_user(value: Any) -> Any:
    users = [node for node in value.users if _operation(node) != "_assert_tensor_metadata"]
    if len(users) != 1:
        what = "the image" if value.op == "placeholder" else f"what {_operation(value)} gives"
        taken = ", ".join(_operation(node) for node in users) or "nothing"
        raise NotAChainError(f"{what} goes into {taken}; a chain has no branches")
    return users[0]


def _operation(node: Any) -> str:
    """Such as conv2d; in place or not."""
    if node.op != "call_function":
        return str(node.op)
    packet = getattr(node.target, "_schema", None)
    name = str(node.target) if packet is None else packet.name.rpartition("::")[2]
    return name if name.startswith("_") else name.removesuffix("_")


def _layers_of(node: Any, value: Any, names: Mapping[str, str], frozen: set[str]) -> list[Layer]:
    """What one operation on `value` is in a chain."""
    operation, given = _operation(node), _arguments(node)
    before, after = tuple(value.meta["val"].shape), tuple(node.meta["val"].shape)
    flattens = operation in _RESHAPING and len(before) == 4 and after == (1, math.prod(before))
    if flattens or operation in _SAME or (operation in _RESHAPING and before == after):
        return [Flatten()] if flattens else []
    if operation in _DROPOUTS:
        if given["train"] and given["p"] > 0:
            raise NotAChainError("dropout is on; take the module in evaluation mode, if the client trained so")
        return []
    if operation == "conv2d":
        return [_convolution(node, given, names, frozen)]
    if operation == "linear" and len(before) == 2:
        return [Dense(_layer_name(node, given, names, frozen))]
    pooling = operation in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean")
    return _pool(operation, given, before, after) if pooling else [_activation(operation, given)]


def _arguments(node: Any) -> dict[str, Any]:
    """All arguments by name, defaults too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise NotAChainError(f"{node.target} is no layer of a chain")
    given: dict[str, Any] = {}
    for place, argument in enumerate(schema.arguments):
        if place < len(node.args):
            given[argument.name] = node.args[place]
        elif argument.name in node.kwargs or argument.has_default_value():
            given[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return given


def _layer_name(node: Any, given: Mapping[str, Any], names: Mapping[str, str], frozen: set[str]) -> str:
    """Of the layer whose `weight` and `bias` the operation takes, both trained."""
    held = {part: given[part] for part in ("weight", "bias") if given.get(part) is not None}
    full = {part: names.get(getattr(argument, "name", "")) for part, argument in held.items()}
    layers = {str(name).rpartition(".")[0] for name in full.values()}
    for part, name in full.items():
        if name is None:
            raise NotAChainError(f"the {part} of a {_operation(node)} is computed, not a parameter by itself")
        if name.rpartition(".")[2] != part or "." not in name or len(layers) != 1:
            raise NotAChainError(f"{name} is the {part} of a {_operation(node)}, but is not named layer.{part}")
        if name in frozen:
            raise NotAChainError(f"{name} is not trained, so that no gradient of it is sent")
    return layers.pop().replace(".", "/")


def _convolution(node: Any, given: Mapping[str, Any], names: Mapping[str, str], frozen: set[str]) -> Convolution:
    name = _layer_name(node, given, names, frozen)
    if given["groups"] != 1:
        raise NotAChainError(f"{name} is a convolution in {given['groups']} groups")
    if set(given["dilation"]) != {1}:
        raise NotAChainError(f"{name} is a convolution with dilation {tuple(given['dilation'])}")
    strides, padding = _pair(given["stride"]), given["padding"]
    if padding in ("same", "valid"):
        size = given["weight"].meta["val"].shape[2:]
        total = [side - 1 if padding == "same" else 0 for side in size]
        return Convolution(name, strides, ((total[0] // 2, -(-total[0] // 2)), (total[1] // 2, -(-total[1] // 2))))
    rows, columns = _pair(padding)
    return Convolution(name, strides, ((rows, rows), (columns, columns)))


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    return both[0], both[1]


def _pool(operation: str, given: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]) -> list[Layer]:
    if operation == "mean":
        axes = sorted(axis % len(before) for axis in given.get("dim") or ())
        if len(before) != 4 or axes != [2, 3]:
            raise NotAChainError(f"mean over the axes {axes} of {before} is no layer of a chain")
        pool = Pool("average", before[2:], before[2:])
        return [pool] if given["keepdim"] else [pool, Flatten()]
    if operation == "adaptive_avg_pool2d":
        size = before[2] // after[2], before[3] // after[3]
        if (size[0] * after[2], size[1] * after[3]) != before[2:]:
            raise NotAChainError(f"adaptive pooling from {before[2:]} to {after[2:]} has windows of several sizes")
        return [Pool("average", size, size)]
    size = _pair(given["kernel_size"])
    rows, columns = _pair(given["padding"])
    padded = rows or columns
    if given["ceil_mode"] or given.get("divisor_override") or (padded and not given.get("count_include_pad", True)):
        raise NotAChainError(f"{operation} with ceil_mode, divisor_override or without its padding's zeros")
    if set(_pair(given.get("dilation", 1))) != {1}:
        raise NotAChainError(f"{operation} with dilation {given['dilation']}")
    strides = _pair(given["stride"]) if given["stride"] else size
    return [Pool("max" if operation == "max_pool2d" else "average", size, strides, ((rows, rows), (columns, columns)))]


def _activation(operation: str, given: Mapping[str, Any]) -> Activation:
    if operation in _ACTIVATIONS:
        return Activation(operation)
    for name, numbers, function in _WITH_NUMBERS:
        if name == operation and all(given[part] == number for part, number in numbers.items()):
            return Activation(function)
    numbers = {part: number for part, number in given.items() if isinstance(number, int | float | str)}
    with_them = " with " + ", ".join(f"{part}={number}" for part, number in numbers.items()) if numbers else ""
    raise NotAChainError(f"{operation}{with_them} is no layer of a chain")
