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

__all__ = ["AlexNet", "AlexNetConvolutions"]


class AlexNetConvolutions(nn.Module):
    """Five convolutions with ReLU, and max-pooling 3x3/2 after the first, second and fifth.

    Attributes:
        width: channels of the first convolution, 64 in torchvision's layout; the others are 3, 6, 4 and 4 times it.
    """

    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """Return the five outputs after ReLU and before pooling, (..., H, W, channels).

        Raises:
            ValueError: unless `images` is one image or a batch, with sides of at least 63 pixels.
        """
        # 63 pixels become 15, 7 and 3, and the third pooling needs 3.
        check_images(images, smallest=63)
        outputs = []
        hidden = images
        layout = ((1, 11, 4, 2), (3, 5, 1, 2), (6, 3, 1, 1), (4, 3, 1, 1), (4, 3, 1, 1))
        for number, (multiple, size, stride, padding) in enumerate(layout, start=1):
            if number in (2, 3):
                hidden = max_pool(hidden)
            convolution = PatchConvolution(multiple * self.width, size, stride, padding, name=f"conv{number}")
            hidden = nn.relu(convolution(hidden))
            outputs.append(hidden)
        return outputs


class AlexNet(HeadedNetwork):
    """`AlexNetConvolutions`, average pooling to 6x6, two dense layers with ReLU; then a dense head.

    Dropout is off, as in evaluation. A 224x224 image arrives at the average pooling as 6x6. What enters `dense1` is
    flattened in the order row, column, channel (PyTorch: channel, row, column). Features are non-negative.

    Attributes:
        width: channels of the first convolution, 64 in torchvision's layout.
        hidden: width of both dense layers, 4096 in torchvision's layout; this is the number of features d.
    """

    width: int = 64
    hidden: int = 4096

    def setup(self) -> None:
        self.convolutions = AlexNetConvolutions(self.width)
        self.dense1 = dense(self.hidden)
        self.dense2 = dense(self.hidden)
        self.head = self.make_head()

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (d,) for one image (H, W, channels) and (N, d) for a batch."""
        pooled = adaptive_average_pool(max_pool(self.convolutions(images)[-1]), 6)
        return nn.relu(self.dense2(nn.relu(self.dense1(flatten(pooled)))))


def max_pool(images: jax.Array) -> jax.Array:
    """Largest value in windows of 3x3 with stride 2, no padding."""
    return nn.max_pool(images, (3, 3), (2, 2))
