"""The network and training loop of Flower's get-started guide for PyTorch, in a simulation whose server audits.

What a server of yours needs is in `serve`: `torch_model` of the network, and an `AuditingStrategy` around the strategy.
The rest is clients, and a score: here the truth is known.

    python examples/flower/federation.py --batch-size 4

Needs: pip install 'softinv_jax[torch]' 'flwr[simulation]>=1.22'
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn import functional

RATE, MOMENTUM = 0.01, 0.9


class Net(nn.Module):
    """Two convolutions with max-pooling, three dense layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.pool(functional.relu(self.conv1(images)))
        hidden = self.pool(functional.relu(self.conv2(hidden)))
        hidden = functional.relu(self.fc1(hidden.view(-1, 16 * 5 * 5)))
        return self.fc3(functional.relu(self.fc2(hidden)))


def train(net: Net, images: torch.Tensor, classes: torch.Tensor, batch_size: int, epochs: int) -> float:
    """Shuffled minibatches, SGD with momentum; the last loss."""
    data = torch.utils.data.TensorDataset(images, classes)
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    net.train()
    loss = torch.zeros(())
    for _ in range(epochs):
        for some, of in torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True):
            optimiser.zero_grad()
            loss = functional.cross_entropy(net(some), of)
            loss.backward()
            optimiser.step()
    return loss.item()


client_app = ClientApp()


