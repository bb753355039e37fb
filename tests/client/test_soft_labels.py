"""Soft labels against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client.soft_labels import (
    FAMILIES,
    compose,
    cutmix,
    hard_label,
    images_per_example,
    mix,
    sample_batch,
    smooth,
)

CLASSES = 7
# A float32 sum of up to 7 entries of size at most 1.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray]:
    """Constant images whose value tells their class: a mixed image then equals label @ values."""
    classes = np.random.default_rng(0).integers(0, CLASSES, 60)
    classes[:CLASSES] = np.arange(CLASSES)
    images = np.broadcast_to((10.0 ** (classes / 2))[:, None, None, None], (60, 4, 5, 3))
    return images.astype(np.float32), classes


def test_hard_and_smoothed_labels_are_their_formulas() -> None:
    np.testing.assert_array_equal(hard_label(2, 5), np.eye(5)[2])
    expected = 0.7 * np.eye(5)[2] + 0.3 / 5
    np.testing.assert_allclose(smooth(hard_label(2, 5), 0.3), expected, rtol=ROUNDING)


def test_mix_is_a_weighted_sum_of_labels_and_images() -> None:
    generator = np.random.default_rng(1)
    weights = np.float32([0.2, 0.5, 0.3])
    for shape in [(3, 6), (3, 4, 5, 2)]:
        stacked = generator.normal(size=shape).astype(np.float32)
        expected = np.tensordot(weights.astype(np.float64), stacked, axes=1)
        np.testing.assert_allclose(mix(weights, stacked), expected, atol=ROUNDING)


def test_mix_rejects_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(3, 4\)"):
        mix(np.ones(2), np.ones((3, 4)))


def test_cutmix_pastes_one_box_and_weighs_by_its_area() -> None:
    images = np.stack([np.zeros((8, 12, 3)), np.ones((8, 12, 3))]).astype(np.float32)
    labels = np.eye(5, dtype=np.float32)[[1, 3]]
    keys = jax.random.split(jax.random.key(0), 400)
    mixed, mixed_labels = jax.vmap(cutmix, in_axes=(0, None, None))(keys, images, labels)
    mask = np.asarray(mixed)[..., 0]
    np.testing.assert_array_equal(mixed, np.broadcast_to(mask[..., None], mixed.shape))
    for box in mask:
        # A box is the outer product of its row and column masks, each without holes.
        rows, columns = box.max(axis=1), box.max(axis=0)
        np.testing.assert_array_equal(box, np.outer(rows, columns))
        assert all(np.abs(np.diff(line, prepend=0, append=0)).sum() in (0, 2) for line in (rows, columns))
    area = mask.mean(axis=(1, 2))
    np.testing.assert_allclose(np.asarray(mixed_labels)[:, 3], area, atol=ROUNDING)
    np.testing.assert_allclose(np.asarray(mixed_labels)[:, 1], 1 - area, atol=ROUNDING)
    assert area.min() < 0.05
    assert area.max() > 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_distributions_and_images_carry_the_same_weights(family, pool) -> None:
    images, classes = pool
    batch = sample_batch(jax.random.key(3), family, images, classes, CLASSES, 500)
    assert batch.images.shape == (500, 4, 5, 3)
    assert batch.labels.shape == (500, CLASSES)
    assert batch.labels.dtype == jnp.float32
    labels = np.asarray(batch.labels, np.float64)
    assert labels.min() >= 0
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=ROUNDING)
    if family in ("mixup", "k_way_mixup", "hard", "cutmix"):
        # Holds for the box of CutMix too, through the mean of the image.
        values = labels @ 10.0 ** (np.arange(CLASSES) / 2)
        np.testing.assert_allclose(np.asarray(batch.images).mean(axis=(1, 2, 3)), values, rtol=1e-5)
    else:
        levels = np.asarray(batch.images)[:, 0, 0, 0]
        unmixed = np.isin(levels, images[:, 0, 0, 0])
        assert unmixed.all() == (family in ("smoothing", "dense"))


def test_each_family_is_constant_but_for_its_targets(pool) -> None:
    images, classes = pool
    targets_of = {"hard": 1, "smoothing": 1, "mixup": 2, "smoothed_mixup": 2, "k_way_mixup": 3, "cutmix": 2}
    for family, targets in targets_of.items():
        batch = sample_batch(jax.random.key(4), family, images, classes, CLASSES, 500)
        ordered = np.sort(np.asarray(batch.labels), axis=1)
        floor = ordered[:, 0]
        np.testing.assert_array_equal(
            ordered[:, : CLASSES - targets], np.broadcast_to(floor[:, None], (500, CLASSES - targets))
        )
        smoothed = family in ("smoothing", "smoothed_mixup")
        assert (floor.max() > 0.05) == smoothed
        if family in ("mixup", "smoothed_mixup", "k_way_mixup"):
            # Partners of one class would merge into one target.
            assert (ordered[:, CLASSES - targets] > floor).all()


def test_strengths_and_weights_follow_their_ranges(pool) -> None:
    images, classes = pool
    smoothed = sample_batch(jax.random.key(5), "smoothing", images, classes, CLASSES, 4000, smoothing_range=(0.1, 0.4))
    strength = np.asarray(smoothed.labels).min(axis=1) * CLASSES
    assert abs(strength.min() - 0.1) < 1e-3
    assert abs(strength.max() - 0.4) < 1e-3
    # Five standard errors of the mean of a uniform variable.
    assert abs(strength.mean() - 0.25) < 5 * 0.3 / np.sqrt(12 * 4000)
    mixed = sample_batch(jax.random.key(6), "mixup", images, classes, CLASSES, 500, mixup_range=(0.3, 0.3))
    np.testing.assert_allclose(np.sort(np.asarray(mixed.labels), axis=1)[:, -2:], [[0.3, 0.7]] * 500, atol=1e-6)


def test_first_image_and_partner_are_uniform_on_the_pool() -> None:
    # One class with 6 of 10 images, one with 3, one with 1; images tell their place in the pool.
    classes = np.array([0] * 6 + [1] * 3 + [2])
    images = np.float32(np.arange(10))[:, None, None, None] * np.ones((1, 2, 2, 1), np.float32)
    count = 20_000
    hard = sample_batch(jax.random.key(7), "hard", images, classes, 3, count)
    share = np.bincount(np.asarray(hard.images)[:, 0, 0, 0].astype(int), minlength=10) / count
    np.testing.assert_allclose(share, 0.1, atol=5 * np.sqrt(0.09 / count))
    # With weight (1, 0) an example shows its first class; pairs come up as 0.6 * 0.3 / 0.4 and so on.
    pairs = sample_batch(jax.random.key(8), "mixup", images, classes, 3, count, mixup_range=(0.25, 0.25))
    labels = np.asarray(pairs.labels)
    first, second = labels.argmax(axis=1), np.abs(labels - 0.25).argmin(axis=1)
    assert (first != second).all()
    sizes = np.array([0.6, 0.3, 0.1])
    for i in range(3):
        for j in set(range(3)) - {i}:
            expected = sizes[i] * sizes[j] / (1 - sizes[i])
            assert abs(np.mean((first == i) & (second == j)) - expected) < 5 * np.sqrt(0.25 / count)


def test_sampling_is_deterministic_and_equals_its_eager_self(pool) -> None:
    images, classes = pool
    arguments = (jax.random.key(9), "smoothing", images, classes, CLASSES, 5)
    compiled, again = sample_batch(*arguments), sample_batch(*arguments)
    np.testing.assert_array_equal(compiled.images, again.images)
    with jax.disable_jit():
        eager = sample_batch(*arguments)
    np.testing.assert_allclose(compiled.labels, eager.labels, atol=ROUNDING)
    np.testing.assert_allclose(compiled.images, eager.images, rtol=1e-5)


def test_k_way_weights_have_the_moments_of_a_flat_dirichlet() -> None:
    images = np.zeros((4, 2, 2, 1), np.float32)
    batch = sample_batch(jax.random.key(10), "k_way_mixup", images, np.arange(4), 4, 20_000, ways=4)
    labels = np.asarray(batch.labels)
    np.testing.assert_allclose(labels.mean(axis=0), 0.25, atol=0.01)
    # Variance of a component of Dirichlet(1, ..., 1): (k - 1) / (k^2 (k + 1)).
    np.testing.assert_allclose(labels.var(axis=0), 3 / (16 * 5), rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "cutout"}, "Unknown family='cutout'"),
        ({"family": "k_way_mixup", "ways": 1}, "ways=1"),
        ({"family": "k_way_mixup", "ways": 8}, "mixes 8 different classes, but the pool has 7"),
        ({"count": 0}, "count=0"),
        ({"smoothing_range": (0.5, 0.1)}, "smoothing_range"),
        ({"mixup_range": (0.0, 1.5)}, "mixup_range"),
        ({"number_of_classes": 3}, "number_of_classes=3"),
        ({"images": np.zeros((60, 4, 5, 3), np.uint8)}, "uint8"),
        ({"images": np.zeros((59, 4, 5, 3), np.float32)}, r"\(59, 4, 5, 3\)"),
        ({"classes": np.zeros(60)}, "float64"),
        ({"classes": np.zeros(60, int), "family": "mixup"}, "the pool has 1"),
    ],
)
def test_bad_input_is_named(change, message, pool) -> None:
    images, classes = pool
    arguments = {
        "family": "hard",
        "images": images,
        "classes": classes,
        "number_of_classes": CLASSES,
        "count": 2,
    }
    with pytest.raises(ValueError, match=message):
        sample_batch(jax.random.key(0), **(arguments | change))


def test_compose_tells_how_many_images_it_needs() -> None:
    assert [images_per_example(family) for family in FAMILIES] == [1, 1, 2, 2, 3, 2, 1]
    with pytest.raises(ValueError, match="Got 3 images for family='mixup'"):
        compose(jax.random.key(0), "mixup", np.zeros((3, 2, 2, 1), np.float32), np.arange(3), 5)
