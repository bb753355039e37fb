"""Is `unique` ever wrong? Gradients of every loss, step, precision and defence that clients are known for.

    python benchmarks/soundness.py [--gradients 400] [--cells PATTERN ...] [--against JSON] [--quick] [--seeds 5]

Nothing is told to the recovery but the head (and, where the row says so, the batch size or that the scale is unknown).
A label is wrong if it is off by more than 1e-3 and by more than six of its stated deviations, if the gradient is not of
one example, or if the loss said is another one. Right ones stand beside it: silence is no soundness.
`--seeds` has no effect: every setting has one head.
"""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from runner import Run, option_parser, timed
from soundness_clients import Cell, Clients, draw

import softinv_jax
from softinv_jax.labels.assumptions import Loss

WRONG = 1e-3
DEVIATIONS = 6.0
FACTORS = ("focal", "class_weights")


def _grid() -> list[dict[str, Any]]:
    """Every value, and every loss; not the full product."""
    formats = ("hard", "smoothing", "mixup", "five_way", "dense")
    few = ((3, "hard"), (3, "smoothing"), (4, "hard"), (4, "smoothing"), (6, "smoothing"), (6, "mixup"))
    losses = (
        "focal",
        "class_weights",
        "temperature2",
        "squared_softmax",
        "logit_adjustment",
        "entropy",
        "distillation",
    )
    hard_losses = (*losses, "temperature0.5", "squared_logits")
    spoilt = ("rows1", "rows2", "rows4", "pruned", "quantised", "stale")
    sent = ("bfloat16", "float16", "float64", "product", "delta32", "delta_bfloat16")
    noises = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    parallel = {"label": "hard", "kind": "parallel", "fan_in": True}
    return [
        *({"label": label} for label in formats),
        *({"label": label, "classes": classes} for classes, label in few),
        *({"label": label, "classes": 100, "features": 256} for label in ("hard", "smoothing", "mixup")),
        *({"label": "smoothing", "kind": kind} for kind in ("signed", "sigmoid")),
        {"label": "hard", "fan_in": True},
        {"label": "smoothing", "unknown_scale": True},
        *({"label": label, "factor": f} for f in (0.5, 0.1, 3.0, -1.0) for label in ("hard", "smoothing", "mixup")),
        *({"loss": loss, "label": label} for loss in ("bce_mean", "bce_sum") for label in ("hard", "multi")),
        *({"loss": loss, "label": "hard"} for loss in hard_losses),
        *({"loss": loss, "label": label} for loss in losses for label in ("smoothing", "mixup")),
        *({"loss": loss, "label": "hard", "fan_in": True} for loss in ("squared_softmax", "logit_adjustment")),
        *({"spoilt": kind} for kind in spoilt),
        *({"spoilt": kind, "label": "hard", "fan_in": True} for kind in spoilt),
        *({"sent": kind} for kind in sent),
        *({"arithmetic": kind, "label": label} for kind in ("tf32", "bfloat16") for label in ("smoothing", "hard")),
        *({"noise": noise, "label": label} for noise in noises for label in ("smoothing", "mixup")),
        *({"noise": 1e-3, "label": label} for label in ("hard", "dense")),
        {"noise": 1e-3, "label": "hard", "classes": 4},
        {"noise": 1e-3, "kind": "signed"},
        *({"examples": examples} for examples in (2, 4, 8)),
        *({"examples": examples} | parallel for examples in (2, 4, 8)),
        {"examples": 2, "label": "hard", "classes": 4},
        {"examples": 2, "label": "hard", "loss": "bce_mean"},
        *({"steps": 3, "label": label} for label in ("smoothing", "hard")),
        {"steps": 3, "examples": 2},
        *({"optimiser": optimiser} for optimiser in ("adam", "sign")),
        *({"optimiser": optimiser, "label": "hard", "kind": "signed"} for optimiser in ("adam", "sign")),
    ]


def cells() -> list[Cell]:
    """The grid, each setting without a bias and with one; fewer than three classes with one only."""
    found = []
    for options in _grid():
        name = ", ".join(f"{key} {value}" for key, value in options.items())
        found += [Cell(name=name, **options), Cell(name=f"{name}, bias", bias=True, **options)]
    for label in ("hard", "smoothing"):
        found.append(Cell(name=f"label {label}, classes 2, bias", label=label, classes=2, bias=True))
    found.append(Cell(name="loss bce_mean, classes 1, bias", loss="bce_mean", label="multi", classes=1, bias=True))
    return found


def judge(cell: Cell, clients: Clients) -> dict[str, Any]:
    """Counts of one cell."""
    observation = softinv_jax.observe(clients.weight, clients.gradient, clients.bias, clients.bias_gradient)
    found, seconds = timed(lambda: softinv_jax.recover_many(observation, unknown_scale=cell.unknown_scale))
    names = found.verdict_name
    label, deviation = np.asarray(found.label, float), np.asarray(found.evidence.label_deviation, float)
    off = np.abs(label - clients.label[:, 0])
    beyond = off > DEVIATIONS * deviation + 1e-6
    one = cell.examples == 1 and cell.steps == 1 and cell.optimiser == "sgd"
    near = ~np.any(beyond & (off > WRONG), axis=1) & one
    right_loss = _loss_is_right(cell, found)
    told = np.isfinite(label).all(axis=1)
    counts = Counter(names.tolist())
    unique, conditional = names == "unique", names == "conditional"
    return {
        "cell": cell.name,
        "gradients": len(names),
        "unique_right": int(np.sum(unique & near & right_loss)),
        "unique_wrong": int(np.sum(unique & ~(near & right_loss))),
        "wrong_label": int(np.sum(unique & ~near)),
        "wrong_loss": int(np.sum(unique & near & ~right_loss)),
        "conditional_right": int(np.sum(conditional & near)),
        "conditional_wrong": int(np.sum(conditional & ~near)),
        "ambiguous_right": int(np.sum((names == "ambiguous") & near)),
        "ambiguous_wrong": int(np.sum((names == "ambiguous") & ~near)),
        "others": {name: count for name, count in counts.items() if name not in ("unique", "conditional", "ambiguous")},
        "entries_told": int(np.sum(unique & near) * label.shape[1]),
        "entries_beyond": int(np.sum(beyond[unique & near])),
        "largest_error": float(np.max(off[unique & told], initial=0.0)),
        "seconds": round(seconds, 2),
    }


