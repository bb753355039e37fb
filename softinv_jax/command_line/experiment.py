"""The demo's experiment: clients that compute gradients, an observer that is told no label format, and the score."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.client.datasets import ImageDataset
from softinv_jax.client.gradients import per_sample_model_gradients
from softinv_jax.client.networks import LeNet, apply_function, initialise, initialise_fan_in
from softinv_jax.client.soft_labels import sample_batch
from softinv_jax.client.training import train
from softinv_jax.command_line.console import Report
from softinv_jax.command_line.demo_batch import BatchOutcome, attack_batch
from softinv_jax.labels.many import recover_many
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.measures.label_error import feature_error, label_error
from softinv_jax.observation.head import Observation, observe, observe_head
from softinv_jax.report.tables import DemoRow

__all__ = [
    "Examples",
    "Outcome",
    "Settings",
    "attack_one_batch",
    "prepare_networks",
    "run_experiment",
    "score",
    "stage_key",
]

# A label whose entries are all within this of the true one is the true one for every purpose.
RIGHT = 1e-3
# Gradients held at once: each has the size of the network.
CHUNK = 250
# These keys compile three times faster than the default's, and a demo needs no stronger ones.
KEYS = "unsafe_rbg"


@dataclass(frozen=True)
class Settings:
    """What to try: `samples` of each of `label_formats`, with the scale known, unknown, or both in turn."""

    samples: int
    seed: int
    epochs: int
    label_formats: tuple[str, ...]
    scales_known: tuple[bool, ...]


@dataclass(frozen=True)
class Examples:
    """What M clients keep to themselves: label_format (M,), images (M, H, W, 3) normalised, labels (M, C)."""

    label_format: np.ndarray
    images: jax.Array
    labels: jax.Array


@dataclass(frozen=True)
class Outcome:
    """One attack on all examples.

    Attributes:
      network: which. scale_known: whether the attack knew the gradients' scale.
      observation: what the attack saw. recovery: what it made of it.
      features: (M, d) the truth, for the score only.
      first_seconds: of the first run, with compilation. seconds: of the second.
    """

    network: str
    scale_known: bool
    observation: Observation
    recovery: Recovery
    features: np.ndarray
    first_seconds: float
    seconds: float


def run_experiment(
    settings: Settings, private: ImageDataset, networks: dict[str, Any], report: Report
) -> tuple[Examples, list[Outcome]]:
    """Draw examples, compute their gradients on each network, and attack them.

    Args:
      private: the clients' images. networks: LeNet parameters by name.
      report: told the stages; `prepare_networks` has been the first.
    """
    key = jax.random.key(settings.seed, impl=KEYS)
    total = _steps(settings, len(networks))
    done = settings.epochs
    examples = _draw(jax.random.fold_in(key, 1), settings, private, report, total)
    done += len(settings.label_formats)
    factors = _unknown_factors(jax.random.fold_in(key, 2), len(examples.label_format))
    outcomes = []
    for name, parameters in networks.items():
        report(done, total, f"clients compute gradients on the {name} network")
        observation, features = _observe(LeNet(private.number_of_classes), parameters, examples)
        done += 1
        for scale_known in settings.scales_known:
            told = "known" if scale_known else "unknown"
            report(done, total, f"attacking the {name} network, scale {told}")
            seen = observation
            if not scale_known:
                seen = observe(observation.weight, np.asarray(observation.weight_gradient) * factors)
            outcomes.append(_attack(name, scale_known, seen, features))
            done += 1
    return examples, outcomes


def attack_one_batch(
    settings: Settings, private: ImageDataset, networks: dict[str, Any], report: Report
) -> BatchOutcome | None:
    """The last stage: one gradient of a batch, on the last of the networks."""
    total = _steps(settings, len(networks))
    name, parameters = list(networks.items())[-1]
    report(total - 1, total, f"attacking a batch on the {name} network")
    outcome = attack_batch(stage_key(settings, 6), private, name, parameters)
    report(total, total, "drawing pictures")
    return outcome


def stage_key(settings: Settings, number: int) -> jax.Array:
    """The random key of a stage of the demo."""
    return jax.random.fold_in(jax.random.key(settings.seed, impl=KEYS), number)


def prepare_networks(settings: Settings, data: ImageDataset, report: Report) -> tuple[dict[str, Any], float | None]:
    """LeNet untrained, U(-0.5, 0.5), and, with `epochs` > 0, briefly trained on `data` with label smoothing.

    Returns:
      Parameters by name, and the trained network's accuracy on `data`.
    """
    network, shape = LeNet(data.number_of_classes), data.images.shape[1:]
    key = jax.random.key(settings.seed, impl=KEYS)
    networks = {"untrained": initialise(network, jax.random.fold_in(key, 3), shape)}
    if settings.epochs == 0:
        return networks, None
    total = _steps(settings, 2)
    report(0, total, "training a network")
    result = train(
        jax.random.fold_in(key, 4),
        network,
        initialise_fan_in(network, jax.random.fold_in(key, 5), shape),
        data.normalised(),
        data.classes,
        number_of_classes=data.number_of_classes,
        epochs=settings.epochs,
        batch_size=min(64, len(data)),
        progress=lambda done, _, __: report(done, total, "training a network"),
    )
    return networks | {"trained": result.parameters}, float(result.accuracy)


def _steps(settings: Settings, networks: int) -> int:
    return settings.epochs + len(settings.label_formats) + networks * (1 + len(settings.scales_known)) + 1


def _draw(key: jax.Array, settings: Settings, private: ImageDataset, report: Report, total: int) -> Examples:
    pool = private.normalised()
    batches = []
    for place, label_format in enumerate(settings.label_formats):
        report(settings.epochs + place, total, "clients draw images and soft labels")
        batches.append(
            sample_batch(
                jax.random.fold_in(key, place),
                label_format,
                pool,
                private.classes,
                private.number_of_classes,
                settings.samples,
            )
        )
    return Examples(
        label_format=np.repeat(np.array(settings.label_formats), settings.samples),
        images=jnp.concatenate([batch.images for batch in batches]),
        labels=jnp.concatenate([batch.labels for batch in batches]),
    )


def _unknown_factors(key: jax.Array, count: int) -> np.ndarray:
    """(M, 1, 1) learning rates, batch sizes, sums and means: factors over two orders of magnitude, of either sign."""
    size = jnp.exp(1.5 * jax.random.normal(key, (count, 1, 1)))
    return np.asarray(size * jax.random.rademacher(jax.random.fold_in(key, 1), (count, 1, 1), size.dtype))


def _observe(network: LeNet, parameters: Any, examples: Examples) -> tuple[Observation, np.ndarray]:
    """What the server sees, by automatic differentiation of the whole network, and the features it does not see."""
    weight, parts = None, []
    total = len(examples.label_format)
    # All pieces of one size, so that one compiled program serves them.
    size = max(size for size in range(1, min(CHUNK, total) + 1) if total % size == 0)
    for start in range(0, total, size):
        chosen = slice(start, start + size)
        gradients = per_sample_model_gradients(
            apply_function(network), parameters, examples.images[chosen], examples.labels[chosen]
        )
        seen = observe_head(parameters, gradients)
        weight = seen.weight
        parts.append(np.asarray(seen.weight_gradient))
    read_features = jax.jit(partial(network.apply, method="features"))
    features = read_features({"params": parameters}, examples.images)
    return observe(np.asarray(weight), np.concatenate(parts)), np.asarray(features)


def _attack(network: str, scale_known: bool, observation: Observation, features: np.ndarray) -> Outcome:
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        recovery = recover_many(observation, unknown_scale=not scale_known)
        seconds.append(time.perf_counter() - start)
    return Outcome(network, scale_known, observation, recovery, features, seconds[0], seconds[1])


def score(examples: Examples, outcomes: Sequence[Outcome]) -> list[DemoRow]:
    """Compare with the truth, one row for each outcome and label format."""
    rows = []
    for outcome in outcomes:
        verdict = np.asarray(outcome.recovery.verdict)
        label_errors = label_error(outcome.recovery.label, np.asarray(examples.labels)).largest
        feature_errors = feature_error(outcome.recovery.feature, outcome.features)
        for label_format in dict.fromkeys(examples.label_format.tolist()):
            chosen = examples.label_format == label_format
            recovered = chosen & (verdict == Verdict.UNIQUE)
            found = bool(recovered.any())
            rows.append(
                DemoRow(
                    network=outcome.network,
                    label_format=label_format,
                    scale_known=outcome.scale_known,
                    total=int(chosen.sum()),
                    recovered=int(recovered.sum()),
                    wrong=int(np.sum(label_errors[recovered] > RIGHT)),
                    largest_label_error=float(label_errors[recovered].max()) if found else None,
                    median_feature_error=float(np.median(feature_errors[recovered])) if found else None,
                    verdicts={kind.name.lower(): int(np.sum(verdict[chosen] == kind)) for kind in reversed(Verdict)},
                    samples_per_second=len(verdict) / outcome.seconds,
                )
            )
    return rows
