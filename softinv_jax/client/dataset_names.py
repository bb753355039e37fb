"""Data sets by name, as `--dataset` takes them."""

from typing import Any

from softinv_jax.client.datasets import ImageDataset, load_photographs, load_tfds
from softinv_jax.client.image_files import load_folder, load_npz

__all__ = ["PHOTOGRAPHS_NAME", "load_public_and_private"]

PHOTOGRAPHS_NAME = "photographs"
FOLDER = "folder:"


def load_public_and_private(
    name: str,
    *,
    data_dir: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    limit: int | None = None,
    crops: tuple[int, int] = (200, 50),
    seed: int = 0,
) -> tuple[ImageDataset, ImageDataset]:
    """Images to train on, and those that clients keep private, with the statistics of the former.

    Args:
        name: `photographs`; `folder:PATH`; `FILE.npz`; or a prepared TFDS data set.
        data_dir: where TFDS data sets were prepared.
        image_size: see `load_tfds`. limit: of each; not of photographs.
        crops: of photographs, how many a class. seed: of photographs and folders.

    Raises:
        ValueError, FileNotFoundError: as the loaders; a data set without one of the splits is both by the other.
    """
    if name == PHOTOGRAPHS_NAME:
        size = 32 if image_size is None else image_size
        if not isinstance(size, int):
            raise ValueError(f"photographs are cut to squares, not to {size}; give one side")
        public = load_photographs(per_class=crops[0], image_size=size, seed=seed)
        private = load_photographs(split="test", per_class=crops[1], image_size=size, seed=seed)
        return public, private.with_statistics_of(public)
    options: dict[str, Any] = {"image_size": image_size, "limit": limit}

    def load(split: str) -> ImageDataset:
        if name.startswith(FOLDER):
            return load_folder(name.removeprefix(FOLDER), split, seed=seed, **options)
        if name.endswith(".npz"):
            return load_npz(name, split, **options)
        return load_tfds(name, split, data_dir=data_dir, **options)

    private = load("test")
    try:
        public = load("train")
    except ValueError as error:
        if "no split" not in str(error):
            raise
        public = private
    return public, private.with_statistics_of(public)