def _loss_is_right(cell: Cell, found: Any) -> np.ndarray:
    """(N,) bool: what is said of the loss, and of the factor on the gradient, is so."""
    if not hasattr(found, "assumptions"):
        return np.ones(found.verdict.shape, bool)
    loss, scale = found.assumptions.loss, np.asarray(found.scale, float)
    softmax = (Loss.CROSS_ENTROPY, Loss.WEIGHTED_CROSS_ENTROPY)
    tempered = (Loss.TEMPERED_CROSS_ENTROPY, Loss.WEIGHTED_TEMPERED_CROSS_ENTROPY)
    sigmoids = (Loss.BINARY_CROSS_ENTROPY, Loss.WEIGHTED_BINARY_CROSS_ENTROPY)
    if cell.loss.startswith("bce"):
        return np.isin(loss, sigmoids)
    if cell.loss.startswith("temperature"):
        # Without a bias a temperature cannot be seen, and changes no label.
        return np.isin(loss, tempered if cell.bias else softmax + tempered)
    if cell.loss == "cross_entropy":
        factor = np.abs(scale / cell.factor - 1) < 1e-2
        return np.isin(loss, softmax) & (factor | cell.unknown_scale)
    if cell.loss in FACTORS and cell.label == "hard":
        return np.isin(loss, softmax)
    return np.zeros(loss.shape, bool)


COLUMNS = {
    "setting": lambda row: row["cell"],
    "gradients": lambda row: row["gradients"],
    "unique, right": lambda row: row["unique_right"],
    "unique, wrong": lambda row: row["unique_wrong"],
    "conditional": lambda row: f"{row['conditional_right']} / {row['conditional_wrong']}",
    "ambiguous": lambda row: f"{row['ambiguous_right']} / {row['ambiguous_wrong']}",
    "others": lambda row: ", ".join(f"{count} {name}" for name, count in row["others"].items()),
    "entries beyond six deviations": lambda row: row["entries_beyond"],
    "ms each": lambda row: f"{1e3 * row['seconds'] / max(row['gradients'], 1):.1f}",
}


def compare(rows: list[dict[str, Any]], before: Path) -> list[str]:
    """The cells in which fewer than 98 % of what was unique and right before still is."""
    earlier = {row["cell"]: row for row in json.loads(before.read_text())["rows"]}
    lost = []
    for row in rows:
        old = earlier.get(row["cell"])
        if old is None or not old["unique_right"]:
            continue
        share_before, share = old["unique_right"] / old["gradients"], row["unique_right"] / row["gradients"]
        if share < 0.98 * share_before:
            lost.append(f"{row['cell']}: {share_before:.1%} before, {share:.1%} now")
    return lost


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__ or "")
    parser.add_argument("--gradients", type=int, default=400, help="of each setting (a quarter with 100 classes)")
    parser.add_argument("--cells", nargs="+", metavar="PATTERN", help="only settings whose names match, as in 'bce*'")
    parser.add_argument("--against", type=Path, metavar="JSON", help="an earlier result: name what is lost since")
    arguments = parser.parse_args()
    run = Run("soundness", arguments)
    count = 20 if arguments.quick else arguments.gradients
    chosen = [
        cell for cell in cells() if not arguments.cells or any(fnmatch.fnmatch(cell.name, p) for p in arguments.cells)
    ]
    try:
        for cell in run.track(chosen, "settings"):
            many = max(count // 4, 5) if cell.classes >= 100 else count
            try:
                run.add(**judge(cell, draw(cell, many, seed=0)))
            except ValueError as error:  # Refused: counted, not dropped.
                run.add(**_refused(cell, many, error))
    except KeyboardInterrupt:
        run.notes["interrupted"] = True
    total = sum(row["gradients"] for row in run.rows)
    wrong = sum(row["unique_wrong"] for row in run.rows)
    told, beyond = (sum(row[key] for row in run.rows) for key in ("entries_told", "entries_beyond"))
    run.notes |= {"total": total, "unique_wrong": wrong, "entries_told": told, "entries_beyond": beyond}
    if arguments.against:
        run.notes["lost"] = compare(run.rows, arguments.against)
        print("\n".join(run.notes["lost"]) or "nothing that was unique and right is lost")
    run.finish(
        f"{wrong} of {total} gradients unique and wrong; {beyond} of {told} entries off by six deviations", COLUMNS
    )


def _refused(cell: Cell, count: int, error: ValueError) -> dict[str, Any]:
    numbers = ("unique_right", "unique_wrong", "wrong_label", "wrong_loss", "conditional_right", "conditional_wrong")
    rest = ("ambiguous_right", "ambiguous_wrong", "entries_told", "entries_beyond", "largest_error", "seconds")
    zeros = dict.fromkeys((*numbers, *rest), 0)
    return {"cell": cell.name, "gradients": count, **zeros, "others": {"refused": count}, "error": str(error)}


if __name__ == "__main__":
    main()
