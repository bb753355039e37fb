"""Compiled programs kept for the next run: compiling takes most of a short one."""

import os
import platform
from pathlib import Path

__all__ = ["keep_compiled_programs"]


def keep_compiled_programs() -> None:
    """Keep them in `softinv` under XDG_CACHE_HOME or ~/.cache, unless JAX_COMPILATION_CACHE_DIR names a place."""
    import jax  # noqa: PLC0415 - the parser of the command line does not need it

    if "JAX_LOGGING_LEVEL" not in os.environ:
        # jax 0.10 reports an error for every kept program it loads although nothing is wrong with it.
        jax.config.update("jax_logging_level", "CRITICAL")
    if getattr(jax.config, "jax_compilation_cache_dir") is not None:  # noqa: B009 - not every jax declares it
        return
    # By machine, because a home folder may be shared between machines with different processors.
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # A user without a home.
        return
    folder = root / "softinv" / f"jax-{jax.__version__}-{platform.node()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
