"""Sections of `accelerator.py` on last layers: labels, the thorough search, labels under noise, and batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_session import Session, best_of, fitting, score

import softinv_jax

NOISE = 1e-4  # Of each gradient's largest entry, as in noise.py.
BATCH_CLASSES, BATCH_FEATURES, BATCH_SIZE = 100, 768, 8


@partial(jax.jit, static_argnums=(1, 2, 3), static_argnames="noise")
def make_clients(
    key: jax.Array, examples: int, classes: int, features: int, noise: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weight (C, d), mixup labels (N, C) and gradients (N, C, d) of sigmoid features, float32, made on the device."""
    keys = jax.random.split(key, 6)
    weight = jax.random.uniform(keys[0], (classes, features), minval=-0.5, maxval=0.5)
    feature = jax.nn.sigmoid(jax.random.normal(keys[1], (examples, features)))
    first = jax.random.randint(keys[2], (examples,), 0, classes)
    second = (first + jax.random.randint(keys[3], (examples,), 1, classes)) % classes
    share = jax.random.uniform(keys[4], (examples, 1))
    label = share * jax.nn.one_hot(first, classes) + (1 - share) * jax.nn.one_hot(second, classes)
    # A client whose logits are coarser than its gradient would be another experiment.
    logits = jnp.matmul(feature, weight.T, precision=jax.lax.Precision.HIGHEST)
    gradient = (jax.nn.softmax(logits) - label)[:, :, None] * feature[:, None, :]
    if noise:
        deviation = noise * jnp.max(jnp.abs(gradient), axis=(1, 2), keepdims=True)
        gradient += deviation * jax.random.normal(keys[5], gradient.shape)
    return weight, label, gradient


class Case:
    """Gradients of one shape on the device, made when first asked for."""

    def __init__(self, classes: int, features: int, examples: int, noise: float = 0.0) -> None:
        self.classes, self.features, self.noise = classes, features, noise
        self.examples = fitting(examples, 4 * classes * features)

    def __str__(self) -> str:
        return f"({self.classes}, {self.features}) x {self.examples:,}"

    @cached_property
    def clients(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        key = jax.random.key(self.classes)
        made = make_clients(key, self.examples, self.classes, self.features, noise=self.noise)
        return jax.block_until_ready(made)

    @property
    def labels(self) -> jax.Array:
        return self.clients[1]

    @property
    def gradients(self) -> jax.Array:
        return self.clients[2]

    @cached_property
    def observation(self) -> softinv_jax.Observation:
        return softinv_jax.observe(self.clients[0], self.gradients)

    def timed(self, function: Callable[[], Any]) -> dict[str, Any]:
        """One row of labels a second; the gradients are made before."""
        _ = self.observation
        timing = best_of(function)
        return timing.row(self.examples, "labels") | {"bytes": 4 * self.examples * self.classes * self.features}


def plain_sum(case: Case) -> dict[str, Any]:
    """The floor: every gradient is read once."""
    total = jax.jit(jnp.sum)
    return case.timed(lambda: total(case.gradients)) | {"unit": "gradients"}


def on_device(case: Case, **options: Any) -> dict[str, Any]:
    """Results left on the device, beside a plain sum before and after."""
    floor = plain_sum(case)["seconds"]
    timing = best_of(lambda: softinv_jax.recover_many(case.observation, **options))
    floor = min(floor, plain_sum(case)["seconds"])
    row = timing.row(case.examples, "labels") | {"bytes": case.gradients.nbytes}
    scored = score(timing.result, case.labels)
    return row | {"times_sum": timing.best / floor} | scored | {"note": f"{scored['given']:,} labels given"}


def fetched(case: Case) -> dict[str, Any]:
    """Label and verdict as NumPy arrays."""

    def run() -> tuple[np.ndarray, np.ndarray]:
        result = softinv_jax.recover_many(case.observation)
        return np.asarray(result.label), np.asarray(result.verdict)

    return case.timed(run)


def with_features(case: Case) -> dict[str, Any]:
    """The features made as well, (N, d)."""

    def run() -> Any:
        result = softinv_jax.recover_many(case.observation)
        return result.verdict, result.feature

    return case.timed(run)


def from_host(case: Case) -> dict[str, Any]:
    """NumPy arrays in and out: the transfer of every gradient is in the time."""
    weight, labels, gradients = (np.asarray(array) for array in case.clients)
    observation = softinv_jax.observe(weight, gradients)
    timing = best_of(lambda: softinv_jax.recover_many(observation))
    return timing.row(case.examples, "labels") | {"bytes": gradients.nbytes} | score(timing.result, labels)


def measure_labels(session: Session, classes: int, features: int, examples: int) -> None:
    """The rows of one shape."""
    case = Case(classes, features, examples)
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "plain sum": lambda: plain_sum(case),
        "left on the device": lambda: on_device(case),
        "label and verdict to NumPy": lambda: fetched(case),
        "features too": lambda: with_features(case),
    }
    for what, function in rows.items():
        session.measure("labels", str(case), what, function)


def measure_from_host(session: Session, classes: int, features: int, examples: int) -> None:
    """The same from and to NumPy."""
    case = Case(classes, features, examples)
    session.measure("labels", str(case), "NumPy in and out", lambda: from_host(case))


def measure_thorough(session: Session, classes: int, features: int, examples: int) -> None:
    """The thorough search of exact gradients, and whatever gradients under noise take."""
    exact, noisy = (Case(classes, features, examples, noise) for noise in (0.0, NOISE))
    session.measure("thorough", str(exact), "thorough=True", lambda: on_device(exact, thorough=True))
    session.measure("thorough", str(noisy), f"under noise {NOISE:.0e}", lambda: on_device(noisy))


def measure_batches(session: Session, batches: int) -> None:
    """Whole batches behind one gradient each; an example counts as found as in batches.py."""
    case = f"C = {BATCH_CLASSES}, B = {BATCH_SIZE}, {batches} gradients"
    session.measure("batches", case, f"batch_size={BATCH_SIZE}", lambda: batch_row(batches))


def batch_row(batches: int) -> dict[str, Any]:
    """Mean gradients of mixup examples."""
    from batches import score as score_batch  # noqa: PLC0415 - loads what only it needs

    clients = make_clients(jax.random.key(0), batches * BATCH_SIZE, BATCH_CLASSES, BATCH_FEATURES)
    weight, labels, gradients = clients
    mean = gradients.reshape(batches, BATCH_SIZE, BATCH_CLASSES, BATCH_FEATURES).mean(axis=1)
    observation = softinv_jax.observe(weight, mean)
    timing = best_of(lambda: softinv_jax.recover_many(observation, batch_size=BATCH_SIZE), runs=3)
    truth = np.asarray(labels).reshape(batches, BATCH_SIZE, BATCH_CLASSES)
    scores = [score_batch(found, own) for found, own in zip(timing.result, truth, strict=True)]
    found = sum(one["found"] + one["imprecise"] for one in scores)
    spurious = sum(one["spurious"] for one in scores)
    note = f"{found} of {truth.shape[0] * BATCH_SIZE} examples, {spurious} spurious"
    return timing.row(batches, "batches") | {"found": found, "spurious": spurious, "note": note}
