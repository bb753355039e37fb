"""The system under audit: a model, its parameters, and the images its clients keep private."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from softinv_jax.audit.models import MODELS
from softinv_jax.audit.settings import AuditSettings
from softinv_jax.client.dataset_names import load_public_and_private
from softinv_jax.client.datasets import ImageDataset
from softinv_jax.client.gradients import ApplyFunction
from softinv_jax.client.networks import apply_function, initial_batch_statistics, initialise, initialise_fan_in
from softinv_jax.client.training import train
from softinv_jax.images.layer_chain import Chain
from softinv_jax.images.objective import WholeBatch
from softinv_jax.inversions import Network
from softinv_jax.observation.head import find_head

__all__ = ["System", "make_system", "system_of_network"]

# Images of a data set that the audit reads, or photographs' crops a class.
IMAGES_READ = 5000
CROPS, TRAINING_CROPS = 50, 200
# These keys compile three times faster than the default's, and nothing here needs stronger ones.
KEYS = "unsafe_rbg"


@dataclass(frozen=True)
class System:
    """What clients compute their gradients with.

    Attributes:
      name: in words. apply_fn: (parameters, image (H, W, channels)) -> logits (C,), hashable.
      parameters: by layer, as `find_head` reads them. chain: the network's layers, or None where it is no chain.
      data: the private images; normalised, they are the model's input. accuracy: of the model on training images.
      has_batch_norm: its running statistics are fixed in `apply_fn`.
    """

    name: str
    apply_fn: ApplyFunction
    parameters: Mapping[str, Any]
    chain: Chain | None
    data: ImageDataset
    accuracy: float | None = None
    has_batch_norm: bool = False

    @property
    def head(self) -> str:
        """Path of the last layer."""
        return find_head(self.parameters, number_of_classes=self.data.number_of_classes)


def make_system(
    settings: AuditSettings, parameters: Mapping[str, Any] | None = None, statistics: Mapping[str, Any] | None = None
) -> System:
    """Read the data, and draw, train or take over the network's parameters.

    Args:
      parameters: of the network, by layer; else they are drawn as the paper does and trained for `settings.epochs`.
      statistics: running statistics of batch normalisation that go with `parameters`.

    Raises:
      ValueError: where parameters and data do not fit each other, or TFDS does not know the data set.
      FileNotFoundError: where the data set is not prepared.
    """
    model = MODELS[settings.network]
    assert model.network is not None
    public, private = load_public_and_private(
        settings.dataset,
        data_dir=settings.data_dir,
        image_size=model.image_size,
        limit=IMAGES_READ,
        crops=(TRAINING_CROPS if settings.epochs else CROPS, CROPS),
        seed=settings.seed,
    )
    classes, shape = private.number_of_classes, private.images.shape[1:]
    key = jax.random.key(settings.seed, impl=KEYS)
    if parameters is not None:
        if settings.epochs:
            raise ValueError(f"epochs = {settings.epochs}, but given parameters are attacked as they are: give 0")
        head = parameters.get("head", {})
        kernel = np.asarray(head.get("kernel", np.zeros(0)) if isinstance(head, Mapping) else np.zeros(0))
        if kernel.ndim != 2 or kernel.shape[1] != classes:
            raise ValueError(
                f"the parameters' head/kernel has shape {kernel.shape}, but (d, C) with C = {classes} classes of"
                f" {private.name} is needed"
            )
        network = model.network(classes, head_bias="bias" in head)
        expected = jax.tree.map(np.shape, initialise(network, key, shape))
        if jax.tree.map(np.shape, dict(parameters)) != expected:
            raise ValueError(f"the parameters are not those of {settings.network} for images {shape}: {expected}")
        given = statistics or initial_batch_statistics(network, shape)
        name = f"{settings.network}, given parameters"
        return System(name, apply_function(network, given), parameters, model.chain, private, None, bool(given))
    network = model.network(classes)
    given = initial_batch_statistics(network, shape)
    if settings.epochs == 0:
        parameters = initialise(network, jax.random.fold_in(key, 1), shape)
        name = f"{settings.network}, untrained"
        return System(name, apply_function(network, given), parameters, model.chain, private, None, bool(given))
    result = train(
        jax.random.fold_in(key, 2),
        network,
        initialise_fan_in(network, jax.random.fold_in(key, 3), shape),
        public.normalised(),
        public.classes,
        number_of_classes=classes,
        epochs=settings.epochs,
        batch_size=min(64, len(public)),
    )
    apply_fn = apply_function(network, result.batch_statistics)
    name = f"{settings.network}, trained for {settings.epochs} epochs"
    return System(
        name, apply_fn, result.parameters, model.chain, private, float(result.accuracy), bool(result.batch_statistics)
    )


def system_of_network(settings: AuditSettings, name: str, network: Network, parameters: Mapping[str, Any]) -> System:
    """A system of any network, with its parameters as they are, and the data of the settings.

    Args:
      name: in words. network, parameters: as `inversions` takes them.

    Raises:
      ValueError: for a network whose examples act on each other, or one that does not fit the data.
      FileNotFoundError: where the data set is not prepared.
    """
    if isinstance(network.apply_fn, WholeBatch):
        raise ValueError(
            f"examples of {name} act on each other, as through batch normalisation in training mode, but here each"
            " client has one; take it in evaluation mode"
        )
    if settings.epochs:
        raise ValueError(f"epochs = {settings.epochs}, but {name} is attacked as it is: give 0")
    height, width = network.image_shape[:2]
    size = height if height == width else (height, width)
    _, private = load_public_and_private(
        settings.dataset,
        data_dir=settings.data_dir,
        image_size=size,
        limit=IMAGES_READ,
        crops=(CROPS, CROPS),
        seed=settings.seed,
    )
    shape = private.images.shape[1:]
    if shape != network.image_shape:
        raise ValueError(f"images of {private.name} are {shape}, but {name} takes {network.image_shape}")
    logits = jax.eval_shape(network.apply_fn, parameters, jax.ShapeDtypeStruct(shape, np.float32)).shape
    if logits != (private.number_of_classes,):
        raise ValueError(f"{name} has {logits} logits, but {private.name} has {private.number_of_classes} classes")
    return System(name, network.apply_fn, parameters, network.chain, private)
