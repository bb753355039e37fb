"""What the networks are made of: convolution over patches, adaptive pooling, and a dense head on features.

Everything takes one image (H, W, channels) or a batch of them. Products are computed at full float32 precision on
every device, so that client and server compute the same logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from softinv_jax.convolution import convolve

__all__ = ["HeadedNetwork", "PatchConvolution", "adaptive_average_pool", "check_images", "dense", "flatten"]


class HeadedNetwork(nn.Module):
    """A network whose last layer is the dense layer `head`; `setup` of a subclass makes it with `make_head`.

    Attributes:
        number_of_classes: C.
        head_bias: whether the head has a bias; the paper's networks have none.
    """

    number_of_classes: int
    head_bias: bool = False

    def make_head(self) -> nn.Dense:
        """Return the last layer, (..., d) -> (..., C)."""
        return dense(self.number_of_classes, use_bias=self.head_bias)

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (d,) for one image (H, W, channels) and (N, d) for a batch."""
        raise NotImplementedError

    def logits_and_features(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the logits (..., C) and the features (..., d) they were computed from."""
        features = self.features(images)
        return self.head(features), features

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, (C,) for one image (H, W, channels) and (N, C) for a batch."""
        return self.logits_and_features(images)[0]


class PatchConvolution(nn.Module):
    """A 2-D convolution (channels last) as one matrix product over image patches.

    Parameters and result are those of `nn.Conv`. On a CPU, XLA's own convolution is slow inside a loop, and when
    differentiated twice, which is what attacks do all the time. For nine convolutions of 3x3 with 64 to 512 channels
    on 32x32 images, two busy cores, two runs: training in a `lax.scan` 14 and 22 times slower, gradient matching in one
    4.4 and 4.6 times, its gradient by itself 3.4 and 1.8 times. A forward pass by itself is 1.2 to 1.7 times faster
    with XLA's, and compiles faster.

    Attributes:
        channels: of the output.
        size: side of the square kernel.
        stride: step in rows and columns.
        padding: zeros added on each side.
        use_bias: whether each output channel has a bias.
    """

    channels: int
    size: int
    stride: int
    padding: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (..., H, W, c) to (..., H', W', channels), H' = (H + 2 padding - size) // stride + 1."""
        kernel_shape = (self.size, self.size, images.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), kernel_shape)
        padding = ((self.padding, self.padding), (self.padding, self.padding))
        product = convolve(images, kernel, (self.stride, self.stride), padding)
        if not self.use_bias:
            return product
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        return product + bias.reshape((1,) * (images.ndim - 1) + (-1,))


def dense(width: int, use_bias: bool = True) -> nn.Dense:
    """Return a dense layer (..., d) -> (..., width)."""
    return nn.Dense(width, use_bias=use_bias, precision="highest")


def adaptive_average_pool(images: jax.Array, size: int) -> jax.Array:
    """Average images (..., H, W, channels) over size x size cells to (..., size, size, channels).

    Cell i covers the rows from floor(i H / size) up to ceil((i + 1) H / size), so cells overlap where `size` does not
    divide H, and repeat rows where it exceeds H: the rule of PyTorch's `AdaptiveAvgPool2d`.
    """
    height, width = images.shape[-3:-1]
    if (height, width) == (size, size):
        return images
    rows, columns = (jnp.asarray(_averages(length, size), images.dtype) for length in (height, width))
    return jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, images, precision="highest")


def _averages(length: int, size: int) -> np.ndarray:
    matrix = np.zeros((size, length))
    for cell in range(size):
        start, stop = cell * length // size, -(-(cell + 1) * length // size)
        matrix[cell, start:stop] = 1 / (stop - start)
    return matrix


def check_images(images: jax.Array, smallest: int = 1) -> None:
    """Raise a ValueError unless `images` is one image or a batch, with sides of at least `smallest` pixels."""
    if images.ndim not in (3, 4):
        raise ValueError(
            f"Expected an image (H, W, channels) or a batch (N, H, W, channels), got {images.shape}. "
            "Put the channels last."
        )
    if min(images.shape[-3:-1]) < smallest:
        raise ValueError(f"Expected sides of at least {smallest} pixels, got {images.shape}. Enlarge the images.")


def flatten(images: jax.Array) -> jax.Array:
    """Return images (..., H, W, channels) as (..., H W channels), in the order row, column, channel."""
    return images.reshape((*images.shape[:-3], -1))
