"""Private images from files of the user's: folders of pictures, one folder a class, and .npz files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from softinv_jax.client.datasets import (
    ImageDataset,
    Progress,
    check_limits,
    fit_picture,
    read_picture,
    stack_pictures,
)

__all__ = ["load_folder", "load_npz"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
# Names of images and classes in .npz files: ours, MedMNIST's, Keras's.
_NAMES = (("{split}_images", "{split}_labels"), ("x_{split}", "y_{split}"), ("images", "labels"), ("images", "classes"))


def load_folder(
    path: str,
    split: str = "train",
    *,
    limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImageDataset:
    """Pictures in one folder for each class: PATH/SPLIT/CLASS/*.png, or PATH/CLASS/*.png for every split.

    Args:
        path: the folder. split: the name of a folder in it, if there is one; such as 'train' or 'test'.
        limit: read only so many, drawn at random over all classes.
        image_size: see `load_tfds`. seed: of the order.
        progress: called with (images read, images in all, note).

    Raises:
        ValueError: where there is no folder, no class with pictures, a file that is no picture, or images of several
            sizes while `image_size` is None.
    """
    check_limits(limit, image_size)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"{path}: no such folder")
    root = root / split if (root / split).is_dir() else root
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
    found = [
        (file, place)
        for place, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in PICTURES
    ]
    if not found:
        raise ValueError(f"{root}: no pictures in folders, one for each class; put them there as CLASS/NAME.png")
    order = np.random.default_rng(seed).permutation(len(found))[:limit]
    pictures, classes = [], []
    for place in order.tolist():
        file, number = found[place]
        try:
            pictures.append(read_picture(file, image_size))
        except OSError as error:
            raise ValueError(f"{file}: no picture that can be read ({error})") from error
        classes.append(number)
        if progress is not None:
            progress(len(pictures), len(order), str(root))
    names = tuple(folder.name for folder in folders)
    return ImageDataset.from_images(stack_pictures(pictures, path), np.asarray(classes), names, f"{root.name}")


def load_npz(
    path: str,
    split: str = "train",
    *,
    limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> ImageDataset:
    """Images and their classes from an .npz file, 8-bit, with or without an axis for channels.

    The arrays are called `images` and `labels` (or `classes`), `train_images`, `train_labels`, `test_images`, ..., as
    MedMNIST does, or `x_train`, `y_train`, `x_test`, ..., as Keras does. `class_names`, if there are any.

    Args:
        path: the file. split: which of them. limit: read only the first so many.
        image_size: see `load_tfds`; for one or three channels.

    Raises:
        ValueError: for a file that cannot be read or holds no such arrays, or arrays that `ImageDataset` refuses.
    """
    check_limits(limit, image_size)
    try:
        with np.load(path, allow_pickle=False) as file:
            images, classes = _arrays(path, file, split)
            names = tuple(map(str, file["class_names"])) if "class_names" in file else None
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(path):
            raise
        raise ValueError(f"{path}: no .npz file that can be read ({error})") from error
    images, classes = images[:limit], classes.reshape(len(classes), -1)[:limit]
    if classes.shape[1] != 1 or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(f"{path}: labels must be one integer an image, but are {classes.dtype} {classes.shape}")
    if images.ndim == 3:
        images = images[..., None]
    if image_size is not None and images.dtype == np.uint8:
        if images.shape[-1] not in (1, 3):
            raise ValueError(
                f"{path}: images of {images.shape[-1]} channels are taken as they are; leave image_size out"
            )
        pictures = (Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images)
        images = stack_pictures([fit_picture(picture, image_size) for picture in pictures], path)
    names = names or tuple(map(str, range(int(classes.max(initial=0)) + 1)))
    return ImageDataset.from_images(images, classes[:, 0], names, f"{Path(path).stem}/{split}")


def _arrays(path: str, file: Mapping[str, np.ndarray], split: str) -> tuple[np.ndarray, np.ndarray]:
    for pattern, other in _NAMES:
        images, classes = pattern.format(split=split), other.format(split=split)
        if images in file and classes in file:
            return file[images], file[classes]
    held = ", ".join(list(file)[:6]) or "nothing"
    raise ValueError(f"{path}: has neither images and labels nor {split}_images and {split}_labels, but {held}")
