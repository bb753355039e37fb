"""Residual networks: ResNet18 with the ImageNet and the CIFAR stem, and ResNet50.

Source: He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016; the stride of a bottleneck
is in its 3x3 convolution, as in torchvision. The CIFAR stem is the one usual for 32x32 images: 3x3/1, no pooling.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from softinv_jax.client.networks.layers import HeadedNetwork, PatchConvolution, check_images

__all__ = ["STEMS", "ResNet", "ResNet18", "ResNet50", "ResidualBlock"]

STEMS = ("imagenet", "cifar")


class ResidualBlock(nn.Module):
    """relu(branch(x) + shortcut(x)), batch normalisation after each convolution, no biases.

    The branch is 3x3, 3x3, or for a bottleneck 1x1, 3x3, 1x1 with four times as many channels at its end. The
    shortcut is x itself, or a 1x1 convolution where shapes differ.

    Attributes:
        channels: of the 3x3 convolutions.
        stride: of the first 3x3 convolution and of the shortcut.
        bottleneck: which of the two branches.
        training: as in `ResNet`.
    """

    channels: int
    stride: int = 1
    bottleneck: bool = False
    training: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map (..., H, W, c) to (..., H', W', channels or 4 channels), H' = (H - 1) // stride + 1."""
        # (channels, size, stride) of each convolution of the branch.
        layout = [(self.channels, 3, self.stride), (self.channels, 3, 1)]
        if self.bottleneck:
            layout = [(self.channels, 1, 1), (self.channels, 3, self.stride), (4 * self.channels, 1, 1)]
        branch = images
        for number, (channels, size, stride) in enumerate(layout, start=1):
            if number > 1:
                branch = nn.relu(branch)
            branch = _convolution(channels, size, stride, name=f"conv{number}")(branch)
            branch = _norm(self.training, name=f"norm{number}")(branch)
        shortcut = images
        if branch.shape != images.shape:
            shortcut = _convolution(branch.shape[-1], 1, self.stride, name="shortcut_conv")(images)
            shortcut = _norm(self.training, name="shortcut_norm")(shortcut)
        return nn.relu(branch + shortcut)


class ResNet(HeadedNetwork):
    """A stem, four stages of residual blocks, the average over all positions; then a dense head.

    Batch normalisation uses its running statistics, as in evaluation: they are part of what client and server both
    know, in a collection of their own, and the gradient is with respect to the parameters alone (see
    `softinv_jax.client.networks.apply_function`). One image then has one gradient. With `training=True` each batch is
    normalised by its own mean and variance. That is a different threat model: one example's gradient depends on the
    whole batch, a batch's gradient is no mean over examples, and the closed forms for single examples do not apply.

    Features are non-negative. Layers are named stem_conv, stem_norm, stages_i_j (stage i, block j), head.

    Attributes:
        blocks: residual blocks in each of the four stages.
        bottleneck: bottleneck blocks, with 4 times the channels.
        stem: 'imagenet', 7x7/2 and max-pooling 3x3/2, or 'cifar', 3x3/1.
        width: channels of the stem and of the first stage's 3x3 convolutions; each stage doubles it.
        training: normalise by the batch's statistics, and update the running ones (collection "batch_stats").
    """

    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    bottleneck: bool = False
    stem: str = "imagenet"
    width: int = 64
    training: bool = False

    def setup(self) -> None:
        if self.stem not in STEMS:
            raise ValueError(f"Unknown stem={self.stem!r}. Choose 'imagenet' or 'cifar'.")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        self.stem_conv = _convolution(self.width, size, stride)
        self.stem_norm = _norm(self.training)
        self.stages = [
            [
                ResidualBlock(self.width * 2**stage, stride, self.bottleneck, self.training)
                for stride in (1 if stage == 0 else 2, *[1] * (count - 1))
            ]
            for stage, count in enumerate(self.blocks)
        ]
        self.head = self.make_head()

    def stage_outputs(self, images: jax.Array) -> list[jax.Array]:
        """Return what each of the four stages puts out, (..., H, W, channels)."""
        check_images(images)
        hidden = nn.relu(self.stem_norm(self.stem_conv(images)))
        if self.stem == "imagenet":
            hidden = nn.max_pool(hidden, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        outputs = []
        for stage in self.stages:
            for block in stage:
                hidden = block(hidden)
            outputs.append(hidden)
        return outputs

    def features(self, images: jax.Array) -> jax.Array:
        """Return the head's input, (d,) for one image (H, W, channels) and (N, d) for a batch."""
        return jnp.mean(self.stage_outputs(images)[-1], axis=(-3, -2))


class ResNet18(ResNet):
    """`ResNet` with two blocks a stage and 512 features; ImageNet stem unless told otherwise."""


class ResNet50(ResNet):
    """`ResNet` with 3, 4, 6 and 3 bottleneck blocks and 2048 features; ImageNet stem unless told otherwise."""

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)
    bottleneck: bool = True


def _convolution(channels: int, size: int, stride: int, name: str | None = None) -> PatchConvolution:
    return PatchConvolution(channels, size, stride, padding=size // 2, use_bias=False, name=name)


def _norm(training: bool, name: str | None = None) -> nn.BatchNorm:
    # The running statistics keep 90 % at each training step, which PyTorch calls a momentum of 0.1.
    return nn.BatchNorm(use_running_average=not training, momentum=0.9, epsilon=1e-5, name=name)
