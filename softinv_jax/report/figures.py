"""The demo's two pictures. Figures are objects of their own: no window, no global matplotlib state."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

__all__ = [
    "GRAY",
    "LabelExample",
    "Landscape",
    "empty_figure",
    "figure_png",
    "labels_figure",
    "landscape_figure",
    "show_pixels",
]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"
PALE_BLUE = "#A9CCE3"
NAMED_CLASSES = 12


@dataclass(frozen=True)
class Landscape:
    """The variance loss of one example.

    Attributes:
      name: what example it is. scalar: the recovered lambda.
      wide: (M,) scalars about it and wide_losses, the loss there by what is left out ("top one", "top two").
      near, near_losses: likewise close to it.
    """

    name: str
    scalar: float
    wide: np.ndarray
    wide_losses: dict[str, np.ndarray]
    near: np.ndarray
    near_losses: dict[str, np.ndarray]


@dataclass(frozen=True)
class LabelExample:
    """One example's image, true label and what was recovered.

    Attributes:
      title: its format. verdict: in words.
      image: (H, W, 3) in [0, 1]. true: (C,). recovered: (C,), NaN where no label is claimed.
      note: a line for the plot where no label is claimed.
    """

    title: str
    verdict: str
    image: np.ndarray
    true: np.ndarray
    recovered: np.ndarray
    note: str = ""


def landscape_figure(landscape: Landscape) -> Figure:
    """The loss over the scalar, whole and close to the recovered one."""
    figure = empty_figure(12.0, 5.6)
    wide, near = figure.subplots(1, 2)
    styles = dict(zip(landscape.wide_losses, (BLUE, GREEN), strict=False))
    for name, losses in landscape.wide_losses.items():
        wide.plot(landscape.wide, losses, color=styles[name], linewidth=1.8, label=f"{name} left out")
    wide.set_xscale("log")
    wide.set_title("The whole landscape", loc="left")
    wide.set_xlabel("scalar λ (length of the feature) that is tried")
    for name, losses in landscape.near_losses.items():
        offset = (landscape.near / landscape.scalar - 1) * 100
        near.plot(offset, losses, color=styles[name], linewidth=1.8, label=f"{name} left out")
    near.set_title("Close to the recovered scalar", loc="left")
    near.set_xlabel("distance of λ from the recovered one, in per cent")
    near.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes, place in ((wide, landscape.scalar), (near, 0.0)):
        name = f"recovered: λ = {landscape.scalar:.5g}"
        axes.axvline(place, color=ORANGE, linewidth=1.6, linestyle=(0, (4, 3)), zorder=1, label=name)
        axes.set_yscale("log")
        axes.set_ylabel("variance of the label's remaining entries")
        axes.grid(True, color="#E5E5E5", linewidth=0.7, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    wide.legend(loc="lower left", frameon=True, framealpha=0.95, edgecolor="none")
    figure.suptitle(f"Variance loss of one gradient: {landscape.name}", fontsize=15, x=0.01, ha="left")
    figure.supxlabel(
        "The right λ makes the remaining entries equal, if as many entries are left out as the label singles out."
        " Far to the right the loss falls\nfor any gradient, because every label tends to one-hot there:"
        " a small loss alone proves nothing.",
        fontsize=10.5,
        color=GRAY,
        x=0.01,
        ha="left",
    )
    return figure


def labels_figure(examples: Sequence[LabelExample], class_names: Sequence[str], caption: str) -> Figure:
    """True against recovered labels, one example a panel, with its image beside it.

    Args:
      examples: at least one. class_names: C names. caption: what network and data these are.
    """
    columns = 2 if len(examples) > 1 else 1
    rows = math.ceil((len(examples) + 1) / columns)
    figure = empty_figure(7.2 * columns, 2.75 * rows + 0.5)
    grid = figure.subplots(rows, 2 * columns, width_ratios=[1.0, 2.6] * columns, squeeze=False)
    panels = [(row[2 * place], row[2 * place + 1]) for row in grid for place in range(columns)]
    for (picture, bars), example in zip(panels, examples, strict=False):
        show_pixels(picture, example.image)
        picture.set_axis_off()
        _draw_label(bars, example, class_names)
    for picture, bars in panels[len(examples) :]:
        picture.set_axis_off()
        bars.set_axis_off()
    _draw_legend(panels[len(examples)][1])
    figure.suptitle(caption, fontsize=15, x=0.01, ha="left")
    return figure


def _draw_label(axes: Axes, example: LabelExample, class_names: Sequence[str]) -> None:
    places = np.arange(example.true.size)
    axes.bar(places, example.true, width=0.82, color=PALE_BLUE)
    is_claimed = bool(np.isfinite(example.recovered).all())
    if is_claimed:
        size = 26 if places.size <= NAMED_CLASSES else 8
        axes.scatter(places, example.recovered, s=size, color=ORANGE, zorder=3, clip_on=False)
    elif example.note:
        axes.text(0.5, 0.8, example.note, transform=axes.transAxes, ha="center", va="center", color=ORANGE)
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.7, places.size - 0.3)
    axes.set_ylabel("label entry")
    axes.set_title(f"{example.title}: {example.verdict}", loc="left", fontsize=12)
    if is_claimed:
        error = np.max(np.abs(example.recovered - example.true))
        axes.set_title(f"largest error {error:.0e}" if error > 0 else "no error", loc="right", fontsize=10, color=GRAY)
    axes.spines[["top", "right"]].set_visible(False)
    if places.size <= NAMED_CLASSES:
        names = [name.replace("_", " ") for name in class_names]
        shortened = [name if len(name) <= 10 else name[:9] + "." for name in names]
        axes.set_xticks(places, shortened, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_xlabel("class")


def _draw_legend(axes: Axes) -> None:
    handles = [
        Patch(color=PALE_BLUE, label="true label (only the client knows it)"),
        Line2D([], [], color=ORANGE, marker="o", linestyle="", label="label recovered from the gradient"),
    ]
    axes.legend(handles=handles, loc="center left", frameon=False, fontsize=12, borderaxespad=0)


def figure_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def show_pixels(axes: Axes, image: np.ndarray) -> None:
    """(H, W, channels) in [0, 1], clipped; the first channel in gray where there are not three."""
    pixels = np.clip(image, 0, 1)
    axes.imshow(
        pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3],
        cmap="gray",
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )


def empty_figure(width: float, height: float) -> Figure:
    """A figure of its own, inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
