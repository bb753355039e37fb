"""How XLA is asked to compile large programs of small operations."""

__all__ = ["compiler_options"]

TUNED = 4  # XLA's own level.


def compiler_options(platform: str, *, tuned: bool = False) -> dict[str, int] | None:
    """Options of `jax.jit` for a device's platform; None for jax's own.

    Args:
      platform: as jax names it.
      tuned: XLA for GPUs tries out variants of every operation. That pays where gradients are read once and quickly; it
        takes minutes for a search of a thousand small operations, and wins little where starting them takes the time.
    """
    if platform not in ("gpu", "cuda", "rocm"):
        return None
    return {"xla_gpu_autotune_level": TUNED if tuned else 0}
