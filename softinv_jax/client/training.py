"""A small training loop, so that attacks can be tried on networks that were trained with soft labels.

One epoch is one compiled `lax.scan`; labels are softened batch by batch inside it. The paper, too, trains its
networks with the augmentation under test (Wang, Liang and He, ICLR 2024, section 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.typing import ArrayLike

from softinv_jax.client.gradients import cross_entropy
from softinv_jax.client.networks import ResNet, initial_batch_statistics
from softinv_jax.client.soft_labels import compose, images_per_example

__all__ = ["TrainingResult", "evaluate", "train"]

Progress = Callable[[int, int, str], None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingResult:
    """A trained network.

    Attributes:
        parameters: pytree like the parameters given.
        batch_statistics: running means and variances of batch normalisation; {} for a network without.
        losses: (epochs,), mean cross-entropy with the soft labels in each epoch, nats.
        accuracy: scalar, share of the unmixed training images that are classified rightly at the end.
    """

    parameters: Any
    batch_statistics: Any
    losses: jax.Array
    accuracy: jax.Array


@dataclass(frozen=True)
class _Settings:
    """What an epoch is compiled for."""

    number_of_classes: int
    family: str
    parts: int
    batch_size: int
    flips: bool


@lru_cache(maxsize=16)
def _optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    # Sigmoids saturate when the first steps are too large, hence the warm-up.
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), max(2, steps))
    return optax.adam(schedule)


def train(
    key: jax.Array,
    network: nn.Module,
    parameters: Any,
    images: ArrayLike,
    classes: ArrayLike,
    *,
    number_of_classes: int,
    batch_statistics: Any = None,
    family: str = "smoothing",
    epochs: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    smoothing_range: tuple[float, float] = (0.0, 0.5),
    mixup_range: tuple[float, float] = (0.0, 1.0),
    ways: int = 3,
    flips: bool = True,
    progress: Progress | None = None,
) -> TrainingResult:
    """Train with Adam (10 % linear warm-up, then cosine decay to 0) on freshly softened labels.

    For a LeNet start from `networks.initialise_fan_in`: from the paper's untrained U(-0.5, 0.5) the sigmoids
    saturate. The defaults then reach 56 % (smoothing) and 54 % (mixup) CIFAR-10 test accuracy from the 50,000
    training images, in about a minute on two CPU cores (one seed each). Without `progress` the call returns
    before the work is done, as jax does: block on the result to time it. A `ResNet` is trained in training mode,
    with the statistics of each batch, which also move the running statistics that come back with the parameters.

    Args:
        key: random key.
        network: a linen module that takes a batch of images.
        parameters: where to start.
        images: (M, H, W, channels), normalised.
        classes: (M,), integers in [0, C).
        number_of_classes: C.
        batch_statistics: where running statistics start; None for those of an untrained network.
        family: one of `soft_labels.FAMILIES`; partners come from the same batch and may share a class.
        epochs: passes over the images; the last M % batch_size of each pass are left out.
        batch_size: examples a step.
        learning_rate: Adam's peak rate.
        smoothing_range: as in `soft_labels.sample_batch`.
        mixup_range: as in `soft_labels.sample_batch`.
        ways: as in `soft_labels.sample_batch`.
        flips: flip each image left to right with probability 1/2.
        progress: called after each epoch with (epochs done, epochs in all, note).

    Returns:
        A `TrainingResult`.

    Raises:
        ValueError: if images and classes do not fit each other, on an unknown family, or if `epochs`,
            `batch_size` or `learning_rate` is out of range.
    """
    images, classes = jnp.asarray(images), jnp.asarray(classes, jnp.int32)
    _check_examples(images, classes)
    if not 1 <= batch_size <= images.shape[0]:
        raise ValueError(
            f"Expected batch_size={batch_size} in [1, {images.shape[0]}]. Take no more than there are images."
        )
    if epochs < 1 or learning_rate <= 0:
        raise ValueError(f"Expected epochs={epochs} >= 1 and learning_rate={learning_rate} > 0.")
    steps = images.shape[0] // batch_size
    settings = _Settings(number_of_classes, family, images_per_example(family, ways), batch_size, flips)
    optimiser = _optimiser(learning_rate, epochs * steps)
    state = optimiser.init(parameters)
    if batch_statistics is None:
        _, height, width, channels = images.shape
        batch_statistics = initial_batch_statistics(network, (height, width, channels))
    ranges = {"smoothing_range": smoothing_range, "mixup_range": mixup_range}
    losses = []
    for epoch, epoch_key in enumerate(jax.random.split(key, epochs)):
        (parameters, batch_statistics, state), loss = _epoch(
            epoch_key,
            (parameters, batch_statistics, state),
            (images, classes),
            ranges,
            network=network.clone(training=True) if isinstance(network, ResNet) else network,
            optimiser=optimiser,
            settings=settings,
        )
        losses.append(loss)
        if progress is not None:
            progress(epoch + 1, epochs, f"loss {float(loss):.4f}")
    accuracy = evaluate(network, parameters, images, classes, batch_statistics=batch_statistics)
    return TrainingResult(parameters, batch_statistics, jnp.stack(losses), accuracy)


def _check_examples(images: jax.Array, classes: jax.Array) -> None:
    if images.ndim != 4 or classes.shape != images.shape[:1] or classes.size == 0:
        raise ValueError(
            f"Expected images (M, H, W, channels) and classes (M,) with M >= 1, got {images.shape} and "
            f"{classes.shape}. Give one class for each image."
        )


@partial(jax.jit, static_argnames=("network", "optimiser", "settings"))
def _epoch(
    key: jax.Array,
    start: tuple[Any, Any, Any],
    examples: tuple[jax.Array, jax.Array],
    ranges: dict[str, Any],
    *,
    network: nn.Module,
    optimiser: optax.GradientTransformation,
    settings: _Settings,
) -> tuple[tuple[Any, Any, Any], jax.Array]:
    images, classes = examples
    steps = images.shape[0] // settings.batch_size
    key_order, key_steps = jax.random.split(key)
    order = jax.random.permutation(key_order, images.shape[0])[: steps * settings.batch_size]

    def step(
        carry: tuple[Any, Any, Any], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[Any, Any, Any], jax.Array]:
        parameters, statistics, state = carry
        step_key, rows = inputs
        batch, labels = _soften(step_key, images[rows], classes[rows], ranges, settings)

        def loss(candidate: Any) -> tuple[jax.Array, Any]:
            variables = {"params": candidate, "batch_stats": statistics}
            logits, updated = network.apply(variables, batch, mutable=["batch_stats"])
            return jnp.mean(jax.vmap(cross_entropy)(logits, labels)), updated.get("batch_stats", {})

        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
        update, state = optimiser.update(gradient, state, parameters)
        return (optax.apply_updates(parameters, update), statistics, state), value

    inputs = (jax.random.split(key_steps, steps), order.reshape(steps, settings.batch_size))
    end, losses = jax.lax.scan(step, start, inputs)
    return end, jnp.mean(losses)


def _soften(
    key: jax.Array, images: jax.Array, classes: jax.Array, ranges: dict[str, Any], settings: _Settings
) -> tuple[jax.Array, jax.Array]:
    key_flip, key_compose = jax.random.split(key)
    if settings.flips:
        flip = jax.random.bernoulli(key_flip, shape=classes.shape)
        images = jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
    # Partners are the batch, rolled: it was shuffled, and two of one class do no harm in training.
    shifts = range(settings.parts)
    together = jnp.stack([jnp.roll(images, shift, axis=0) for shift in shifts], axis=1)
    classes_together = jnp.stack([jnp.roll(classes, shift) for shift in shifts], axis=1)

    def make(example_key: jax.Array, parts: jax.Array, part_classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        family, number_of_classes = settings.family, settings.number_of_classes
        return compose(example_key, family, parts, part_classes, number_of_classes, **ranges)

    keys = jax.random.split(key_compose, settings.batch_size)
    return jax.vmap(make)(keys, together, classes_together)


def evaluate(
    network: nn.Module,
    parameters: Any,
    images: ArrayLike,
    classes: ArrayLike,
    *,
    batch_statistics: Any = None,
    batch_size: int = 1000,
) -> jax.Array:
    """Return the share (scalar in [0, 1]) of images whose largest logit is that of their class.

    Args:
        network: a linen module that takes one image.
        parameters: its parameters.
        images: (M, H, W, channels), normalised.
        classes: (M,), integers.
        batch_statistics: running statistics of batch normalisation, for a network with it.
        batch_size: images in memory at a time.

    Raises:
        ValueError: if images and classes do not fit each other.
    """
    images, classes = jnp.asarray(images), jnp.asarray(classes)
    _check_examples(images, classes)
    variables = {"params": parameters, "batch_stats": batch_statistics or {}}
    return _evaluate(variables, images, classes, network, batch_size)


@partial(jax.jit, static_argnames=("network", "batch_size"))
def _evaluate(variables: Any, images: jax.Array, classes: jax.Array, network: nn.Module, batch_size: int) -> jax.Array:
    def predict(image: jax.Array) -> jax.Array:
        return jnp.argmax(network.apply(variables, image))

    return jnp.mean(jax.lax.map(predict, images, batch_size=batch_size) == classes)
