"""The pictures of an audit: leakage against strength, labels, images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from softinv_jax.audit.catalogue import DEFENCES
from softinv_jax.audit.cells import Cell
from softinv_jax.audit.run import AuditResult
from softinv_jax.audit.settings import Sweep
from softinv_jax.audit.summary import CellSummary, Estimate, Share
from softinv_jax.images.verdicts import image_verdict_names
from softinv_jax.labels.verdicts import verdict_names
from softinv_jax.report.figures import BLUE, GRAY, GREEN, ORANGE, LabelExample, empty_figure, labels_figure
from softinv_jax.report.image_figures import ImageExample, images_figure

__all__ = ["audit_figures"]

SHOWN_LABELS = 5


def audit_figures(result: AuditResult) -> dict[str, Figure]:
    """By name: `labels`, `images` where these were tried, and `leakage-DEFENCE` for each sweep of several strengths.

    A sweep that appears twice, with other defences beside it, is numbered.
    """
    figures = {"labels": _labels(result)}
    tried = [(title, cell) for title, cell in (("no defence", result.baseline_cell), *result.shown) if _tried(cell)]
    if tried:
        caption = f"One client's image, and what comes back of it ({result.system.name}, {result.system.data.name})"
        figures["images"] = images_figure([_image(title, cell) for title, cell in tried], caption)
    for sweep, cells in result.sweeps:
        if len(cells) > 1:
            name = f"leakage-{sweep.defence}"
            number = 1 + sum(other == name or other.startswith(f"{name}-") for other in figures)
            figures[name if number == 1 else f"{name}-{number}"] = _leakage(sweep, cells, result.baseline)
    return figures


def _labels(result: AuditResult) -> Figure:
    cell, data = result.baseline_cell, result.system.data
    names = verdict_names(cell["verdict"])
    count = min(SHOWN_LABELS, len(cell["original"]), len(names)) or 1
    blank = np.ones((1, 1, 3))
    examples = [
        LabelExample(
            f"Client {number + 1}",
            str(names[number]).replace("_", " "),
            cell["original"][number] if number < len(cell["original"]) else blank,
            cell["true_label"][number],
            cell["label"][number],
            "" if np.all(np.isfinite(cell["label"][number])) else "no label recovered",
        )
        for number in range(count)
    ]
    return labels_figure(examples, data.class_names, "Without a defence: true labels, and those in the gradients")


def _tried(cell: Cell) -> bool:
    return bool(np.any(cell["image_tried"]))


def _image(title: str, cell: Cell) -> ImageExample:
    quality = cell["psnr"][0]
    note = f"{quality:.0f} dB" if np.isfinite(quality) else ""
    verdict = str(image_verdict_names(cell["image_verdict"])[0])
    shortened = title.replace(" (clipping and noise)", "").replace(" (top-k)", "")
    return ImageExample(shortened, cell["original"][0], cell["recovered"][0], verdict, note)


def _leakage(sweep: Sweep, cells: Sequence[CellSummary], baseline: CellSummary) -> Figure:
    """What leaks against the defence's strength: labels and class above, errors below."""
    with_images = baseline.images > 0
    figure = empty_figure(11.0 if with_images else 7.6, 4.4)
    panels = figure.subplots(1, 3 if with_images else 2, width_ratios=[1.25, 1, 1] if with_images else [1.25, 1])
    shares, errors = panels[0], panels[1]
    strengths = np.array(sweep.strengths)
    for values, base, colour, marker, name in (
        ([cell.class_found for cell in cells], baseline.class_found, GRAY, "s", "class known"),
        ([cell.certain for cell in cells], baseline.certain, ORANGE, "o", "label certain"),
        ([cell.likely for cell in cells], baseline.likely, BLUE, "^", "label likely, not certain"),
    ):
        _draw_shares(shares, strengths, values, base, colour, marker, name)
    shares.set_ylim(-3, 103)
    shares.set_ylabel("clients, per cent")
    shares.set_title("What is known of the label", loc="left", fontsize=11)
    _draw_estimates(errors, strengths, [cell.label_error for cell in cells], ORANGE)
    errors.set_yscale("log")
    errors.set_title("Median of the largest label error", loc="left", fontsize=11)
    if with_images:
        _draw_estimates(panels[2], strengths, [cell.psnr for cell in cells], GREEN)
        panels[2].set_title("Images: mean PSNR, dB", loc="left", fontsize=11)
    for axes in panels:
        _strength_axis(axes, strengths)
        axes.set_xlabel(_wrapped(DEFENCES[sweep.defence].strength), fontsize=8.5)
        axes.grid(True, color="#E5E5E5", linewidth=0.7, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    shares.legend(loc="best", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")
    figure.suptitle(sweep.title, fontsize=13, x=0.01, ha="left")
    return figure


def _draw_shares(
    axes: Axes, strengths: np.ndarray, shares: Sequence[Share], base: Share, colour: str, marker: str, name: str
) -> None:
    middle = np.array([100 * share.count / share.total for share in shares])
    bars = np.array([[100 * share.low, 100 * share.high] for share in shares]).T
    reach = np.maximum([middle - bars[0], bars[1] - middle], 0)
    axes.errorbar(strengths, middle, reach, color=colour, marker=marker, markersize=5, capsize=3, label=name)
    axes.axhline(100 * base.count / base.total, color=colour, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)


def _draw_estimates(axes: Axes, strengths: np.ndarray, estimates: Sequence[Estimate], colour: str) -> None:
    known = [place for place, estimate in enumerate(estimates) if estimate.value]
    if not known:
        axes.text(0.5, 0.5, "nothing recovered", transform=axes.transAxes, ha="center", color=GRAY)
        return
    middle = np.array([estimates[place].value for place in known], float)
    bars = np.array([[estimates[place].low or np.nan, estimates[place].high or np.nan] for place in known], float).T
    reach = np.nan_to_num(np.maximum([middle - bars[0], bars[1] - middle], 0))
    axes.errorbar(strengths[known], middle, reach, color=colour, marker="o", markersize=5, capsize=3)


def _strength_axis(axes: Axes, strengths: np.ndarray) -> None:
    positive = np.all(strengths > 0)
    if positive and strengths.max() / strengths.min() > 30:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths], fontsize=8)
    if strengths[0] > strengths[-1]:  # Stronger to the right.
        axes.invert_xaxis()


def _wrapped(text: str, width: int = 44) -> str:
    lines = [""]
    for word in text.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [lines[-1], word]
    return "\n".join(lines)