@client_app.train()
def train_on_own_images(message: Message, context: Context) -> Message:
    """What Flower calls on each client. Which of the images were its own is written down for the score."""
    told = message.content["config"]
    with np.load(Path(str(told["folder"])) / "images.npz") as held:
        rows = np.arange(told["examples"]) + told["examples"] * int(context.node_config["partition-id"])
        pixels, classes = held["images"][rows], held["classes"][rows]
    np.save(Path(str(told["folder"])) / f"{message.metadata.dst_node_id}.npy", rows)
    # As ToTensor and Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) of torchvision.
    images = torch.from_numpy((pixels.astype(np.float32) / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).contiguous()
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(net, images, torch.from_numpy(classes).long(), told["batch-size"], told["epochs"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows)})
    return Message(content=RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


def serve(arguments: argparse.Namespace, grid: Grid, folder: Path) -> list[Any]:
    """A federation as without the audit, but for four lines."""
    from softinv_jax.frameworks.flower import AuditingStrategy  # noqa: PLC0415 - a client needs none of it
    from softinv_jax.frameworks.torch_model import torch_model  # noqa: PLC0415
    from softinv_jax.images.objective import MatchingSettings  # noqa: PLC0415

    torch.manual_seed(arguments.seed)
    net = Net()
    averaging = FedAvg(fraction_evaluate=0.0, min_train_nodes=arguments.clients, min_available_nodes=arguments.clients)
    steps = arguments.epochs * -(-arguments.examples // arguments.batch_size)
    strategy = AuditingStrategy(
        averaging,
        model=torch_model(net, (32, 32, 3)),
        batch_size=arguments.examples,
        matching=MatchingSettings(steps=arguments.match_steps) if arguments.match_steps else None,
        learning_rate=RATE,
        momentum=MOMENTUM,
        local_steps=steps,
        minibatch_size=arguments.batch_size if steps > 1 else None,
    )
    told = {"examples": arguments.examples, "batch-size": arguments.batch_size, "epochs": arguments.epochs}
    config = ConfigRecord({**told, "folder": str(folder)})
    strategy.start(grid, ArrayRecord(net.state_dict()), num_rounds=arguments.rounds, train_config=config)
    return strategy.audits


def score(audit: Any, folder: Path) -> dict[str, Any]:
    """What one audit found, beside the truth."""
    with np.load(folder / "images.npz") as held:
        rows = np.load(folder / f"{audit.client}.npy")
        images, classes = held["images"][rows], held["classes"][rows]
    row = {"round": audit.server_round, "examples": len(classes), "problem": audit.problem}
    if audit.recovery is not None:
        row |= score_labels(audit.recovery, np.bincount(classes, minlength=10))
    if audit.images is not None:
        row |= score_images(audit.images, images.astype(np.float64) / 255)
    return row


def score_labels(recovery: Any, true: np.ndarray) -> dict[str, Any]:
    """By class: how many are told for sure, how many of the likeliest are right; true: (10,) numbers of examples."""
    from softinv_jax.batches.class_counts import ClassCounts  # noqa: PLC0415
    from softinv_jax.labels.verdicts import verdict_names  # noqa: PLC0415

    if isinstance(recovery, ClassCounts):
        told = recovery.count >= 0
        sure, likeliest = np.where(told, recovery.count, 0), recovery.likeliest
        wrong = np.abs(sure - true)[told].sum()
    else:
        labels, verdicts = np.atleast_2d(recovery.label), np.atleast_1d(verdict_names(recovery.verdict))
        likeliest, sure = (
            np.bincount(np.argmax(labels[chosen], axis=1), minlength=10)
            for chosen in (np.isfinite(labels).all(axis=1), verdicts == "unique")
        )
        wrong = np.maximum(sure - true, 0).sum()
    return {
        "told": "numbers of each class" if isinstance(recovery, ClassCounts) else "each label",
        "labels right": int(np.minimum(likeliest, true).sum()),
        "labels sure": int(sure.sum()),
        "sure and wrong": int(wrong),
    }


def score_images(found: Any, true: np.ndarray) -> dict[str, Any]:
    """true: (B, 32, 32, 3) in [0, 1]."""
    from softinv_jax.images.verdicts import image_verdict_names  # noqa: PLC0415
    from softinv_jax.measures.image_quality import match_images, peak_signal_to_noise_ratio  # noqa: PLC0415

    images = found.recovery.images[0].astype(np.float64) * 0.5 + 0.5
    pairs = match_images(images, true)
    known = pairs >= 0
    row = {"images by": found.method, "verdicts": image_verdict_names(found.recovery.verdict[0]).tolist()}
    if np.any(known):
        row["PSNR"] = np.round(peak_signal_to_noise_ratio(images[pairs[known]], true[known]), 1).tolist()
    return row | {"why not exact": found.reason or None}


def main() -> None:
    from flwr.simulation import run_simulation  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    arguments = parse_arguments()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    server_app, rows = ServerApp(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(arguments, folder / "images.npz")

        @server_app.main()
        def run_server(grid: Grid, context: Context) -> None:
            rows.extend(score(audit, folder) for audit in serve(arguments, grid, folder))

        start = time.perf_counter()
        resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0}}
        run_simulation(server_app, client_app, num_supernodes=arguments.clients, backend_config=resources)
        seconds = time.perf_counter() - start
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "data_dir")}
    result = {"settings": settings, "seconds": round(seconds), "clients": rows}
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    for row in rows:
        console.print({name: value for name, value in row.items() if value is not None})
    console.print(f"{seconds:.0f} s. Everything is in {arguments.out}.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="of a minibatch (4; Flower's guide has 32)")
    parser.add_argument("--examples", type=int, help="of each client (as many: one step an epoch)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--match-steps", type=int, default=0, metavar="N", help="for likenesses of the images (0: none)"
    )
    parser.add_argument("--dataset", default="photographs", help="or cifar10, prepared by TFDS, ... (photographs)")
    parser.add_argument("--data-dir", help="where TFDS prepared it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="flower-audit.json")
    arguments = parser.parse_args()
    arguments.examples = arguments.examples or arguments.batch_size
    return arguments


def write_images(arguments: argparse.Namespace, path: Path) -> None:
    """The clients' images, shuffled; each client takes its own."""
    from softinv_jax.client.dataset_names import load_public_and_private  # noqa: PLC0415

    needed = arguments.clients * arguments.examples
    crops = -(-needed // 10)
    _, private = load_public_and_private(
        arguments.dataset,
        data_dir=arguments.data_dir,
        image_size=32,
        limit=needed,
        crops=(crops, crops),
        seed=arguments.seed,
    )
    np.savez(path, images=private.images[:needed], classes=private.classes[:needed])


if __name__ == "__main__":
    main()
