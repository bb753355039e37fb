"""Data sets against NumPy statistics, other readers, and the messages for data that are not there."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from softinv_jax.client.datasets import PHOTOGRAPHS, ImageDataset, load_photographs, load_tfds


def has(name: str) -> bool:
    return (Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / name).is_dir()


needs_cifar10 = pytest.mark.skipif(
    not has("cifar10"), reason="cifar10 is not prepared in TFDS_DATA_DIR (see the message of load_tfds)"
)
needs_cifar100 = pytest.mark.skipif(
    not has("cifar100"), reason="cifar100 is not prepared in TFDS_DATA_DIR (see the message of load_tfds)"
)


@pytest.fixture
def small() -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    return ImageDataset.from_images(images, np.array([0, 1, 1, 0, 1]), ("even", "odd"), "noise")


def test_statistics_and_normalisation_are_numpys(small) -> None:
    scaled = small.images / 255.0
    np.testing.assert_allclose(small.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(small.std, scaled.std(axis=(0, 1, 2)), rtol=1e-12)
    normalised = small.normalised()
    assert normalised.dtype == np.float32
    expected = (scaled - scaled.mean(axis=(0, 1, 2))) / scaled.std(axis=(0, 1, 2))
    np.testing.assert_allclose(normalised, expected, atol=1e-6)


def test_denormalise_is_the_inverse_for_one_image_and_for_many(small) -> None:
    many = small.denormalise(small.normalised())
    np.testing.assert_array_equal(np.round(np.asarray(many) * 255), small.images)
    np.testing.assert_allclose(small.denormalise(small.normalised()[2]), many[2], atol=1e-6)


def test_a_test_set_takes_the_statistics_of_its_train_set(small) -> None:
    other = ImageDataset.from_images(small.images // 2, small.classes, small.class_names, "darker")
    shared = other.with_statistics_of(small)
    assert (shared.mean, shared.std, shared.name) == (small.mean, small.std, "darker")
    assert (len(shared), shared.number_of_classes) == (5, 2)


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros(2, int), "float64"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int), r"\(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, int), r"\(3,\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 9]), "0 to 9"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, int), "std="),
    ],
)
def test_bad_images_are_named(images, classes, message) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset.from_images(images, classes, ("only",), "bad")


def test_photographs_are_balanced_deterministic_and_split() -> None:
    train, again = load_photographs(per_class=20), load_photographs(per_class=20)
    test, other = load_photographs(split="test", per_class=20), load_photographs(per_class=20, seed=1)
    assert train.images.shape == (200, 32, 32, 3)
    assert train.class_names == PHOTOGRAPHS
    np.testing.assert_array_equal(np.bincount(train.classes), [20] * 10)
    np.testing.assert_array_equal(train.images, again.images)
    for different in (test, other):
        pairs = (train.images[:, None] == different.images[None]).all(axis=(2, 3, 4))
        assert not pairs.any()
    # Every crop shows something: no image is constant.
    assert train.images.std(axis=(1, 2, 3)).min() > 2


def test_photographs_have_the_colours_of_their_class() -> None:
    crops = load_photographs(per_class=60, image_size=16)
    for name in ("rocket", "coffee", "camera"):
        photograph = getattr(data, name)()
        colour = photograph.reshape(-1, photograph.shape[-1] if photograph.ndim == 3 else 1).mean(axis=0)
        mine = crops.images[crops.classes == PHOTOGRAPHS.index(name)].mean(axis=(0, 1, 2))
        # Crops prefer the middle of a photograph, so the means agree only roughly.
        np.testing.assert_allclose(mine, np.broadcast_to(colour, 3), atol=30)


def test_photographs_reject_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split='valid'"):
        load_photographs(split="valid")
    with pytest.raises(ValueError, match="per_class=0"):
        load_photographs(per_class=0)


def test_data_not_prepared_name_the_command_at_once(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"(?s)softinv_jax\[tfds-prepare\].*download_and_prepare") as error:
        load_tfds("cifar10", "test", data_dir=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unknown_data_sets_and_limits_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="name='cifar11'") as error:
        load_tfds("cifar11", "test", data_dir=tmp_path)
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match="limit=0"):
        load_tfds("cifar10", "test", limit=0)
    with pytest.raises(ValueError, match="image_size=0"):
        load_tfds("cifar10", "test", image_size=0)


@needs_cifar10
def test_cifar10_is_what_tfds_itself_decodes() -> None:
    import tensorflow_datasets as tfds  # noqa: PLC0415 - takes two seconds to import

    reports = []
    mine = load_tfds("cifar10", "test", limit=1500, progress=lambda *report: reports.append(report))
    assert mine.images.shape == (1500, 32, 32, 3)
    assert mine.class_names[:2] == ("airplane", "automobile")
    assert reports == [(1000, 1500, "cifar10 test"), (1500, 1500, "cifar10 test")]
    source = tfds.data_source("cifar10", split="test", data_dir=os.environ.get("TFDS_DATA_DIR"))
    for index in (0, 999, 1000, 1499):
        np.testing.assert_array_equal(mine.images[index], source[index]["image"])
        assert mine.classes[index] == source[index]["label"]


@needs_cifar10
def test_cifar10_slices_and_resizes() -> None:
    part = load_tfds("cifar10", "test[10:20]", image_size=16)
    whole = load_tfds("cifar10", "test", limit=20)
    assert part.images.shape == (10, 16, 16, 3)
    np.testing.assert_array_equal(part.classes, whole.classes[10:])
    # Halving with antialiasing keeps the mean colour.
    np.testing.assert_allclose(part.images.mean(axis=(1, 2)), whole.images[10:].mean(axis=(1, 2)), atol=2)
    with pytest.raises(ValueError, match="no split='validation'"):
        load_tfds("cifar10", "validation")


@needs_cifar100
def test_cifar100_has_its_hundred_classes() -> None:
    cifar100 = load_tfds("cifar100", "test", limit=200)
    assert cifar100.number_of_classes == 100
    assert cifar100.class_names[0] == "apple"


def test_a_data_set_of_large_images_is_read_as_imagenet_would_be(tmp_path) -> None:
    import tensorflow_datasets as tfds  # noqa: PLC0415 - takes two seconds to import

    pixels = [np.asarray(Image.fromarray(getattr(data, name)()).resize((300, 224))) for name in ("astronaut", "coffee")]

    class LargePhotographs(tfds.core.GeneratorBasedBuilder):
        """PNG bytes, which TFDS stores without TensorFlow."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["astronaut", "coffee"])
            image = tfds.features.Image(shape=(None, None, 3))
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": image, "label": label})
            )

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for index, photograph in enumerate(pixels):
                encoded = io.BytesIO()
                Image.fromarray(photograph).save(encoded, "PNG")
                encoded.seek(0)
                yield index, {"image": encoded, "label": index}

    LargePhotographs(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    whole = load_tfds("large_photographs", "test", data_dir=tmp_path)
    assert whole.images.shape == (2, 224, 300, 3)
    for image, label in zip(whole.images, whole.classes, strict=True):
        np.testing.assert_array_equal(image, pixels[label])
    square = load_tfds("large_photographs", "test", data_dir=tmp_path, image_size=224)
    assert square.images.shape == (2, 224, 224, 3)
    np.testing.assert_array_equal(square.images, whole.images[:, :, 38:262])
    assert square.class_names == ("astronaut", "coffee")
