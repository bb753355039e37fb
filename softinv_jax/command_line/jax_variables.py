"""jax as the environment's variables set it up: what cannot work is named, what would spoil results is switched off."""

import os
import sys

from softinv_jax.command_line.console import InputError

__all__ = ["prepare_jax"]

# Checks for people who develop with jax. Results hold NaN where nothing is recovered, and mix dtypes on purpose.
_SWITCHED_OFF = {
    "JAX_DEBUG_NANS": False,
    "JAX_DEBUG_INFS": False,
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_TRANSFER_GUARD": "allow",
}


def prepare_jax() -> None:
    """Load jax and start its platform.

    Raises:
      InputError: one line that names the variables at fault.
    """
    try:
        import jax  # noqa: PLC0415 - slow
    except ValueError as error:
        raise InputError(f"jax refuses one of {_variables()}: {error}; unset it") from error
    for variable, value in _SWITCHED_OFF.items():
        option = variable.lower()
        if variable in os.environ and getattr(jax.config, option, value) != value:
            jax.config.update(option, value)
            print(f"softinv: {variable} is not heeded: it is for developing with jax", file=sys.stderr)
    try:
        jax.devices()
    except Exception as error:  # RuntimeError for most platforms, AssertionError for CUDA where there is none.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"jax finds no device ({reason}); look at {_variables()}") from error


def _variables() -> str:
    prefixes = ("JAX_", "XLA_", "CUDA_")
    names = sorted(name for name in os.environ if name.startswith(prefixes) and not name.endswith("CACHE_DIR"))
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "its installation"
