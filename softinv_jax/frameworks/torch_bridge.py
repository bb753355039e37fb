"""A PyTorch module as a function of JAX arrays, by torchax; dropout as torch draws it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.frameworks.parameter_files import flat

try:
    import torch
    import torchax
    from torch.overrides import TorchFunctionMode
except ImportError as error:
    raise ImportError("needs torch and torchax; pip install 'softinv_jax[torch-models]'") from error

__all__ = ["bridge"]

_DROPOUTS = tuple(getattr(torch.nn.functional, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d"))


def bridge(
    module: torch.nn.Module, trained: Mapping[str, Any], dropout_seed: int | None
) -> Callable[[Any, jax.Array], jax.Array]:
    """(parameters, images (B, H, W, channels)) -> logits (B, C), in the parameters' dtype.

    Args:
      module: on the CPU. trained: names of its parameters, which the function takes as a tree; all else is fixed in it.
      dropout_seed: see `torch_model`.
    """
    states, run = torchax.extract_jax(module)
    # What is not trained is fixed in the function: buffers, frozen layers. On the host, to follow any dtype.
    fixed = {name: np.asarray(value) for name, value in states.items() if name not in trained}

    def of_batch(parameters: Any, images: jax.Array) -> jax.Array:
        given = {name: jnp.asarray(value) for name, value in flat(parameters, ".").items()}
        kind = jnp.result_type(*given.values())
        own = {name: jnp.asarray(array, kind if array.dtype.kind == "f" else None) for name, array in fixed.items()}
        channels_first = jnp.moveaxis(jnp.asarray(images, kind), -1, 1)
        # PyTorch's operations broadcast, whatever the caller wants of JAX's.
        with jax.numpy_rank_promotion("allow"), _dropout(module, dropout_seed, tuple(channels_first.shape)):
            return run({**own, **given}, (channels_first,))

    return of_batch


@contextmanager
def _dropout(module: torch.nn.Module, seed: int | None, shape: tuple[int, ...]) -> Iterator[None]:
    """Dropout keeps what it keeps in torch, with this seed and a batch of this shape."""
    if seed is None:
        yield
        return
    drawn = _Draws()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), drawn:
        torch.manual_seed(seed)
        kind = next(module.parameters()).dtype
        copy.deepcopy(module)(torch.zeros(shape, dtype=kind))
    with _Replay(drawn.kept):
        yield


class _Draws(TorchFunctionMode):
    """Notes down what each dropout keeps, as factors."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _DROPOUTS:
            return function(*args, **(kwargs or {}))
        value, *rest = args
        factor = function(torch.ones_like(value), *rest, **{**(kwargs or {}), "inplace": False})
        self.kept.append(factor.numpy())
        return value * factor


class _Replay(TorchFunctionMode):
    """The factors noted down, in turn."""

    def __init__(self, kept: list[np.ndarray]) -> None:
        super().__init__()
        self._kept = iter(kept)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _DROPOUTS:
            return function(*args, **(kwargs or {}))
        return args[0] * torchax.default_env().j2t_iso(jnp.asarray(next(self._kept), args[0].jax().dtype))
