"""The model inside a checkpoint: which of its dictionaries, and the names without what wrappers put before them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["find_state", "plain_names", "under_key"]

# What wrappers call the module they hold: torch.compile, Opacus, and (only where all names begin with it) DataParallel.
_INNER = ("_orig_mod", "_module")
_OUTERMOST = "module"
BARE_LAYER = "head"


def find_state(loaded: Any, is_matrix: Callable[[Any], bool], key: str | None = None) -> Mapping[str, Any]:
    """The dictionary of parameters in what a training script saved.

    It is the outermost one that holds a matrix by name, or nothing but arrays. Optimisers, told by their
    `param_groups`, are passed over.

    Args:
      loaded: a state dictionary, or a dictionary with one inside, such as {"model_state_dict": ..., "epoch": 3}.
      is_matrix: whether a value is an array of floats with two axes or more.
      key: which, where several could be it: names joined by "/".

    Raises:
      ValueError: none is found; several are, which the message names; or `key` is none of them.
    """
    found = _states(loaded, is_matrix)
    if key is not None:
        if key not in found:
            raise ValueError(f"no parameters under the key {key!r}; {_listing(found)}")
        return found[key]
    if "" in found:
        return found[""]
    if len(found) != 1:
        remedy = "choose one with --key (key=)" if found else "write torch.save(model.state_dict(), path)"
        raise ValueError(f"{_listing(found)}; {remedy}")
    return next(iter(found.values()))


def _listing(found: Mapping[str, Any]) -> str:
    if not found:
        return "no mapping of names to tensors with a matrix among them"
    return f"parameters are under {', '.join(repr(name) for name in found)}"


def _states(value: Any, is_matrix: Callable[[Any], bool], path: str = "") -> dict[str, Mapping[str, Any]]:
    if not isinstance(value, Mapping) or "param_groups" in value:
        return {}
    named = {name: entry for name, entry in value.items() if isinstance(name, str)}
    found: dict[str, Mapping[str, Any]] = {}
    only_arrays = not path and bool(named) and all(hasattr(entry, "ndim") for entry in named.values())
    if only_arrays or any(is_matrix(entry) for entry in named.values()):
        found[path] = named
        if path:
            return found
    for name, entry in named.items():
        found |= _states(entry, is_matrix, f"{path}/{name}" if path else name)
    return found


def under_key(arrays: Mapping[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with `key` and a separator, without it.

    Raises:
      ValueError: if there are none.
    """
    chosen = {}
    for name, array in arrays.items():
        if name.startswith((f"{key}/", f"{key}.")):
            chosen[name[len(key) + 1 :]] = array
    if not chosen:
        first = ", ".join(map(repr, list(arrays)[:6])) or "nothing"
        raise ValueError(f"no parameters under the key {key!r}; it holds {first}")
    return chosen


def plain_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays by the names of the model itself, without what DataParallel, torch.compile and Opacus put before them.

    A lone dense layer, which names no layer, is called `head`.

    Raises:
      ValueError: if two arrays end up with one name.
    """
    plain: dict[str, np.ndarray] = {}
    parted = {name: [part for part in name.split(".") if part not in _INNER] for name in arrays}
    # At least a layer must be left, as for a model that is one dense layer.
    while parted and all(len(parts) > 1 and parts[0] == _OUTERMOST for parts in parted.values()):
        parted = {name: parts[1:] for name, parts in parted.items()}
    for name, parts in parted.items():
        new = ".".join(parts) or name
        if new in plain:
            raise ValueError(f"{name} and another array are both {new} without the wrappers' prefixes; save one model")
        plain[new] = arrays[name]
    matrix = plain.get("weight", plain.get("kernel"))
    if matrix is not None and np.ndim(matrix) == 2 and set(plain) <= {"weight", "kernel", "bias"}:
        return {f"{BARE_LAYER}.{name}": array for name, array in plain.items()}
    return plain
