"""How XLA is asked to compile large programs of small operations."""

__all__ = ["compiler_options"]


def compiler_options(platform: str) -> dict[str, int] | None:
    """Options of `jax.jit` for a device's platform; None for jax's own.

    XLA for GPUs tries out variants of every fused operation, which takes minutes for a search of a thousand of them,
    and wins little where starting them is what takes time.
    """
    return {"xla_gpu_autotune_level": 0} if platform in ("gpu", "cuda", "rocm") else None
