"""The paper's networks in flax.linen: FCN-4, LeNet, AlexNet, ResNet18 and ResNet50.

All take one image (H, W, channels) or a batch of them, call their last layer `head`, and offer its input through
`network.apply({"params": parameters}, images, method="features")`, with `"batch_stats": batch_statistics` beside the
parameters for a `ResNet`.

Source: Wang, Liang and He, ICLR 2024, section 4 and appendix.
"""

from softinv_jax.client.networks.alexnet import AlexNet
from softinv_jax.client.networks.fcn4 import FCN4
from softinv_jax.client.networks.layers import PatchConvolution
from softinv_jax.client.networks.lenet import LeNet
from softinv_jax.client.networks.parameters import (
    apply_function,
    initial_batch_statistics,
    initialise,
    initialise_fan_in,
    initialise_uniform,
)
from softinv_jax.client.networks.resnet import ResNet, ResNet18, ResNet50

__all__ = [
    "FCN4",
    "AlexNet",
    "LeNet",
    "PatchConvolution",
    "ResNet",
    "ResNet18",
    "ResNet50",
    "apply_function",
    "initial_batch_statistics",
    "initialise",
    "initialise_fan_in",
    "initialise_uniform",
]
