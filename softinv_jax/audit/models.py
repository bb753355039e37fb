"""The networks that can be named: as flax modules, and as chains of layers where they are one."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from softinv_jax.client.networks import FCN4, AlexNet, LeNet, ResNet18, ResNet50
from softinv_jax.client.networks.layers import HeadedNetwork
from softinv_jax.images.layer_chain import Chain, fcn_chain, lenet_chain

__all__ = ["MLP", "MODELS", "Model", "mlp"]

# As many dense layers as a file has: not a network by itself.
MLP = "mlp"


@dataclass(frozen=True)
class Model:
    """How to make the network for C classes, or None for a chain alone; its chain, or None; the usual side of
    images."""

    network: Callable[..., HeadedNetwork] | None
    chain: Chain | None
    image_size: int


MODELS = {
    "lenet": Model(LeNet, lenet_chain(), 32),
    "fcn4": Model(FCN4, fcn_chain(), 64),
    "alexnet": Model(AlexNet, None, 224),
    "resnet18": Model(ResNet18, None, 224),
    "resnet18-cifar": Model(lambda classes, **options: ResNet18(classes, stem="cifar", **options), None, 32),
    "resnet50": Model(ResNet50, None, 224),
}


def mlp(layers: Iterable[str], activation: str) -> Model:
    """Dense layers `dense1`, `dense2`, ... and `head`, as many as are among the names, an activation between.

    Raises:
      ValueError: if there is no `dense1`, or a number is left out.
    """
    numbers = sorted(int(match[1]) for match in map(re.compile(r"dense(\d+)").fullmatch, layers) if match)
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        held = ", ".join(f"dense{number}" for number in numbers) or "none"
        raise ValueError(
            f"a multilayer perceptron has layers dense1, dense2, ... and head, but of these there are: {held}"
        )
    return Model(None, fcn_chain(len(numbers), activation), 32)
