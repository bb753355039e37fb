"""What do PyTorch modules give away, from the module alone to labels and images? Beside a published attack. CIFAR-10.

    python benchmarks/torch_models.py [--dataset cifar10] [--data-dir DIR] [--clients 3] [--rows NAME ...] [--fresh]

Each client takes one step: what is sent is its gradient, or its parameters after SGD at a rate of 0.01, in float32.
Weights are PyTorch's initial ones, labels hard; images are normalised to [-1, 1]. Nothing is told but the module, the
number of examples and the rate. Each row is `torch_model` and `inversions`: layers where they determine the images,
gradient matching elsewhere.

The peer is our PyTorch rendering of Inverting Gradients (Geiping et al. 2020; breaching's default: cosine distance,
total variation, Adam on signs), on the same gradients, with as many steps as our matching, and told the labels.

Counted over all clients of a row: labels within 1e-3, `unique` ones, of these wrong ones; PSNR over images, clipped to
[0, 1], in decibels: median. Verdicts are those of images. Seconds are a client's, after compilation.

Rows that are there already are kept: the command can be interrupted. `--seeds` has no effect.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch_networks as networks
from clients import load_data
from finished_rows import FinishedRows, add_row_options, measure_rows
from published_images import inverting_gradients
from runner import Run, add_data_options, option_parser
from torch import nn
from torch.nn import functional

from softinv_jax.frameworks.torch_model import TorchModel, torch_model
from softinv_jax.images.objective import MatchingSettings
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.inversions import Inversion, invert_gradients, invert_observed
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.measures.image_quality import match_images, peak_signal_to_noise_ratio

RATE, CLASSES = 0.01, 10


class Row(NamedTuple):
    """One line of the table; gray: images of one channel, 28x28."""

    title: str
    network: Callable[..., nn.Module]
    examples: int
    sends: str
    gray: bool = False

    @property
    def name(self) -> str:
        return f"{self.title}, B = {self.examples}, {self.sends}"


def narrow_resnet(norm: Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    """ResNet18 with 16 channels in its first stage."""
    return lambda classes: networks.ResNet(16, norm, classes)


ROWS = (
    Row("LeNet, strides, sigmoid", networks.strided_lenet, 1, "gradient"),
    Row("LeNet, strides, sigmoid", networks.strided_lenet, 1, "parameters"),
    Row("LeNet-5, mean pooling, tanh", networks.lenet5, 1, "gradient", gray=True),
    Row("LeNet-5, mean pooling, tanh", networks.lenet5, 1, "parameters", gray=True),
    Row("FedAvg's CNN, max-pooling, ReLU", networks.fedavg_cnn, 1, "gradient", gray=True),
    Row("FedAvg's CNN, max-pooling, ReLU", networks.fedavg_cnn, 1, "parameters", gray=True),
    Row("get-started, max-pooling, ReLU", networks.get_started, 1, "parameters"),
    Row("get-started, max-pooling, ReLU", networks.get_started, 4, "parameters"),
    Row("3072-400-400-10, ReLU", networks.perceptron, 16, "parameters"),
    Row("ResNet18, narrow, batch norm in training", narrow_resnet(nn.BatchNorm2d), 2, "gradient"),
    Row("ResNet18, narrow, group norm", narrow_resnet(lambda width: nn.GroupNorm(4, width)), 1, "gradient"),
    Row("vision transformer", lambda classes: networks.VisionTransformer(32, classes), 1, "gradient"),
)


class Clients:
    """Images, loaded once."""

    def __init__(self, arguments: argparse.Namespace, steps: int) -> None:
        _, self.data, _ = load_data(arguments)
        self.steps = steps

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """One client; the truth is used below the attack only."""
        generator = np.random.default_rng([row.examples, seed])
        chosen = generator.choice(len(self.data), row.examples, replace=False)
        pixels = self.data.images[chosen].astype(np.float32) / 255
        if row.gray:
            pixels = pixels[:, 2:30, 2:30].mean(axis=-1, keepdims=True)
        images, label = 2 * pixels - 1, np.eye(CLASSES, dtype=np.float32)[self.data.classes[chosen]]
        torch.manual_seed(seed)
        module = row.network(classes=CLASSES).train()
        model = torch_model(module, images.shape[1:])
        held = {name: value.detach().numpy().copy() for name, value in module.named_parameters()}
        gradient = _gradient(module, images, label)
        _ = model.network  # Compared with torch, which is not timed.
        self._attack(row, model, held, gradient, row.examples)  # Compiles everything.
        start = time.perf_counter()
        found = self._attack(row, model, held, gradient, row.examples)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        peer = self._peer(module, gradient, label, images.shape)
        peer_seconds = time.perf_counter() - start
        judged = _judged(found, images, label)
        psnr = _psnr(peer.reshape(images.shape), images)
        return judged | {"seconds": seconds, "peer_psnr": psnr, "peer_seconds": peer_seconds}

    def _attack(
        self, row: Row, model: TorchModel, held: dict[str, Any], gradient: dict[str, Any], examples: int
    ) -> Inversion:
        settings = MatchingSettings(steps=self.steps)
        if row.sends == "gradient":
            gradients = jax.tree.map(lambda leaf: leaf[None], model.tree(gradient))
            return invert_gradients(model.network, model.tree(held), gradients, batch_size=examples, matching=settings)
        after = {name: (value - np.float32(RATE) * gradient[name]).astype(np.float32) for name, value in held.items()}
        update = model.observe(held, after, learning_rate=RATE)
        return invert_observed(model.network, [update], batch_size=examples, matching=settings)

    def _peer(
        self, module: nn.Module, gradient: dict[str, Any], label: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray:
        names = list(gradient)
        parameters = [dict(module.named_parameters())[name] for name in names]

        def gradient_of(images: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
            loss = -(target * functional.log_softmax(module(images), dim=1)).sum(1).mean()
            return list(torch.autograd.grad(loss, parameters, create_graph=True))

        torch.manual_seed(0)
        ends = np.full(shape[-1], -1.0), np.full(shape[-1], 1.0)
        observed = [torch.from_numpy(gradient[name]) for name in names]
        channels_first = (shape[0], shape[3], *shape[1:3])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # The other has no second derivative.
            return inverting_gradients(
                {}, observed, channels_first, label, *ends, steps=self.steps, gradient_of=gradient_of
            )


def _gradient(module: nn.Module, images: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    loss = functional.cross_entropy(module(given), torch.from_numpy(label))
    names, parameters = zip(*module.named_parameters(), strict=True)
    return {name: part.numpy() for name, part in zip(names, torch.autograd.grad(loss, parameters), strict=True)}


def _psnr(found: np.ndarray, images: np.ndarray) -> list[float]:
    """Of each image found, on the scale [0, 1]."""
    found, images = (np.asarray(part, np.float64) / 2 + 0.5 for part in (found, images))
    pairs = match_images(found, images)
    known = pairs >= 0
    if not np.any(known):
        return []
    return np.atleast_1d(peak_signal_to_noise_ratio(found[pairs[known]], images[known])).tolist()


def _judged(found: Inversion, images: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    recovery = found.recovery
    labels, verdicts = recovery.labels[0], recovery.label_verdict[0]
    distance = np.abs(labels[:, None] - label[None]).max(axis=2)
    right = np.any(distance < 1e-3, axis=1)
    unique = verdicts == Verdict.UNIQUE
    return {
        "examples": len(images),
        "labels": int(right.sum()),
        "unique": int(unique.sum()),
        "wrong": int(np.sum(unique & ~right)),
        "psnr": _psnr(recovery.images[0], images),
        "by": found.method,
        "verdicts": {kind.name.lower(): int(np.sum(recovery.verdict == kind)) for kind in reversed(ImageVerdict)},
    }


def _sum(row: dict[str, Any], key: str) -> int:
    return sum(one[key] for one in row["clients"])


def _median(row: dict[str, Any], key: str) -> str:
    values = [value for one in row["clients"] for value in one[key]]
    return f"{np.median(values):.1f}" if values else "-"


def _verdicts(row: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for one in row["clients"]:
        for name, count in one["verdicts"].items():
            counts[name] = counts.get(name, 0) + count
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


COLUMNS = {
    "module": lambda row: row["row"],
    "labels": lambda row: f"{_sum(row, 'labels')} of {_sum(row, 'examples')}",
    "unique": lambda row: str(_sum(row, "unique")),
    "wrong": lambda row: str(_sum(row, "wrong")),
    "images by": lambda row: row["clients"][0]["by"],
    "verdicts": _verdicts,
    "PSNR": lambda row: _median(row, "psnr"),
    "s": lambda row: f"{np.mean([one['seconds'] for one in row['clients']]):.0f}",
    "peer PSNR": lambda row: _median(row, "peer_psnr"),
    "peer s": lambda row: f"{np.mean([one['peer_seconds'] for one in row['clients']]):.0f}",
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--clients", type=int, help="of each row")
    parser.add_argument("--steps", type=int, help="of matching, ours and the peer's")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    add_row_options(parser)
    arguments = parser.parse_args()
    run = Run("torch_models", arguments)
    count = arguments.clients or run.size(1, 3, 10)
    steps = arguments.steps or run.size(20, 1000, 4800)
    settings = {"dataset": arguments.dataset, "clients": count, "steps": steps}
    finished = FinishedRows(arguments.out / "torch_models.rows.json", settings, fresh=arguments.fresh)
    own = Clients(arguments, steps)
    title = f"PyTorch modules, {count} clients a row, {arguments.dataset}, {steps} steps of matching"

    def asked(name: str) -> bool:
        return not arguments.finished and (not arguments.rows or any(part in name for part in arguments.rows))

    def measure(row: Row) -> dict[str, Any]:
        return {"row": row.name, "clients": [own.measure(row, seed) for seed in range(count)]}

    rows = {row.name: partial(measure, row) for row in (ROWS[:1] if arguments.quick else ROWS)}
    measure_rows(run, finished, rows, title, COLUMNS, asked=asked)


if __name__ == "__main__":
    main()
