"""Pictures of images: recovered ones, and original beside recovered with the difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softinv_jax.report.figures import GRAY, empty_figure, show_pixels

__all__ = ["ImageExample", "images_figure", "recovered_images_figure"]

COLUMNS = 8


@dataclass(frozen=True)
class ImageExample:
    """One image and what was recovered of it.

    Attributes:
      title: for example its label's format. original, recovered: (H, W, 3) in [0, 1]; recovered NaN where not found.
      verdict: in words. note: for example the peak signal-to-noise ratio.
    """

    title: str
    original: np.ndarray
    recovered: np.ndarray
    verdict: str
    note: str


def images_figure(examples: Sequence[ImageExample], caption: str) -> Figure:
    """Original, recovered and their difference, multiplied to be seen; one example a column.

    Args:
      examples: at least one. caption: what network and data these are.
    """
    figure = empty_figure(2.0 * len(examples) + 1.0, 7.0)
    grid = figure.subplots(3, len(examples), squeeze=False)
    for column, example in enumerate(examples):
        difference = np.abs(np.clip(example.recovered, 0, 1) - np.clip(example.original, 0, 1))
        largest = float(np.quantile(difference, 0.99)) if np.all(np.isfinite(difference)) else math.nan
        # By a power of ten, so that all but the largest differences are between a tenth and all of the range.
        power = math.floor(-math.log10(largest)) if largest > 0 else 0
        _show(grid[0, column], example.original, example.title, "")
        _show(grid[1, column], example.recovered, example.verdict.replace("_", " "), example.note)
        shown = difference * 10.0**power if math.isfinite(largest) else difference
        _show(grid[2, column], shown, f"times 10$^{{{power}}}$" if math.isfinite(largest) else "", "")
    for row, name in enumerate(("original", "recovered", "difference")):
        grid[row, 0].set_ylabel(name, fontsize=12)
    figure.suptitle(caption, fontsize=13, x=0.01, ha="left")
    return figure


def recovered_images_figure(images: np.ndarray, verdicts: Sequence[str]) -> Figure:
    """All images with their verdicts; each is stretched to its own range, because their scale is the model's.

    Args:
      images: (N, H, W, channels), NaN where not found. verdicts: N.
    """
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    figure = empty_figure(1.6 * columns + 0.4, 1.9 * rows + 0.2)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, image, verdict in zip(panels, images, verdicts, strict=False):
        low, high = (np.min(image), np.max(image)) if np.all(np.isfinite(image)) else (0.0, 1.0)
        _show(axes, (image - low) / (high - low if high > low else 1.0), verdict.replace("_", " "), "")
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    return figure


def _show(axes: Axes, image: np.ndarray, title: str, note: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if np.all(np.isfinite(image)):
        show_pixels(axes, image)
    else:
        axes.set_xlim(0, 1)
        axes.text(0.5, 0.5, "no image", ha="center", va="center", color=GRAY)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(note, fontsize=9, color=GRAY)
