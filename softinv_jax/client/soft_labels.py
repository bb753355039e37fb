"""Soft labels as clients make them: smoothing, mixup and their relatives, and batches drawn from them.

The one-example functions are pure; `sample_batch` is their vectorised edge. A label here is a float vector
of shape (C,), non-negative, with sum 1 up to rounding.

Sources: label smoothing, Szegedy et al. 2016; mixup, Zhang et al. 2018; CutMix, Yun et al. 2019; the ranges
are those of Wang, Liang and He, ICLR 2024, section 4.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

__all__ = [
    "FAMILIES",
    "SoftLabelBatch",
    "compose",
    "cutmix",
    "hard_label",
    "images_per_example",
    "mix",
    "sample_batch",
    "smooth",
]

FAMILIES = ("hard", "smoothing", "mixup", "smoothed_mixup", "k_way_mixup", "cutmix", "dense")


@partial(jax.tree_util.register_dataclass, data_fields=["images", "labels"], meta_fields=[])
@dataclass(frozen=True)
class SoftLabelBatch:
    """Private client examples: images (N, H, W, channels) and their soft labels (N, C)."""

    images: jax.Array
    labels: jax.Array


def hard_label(class_index: ArrayLike, number_of_classes: int) -> jax.Array:
    """Return the one-hot label e_k, shape (C,), float32, of the class `class_index` (integer scalar)."""
    return jax.nn.one_hot(class_index, number_of_classes, dtype=jnp.float32)


def smooth(label: ArrayLike, strength: ArrayLike) -> jax.Array:
    """Return (1 - a) y + a / C for a label y (C,) and a strength a in [0, 1] (Szegedy et al. 2016)."""
    label = jnp.asarray(label)
    return (1.0 - jnp.asarray(strength)) * label + jnp.asarray(strength) / label.shape[-1]


def mix(weights: ArrayLike, stacked: ArrayLike) -> jax.Array:
    """Return sum_k weights[k] stacked[k] (mixup, Zhang et al. 2018).

    Args:
        weights: (k,), usually non-negative with sum 1.
        stacked: (k, ...), the labels or the images to mix.

    Raises:
        ValueError: if the two leading sizes differ.
    """
    weights, stacked = jnp.asarray(weights), jnp.asarray(stacked)
    if weights.ndim != 1 or stacked.ndim < 1 or weights.shape[0] != stacked.shape[0]:
        shapes = f"{weights.shape} and {stacked.shape}"
        raise ValueError(f"Expected weights (k,) and stacked (k, ...), got {shapes}. Stack along axis 0.")
    # A plain sum, not a matrix product: accelerators round the inputs of the latter.
    return jnp.sum(weights.reshape((-1,) + (1,) * (stacked.ndim - 1)) * stacked, axis=0)


def cutmix(key: jax.Array, images: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Paste a random box of the second image into the first (CutMix, Yun et al. 2019, algorithm 1).

    The kept area ratio is drawn from U(0, 1) and the box's centre uniformly; the box is clipped at the
    border. The labels are mixed by the area that was really pasted.

    Args:
        key: random key.
        images: (2, H, W, channels).
        labels: (2, C).

    Returns:
        The image (H, W, channels) and its label (C,).

    Raises:
        ValueError: if the shapes are not those.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if images.ndim != 4 or images.shape[0] != 2 or labels.shape[:-1] != (2,):
        shapes = f"{images.shape} and {labels.shape}"
        raise ValueError(f"Expected images (2, H, W, channels) and labels (2, C), got {shapes}. Stack two.")
    height, width = images.shape[1:3]
    key_ratio, key_row, key_column = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - jax.random.uniform(key_ratio, dtype=jnp.float32))
    inside = _interval(key_row, height, side)[:, None] & _interval(key_column, width, side)[None, :]
    pasted = jnp.sum(inside) / (height * width)
    weights = jnp.stack([1.0 - pasted, pasted]).astype(labels.dtype)
    return jnp.where(inside[:, :, None], images[1], images[0]), mix(weights, labels)


def _interval(key: jax.Array, size: int, fraction: jax.Array) -> jax.Array:
    """Mask (size,) of a clipped interval of `fraction * size` pixels about a uniform centre."""
    length = (fraction * size).astype(jnp.int32)
    start = jax.random.randint(key, (), 0, size) - length // 2
    position = jnp.arange(size)
    return (position >= start) & (position < start + length)


def images_per_example(family: str, ways: int = 3) -> int:
    """Return how many images of different classes one example of `family` is made of."""
    if family not in FAMILIES:
        raise ValueError(f"Unknown family={family!r}. Choose one of {', '.join(FAMILIES)}.")
    if family == "k_way_mixup":
        if ways < 2:
            raise ValueError(f"Expected ways={ways} >= 2. Use the family 'hard' for unmixed images.")
        return ways
    return 2 if family in ("mixup", "smoothed_mixup", "cutmix") else 1


def compose(
    key: jax.Array,
    family: str,
    images: ArrayLike,
    classes: ArrayLike,
    number_of_classes: int,
    *,
    smoothing_range: tuple[ArrayLike, ArrayLike] = (0.0, 0.5),
    mixup_range: tuple[ArrayLike, ArrayLike] = (0.0, 1.0),
) -> tuple[jax.Array, jax.Array]:
    """Make one example of `family` from k images and their classes; pure, may be vmapped and jitted.

    Args:
        key: random key for the strength, the mixing weights or the box.
        family: one of `FAMILIES`; k-way mixup draws its weights from Dirichlet(1, ..., 1).
        images: (k, H, W, channels), floating point; k as `images_per_example` tells.
        classes: (k,), integers.
        number_of_classes: C.
        smoothing_range: the smoothing strength is uniform on it.
        mixup_range: the second image's weight is uniform on it.

    Returns:
        The image (H, W, channels) and its label (C,), float32.

    Raises:
        ValueError: on an unknown family or a number of images that it does not use.
    """
    images, classes = jnp.asarray(images), jnp.asarray(classes)
    if images_per_example(family, ways=max(2, images.shape[0])) != images.shape[0]:
        raise ValueError(f"Got {images.shape[0]} images for family={family!r}. See `images_per_example`.")
    key_weights, key_strength = jax.random.split(key)
    labels = jax.vmap(partial(hard_label, number_of_classes=number_of_classes))(classes)
    if family == "cutmix":
        return cutmix(key_weights, images, labels)
    if family == "dense":
        return images[0], _flat_dirichlet(key_weights, number_of_classes)
    image, label = images[0], labels[0]
    if "mixup" in family:
        if family == "k_way_mixup":
            weights = _flat_dirichlet(key_weights, images.shape[0])
        else:
            second = jax.random.uniform(key_weights, (), jnp.float32, *mixup_range)
            weights = jnp.stack([1.0 - second, second])
        image, label = mix(weights.astype(images.dtype), images), mix(weights, labels)
    if family in ("smoothing", "smoothed_mixup"):
        label = smooth(label, jax.random.uniform(key_strength, (), jnp.float32, *smoothing_range))
    return image, label


def _flat_dirichlet(key: jax.Array, size: int) -> jax.Array:
    """Dirichlet(1, ..., 1) as normalised exponentials, which needs no rejection sampling."""
    draws = jax.random.exponential(key, (size,), jnp.float32)
    return draws / jnp.sum(draws)


def sample_batch(
    key: jax.Array,
    family: str,
    images: ArrayLike,
    classes: ArrayLike,
    number_of_classes: int,
    count: int,
    *,
    smoothing_range: tuple[float, float] = (0.0, 0.5),
    mixup_range: tuple[float, float] = (0.0, 1.0),
    ways: int = 3,
) -> SoftLabelBatch:
    """Draw `count` examples of `family` from a pool, with replacement; partners differ in class.

    The first image is uniform on the pool, each partner uniform on the pool without the classes already
    taken. Images are mixed with their labels' weights; 'hard', 'smoothing' and 'dense' leave them alone.

    Args:
        key: random key.
        family: one of `FAMILIES`.
        images: (M, H, W, channels), floating point (normalised), the pool.
        classes: (M,), integers in [0, C).
        number_of_classes: C.
        count: N, how many examples to draw.
        smoothing_range: bounds, within [0, 1], of the uniform smoothing strength.
        mixup_range: bounds, within [0, 1], of the second image's uniform weight.
        ways: how many images 'k_way_mixup' mixes.

    Returns:
        A `SoftLabelBatch`: images (N, H, W, channels) of the pool's dtype, labels (N, C) in float32.

    Raises:
        ValueError: on an unknown family, a pool of integers or with too few classes, a class outside
            [0, C), or a range outside [0, 1].
    """
    parts = images_per_example(family, ways)
    for name, (low, high) in (("smoothing_range", smoothing_range), ("mixup_range", mixup_range)):
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"Expected {name}=({low}, {high}) within [0, 1]. Give (low, high) in order.")
    if count < 1:
        raise ValueError(f"Expected count={count} >= 1. Ask for at least one example.")
    pool, pool_classes = jnp.asarray(images), np.asarray(classes)
    _check_pool(pool, pool_classes, number_of_classes)
    present = np.unique(pool_classes).size
    if present < parts:
        raise ValueError(
            f"family={family!r} mixes {parts} different classes, but the pool has {present}. "
            "Use a pool with more classes."
        )
    ranges = {"smoothing_range": smoothing_range, "mixup_range": mixup_range}
    # With the pool sorted by class, a member of a class is an offset into that class's block.
    order = np.argsort(pool_classes, kind="stable").astype(np.int32)
    sizes = np.bincount(pool_classes, minlength=number_of_classes).astype(np.int32)
    chosen, members, keys = _choose(key, jnp.asarray(order), jnp.asarray(sizes), count, parts)
    return _compose_all(keys, pool, members, chosen, ranges, family, number_of_classes)


def _check_pool(images: jax.Array, classes: np.ndarray, number_of_classes: int) -> None:
    if images.ndim != 4 or classes.shape != images.shape[:1] or classes.size == 0:
        shapes = f"{images.shape} and {classes.shape}"
        raise ValueError(f"Expected images (M, H, W, channels) and classes (M,), got {shapes}. Make M fit.")
    if not (jnp.issubdtype(images.dtype, jnp.floating) and np.issubdtype(classes.dtype, np.integer)):
        types = f"{images.dtype} and {classes.dtype}"
        raise ValueError(f"Expected float images and integer classes, got {types}. Normalise the images.")
    if classes.min() < 0 or classes.max() >= number_of_classes:
        limits = f"{classes.min()} to {classes.max()}"
        raise ValueError(f"Classes go from {limits}, outside number_of_classes={number_of_classes}. Raise it.")


# Two programs: the choice, most of the time to compile, is the same for many families.
@partial(jax.jit, static_argnums=(3, 4))
def _choose(
    key: jax.Array, order: jax.Array, sizes: jax.Array, count: int, parts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Classes (N, k) and images (N, k) of each example, as indices, and its key for all that is left.

    order: (M,) the pool sorted by class. sizes: (C,) of each class.
    """
    starts = jnp.cumsum(sizes) - sizes

    def draw(example_key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        key_classes, key_members, key_compose = jax.random.split(example_key, 3)
        # Gumbel top-k on log sizes: classes without repetition, each drawn in proportion to its size.
        scores = jax.random.gumbel(key_classes, sizes.shape, jnp.float32) + jnp.log(sizes)
        _, chosen = jax.lax.top_k(scores, parts)
        members = starts[chosen] + jax.random.randint(key_members, (parts,), 0, sizes[chosen])
        return chosen, order[members], key_compose

    return jax.vmap(draw)(jax.random.split(key, count))


@partial(jax.jit, static_argnums=(5, 6))
def _compose_all(
    keys: jax.Array,
    images: jax.Array,
    members: jax.Array,
    classes: jax.Array,
    ranges: Any,
    family: str,
    number_of_classes: int,
) -> SoftLabelBatch:
    def one(key: jax.Array, own: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return compose(key, family, images[own], classes, number_of_classes, **ranges)

    mixed, labels = jax.vmap(one)(keys, members, classes)
    return SoftLabelBatch(images=mixed, labels=labels)
