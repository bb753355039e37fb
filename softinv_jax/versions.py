"""What a result was computed with."""

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["package_versions"]


def package_versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    versions = {"python": platform.python_version()}
    for name in ("softinv_jax", "jax", "jaxlib", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
