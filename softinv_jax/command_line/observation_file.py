"""OBSERVATION.npz: what the server saw of one head, read without trusting the file."""

import numpy as np

from softinv_jax.command_line.console import input_errors
from softinv_jax.frameworks.npz_file import map_npz, read_npz
from softinv_jax.observation.head import Observation, observe

__all__ = ["read_observation"]

_REQUIRED = ("weight", "weight_gradient")
_OPTIONAL = ("bias", "bias_gradient")


def read_observation(path: str, *, mapped: bool = False) -> Observation:
    """Read and check an observation.

    Args:
      path: an .npz file with `weight` (C, d), `weight_gradient` (C, d) or (N, C, d) and, for a head with a bias,
        `bias` (C,) and `bias_gradient` (C,) or (N, C); float16, float32 or float64. Nothing in it is executed.
      mapped: leave the arrays in the file, as memory maps whose values are not looked at yet.

    Returns:
      An `Observation` whose gradients have a leading axis N.

    Raises:
      InputError: one line that names the file, what is wrong, and the remedy.
    """
    with input_errors():
        arrays = (map_npz if mapped else read_npz)(path, _check_keys)
    with input_errors(f"{path}: "):
        observation = _observe(arrays, check_values=not mapped)
    if observation.weight_gradient.ndim == 2:
        arrays = {name: array[None] if name.endswith("gradient") else array for name, array in arrays.items()}
        observation = _observe(arrays, check_values=not mapped)
    return observation


def _observe(arrays: dict[str, np.ndarray], check_values: bool) -> Observation:
    weights = arrays["weight"], arrays["weight_gradient"]
    return observe(*weights, arrays.get("bias"), arrays.get("bias_gradient"), check_values=check_values)


def _check_keys(names: list[str]) -> None:
    missing = [name for name in _REQUIRED if name not in names]
    unknown = [name for name in names if name not in _REQUIRED + _OPTIONAL]
    known = f"an observation has {', '.join(_REQUIRED)} and, for a head with a bias, {', '.join(_OPTIONAL)}"
    if missing:
        found = ", ".join(map(repr, names[:6])) or "nothing"
        raise ValueError(f"{' and '.join(missing)} missing (it holds {found}); {known}")
    if unknown:
        listed = ", ".join(map(repr, unknown[:6]))
        raise ValueError(f"unknown {'array' if len(unknown) == 1 else 'arrays'} {listed}; {known}")
