"""The demo's files: up to five pictures, results.json and results.npz."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from softinv_jax.client.datasets import ImageDataset
from softinv_jax.command_line.demo_batch import BatchOutcome, batch_figure
from softinv_jax.command_line.experiment import Examples, Outcome
from softinv_jax.command_line.outputs import write_atomically, write_npz
from softinv_jax.labels.verdicts import Verdict, verdict_names
from softinv_jax.measures.label_error import feature_error, label_error
from softinv_jax.report.figures import LabelExample, Landscape, labels_figure, landscape_figure
from softinv_jax.report.image_figures import ImageExample, images_figure
from softinv_jax.report.landscape import variance_landscape

__all__ = ["write_files"]

EXCLUDED = {"top one": 1, "top two": 2}
# The format whose landscape teaches most comes first: a mixup label shows why the paper's method needs to be told.
TITLES = {"k_way_mixup": "Three-way mixup", "cutmix": "CutMix"}
LANDSCAPE_FORMATS = ("mixup", "smoothed_mixup", "cutmix", "smoothing", "hard", "k_way_mixup")


def write_files(
    folder: Path,
    examples: Examples,
    outcomes: Sequence[Outcome],
    batch: BatchOutcome | None,
    pictures: Sequence[ImageExample],
    larger: Sequence[ImageExample],
    private: ImageDataset,
    results: dict[str, Any],
) -> list[Path]:
    """Write everything, replacing what an earlier demo left in `folder`.

    Returns:
      The paths written.

    Raises:
      InputError: where the folder cannot be written.
    """
    shown = [outcome for outcome in outcomes if outcome.scale_known] or list(outcomes)
    figures = {"labels.png": _labels(examples, shown[-1], private)}
    if shown[-1].scale_known:
        landscape = _landscape(examples, shown[-1])
        if landscape is not None:
            figures["landscape.png"] = landscape_figure(landscape)
    if batch is not None:
        figures["batch.png"] = batch_figure(batch, private)
    caption = f"Private images, and what one gradient gives away of them (untrained LeNet, {private.name})"
    figures["images.png"] = images_figure(pictures, caption)
    caption = f"The first of 32 images behind one gradient (untrained dense layers, {private.name})"
    figures["larger_batch.png"] = images_figure(larger, caption)
    text = (json.dumps(results, allow_nan=False, indent=1) + "\n").encode()
    paths = [folder / name for name in (*figures, "results.json", "results.npz")]
    for name, figure in figures.items():
        _save(folder / name, figure)
    write_atomically(str(folder / "results.json"), lambda file: file.write(text))
    write_npz(str(folder / "results.npz"), _arrays(examples, outcomes))
    return paths


def _save(path: Path, figure: Figure) -> None:
    write_atomically(str(path), lambda file: figure.savefig(file, format="png"))


def _arrays(examples: Examples, outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """One row for each gradient attacked."""
    true_label = np.asarray(examples.labels)
    tables = []
    for outcome in outcomes:
        recovery = outcome.recovery
        count = len(true_label)
        tables.append(
            {
                "network": np.full(count, outcome.network),
                "scale_known": np.full(count, outcome.scale_known),
                "label_format": examples.label_format,
                "true_label": true_label,
                "recovered_label": recovery.label,
                "verdict": verdict_names(recovery.verdict),
                "scalar": recovery.scalar,
                "scale": recovery.scale,
                "label_error": label_error(recovery.label, true_label).largest,
                "feature_error": feature_error(recovery.feature, outcome.features),
            }
        )
    return {name: np.concatenate([np.asarray(table[name]) for table in tables]) for name in tables[0]}


def _first(examples: Examples, outcome: Outcome, label_format: str) -> tuple[int, bool]:
    """An example of a format, a recovered one if there is one; and whether it is."""
    of_format = np.flatnonzero(examples.label_format == label_format)
    recovered = of_format[np.asarray(outcome.recovery.verdict)[of_format] == Verdict.UNIQUE]
    return (int(recovered[0]), True) if recovered.size else (int(of_format[0]), False)


def _labels(examples: Examples, outcome: Outcome, private: ImageDataset) -> Figure:
    shown = []
    for label_format in dict.fromkeys(examples.label_format.tolist()):
        index, _ = _first(examples, outcome, label_format)
        recovery = outcome.recovery
        low, high = (float(end) for end in np.asarray(recovery.interval)[index])
        note = "no label is claimed"
        if np.isfinite([low, high]).all():
            note += f":\nthe gradient only says that λ lies between {low:.3g} and {high:.3g}"
        shown.append(
            LabelExample(
                title=TITLES.get(label_format, label_format.replace("_", " ").capitalize()),
                verdict=str(verdict_names(recovery.verdict[index])).replace("_", " "),
                image=np.asarray(private.denormalise(examples.images[index])),
                true=np.asarray(examples.labels[index]),
                recovered=np.asarray(recovery.label[index]),
                note=note,
            )
        )
    caption = f"Private labels, and what one gradient gives away of them ({outcome.network} LeNet, {private.name})"
    return labels_figure(shown, private.class_names, caption)


def _landscape(examples: Examples, outcome: Outcome) -> Landscape | None:
    present = set(examples.label_format.tolist())
    for label_format in LANDSCAPE_FORMATS:
        if label_format in present:
            index, is_recovered = _first(examples, outcome, label_format)
            if is_recovered:
                name = f"a {label_format.replace('_', ' ')} label, {outcome.network} LeNet"
                return _landscape_of(name, outcome, index)
    return None


def _landscape_of(name: str, outcome: Outcome, index: int) -> Landscape:
    observation = outcome.observation
    gradient = observation.weight_gradient[index]
    feature = np.asarray(outcome.recovery.feature[index], np.float64)
    scalar = float(np.linalg.norm(feature))

    def losses(scalars: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: variance_landscape(observation.weight, gradient, feature, scalars, excluded)
            for name, excluded in EXCLUDED.items()
        }

    # One of each grid's points is the root itself.
    wide = scalar * np.geomspace(1 / 50, 50, 1401)
    near = scalar * (1 + np.linspace(-0.02, 0.02, 801))
    return Landscape(name, scalar, wide, losses(wide), near, losses(near))
