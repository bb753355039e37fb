"""Private images for the client: photographs that are always at hand, and prepared TFDS data sets.

Nothing here downloads. `load_photographs` reads what ships inside the scikit-image wheel; `load_tfds` reads
data that were prepared before and says how to prepare them where they were not.
"""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from PIL import Image

__all__ = [
    "PHOTOGRAPHS",
    "ImageDataset",
    "check_limits",
    "fit_picture",
    "load_photographs",
    "load_tfds",
    "read_picture",
    "stack_pictures",
]

Progress = Callable[[int, int, str], None]

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
    "stereo_motorcycle",
    "camera",
    "coins",
)
"""Functions of `skimage.data` that read from the wheel; the last two photographs are gray."""

_SPLITS = ("train", "test")
_CHUNK = 1000


@dataclass(frozen=True)
class ImageDataset:
    """Labelled 8-bit images on the host, with the statistics that normalise them.

    Attributes:
        images: (N, H, W, channels), uint8; one channel is gray.
        classes: (N,), int32.
        class_names: one name for each class.
        name: where the images come from.
        mean: of each channel, on the scale [0, 1].
        std: deviation of each channel, on the scale [0, 1].
    """

    images: np.ndarray
    classes: np.ndarray
    class_names: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_images(
        cls, images: np.ndarray, classes: np.ndarray, class_names: tuple[str, ...], name: str
    ) -> "ImageDataset":
        """Make a data set whose mean and standard deviation are those of its own images.

        Raises:
            ValueError: if `images` are not uint8 (N, H, W, channels) with N >= 1, `classes` not (N,) integers
                within `class_names`, or a channel is constant.
        """
        images, classes = np.asarray(images), np.asarray(classes)
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            found = f"{images.dtype} {images.shape}"
            raise ValueError(f"Expected uint8 images (N, H, W, channels), got {found}. Gray ones have one channel.")
        if classes.shape != images.shape[:1] or not np.issubdtype(classes.dtype, np.integer):
            found = f"{classes.dtype} {classes.shape}"
            raise ValueError(f"Expected integer classes ({images.shape[0]},), got {found}. One an image.")
        if classes.min() < 0 or classes.max() >= len(class_names):
            found = f"{classes.min()} to {classes.max()}"
            raise ValueError(f"Classes go from {found} with {len(class_names)} class_names. Name every class.")
        mean, std = _channel_statistics(images)
        if min(std) == 0.0:
            raise ValueError(f"Expected std={std} > 0 in every channel. Give images that are not constant.")
        return cls(images, classes.astype(np.int32), tuple(class_names), name, mean, std)

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def number_of_classes(self) -> int:
        return len(self.class_names)

    def with_statistics_of(self, other: "ImageDataset") -> "ImageDataset":
        """Return this data set with the mean and std of another, as a test set takes its train set's."""
        return replace(self, mean=other.mean, std=other.std)

    def normalised(self) -> jax.Array:
        """Return (images / 255 - mean) / std, (N, H, W, channels), float32."""
        mean, std = (np.asarray(value, np.float32)[None, None, None] for value in (self.mean, self.std))
        return (jnp.asarray(self.images, jnp.float32) / 255.0 - mean) / std

    def denormalise(self, images: ArrayLike) -> jax.Array:
        """Undo `normalised` for images (..., H, W, channels): values on the scale [0, 1], not clipped."""
        images = jnp.asarray(images)
        shape = (1,) * (images.ndim - 1) + (-1,)
        mean = jnp.asarray(self.mean, images.dtype).reshape(shape)
        return images * jnp.asarray(self.std, images.dtype).reshape(shape) + mean


def _channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # From the histogram of the 256 values: exact, and no float copy of the images.
    channels = images.reshape(-1, images.shape[-1]).T
    shares = np.stack([np.bincount(channel, minlength=256) for channel in channels]) / channels.shape[1]
    values = np.arange(256) / 255.0
    mean = shares @ values
    deviation = np.sqrt(np.sum(shares * (values[None] - mean[:, None]) ** 2, axis=1))
    return tuple(mean.tolist()), tuple(deviation.tolist())


def load_photographs(
    *, split: str = "train", per_class: int = 200, image_size: int = 32, seed: int = 0
) -> ImageDataset:
    """Random crops of ten real photographs inside the scikit-image wheel, one class for each photograph.

    A crop is a square of side U(0.3, 1) times the photograph's shorter side, at a uniform place, resized
    with antialiasing and flipped left to right half of the time. The splits are independent draws from the
    same photographs, so test crops overlap train crops: accuracy says nothing about other photographs.

    Args:
        split: 'train' or 'test'.
        per_class: crops of each photograph.
        image_size: side of the square result, pixels.
        seed: the same seed and split give the same images.

    Returns:
        An `ImageDataset` of 10 * per_class images, shuffled, with statistics of its own.

    Raises:
        ValueError: on an unknown split, or a size below 1.
    """
    if split not in _SPLITS:
        raise ValueError(f"Unknown split={split!r}. Choose 'train' or 'test'.")
    if per_class < 1 or image_size < 1:
        raise ValueError(f"Expected per_class={per_class} >= 1 and image_size={image_size} >= 1.")
    generator = np.random.default_rng([seed, _SPLITS.index(split)])
    crops = np.empty((len(PHOTOGRAPHS), per_class, image_size, image_size, 3), np.uint8)
    for row, name in zip(crops, PHOTOGRAPHS, strict=True):
        photograph = _photograph(name)
        for index in range(per_class):
            row[index] = _random_crop(generator, photograph, image_size)
    order = generator.permutation(len(PHOTOGRAPHS) * per_class)
    classes = np.repeat(np.arange(len(PHOTOGRAPHS), dtype=np.int32), per_class)
    images = crops.reshape(-1, image_size, image_size, 3)
    return ImageDataset.from_images(images[order], classes[order], PHOTOGRAPHS, f"photographs/{split}")


