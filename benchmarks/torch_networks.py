"""PyTorch modules of the kinds that people train, small; `ZOO` is also what the tests compare with torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

CLASSES = 5


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Any) -> Any:
        hidden = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(images)))))
        return functional.relu(hidden + self.around(images))


class ResNet(nn.Module):
    """As ResNet18: a stem, max-pooling, four stages of two blocks, the mean over the image."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential()
        for stage in range(4):
            self.stages.append(Block(widths[stage], widths[stage + 1], 1 if stage == 0 else 2, norm))
            self.stages.append(Block(widths[stage + 1], widths[stage + 1], 1, norm))
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8 * width, classes)

    def forward(self, images: Any) -> Any:
        return self.fc(torch.flatten(self.mean(self.stages(self.pool(self.stem(images)))), 1))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 16, classes: int = CLASSES) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.1 * torch.randn(1, 17, width))
        layer = nn.TransformerEncoderLayer(width, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Any) -> Any:
        parts = self.patches(images).flatten(2).transpose(1, 2)
        parts = torch.cat([self.token.expand(len(parts), -1, -1), parts], 1) + self.places
        return self.head(self.norm(self.encoder(parts))[:, 0])


class Dropouts(nn.Module):
    """As PyTorch's MNIST example: two kinds of dropout, and a log-softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(3, 6, 5), nn.Dropout2d(0.3)
        self.dense, self.head = nn.Linear(6 * 14 * 14, 20), nn.Linear(20, CLASSES)

    def forward(self, images: Any) -> Any:
        hidden = functional.relu(functional.max_pool2d(self.drop(self.conv(images)), 2)).view(-1, 6 * 14 * 14)
        hidden = functional.dropout(functional.relu(self.dense(hidden)), training=self.training)
        return functional.log_softmax(self.head(hidden), dim=1)


def get_started(classes: int = CLASSES) -> nn.Module:
    """The layers of Flower's get-started network (and of PyTorch's CIFAR-10 tutorial), for images 32x32."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)),
    )


def lenet5(classes: int = CLASSES) -> nn.Module:
    """LeCun et al. 1998 as it is taught: tanh, mean pooling, for gray images 28x28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, classes)),
    )


def fedavg_cnn(classes: int = CLASSES) -> nn.Module:
    """The CNN of McMahan et al. 2017 (FedAvg), for gray images 28x28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, classes)),
    )


def strided_lenet(classes: int = CLASSES) -> nn.Module:
    """The LeNet of published attacks: strides in place of pooling, sigmoid; with a bias at the head."""
    layers: list[nn.Module] = []
    for inputs, stride in ((3, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(inputs, 12, 5, stride, 2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, classes))


def perceptron(classes: int = CLASSES) -> nn.Module:
    """3072-400-400-C."""
    first, second = nn.Linear(3072, 400), nn.Linear(400, 400)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(400, classes))


def depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, 1, 1, groups=8)),
        *(nn.Hardswish(), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, CLASSES)),
    )


ZOO: dict[str, Callable[[], nn.Module]] = {
    "max-pooling": get_started,
    "resnet18, evaluation": lambda: ResNet(4).eval(),
    "resnet18, training": lambda: ResNet(4).train(),
    "resnet, group norm": lambda: ResNet(4, lambda width: nn.GroupNorm(2, width)),
    "vision transformer": VisionTransformer,
    "depthwise, evaluation": lambda: depthwise().eval(),
    "depthwise, training": lambda: depthwise().train(),
    "dropout off": lambda: Dropouts().eval(),
}
