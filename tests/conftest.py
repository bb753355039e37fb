"""What all tests share: strict jax settings, a NumPy client, and compiled recoveries."""

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import softinv_jax
from softinv_jax.float64 import in_float64
from softinv_jax.labels import recovery

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes millions of objects that live on: looking through them for cycles again and again is 4 % of the time.
gc.set_threshold(100_000, 50, 50)
# Compilation is most of the time the tests take: little optimised machine code is made in half of it, and computes the
# same. Programs that tests start inherit this. The folder of what is compiled is ignored by git.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip()
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@dataclass(frozen=True)
class Sample:
    """One client example: the head, the private feature and label (float64), and the gradient it uploads."""

    weight: np.ndarray
    feature: np.ndarray
    label: np.ndarray
    gradient: np.ndarray
    bias: np.ndarray | None = None
    bias_gradient: np.ndarray | None = None

    @property
    def observation(self) -> softinv_jax.Observation:
        return softinv_jax.observe(self.weight, self.gradient, self.bias, self.bias_gradient)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def make_label(rng: np.random.Generator, family: str, number_of_classes: int) -> np.ndarray:
    unit = np.eye(number_of_classes)[rng.permutation(number_of_classes)]
    strength, share = rng.uniform(0.05, 0.5), rng.uniform(0.1, 0.9)
    mixed = (1 - share) * unit[0] + share * unit[1]
    uniform = np.full(number_of_classes, 1 / number_of_classes)
    labels = {
        "hard": lambda: unit[0],
        "smoothing": lambda: (1 - strength) * unit[0] + strength * uniform,
        "mixup": lambda: mixed,
        "smoothed_mixup": lambda: (1 - strength) * mixed + strength * uniform,
        "three_way_mixup": lambda: rng.dirichlet(np.full(3, 5.0)) @ unit[:3],
        "dirichlet": lambda: rng.dirichlet(np.ones(number_of_classes)),
        "teacher": lambda: softmax(rng.normal(size=number_of_classes)),
        "uniform": lambda: uniform,
        "one_zero": lambda: (1 - unit[0]) / (number_of_classes - 1),
    }
    return labels[family]()


def make_feature(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    normal = rng.normal(size=size)
    features = {"sigmoid": 1 / (1 + np.exp(-normal)), "signed": normal, "relu": np.maximum(normal, 0)}
    return features[kind].astype(np.float32).astype(np.float64)


def upload(
    weight: np.ndarray,
    feature: np.ndarray,
    label: np.ndarray,
    bias: np.ndarray | None = None,
    factor: float = 1.0,
    dtype: type = np.float32,
) -> Sample:
    """The gradient (p - y) x^T in float64, times `factor`, rounded to `dtype` once."""
    logits = weight.astype(np.float64) @ feature + (0.0 if bias is None else bias.astype(np.float64))
    error = factor * (softmax(logits) - label)
    gradient = np.outer(error, feature).astype(dtype)
    return Sample(weight, feature, label, gradient, bias, None if bias is None else error.astype(dtype))


def draw_sample(
    family: str,
    seed: int,
    *,
    number_of_classes: int = 10,
    features: int = 32,
    kind: str = "sigmoid",
    has_bias: bool = False,
    factor: float = 1.0,
    dtype: type = np.float32,
) -> Sample:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (number_of_classes, features)).astype(np.float32)
    bias = rng.normal(size=number_of_classes).astype(np.float32) if has_bias else None
    label = make_label(rng, family, number_of_classes)
    return upload(weight, make_feature(rng, kind, features), label, bias, factor, dtype)


