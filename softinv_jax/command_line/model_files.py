"""PARAMETERS.npz and GRADIENTS.npz: a flax model's arrays by name, as a tree."""

from softinv_jax.command_line.console import InputError, input_errors
from softinv_jax.frameworks.npz_file import read_npz
from softinv_jax.frameworks.parameter_files import Tree, flat, nested

__all__ = ["STATISTICS", "Tree", "read_gradients", "read_parameters"]

STATISTICS = "batch_stats"


def read_parameters(path: str) -> tuple[Tree, Tree]:
    """Read a model: arrays named by layer, parts joined by "/", such as `conv1/kernel`.

    Returns:
      The parameters, and the running statistics of batch normalisation: what is under `batch_stats/`, perhaps nothing.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    with input_errors():
        arrays = read_npz(path)
    with input_errors(f"{path}: "):
        tree = nested(arrays)
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
    with input_errors():
        given, expected = read_npz(path), flat(parameters)
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
    with input_errors(f"{path}: "):
        return nested({name: array if leading[name] else array[None] for name, array in given.items()})
