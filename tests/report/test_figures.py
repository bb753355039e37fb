"""Pictures and tables: drawn without a display, with what a reader needs in them."""

import io

import numpy as np
import pytest
from rich.console import Console

from softinv_jax.report.figures import LabelExample, Landscape, labels_figure, landscape_figure
from softinv_jax.report.landscape import variance_landscape
from softinv_jax.report.tables import DemoRow, demo_tables

TOP = {"top one": 1, "top two": 2}


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@pytest.fixture
def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, gradient and feature of a smoothed label."""
    generator = np.random.default_rng(0)
    weight, feature = generator.normal(size=(10, 32)), generator.random(32)
    label = np.full(10, 0.03)
    label[4] += 0.7
    return weight, np.outer(softmax(weight @ feature) - label, feature), feature


def png_size(figure) -> tuple[int, int]:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    content = file.getvalue()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def texts(figure) -> str:
    words = [figure.get_suptitle(), figure.get_supxlabel()]
    for axes in figure.axes:
        words += [axes.get_title(loc="left"), axes.get_title(loc="right"), axes.get_xlabel(), axes.get_ylabel()]
        words += [text.get_text() for text in axes.texts]
    return "\n".join(words)


def test_landscape_agrees_with_a_naive_loss_and_vanishes_at_the_true_scalar(example) -> None:
    weight, gradient, feature = example
    scalar = np.linalg.norm(feature)
    scalars = scalar * np.array([0.5, 1.0, 2.0])
    unit = feature / scalar
    for excluded in (1, 2):
        losses = variance_landscape(weight, gradient, 7.0 * feature, scalars, excluded)
        labels = [softmax(s * weight @ unit) - gradient @ unit / s for s in scalars]
        naive = [np.var(np.sort(label)[: 10 - excluded]) for label in labels]
        # float64: the entries are of size 1.
        np.testing.assert_allclose(losses, naive, rtol=1e-9, atol=1e-28)
        assert losses[1] < 1e-28
        assert losses[[0, 2]].min() > 1e-6


def test_landscape_figure_marks_the_recovered_scalar(example) -> None:
    weight, gradient, feature = example
    scalar = float(np.linalg.norm(feature))
    wide, near = scalar * np.geomspace(0.1, 10, 51), scalar * np.linspace(0.99, 1.01, 51)

    def losses(scalars: np.ndarray) -> dict[str, np.ndarray]:
        return {name: variance_landscape(weight, gradient, feature, scalars, count) for name, count in TOP.items()}

    figure = landscape_figure(Landscape("a smoothed label", scalar, wide, losses(wide), near, losses(near)))
    assert "a smoothed label" in texts(figure)
    left, right = figure.axes
    assert left.get_yscale() == right.get_yscale() == "log"
    labels = [line.get_label() for line in left.get_lines()]
    assert labels == ["top one left out", "top two left out", f"recovered: λ = {scalar:.5g}"]
    assert left.get_lines()[2].get_xdata()[0] == scalar
    assert min(png_size(figure)) > 500


@pytest.mark.parametrize("number_of_classes", [10, 100])
def test_labels_figure_shows_recovered_labels_and_claims_nothing_else(number_of_classes) -> None:
    generator = np.random.default_rng(1)
    image = generator.random((32, 32, 3))
    true = np.full(number_of_classes, 1 / number_of_classes)
    nothing = np.full(number_of_classes, np.nan)
    examples = [
        LabelExample("Smoothing", "unique", image, true, true + 1e-3),
        LabelExample("Dense", "unidentifiable", image, true, nothing, note="no label is claimed"),
    ]
    names = [f"class_{index}" for index in range(number_of_classes)]
    figure = labels_figure(examples, names, "caption")
    words = texts(figure)
    for expected in ("Smoothing: unique", "largest error 1e-03", "Dense: unidentifiable", "no label is claimed"):
        assert expected in words
    claimed, open_case = figure.axes[1], figure.axes[3]
    assert len(claimed.patches) == len(open_case.patches) == number_of_classes
    assert len(claimed.collections) == 1
    assert not open_case.collections
    assert min(png_size(figure)) > 500


def test_table_fits_a_terminal_of_80_columns() -> None:
    verdicts = {"unique": 97, "ambiguous": 1, "unidentifiable": 2, "no_signal": 0}
    rows = [
        DemoRow("untrained", "smoothed_mixup", True, 100, 97, 0, 1e-6, 2e-7, verdicts, 8500.0),
        DemoRow("trained", "dense", False, 100, 0, 0, None, None, verdicts | {"unique": 0}, 4000.0),
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(demo_tables(rows))
    text = console.export_text()
    for expected in ("untrained network, known scale: 8,500 samples per second", "smoothed mixup", "97/100", "1e-06"):
        assert expected in text
    for expected in ("trained network, unknown scale", "0/100", "1 ambiguous, 2", "unidentifiable"):
        assert expected in text
    assert "…" not in text