def jit_quickly(function: Callable, **options: Any) -> Callable:
    """`jax.jit` to machine code that takes a third of the time to make, and runs slower; it runs only a few times."""
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11):  # Newer ones have it no more.
        quick["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(function, compiler_options=quick, **options)


STAGES = {name: jit_quickly(getattr(recovery, name), static_argnums=1) for name in ("read", "search")}


@in_float64
def recover_compiled(
    sample: Sample,
    *,
    unknown_scale: bool = False,
    thorough: bool = True,
    method: str = "exact",
    label_format: str | None = None,
) -> softinv_jax.Recovery:
    """`recover` by its own stages, quickly compiled; the search is the same program for heads of any size."""
    observation = sample.observation
    stages = recovery.stages_for(observation, method, unknown_scale, label_format, thorough)
    found = STAGES["search"](STAGES["read"](observation, stages), stages)
    return jax.device_get(recovery.complete(observation, found, stages))


def check_honesty(found: softinv_jax.Recovery, label: np.ndarray) -> None:
    """A unique label is right and sharp: within ten of its own deviations (float32 output: never closer than 1e-6).

    And no label is given where none is claimed.
    """
    if found.verdict_name == "unique":
        deviation = found.evidence.label_deviation.max()
        assert np.abs(found.label - label).max() < 1e-6 + 10 * deviation
        assert deviation < 0.05
        assert found.label.min() >= -10 * deviation
        assert found.label.max() <= 1 + 10 * deviation
    elif found.verdict_name not in ("ambiguous", "conditional"):
        assert np.isnan(found.label).all()
        assert np.isnan(found.feature).all()


@pytest.fixture(scope="module", autouse=True)
def unload_programs() -> Iterator[None]:
    """Compiled programs stay mapped, and Linux ends a process at 65,530 mappings: drop them long before that."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def draw() -> Callable[..., Sample]:
    """`draw(family, seed, ...)`: a random head, feature and label, and their gradient."""
    return draw_sample


@pytest.fixture(scope="session")
def client() -> Callable[..., Sample]:
    """`client(weight, feature, label, bias, factor, dtype)`: the gradient of given data."""
    return upload


@pytest.fixture(scope="session")
def recover_one() -> Callable[..., softinv_jax.Recovery]:
    """`recover`, quickly compiled, with NumPy results."""
    return recover_compiled


@pytest.fixture(scope="session")
def quick_jit() -> Callable[[Callable], Callable]:
    return jit_quickly


@pytest.fixture(scope="session")
def assert_honest() -> Callable[[softinv_jax.Recovery, np.ndarray], None]:
    return check_honesty


@dataclass(frozen=True)
class DenseRun:
    """A client's training of dense layers: the tree it was sent, the one it sends back, its inputs and labels."""

    sent: dict[str, Any]
    returned: dict[str, Any]
    inputs: np.ndarray
    labels: np.ndarray


def run_dense(
    examples: int = 6,
    steps: int = 4,
    minibatch_size: int | None = None,
    *,
    widths: tuple[int, ...] = (48, 120, 5),
    rate: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    activation: str = "relu",
    bias: bool = True,
    adaptive: bool = False,
    smoothing: float = 0.0,
    seed: int = 0,
) -> DenseRun:
    """SGD in NumPy, float32, on the mean cross-entropy, as `torch.optim.SGD` steps; minibatches in a random order.

    adaptive: Adam instead, without the corrections for its start.
    """
    rng = np.random.default_rng(seed)
    names = [f"dense{place + 1}" for place in range(len(widths) - 2)] + ["head"]
    sent: dict[str, Any] = {}
    for name, before, after in zip(names, widths[:-1], widths[1:], strict=True):
        bound = np.sqrt(1 / before)
        sent[name] = {"kernel": rng.uniform(-bound, bound, (before, after)).astype(np.float32)}
        if bias:
            sent[name]["bias"] = rng.uniform(-bound, bound, after).astype(np.float32)
    inputs = rng.normal(0.2, 1, (examples, widths[0])).astype(np.float32)
    classes = np.eye(widths[-1])[rng.integers(0, widths[-1], examples)]
    labels = ((1 - smoothing) * classes + smoothing / widths[-1]).astype(np.float32)
    held = jax.tree.map(np.copy, sent)
    first, second = (jax.tree.map(np.zeros_like, sent) for _ in range(2))
    order: list[int] = []
    for _ in range(steps):
        order = order or rng.permutation(examples).tolist()
        size = minibatch_size or examples
        chosen, order = order[:size], order[size:]
        gradient = dense_gradient(held, names, inputs[chosen], labels[chosen], activation)
        gradient = jax.tree.map(lambda own, value: own + np.float32(weight_decay) * value, gradient, held)
        first = jax.tree.map(lambda own, value: np.float32(momentum) * value + own, gradient, first)
        second = jax.tree.map(lambda own, value: np.float32(0.99) * value + np.float32(0.01) * own**2, gradient, second)
        move = jax.tree.map(lambda one, two: one / (np.sqrt(two) + 1e-8), first, second) if adaptive else first
        held = jax.tree.map(lambda value, own: (value - np.float32(rate) * own).astype(np.float32), held, move)
    return DenseRun(sent, held, inputs, labels)


def dense_gradient(
    held: dict[str, Any], names: list[str], inputs: np.ndarray, labels: np.ndarray, activation: str
) -> dict[str, Any]:
    hidden, slopes = [inputs], []
    for name in names:
        values = hidden[-1] @ held[name]["kernel"] + held[name].get("bias", np.float32(0))
        if activation == "relu":
            hidden.append(np.maximum(values, 0))
            slopes.append((values > 0).astype(np.float32))
        else:
            hidden.append(np.tanh(values))
            slopes.append(1 - hidden[-1] ** 2)
    delta = (softmax(values) - labels) / np.float32(len(inputs))
    gradient = {}
    for place in range(len(names) - 1, -1, -1):
        gradient[names[place]] = {"kernel": hidden[place].T @ delta}
        if "bias" in held[names[place]]:
            gradient[names[place]]["bias"] = delta.sum(axis=0)
        if place:
            delta = (delta @ held[names[place]]["kernel"].T) * slopes[place - 1]
    return {name: gradient[name] for name in held}


@pytest.fixture(scope="session")
def dense_run() -> Callable[..., DenseRun]:
    return run_dense
