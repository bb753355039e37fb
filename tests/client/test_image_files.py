"""Folders of pictures and .npz files: gray, not square, many channels; what cannot be read is said."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softinv_jax.client.dataset_names import load_public_and_private
from softinv_jax.client.image_files import load_folder, load_npz


def pictures(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture
def gray(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Two classes of three pictures 6 by 4, in splits."""
    pixels = pictures(6, 6, 4)
    for split in ("train", "test"):
        for number, image in enumerate(pixels):
            folder = tmp_path / split / ("cats" if number < 3 else "dogs")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    return tmp_path, pixels


def test_a_folder_of_gray_pictures_that_are_not_square(gray: tuple[Path, np.ndarray]) -> None:
    folder, pixels = gray
    held = load_folder(str(folder), "test")
    assert (held.images.shape, held.class_names) == ((6, 6, 4, 1), ("cats", "dogs"))
    # In another order, each with its class.
    for image, number in zip(held.images, held.classes, strict=True):
        (place,) = np.flatnonzero((pixels == image[..., 0]).all(axis=(1, 2)))
        assert number == place // 3
    assert load_folder(str(folder), "test", limit=2).images.shape == (2, 6, 4, 1)
    np.testing.assert_allclose(held.denormalise(held.normalised()), held.images / 255, atol=1e-6)


def test_the_largest_central_part_is_resized(gray: tuple[Path, np.ndarray]) -> None:
    held = load_folder(str(gray[0]), "test", image_size=(2, 4))
    whole = load_folder(str(gray[0]), "test")
    np.testing.assert_array_equal(held.images, whole.images[:, 2:4])


def test_gray_pictures_beside_coloured_ones(gray: tuple[Path, np.ndarray]) -> None:
    Image.fromarray(pictures(1, 6, 4, 3)[0]).save(gray[0] / "test" / "dogs" / "colour.png")
    held = load_folder(str(gray[0]), "test")
    assert held.images.shape == (7, 6, 4, 3)
    assert np.sum(np.all(held.images == held.images[..., :1], axis=(1, 2, 3))) == 6


def test_public_and_private_by_name(gray: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    public, private = load_public_and_private(f"folder:{gray[0]}")
    assert public.mean == private.mean
    path = tmp_path / "both.npz"
    images = pictures(5, 3, 7, 4)
    np.savez(path, train_images=images, train_labels=np.arange(5)[:, None], test_images=images[:2], test_labels=[4, 1])
    public, private = load_public_and_private(str(path))
    np.testing.assert_array_equal(private.images, images[:2])
    assert (public.images.shape, private.classes.tolist(), private.number_of_classes) == ((5, 3, 7, 4), [4, 1], 5)


@pytest.mark.parametrize("names", [("x_train", "y_train"), ("images", "labels"), ("images", "classes")])
def test_names_of_arrays(tmp_path: Path, names: tuple[str, str]) -> None:
    images = pictures(4, 5, 5)
    np.savez(tmp_path / "data.npz", **{names[0]: images, names[1]: np.array([0, 2, 1, 2])})
    held = load_npz(str(tmp_path / "data.npz"), limit=3, image_size=5)
    np.testing.assert_array_equal(held.images, images[:3, ..., None])
    assert held.classes.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pixels": pictures(2, 3, 3)}, "pixels"),
        ({"images": pictures(2, 3, 3), "labels": np.eye(2)}, "one integer"),
        ({"images": pictures(2, 3, 3) / 255, "labels": np.arange(2)}, "float64"),
        ({"images": pictures(2, 3, 3), "labels": np.arange(3)}, r"\(3,\)"),
        ({"images": np.array([{}]), "labels": np.arange(1)}, "cannot|no .npz|allow_pickle"),
    ],
)
def test_npz_files_that_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        load_npz(str(tmp_path / "data.npz"))


def test_folders_that_are_refused(gray: tuple[Path, np.ndarray]) -> None:
    folder = gray[0]
    with pytest.raises(ValueError, match="no such folder"):
        load_folder(str(folder / "none"))
    with pytest.raises(ValueError, match="no pictures"):
        load_folder(str(folder / "test" / "cats"))
    with pytest.raises(ValueError, match="limit=0"):
        load_folder(str(folder), limit=0)
    (folder / "test" / "cats" / "9.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"9\.png"):
        load_folder(str(folder), "test")
    (folder / "test" / "cats" / "9.png").unlink()
    Image.fromarray(pictures(1, 3, 3)[0]).save(folder / "test" / "cats" / "9.png")
    with pytest.raises(ValueError, match="several sizes"):
        load_folder(str(folder), "test")
