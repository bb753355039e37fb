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
    chosen = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - not every jax declares it
    if chosen is not None:
        # One that cannot be made would be told of again and again by jax, with every program.
        if "://" not in str(chosen) and not _is_usable(Path(chosen)):
            jax.config.update("jax_compilation_cache_dir", None)
        return
    # By machine, because a home folder may be shared between machines with different processors.
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # A user without a home.
        return
    folder = root / "softinv" / f"jax-{jax.__version__}-{platform.node()}"
    if _is_usable(folder):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _is_usable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
