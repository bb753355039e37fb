"""What the observer is told of an update, and what it is after."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from softinv_jax.images.layer_chain import Chain
from softinv_jax.observation.local_training import LocalTraining

__all__ = ["Guess", "Problem"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["parameters", "observed", "noise", "unit_roundoff"],
    meta_fields=["chain", "image_shape", "training"],
)
@dataclass(frozen=True)
class Problem:
    """One update. Trees are by layer, float64 on the device.

    Attributes:
      chain: the network. image_shape: (H, W, channels). training: what the client did.
      parameters: that it was sent.
      observed: like them, its update as `observe_update` makes it. noise: the deviation of each entry, positive.
      unit_roundoff: of the update's dtype.
    """

    chain: Chain
    image_shape: tuple[int, int, int]
    training: LocalTraining
    parameters: Mapping[str, Any]
    observed: Mapping[str, Any]
    noise: Mapping[str, Any]
    unit_roundoff: float


class Guess(NamedTuple):
    """images: (B, H, W, c). labels: (B, C), each of sum 1."""

    images: jax.Array
    labels: jax.Array
