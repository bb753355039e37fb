"""Ours and published attacks in one run, on the same gradients: what each recovers, and in what time.

    python benchmarks/peers.py [--dataset cifar10] [--data-dir DIR] [--labels N] [--images N] [--steps S] [--seeds 5]
                               [--quick | --full]

Untrained LeNets, smoothed and mixup labels. Labels: `exact` (the format not told), our rendering of the paper's loss in
JAX (`variance`, told), the published procedure in PyTorch (`published`, told; L-BFGS, then particle swarms) and iDLG,
which can only answer with a hard label. Right: largest label error below 1e-3, and for `exact` the verdict `unique`.
Images: layer by layer (`exact inversion`), our matching with the recovered label, DLG and inverting gradients in
PyTorch, with as many steps of Adam as ours. The peers are our own renderings of the published procedures
(`published_procedure.py`, `published_images.py`; extra `peers`), one example at a time as published; without PyTorch
they are skipped, and the table says so. Times are wall times on one machine, compilation apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from clients import head_and_features, load_data
from images_by_label_mode import Scores, Victim, attack, make_victim
from runner import Run, add_data_options, option_parser, shares, spread, timed

import softinv_jax
from softinv_jax.client import LeNet, initialise, per_sample_last_layer_gradients, sample_batch
from softinv_jax.measures.label_error import label_error

FORMATS = {"smoothing": 1, "mixup": 2}
RIGHT = 1e-3
SKIPPED = "skipped: pip install 'softinv_jax[peers]'"


def label_methods(weight: np.ndarray, gradients: np.ndarray, family: str) -> dict[str, Callable[[], Any]]:
    """Each gives (label (N, C), which it vouches for (N,))."""
    observation = softinv_jax.observe(weight, gradients)

    def ours(**options: Any) -> tuple[np.ndarray, np.ndarray]:
        found = softinv_jax.recover_many(observation, **options)
        unique = found.verdict == softinv_jax.Verdict.UNIQUE
        return found.label, unique if not options else np.isfinite(found.label).all(axis=1)

    methods: dict[str, Callable[[], Any]] = {
        "exact": ours,
        "variance (told)": lambda: ours(method="variance", label_format=family),
        "iDLG": lambda: ours(method="idlg"),
    }
    try:
        from published_procedure import MIXUP_SETTINGS, SMOOTHING_SETTINGS, check_swarms, recover_published  # noqa: PLC0415

        check_swarms()
    except ImportError:
        return methods

    def published() -> tuple[np.ndarray, np.ndarray]:
        np.random.seed(0)  # noqa: NPY002 - scikit-opt draws from the global generator
        settings = MIXUP_SETTINGS if family == "mixup" else SMOOTHING_SETTINGS
        found = [
            recover_published(weight, gradient, excluded=FORMATS[family], settings=settings) for gradient in gradients
        ]
        return np.stack([one.label for one in found]), np.array([one.stage != "failed" for one in found])

    return methods | {"published (told)": published}


def compare_labels(run: Run, data: Any, family: str, count: int) -> None:
    """The rows of one format."""
    training, test, images = data
    found: dict[str, list[tuple[np.ndarray, np.ndarray, float]]] = {}
    for seed in run.track(run.seeds, f"labels, {family}"):
        network = LeNet(training.number_of_classes)
        parameters = initialise(network, jax.random.key(seed), images.shape[1:])
        key = jax.random.fold_in(jax.random.key(8), seed)
        batch = sample_batch(key, family, images, test.classes, training.number_of_classes, count)
        weight, features = head_and_features(network, parameters, batch.images)
        gradients = np.asarray(per_sample_last_layer_gradients(weight, features, batch.labels).weight)
        for method, answer in label_methods(np.asarray(weight), gradients, family).items():
            if method != "published (told)" and seed == 0:
                answer()  # Compiles.
            (label, vouched), seconds = timed(answer)
            error = label_error(label, np.asarray(batch.labels)).largest
            found.setdefault(method, []).append((vouched & (error < RIGHT), vouched & ~(error < RIGHT), seconds))
    for method, results in found.items():
        run.add(
            part="labels",
            format=family,
            method=method,
            **shares([right for right, _, _ in results]),
            wrong=sum(int(np.sum(wrong)) for _, wrong, _ in results),
            milliseconds_each=1e3 * float(np.median([seconds for _, _, seconds in results])) / count,
        )
    if "published (told)" not in found:
        run.add(part="labels", format=family, method="published (told)", skipped=SKIPPED)


def image_methods(victim: Victim, steps: int, dlg_steps: int, seed: int) -> dict[str, Callable[[], np.ndarray]]:
    """Each gives images (N, H, W, channels), NaN where it has none."""
    methods: dict[str, Callable[[], np.ndarray]] = {
        "exact inversion": lambda: attack([victim], "layer by layer", steps, 1),
        "matching, recovered label": lambda: attack([victim], "recovered", steps, 1),
    }
    try:
        import published_images as peers  # noqa: PLC0415
        import torch  # noqa: PLC0415
    except ImportError:
        return methods
    parameters = peers.torch_arrays(victim.parameters)
    height, width, channels = victim.images.shape[1:]
    shape, classes = (1, channels, height, width), victim.labels.shape[1]
    observed = []
    for row in range(len(victim.images)):
        arrays = peers.torch_arrays(jax.tree.map(lambda leaf, row=row: leaf[row], victim.gradients))
        observed.append([arrays[name] for name in sorted(arrays)])
    observation = softinv_jax.observe_head(victim.parameters, victim.gradients)
    hard = softinv_jax.recover_many(observation, method="idlg").label
    mean, deviation = np.asarray(victim.data.mean), np.asarray(victim.data.std)
    low, high = -mean / deviation, (1 - mean) / deviation

    def deep_leakage() -> np.ndarray:
        torch.manual_seed(seed)
        return np.stack([peers.deep_leakage(parameters, one, shape, classes, steps=dlg_steps) for one in observed])

    def inverting_gradients() -> np.ndarray:
        torch.manual_seed(seed)
        found = [
            peers.inverting_gradients(parameters, one, shape, label, low, high, steps=steps)
            for one, label in zip(observed, hard, strict=True)
        ]
        return np.stack(found)

    return methods | {"DLG": deep_leakage, "inverting gradients, iDLG's label": inverting_gradients}


def compare_images(run: Run, data: Any, family: str, count: int, steps: int, dlg_steps: int) -> None:
    """The rows of one format."""
    found: dict[str, Scores] = {}
    for seed in run.track(run.seeds, f"images, {family}"):
        victim = make_victim(run, data, "untrained", family, count, seed)
        for method, answer in image_methods(victim, steps, dlg_steps, seed).items():
            if seed == 0 and method in ("exact inversion", "matching, recovered label"):
                answer()  # Compiles.
            found.setdefault(method, Scores()).add(victim, *timed(answer))
    for method, scores in found.items():
        run.add(
            part="images",
            format=family,
            method=method,
            total=len(scores.psnr),
            failed=scores.failed,
            psnr=scores.psnr,
            ssim=scores.ssim,
            milliseconds_each=1e3 * float(np.median(scores.seconds_per_image)),
        )
    if "DLG" not in found:
        for method in ("DLG", "inverting gradients"):
            run.add(part="images", format=family, method=method, skipped=SKIPPED)


COLUMNS = {
    "": lambda row: row["part"],
    "format": lambda row: row["format"],
    "method": lambda row: row["method"],
    "right, % / PSNR, dB": lambda row: (
        row["skipped"] if "skipped" in row else spread(row["right_percent"] if row["part"] == "labels" else row["psnr"])
    ),
    "SSIM": lambda row: spread(row["ssim"], 3) if "ssim" in row else "",
    "failed": lambda row: f"{row['failed']} of {row['total']}" if "total" in row else "",
    "wrong but vouched for": lambda row: row.get("wrong", ""),
    "ms each": lambda row: f"{row['milliseconds_each']:,.2f}" if "total" in row else "",
}


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    add_data_options(parser)
    parser.add_argument("--labels", type=int, help="of each network and format")
    parser.add_argument("--images", type=int, help="of each network and format")
    parser.add_argument("--steps", type=int, help="of Adam")
    parser.add_argument("--dlg-steps", type=int, help="of L-BFGS for DLG")
    arguments = parser.parse_args()
    run = Run("peers", arguments)
    data = load_data(arguments)
    for family in FORMATS:
        compare_labels(run, data, family, arguments.labels or run.size(2, 10, 200))
    steps, dlg_steps = arguments.steps or run.size(5, 1200, 4800), arguments.dlg_steps or run.size(2, 100, 300)
    for family in FORMATS:
        compare_images(run, data, family, arguments.images or run.size(1, 1, 6), steps, dlg_steps)
    title = (
        f"Ours and published attacks on the same gradients, LeNet untrained ({steps} steps of Adam, {dlg_steps} of DLG)"
    )
    run.finish(title, COLUMNS)


if __name__ == "__main__":
    main()
