"""Real training in PyTorch, seen as a server sees it: is what `recover` says of the updates true?

    python benchmarks/field.py [--clients 2] [--dataset cifar10] [--data-dir DIR] [--quick | --full] [--seeds 5]

Five networks (`field_clients.py`), as they are initialised and after 300 steps of training; five losses; SGD, SGD with
momentum, Adam, AdamW; 1, 4 or 32 examples a step; 1 or 5 local steps. The images are CIFAR-10's where it is prepared,
else photographs. The observer has the parameters before and after. It is told the learning rate, and the momentum of
SGD. It takes every update for one step of SGD on one example. Most are not: a `unique` label of those is wrong. So is
one that is off by more than 1e-3 and by more than six of its deviations, or with another loss than the client's.

In the rows "told", the observer knows that there were four examples in one step of SGD. Examples that cannot be told
apart are given as one, and the mean of their labels is right. The mean label of several examples, where that is not
told, is checked if the loss is cross-entropy. A row is over all networks. The JSON says of wrong ones which network it
was. `--seeds` has no effect: each network has one set of parameters.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from clients import load_data
from runner import Run, add_data_options, option_parser, timed
from scipy.optimize import linear_sum_assignment

import softinv_jax
from softinv_jax.frameworks.parameter_files import trained_layers
from softinv_jax.labels.assumptions import Assumption, Loss
from softinv_jax.observation.head import stack_observations

if TYPE_CHECKING:
    from field_clients import State

EXAMPLES, STEPS, WARM_UP, TOLD = (1, 4, 32), (1, 5), 300, 4
WRONG, DEVIATIONS = 1e-3, 6.0
SOFTMAX = (Loss.CROSS_ENTROPY, Loss.WEIGHTED_CROSS_ENTROPY)
RIGHT_LOSSES = {
    "cross_entropy": (Loss.CROSS_ENTROPY,),
    "smoothing": (Loss.CROSS_ENTROPY,),
    "bce": (Loss.BINARY_CROSS_ENTROPY,),
    "focal": SOFTMAX,  # With a hard label, cross-entropy with a factor.
    "class_weights": SOFTMAX,
}


@dataclass(frozen=True)
class Setting:
    """How a client trains. The names are those of `field_clients`."""

    loss: str
    optimiser: str
    examples: int
    steps: int

    @property
    def is_one(self) -> bool:
        """One gradient of one example."""
        return self.examples == 1 and self.steps == 1 and self.is_descent

    @property
    def is_descent(self) -> bool:
        """A first step follows the gradient."""
        return self.optimiser in ("sgd", "momentum")


@dataclass(frozen=True)
class Update:
    """What the observer has of one client; (B, C) the labels of the first step, for the judge alone."""

    network: str
    observation: softinv_jax.Observation
    label: np.ndarray


def train_clients(
    setting: Setting, network: str, sent: State, images: np.ndarray, classes: np.ndarray, count: int
) -> list[Update]:
    """So many clients of one network, each with images of its own, and their heads as the observer computes them."""
    from field_clients import NETWORKS, OPTIMISERS, train, true_label  # noqa: PLC0415 - needs PyTorch

    optimiser = OPTIMISERS[setting.optimiser]
    kind = network.removesuffix(", trained")
    key = [list(NETWORKS).index(kind), *(sum(map(ord, str(part))) for part in vars(setting).values())]
    rng = np.random.default_rng(key)
    updates = []
    for _ in range(count):
        chosen = rng.choice(len(images), (setting.steps, setting.examples), replace=False)
        after = train(kind, sent, setting.loss, optimiser, images[chosen], classes[chosen])
        update = softinv_jax.observe_update(
            trained_layers(sent), trained_layers(after), learning_rate=optimiser.rate, momentum=optimiser.momentum
        )
        observation = softinv_jax.observe_update_head(update, name="head")
        updates.append(Update(network, observation, true_label(setting.loss, classes[chosen[0]])))
    return updates


def judge(setting: Setting, updates: list[Update]) -> dict[str, Any]:
    """Counts over clients of one network, of which nothing was told. The truth is used here only."""
    found, seconds = timed(
        lambda: softinv_jax.recover_many(stack_observations([one.observation for one in updates]), thorough=True)
    )
    label, deviation = np.asarray(found.label, float), np.asarray(found.evidence.label_deviation, float)
    truth = np.stack([one.label[0] for one in updates])
    near = np.all(np.abs(label - truth) <= np.maximum(WRONG, DEVIATIONS * deviation), axis=1) & setting.is_one
    right_loss = np.isin(found.assumptions.loss, RIGHT_LOSSES[setting.loss])
    counts: Counter[str] = Counter()
    for name, is_near, is_loss in zip(found.verdict_name, near, right_loss, strict=True):
        right = is_near and (is_loss or name != "unique")
        counts[f"{name} {'right' if right else 'wrong'}" if name in GIVEN else str(name)] += 1
    several = np.asarray(found.assumptions.refuted) & int(Assumption.ONE_EXAMPLE) > 0
    return {
        "counts": counts,
        "said_several": int(np.sum(several)),
        "mean_labels": _mean_labels(setting, updates, found),
        "wrong": [updates[0].network] * counts["unique wrong"],
        "seconds": seconds,
    }


GIVEN = ("unique", "conditional", "ambiguous")


def _mean_labels(setting: Setting, updates: list[Update], found: Any) -> Counter[str]:
    """How many mean labels are given, and how many of these have an entry off by more than six deviations."""
    plain = setting.loss in ("cross_entropy", "smoothing") and setting.is_descent and setting.steps == 1
    if not plain or setting.examples == 1:
        return Counter()
    truth = np.stack([one.label.mean(axis=0) for one in updates])
    label, deviation = (np.asarray(part, float) for part in (found.mean.label, found.mean.deviation))
    given = np.isfinite(label).all(axis=1)
    beyond = np.any(np.abs(label - truth) > DEVIATIONS * deviation + 1e-6, axis=1)
    return Counter(given=int(np.sum(given)), beyond=int(np.sum(given & beyond)), examples=len(updates))


def judge_told(setting: Setting, updates: list[Update]) -> dict[str, Any]:
    """The same where the observer knows the number of examples; every example is counted."""
    counts: Counter[str] = Counter()
    seconds = 0.0
    for one in updates:
        found: Any
        found, own = timed(lambda one=one: softinv_jax.recover(one.observation, batch_size=setting.examples))
        seconds += own
        names = softinv_jax.verdict_names(found.verdict)
        given = np.flatnonzero(np.isin(names, GIVEN))
        truth = one.label
        together = setting.examples - len(names)
        if together > 0:  # Examples that cannot be told apart are given as one, with their mean label.
            counts["given with another"] += together
            pairs = itertools.combinations(truth, 2)
            truth = np.concatenate([truth, [np.mean(pair, axis=0) for pair in pairs]])
        off = np.abs(found.label[given, None] - truth[None])
        near = np.all(off <= np.maximum(WRONG, DEVIATIONS * found.label_deviation[given, None]), axis=2)
        right = np.zeros(len(names), bool)
        rows, columns = linear_sum_assignment(~near)
        right[given[rows]] = near[rows, columns] & (found.loss in RIGHT_LOSSES[setting.loss])
        for name, is_right in zip(names, right, strict=True):
            counts[f"{name} {'right' if is_right else 'wrong'}" if name in GIVEN else str(name)] += 1
    wrong = [updates[0].network] * counts["unique wrong"]
    return {"counts": counts, "said_several": 0, "mean_labels": Counter(), "wrong": wrong, "seconds": seconds}


def add_row(run: Run, setting: Setting, told: bool, parts: list[dict[str, Any]]) -> None:
    """One row of what the networks gave."""
    counts: Counter[str] = sum((part["counts"] for part in parts), Counter())
    wrong = Counter(itertools.chain.from_iterable(part["wrong"] for part in parts))
    run.add(
        **vars(setting),
        told=told,
        total=counts.total(),
        counts=dict(sorted(counts.items())),
        said_several=sum(part["said_several"] for part in parts),
        mean_labels=dict(sum((part["mean_labels"] for part in parts), Counter())),
        unique_wrong=counts["unique wrong"],
        wrong_networks=dict(wrong),
        seconds=round(sum(part["seconds"] for part in parts), 2),
    )


def _both(verdict: str) -> Any:
    return lambda row: f"{row['counts'].get(f'{verdict} right', 0)} / {row['counts'].get(f'{verdict} wrong', 0)}"


def _mean_text(row: dict[str, Any]) -> str:
    mean = row["mean_labels"]
    return f"{mean.get('given', 0)} / {mean.get('beyond', 0)}" if mean else ""


COLUMNS = {
    "loss": lambda row: row["loss"],
    "optimiser": lambda row: row["optimiser"],
    "examples": lambda row: f"{row['examples']}{', told' if row['told'] else ''}",
    "steps": lambda row: row["steps"],
    "labels": lambda row: row["total"],
    "unique: right / wrong": _both("unique"),
    "conditional": _both("conditional"),
    "ambiguous": _both("ambiguous"),
    "others": lambda row: ", ".join(
        f"{count} {name}" for name, count in row["counts"].items() if name.split()[0] not in GIVEN
    ),
    "said to be several": lambda row: "" if row["told"] else row["said_several"],
    "mean labels: given / beyond six deviations": _mean_text,
}


def settings(quick: bool) -> list[tuple[Setting, bool]]:
    """Every setting, and whether the number of examples is told."""
    from field_clients import LOSSES, OPTIMISERS  # noqa: PLC0415 - needs PyTorch

    losses = tuple(LOSSES)[:2] if quick else LOSSES
    optimisers = ("sgd",) if quick else OPTIMISERS
    every = [Setting(*parts) for parts in itertools.product(losses, optimisers, EXAMPLES, STEPS)]
    told = [Setting(loss, "sgd", TOLD, 1) for loss in losses]
    return [(one, False) for one in every] + [(one, True) for one in told]


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__ or "")
    dataset = "cifar10" if os.environ.get("TFDS_DATA_DIR") else "photographs"
    add_data_options(parser, dataset)
    parser.add_argument("--clients", type=int, help="of each network and setting (2; 1 with --quick, 8 with --full)")
    arguments = parser.parse_args()
    try:
        from field_clients import NETWORKS, served  # noqa: PLC0415 - needs PyTorch
    except ModuleNotFoundError as error:
        raise SystemExit(f"this benchmark trains in PyTorch, which is missing ({error}): pip install torch") from None
    run = Run("field", arguments)
    count = arguments.clients or run.size(1, 2, 8)
    _, test, images = load_data(arguments)
    pixels = np.ascontiguousarray(np.asarray(images, np.float32).transpose(0, 3, 1, 2))
    classes = np.asarray(test.classes, np.int64)
    half = len(pixels) // 2  # The server's images are not the clients'.
    sent = {}
    for name in list(NETWORKS)[: 2 if arguments.quick else None]:
        sent[name] = served(name, pixels[:half], classes[:half], 0)
        if not arguments.quick:
            sent[f"{name}, trained"] = served(name, pixels[:half], classes[:half], WARM_UP)
    try:
        for setting, told in run.track(settings(arguments.quick), "settings"):
            clients = [
                train_clients(setting, name, state, pixels[half:], classes[half:], 1 if told else count)
                for name, state in sent.items()
            ]
            add_row(run, setting, told, [(judge_told if told else judge)(setting, part) for part in clients])
    except KeyboardInterrupt:
        run.notes["interrupted"] = True
    total, wrong = (sum(row[key] for row in run.rows) for key in ("total", "unique_wrong"))
    run.notes |= {"networks": list(sent), "total": total, "unique_wrong": wrong}
    run.finish(f"Real training in PyTorch on {test.name}: {wrong} of {total} labels unique and wrong", COLUMNS)


if __name__ == "__main__":
    main()
