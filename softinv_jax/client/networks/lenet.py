"""LeNet in the form of Zhu et al. 2019 (DLG), as the paper uses it.

Source: Wang, Liang and He, ICLR 2024, section 4 and appendix.
"""

import jax
from flax import linen as nn

from softinv_jax.client.networks.layers import HeadedNetwork, PatchConvolution, check_images, flatten

__all__ = ["LeNet"]


class LeNet(HeadedNetwork):
    """Three 5x5 convolutions with 12 channels, strides 2, 2, 1, sigmoid after each; then a dense head.

    A 32x32 image has 768 features, flattened in the order row, column, channel. All features lie in (0, 1).
    """

    def setup(self) -> None:
        self.conv1 = self._convolution(stride=2)
        self.conv2 = self._convolution(stride=2)
        self.conv3 = self._convolution(stride=1)
        self.head = self.make_head()

    def _convolution(self, stride: int) -> PatchConvolution:
        return PatchConvolution(channels=12, size=5, stride=stride, padding=2)

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (d,) for one image (H, W, channels) and (N, d) for a batch."""
        check_images(images)
        hidden = images
        for convolution in (self.conv1, self.conv2, self.conv3):
            hidden = nn.sigmoid(convolution(hidden))
        return flatten(hidden)
