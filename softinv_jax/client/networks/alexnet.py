"""AlexNet in torchvision's layout.

Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014 (arXiv 1404.5997).
"""

import jax
from flax import linen as nn

from softinv_jax.client.networks.layers import (
    HeadedNetwork,
    PatchConvolution,
    adaptive_average_pool,
    check_images,
    dense,
    flatten,
)

__all__ = ["AlexNet"]


class AlexNet(HeadedNetwork):
    """Five convolutions, average pooling to 6x6, two dense layers; then a dense head. ReLU after each layer.

    Max-pooling 3x3/2 follows the first, second and fifth convolution. Dropout is off, as in evaluation. A 224x224
    image arrives at the average pooling as 6x6. What enters `dense1` is flattened in the order row, column, channel
    (PyTorch: channel, row, column). Features are non-negative.

    Attributes:
        width: channels of the first convolution, 64 in torchvision's layout; the others are 3, 6, 4 and 4 times it.
        hidden: width of both dense layers, 4096 in torchvision's layout; this is the number of features d.
    """

    width: int = 64
    hidden: int = 4096

    def setup(self) -> None:
        self.conv1 = PatchConvolution(self.width, size=11, stride=4, padding=2)
        self.conv2 = PatchConvolution(3 * self.width, size=5, stride=1, padding=2)
        self.conv3 = PatchConvolution(6 * self.width, size=3, stride=1, padding=1)
        self.conv4 = PatchConvolution(4 * self.width, size=3, stride=1, padding=1)
        self.conv5 = PatchConvolution(4 * self.width, size=3, stride=1, padding=1)
        self.dense1 = dense(self.hidden)
        self.dense2 = dense(self.hidden)
        self.head = self.make_head()

    def convolution_outputs(self, images: jax.Array) -> list[jax.Array]:
        """Return the five convolutions' outputs after ReLU and before pooling, (..., H, W, channels)."""
        # 63 pixels become 15, 7 and 3, and the third pooling needs 3.
        check_images(images, smallest=63)
        first = nn.relu(self.conv1(images))
        second = nn.relu(self.conv2(max_pool(first)))
        third = nn.relu(self.conv3(max_pool(second)))
        fourth = nn.relu(self.conv4(third))
        return [first, second, third, fourth, nn.relu(self.conv5(fourth))]

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (d,) for one image (H, W, channels) and (N, d) for a batch."""
        pooled = adaptive_average_pool(max_pool(self.convolution_outputs(images)[-1]), 6)
        return nn.relu(self.dense2(nn.relu(self.dense1(flatten(pooled)))))


def max_pool(images: jax.Array) -> jax.Array:
    """Largest value in windows of 3x3 with stride 2, no padding."""
    return nn.max_pool(images, (3, 3), (2, 2))