def _photograph(name: str) -> Image.Image:
    from skimage import data  # noqa: PLC0415 - slow to import

    pixels: Any = getattr(data, name)()
    # `stereo_motorcycle` gives left view, right view and disparity.
    picture = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
    # No crop needs more than 512 pixels, and the largest photograph has 1411.
    picture.thumbnail((512, 512), Image.Resampling.BICUBIC)
    return picture


def _random_crop(generator: np.random.Generator, photograph: Image.Image, image_size: int) -> np.ndarray:
    scale, across, down, flip = generator.random(4)
    side = (0.3 + 0.7 * scale) * min(photograph.size)
    left, top = across * (photograph.width - side), down * (photograph.height - side)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(crop)[:, :: -1 if flip < 0.5 else 1]


def load_tfds(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> ImageDataset:
    """Read a prepared TensorFlow data set through `tfds.data_source`, without TensorFlow and without network.

    Args:
        name: as TFDS knows it, e.g. 'cifar10'; it must have the features 'image' and 'label'.
        split: e.g. 'train', or a slice 'test[:1000]'.
        data_dir: where the data were prepared; else the variable TFDS_DATA_DIR, else ~/tensorflow_datasets.
        limit: read only the first `limit` examples (TFDS shuffled them when it prepared them).
        image_size: (height, width), or the side of squares, pixels: cut the largest central part of that shape and
            resize it. None leaves images as they are.
        progress: called with (images read, images in all, note).

    Returns:
        An `ImageDataset`; gray images have one channel, unless others of the set have three.

    Raises:
        FileNotFoundError: if the data are not prepared as array_record; the message says how to do that.
        ValueError: on an unknown name or split, a data set without 'image' and 'label', or images of
            several sizes while `image_size` is None.
    """
    check_limits(limit, image_size)
    import tensorflow_datasets as tfds  # noqa: PLC0415 - takes two seconds to import

    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    builder = _prepared_builder(tfds, name, split, folder)
    # Decoding here spares the caller TFDS's hint to install OpenCV, and takes a third of its time.
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    count = len(source) if limit is None else min(limit, len(source))
    images: list[np.ndarray] = []
    classes: list[int] = []
    for start in range(0, count, _CHUNK):
        for record in source.__getitems__(list(range(start, min(start + _CHUNK, count)))):
            images.append(read_picture(io.BytesIO(record["image"]), image_size))
            classes.append(int(record["label"]))
        if progress is not None:
            progress(len(images), count, f"{name} {split}")
    names = tuple(builder.info.features["label"].names)
    return ImageDataset.from_images(stack_pictures(images, name), np.asarray(classes), names, f"{name}/{split}")


def _prepared_builder(tfds: Any, name: str, split: str, folder: Path) -> Any:
    """Look for the data first: TFDS itself would go on to the network and wait there for minutes."""
    try:
        builder = tfds.builder(name, data_dir=str(folder))
    except tfds.core.registered.DatasetNotFoundError:
        # Its own message goes on with a thousand names.
        raise ValueError(f"TFDS has no data set name={name!r}. Use a name such as 'cifar10'.") from None
    info = builder.info
    if not info.splits or "array_record" not in str(info.file_format.value):
        raise FileNotFoundError(
            f"{name!r} is not prepared as array_record in data_dir={str(folder)!r}. Prepare it once, with "
            "network:\n    pip install 'softinv_jax[tfds-prepare]'\n    python -c \"import "
            f"tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir={str(folder)!r}, "
            "file_format='array_record').download_and_prepare()\"\n"
            "or give the data_dir (or TFDS_DATA_DIR) where it is."
        )
    if split.split("[", maxsplit=1)[0] not in info.splits:
        raise ValueError(f"{name!r} has no split={split!r}. Prepared here: {', '.join(info.splits)}.")
    features = set(info.features)
    if not {"image", "label"} <= features or not hasattr(info.features["label"], "names"):
        raise ValueError(f"{name!r} has {sorted(features)}. Take one with an 'image' and a class 'label'.")
    return builder


def check_limits(limit: int | None, image_size: int | tuple[int, int] | None) -> None:
    """Raise ValueError unless both are positive, or None."""
    for option, value in (("limit", limit), ("image_size", image_size)):
        if value is not None and min(np.atleast_1d(value)) < 1:
            raise ValueError(f"Expected {option}={value} >= 1. Use None for everything as it is.")


def read_picture(file: BinaryIO | Path, image_size: int | tuple[int, int] | None) -> np.ndarray:
    """One picture as uint8 (H, W, 1) if it is gray, else (H, W, 3); see `load_tfds` for its size."""
    with Image.open(file) as picture:
        return fit_picture(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"), image_size)


def fit_picture(picture: Image.Image, image_size: int | tuple[int, int] | None) -> np.ndarray:
    """The largest central part of the shape wanted, resized; (H, W, channels)."""
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if picture.size != (width, height):
            scale = min(picture.width / width, picture.height / height)
            left, top = (picture.width - scale * width) / 2, (picture.height - scale * height) / 2
            box = (left, top, left + scale * width, top + scale * height)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def stack_pictures(pictures: Sequence[np.ndarray], name: str) -> np.ndarray:
    """(N, H, W, channels); gray ones get three channels where others have them.

    Raises:
        ValueError: where sizes differ.
    """
    if len({picture.shape[:2] for picture in pictures}) > 1:
        raise ValueError(f"The images of {name!r} have several sizes while image_size=None. Give one.")
    channels = max(picture.shape[2] for picture in pictures)
    return np.stack([np.broadcast_to(picture, (*picture.shape[:2], channels)) for picture in pictures])
