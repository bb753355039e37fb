"""The paper's fully connected network FCN-4.

Source: Wang, Liang and He, ICLR 2024, section 4 and appendix.
"""

import jax
from flax import linen as nn

from softinv_jax.client.networks.layers import HeadedNetwork, check_images, dense, flatten

__all__ = ["FCN4"]


class FCN4(HeadedNetwork):
    """Four dense layers of widths 4096, 1024, 256 and C, with ReLU between and no biases."""

    def setup(self) -> None:
        self.dense1 = dense(4096, use_bias=False)
        self.dense2 = dense(1024, use_bias=False)
        self.dense3 = dense(256, use_bias=False)
        self.head = self.make_head()

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (256,) for one image (H, W, channels) and (N, 256) for a batch."""
        check_images(images)
        hidden = flatten(images)
        for layer in (self.dense1, self.dense2, self.dense3):
            hidden = nn.relu(layer(hidden))
        return hidden
