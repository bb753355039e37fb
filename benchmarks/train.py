"""Train the networks under attack, LeNet and a CIFAR ResNet18, with smoothing and with mixup, one for each seed.

    python benchmarks/train.py [--dataset cifar10] [--data-dir DIR] [--networks lenet resnet18] [--seeds 5]
                               [--families smoothing mixup] [--checkpoints FOLDER] [--quick | --full]

Checkpoints (safetensors, extra `benchmarks`) go to ~/.cache/softinv/checkpoints and are taken from there when they are
asked for again; the benchmarks that attack trained networks train what is missing in the same way. The seed fixes the
initial weights, the order of the images and the labels drawn; the same machine then gives the same file. As it is,
10,000 images and 8 epochs for LeNet, 4,000 images, 3 epochs and an eighth of the width for ResNet18: minutes on one
core. `--full`: all images, 20 epochs (ResNet18 at full width: for a GPU).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clients import load_data
from runner import Run, add_data_options, option_parser, spread, timed

from softinv_jax.atomic_file import write_atomically
from softinv_jax.client import (
    ImageDataset,
    LeNet,
    ResNet18,
    evaluate,
    initial_batch_statistics,
    initialise,
    initialise_fan_in,
    train,
)
from softinv_jax.frameworks.parameter_files import flat, nested

FAMILIES = ("smoothing", "mixup")
DEFAULT_FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softinv" / "checkpoints"


@dataclass(frozen=True)
class Recipe:
    """All that a checkpoint depends on, apart from the code and the machine."""

    architecture: str
    family: str
    seed: int
    dataset: str
    classes: int
    images: int
    epochs: int
    width: int
    learning_rate: float

    @property
    def name(self) -> str:
        """File name without ending."""
        return (
            f"{self.architecture}-{self.dataset}-{self.family}-seed{self.seed}-"
            f"{self.images}images-{self.epochs}epochs-width{self.width}"
        )

    def network(self) -> Any:
        """The network, untrained."""
        if self.architecture == "lenet":
            return LeNet(self.classes)
        return ResNet18(self.classes, stem="cifar", width=self.width)


@dataclass(frozen=True)
class Trained:
    """A trained network: flax variables, the file's SHA-256, and the share of test images it gets right."""

    name: str
    network: Any
    parameters: Any
    batch_statistics: Any
    sha256: str
    test_accuracy: float


def make_recipe(
    architecture: str, family: str, seed: int, arguments: argparse.Namespace, training: ImageDataset
) -> Recipe:
    """The recipe that `--quick`, `--full` or neither stands for."""
    lenet = architecture == "lenet"
    if arguments.full:
        images, epochs, width = len(training), 20, 64
    elif arguments.quick:
        images, epochs, width = 512, 1, 4
    else:
        images, epochs, width = (10_000, 8, 64) if lenet else (4_000, 3, 8)
    return Recipe(
        architecture=architecture,
        family=family,
        seed=seed,
        dataset=arguments.dataset,
        classes=training.number_of_classes,
        images=min(images, len(training)),
        epochs=epochs,
        width=0 if lenet else width,
        # With 1e-2 one LeNet in ten saturates from so few images.
        learning_rate=5e-3 if lenet else 3e-3,
    )


def trained(recipe: Recipe, folder: Path, training: ImageDataset, test: ImageDataset) -> Trained:
    """The network of a recipe: from its checkpoint, or trained now and kept there.

    Raises:
      ValueError: if the checkpoint is damaged or belongs to another recipe.
    """
    path = folder / f"{recipe.name}.safetensors"
    if not path.exists():
        parameters, statistics = _train(recipe, training)
        accuracy = evaluate(
            recipe.network(), parameters, _normalised(test, training), test.classes, batch_statistics=statistics
        )
        _save(path, {"params": parameters, "batch_stats": statistics}, recipe, float(accuracy))
    return _load(path, recipe)


def _normalised(images: ImageDataset, training: ImageDataset) -> jax.Array:
    return images.with_statistics_of(training).normalised()


def _train(recipe: Recipe, training: ImageDataset) -> tuple[Any, Any]:
    network, key = recipe.network(), jax.random.key(recipe.seed)
    key_start, key_train = jax.random.split(key)
    shape = training.images.shape[1:]
    first = initialise_fan_in if recipe.architecture == "lenet" else initialise
    result = train(
        key_train,
        network,
        first(network, key_start, shape),
        training.normalised()[: recipe.images],
        training.classes[: recipe.images],
        number_of_classes=recipe.classes,
        batch_statistics=initial_batch_statistics(network, shape),
        family=recipe.family,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
    )
    return result.parameters, result.batch_statistics


def _safetensors() -> Any:
    try:
        import safetensors.numpy  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit("Trained networks are kept as safetensors: pip install 'softinv_jax[benchmarks]'") from error
    return safetensors


def _save(path: Path, variables: Mapping[str, Any], recipe: Recipe, accuracy: float) -> None:
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in flat(dict(variables)).items()}
    notes = {"recipe": json.dumps(asdict(recipe)), "test_accuracy": repr(accuracy)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(_safetensors().numpy.save(arrays, notes)))


def _load(path: Path, recipe: Recipe) -> Trained:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to train anew") from error
    if json.loads(notes.get("recipe", "null")) != asdict(recipe):
        raise ValueError(f"{path} was trained otherwise ({notes.get('recipe')}); remove it to train anew")
    variables: dict[str, Any] = {"batch_stats": {}} | nested(arrays)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    accuracy = float(notes["test_accuracy"])
    return Trained(recipe.name, recipe.network(), variables["params"], variables["batch_stats"], digest, accuracy)


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """`--checkpoints`."""
    parser.add_argument("--checkpoints", type=Path, default=DEFAULT_FOLDER, help="folder of the trained networks")


def note_checkpoint(run: Run, network: Trained) -> None:
    """Name a trained network in the results."""
    run.notes.setdefault("checkpoints", {})[network.name] = {
        "sha256": network.sha256,
        "test_accuracy": network.test_accuracy,
    }


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    add_checkpoint_option(parser)
    parser.add_argument("--networks", nargs="+", choices=("lenet", "resnet18"), default=["lenet", "resnet18"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    arguments = parser.parse_args()
    run = Run("train", arguments)
    training, test, _ = load_data(arguments)
    for architecture in arguments.networks:
        for family in arguments.families:
            accuracies, seconds = [], []
            for seed in run.track(run.seeds, f"{architecture}, {family}"):
                recipe = make_recipe(architecture, family, seed, arguments, training)
                network, taken = timed(lambda recipe=recipe: trained(recipe, arguments.checkpoints, training, test))
                note_checkpoint(run, network)
                accuracies.append(100 * network.test_accuracy)
                seconds.append(taken)
            run.add(network=architecture, family=family, test_accuracy=accuracies, seconds=seconds)
    run.finish(
        f"Trained networks, {arguments.dataset}",
        {
            "network": lambda row: row["network"],
            "trained with": lambda row: row["family"],
            "networks": lambda row: len(row["seconds"]),
            "test accuracy, %": lambda row: spread(row["test_accuracy"]),
            "s each": lambda row: spread(row["seconds"]),
        },
    )


if __name__ == "__main__":
    main()
