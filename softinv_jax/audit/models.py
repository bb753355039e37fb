"""The networks that can be named: as flax modules, and as chains of layers where they are one."""

from collections.abc import Callable
from dataclasses import dataclass

from softinv_jax.client.networks import FCN4, AlexNet, LeNet, ResNet18, ResNet50
from softinv_jax.client.networks.layers import HeadedNetwork
from softinv_jax.images.layer_chain import Chain, fcn_chain, lenet_chain

__all__ = ["MODELS", "Model"]


@dataclass(frozen=True)
class Model:
    """How to make the network for C classes; its chain, or None; the usual side of its images, pixels."""

    network: Callable[..., HeadedNetwork]
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
