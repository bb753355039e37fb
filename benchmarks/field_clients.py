"""Clients that train in PyTorch as clients do: networks, losses, optimisers and local steps on real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional

__all__ = ["CLASSES", "LOSSES", "NETWORKS", "OPTIMISERS", "Optimiser", "State", "served", "train", "true_label"]

CLASSES = 10
SMOOTHING = 0.1
State = dict[str, np.ndarray]


class TwoConvolutions(nn.Module):
    """Two convolutions with max-pooling, three dense layers, ReLU: 84 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        )
        self.head = nn.Linear(84, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class SigmoidLeNet(nn.Module):
    """Strided convolutions and sigmoids, as attacks on gradients use it: 768 features."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 12, 12, 12), (2, 2, 1)
        layers: list[nn.Module] = []
        for (before, after), stride in zip(pairwise(widths), strides, strict=True):
            layers += [nn.Conv2d(before, after, 5, stride, padding=2), nn.Sigmoid()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(768, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class Residual(nn.Module):
    """Two convolutions with batch normalisation, added to their input."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.main(images) + self.short(images))


class SmallResNet(nn.Module):
    """Three residual blocks, batch normalisation in training mode, average pooling: 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Residual(3, 16, 2), Residual(16, 32, 2), Residual(32, 64, 2))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).mean(dim=(2, 3)))


class GroupNormNet(nn.Module):
    """Convolutions with group normalisation and SiLU, a dense layer with tanh: 128 features of either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, padding=1), nn.GroupNorm(4, 16), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, 2, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(512, 128), nn.Tanh()),
        )
        self.head = nn.Linear(128, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class SmallTransformer(nn.Module):
    """A vision transformer: 16 patches, two layers of attention, layer normalisation before the head: 48 features."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, 48))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens).mean(dim=1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "two convolutions": TwoConvolutions,
    "sigmoid LeNet": SigmoidLeNet,
    "ResNet, batch norm": SmallResNet,
    "group norm": GroupNormNet,
    "vision transformer": SmallTransformer,
}


def _units(classes: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(classes, CLASSES).float()


def _focal(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    surprise = functional.cross_entropy(logits, classes, reduction="none")
    return ((1 - torch.exp(-surprise)) ** 2 * surprise).mean()


def _weighted(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    # PyTorch's own mean divides by the weights: of one example nothing of them would be left.
    weights = torch.linspace(0.5, 2, CLASSES)
    return functional.cross_entropy(logits, classes, weight=weights, reduction="sum") / len(classes)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "smoothing": lambda logits, classes: functional.cross_entropy(logits, classes, label_smoothing=SMOOTHING),
    "bce": lambda logits, classes: functional.binary_cross_entropy_with_logits(logits, _units(classes)),
    "focal": _focal,
    "class_weights": _weighted,
}


@dataclass(frozen=True)
class Optimiser:
    """make: from parameters. rate: of learning. momentum: told to the observer with the rate, who takes it for SGD."""

    make: Callable[..., torch.optim.Optimizer]
    rate: float
    momentum: float = 0.0


OPTIMISERS = {
    "sgd": Optimiser(lambda parameters: torch.optim.SGD(parameters, lr=0.01), 0.01),
    "momentum": Optimiser(lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9), 0.01, 0.9),
    "adam": Optimiser(lambda parameters: torch.optim.Adam(parameters, lr=1e-3), 1e-3),
    "adamw": Optimiser(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), 1e-3),
}


def true_label(loss: str, classes: np.ndarray) -> np.ndarray:
    """(B, C) labels that the loss compares with."""
    units = np.eye(CLASSES)[classes]
    return (1 - SMOOTHING) * units + SMOOTHING / CLASSES if loss == "smoothing" else units


def served(network: str, images: np.ndarray, classes: np.ndarray, steps: int) -> State:
    """The parameters that the server sends: initial ones, trained for so many steps of Adam on cross-entropy.

    Args:
      images: (N, 3, H, W) float32. classes: (N,). 32 are drawn for each step.
    """
    torch.manual_seed(0)
    model = NETWORKS[network]().train()
    descent = torch.optim.Adam(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.choice(len(images), 32, replace=False)
        _step(model, "cross_entropy", descent, images[chosen], classes[chosen])
    return _copy(model)


def train(network: str, sent: State, loss: str, optimiser: Optimiser, images: np.ndarray, classes: np.ndarray) -> State:
    """The parameters after local training in training mode, from a fresh optimiser.

    Args:
      sent: parameters before. images: (steps, B, 3, H, W) float32. classes: (steps, B).
    """
    model = NETWORKS[network]().train()
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in sent.items()})
    descent = optimiser.make(model.parameters())
    for batch, answers in zip(images, classes, strict=True):
        _step(model, loss, descent, batch, answers)
    return _copy(model)


def _step(model: nn.Module, loss: str, descent: torch.optim.Optimizer, images: np.ndarray, classes: np.ndarray) -> None:
    descent.zero_grad()
    LOSSES[loss](model(torch.from_numpy(images)), torch.from_numpy(classes)).backward()
    descent.step()


def _copy(model: nn.Module) -> State:
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
