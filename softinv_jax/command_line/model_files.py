"""PARAMETERS.npz and GRADIENTS.npz: a flax model's arrays by name, as a tree."""

import numpy as np

from softinv_jax.command_line.console import InputError
from softinv_jax.command_line.npz_file import read_arrays

__all__ = ["STATISTICS", "Tree", "read_gradients", "read_parameters"]

STATISTICS = "batch_stats"
Tree = dict[str, "np.ndarray | Tree"]


def read_parameters(path: str) -> tuple[Tree, Tree]:
    """Read a model: arrays named by layer, parts joined by "/", such as `conv1/kernel`.

    Returns:
      The parameters, and the running statistics of batch normalisation: what is under `batch_stats/`, perhaps nothing.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    tree = _tree(path, read_arrays(path))
    statistics = tree.pop(STATISTICS, {})
    if not isinstance(statistics, dict) or not tree:
        raise InputError(f"{path}: holds no parameters; name arrays by layer, such as conv1/kernel and head/kernel")
    return tree, statistics


def read_gradients(path: str, parameters: Tree, parameters_path: str) -> Tree:
    """Read gradients named as the parameters are, each array like its parameter or with a leading axis N.

    Returns:
      The gradients, every array with the leading axis.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    given, expected = read_arrays(path), _flat(parameters)
    for kind, names in (("missing", set(expected) - set(given)), ("unknown", set(given) - set(expected))):
        if names:
            listed = ", ".join(sorted(names)[:6])
            raise InputError(f"{path}: {kind}: {listed}; the arrays must be named as those of {parameters_path}")
    leading = {name: array.ndim - expected[name].ndim for name, array in given.items()}
    for name, array in given.items():
        shape = expected[name].shape
        if leading[name] not in (0, 1) or array.shape[leading[name] :] != shape or 0 in array.shape:
            raise InputError(f"{path}: {name} has shape {array.shape}, but {shape} or (N, *{shape}) is needed")
    counts = {array.shape[0] for name, array in given.items() if leading[name]}
    if len(counts) > 1 or len(set(leading.values())) > 1:
        raise InputError(f"{path}: arrays differ in the number of gradients; give all the same leading axis N, or none")
    return _tree(path, {name: array if leading[name] else array[None] for name, array in given.items()})


def _tree(path: str, arrays: dict[str, np.ndarray]) -> Tree:
    tree: Tree = {}
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            raise InputError(f"{path}: {name} holds entries that are not finite; leave out what they belong to")
        *parents, last = name.split("/")
        branch = tree
        for part in parents:
            inner = branch.setdefault(part, {})
            if not isinstance(inner, dict):
                raise InputError(f"{path}: {name} lies inside another array; name arrays as layer/part")
            branch = inner
        if last in branch:
            raise InputError(f"{path}: {name} is given twice; name arrays as layer/part")
        branch[last] = array
    return tree


def _flat(tree: Tree, prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
