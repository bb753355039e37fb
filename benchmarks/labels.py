"""How fast are soft labels recovered, beside the published procedure and a plain sum over the same gradients?

    python benchmarks/labels.py [--peak-bandwidth GB/S] [--stages] [--quick | --full]

For each (C, d): untrained head U(-0.5, 0.5), sigmoid features, mixup labels (the harder format), float32 gradients.
Compile time is reported apart; every timing blocks until the result is ready and is the best of several runs, with
`jnp.sum` over the same gradients timed in turn with ours. "CPU" is the processor time of all threads for one sample:
on an idle machine with N cores the wall time is down to 1/N of it. "of peak" is bytes of gradient read per second over
the memory bandwidth given. The published procedure (extra `peers`) and our `variance` rendering of its loss run on the
first few of the same gradients. On several devices the examples are shared out among all of them. `--stages`
says where the time goes: each stage of the fast search compiled with all before it, on one chunk, one at a time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from runner import Run, option_parser

import softinv_jax
from softinv_jax.client import per_sample_last_layer_gradients
from softinv_jax.labels.consensus import score_hypotheses
from softinv_jax.labels.exact import FAST_TRIPLES, explain_by_consensus
from softinv_jax.labels.hypotheses import plan_triples, solve_hypotheses
from softinv_jax.labels.recovery import recover
from softinv_jax.labels.scalar_equation import ScalarEquation, Unknowns
from softinv_jax.measures.label_error import label_error
from softinv_jax.observation.rank_one import dominant_factors

SHAPES = {(10, 768): 8192, (100, 512): 2048, (1000, 2048): 64}
RUNS = 5


def make_gradients(number_of_classes: int, features: int, examples: int, seed: int) -> tuple[np.ndarray, ...]:
    """Weight (C, d), labels (N, C) and gradients (N, C, d) of mixup examples, float32."""
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (number_of_classes, features)).astype(np.float32)
    feature = 1 / (1 + np.exp(-rng.standard_normal((examples, features), dtype=np.float32)))
    first = rng.integers(0, number_of_classes, examples)
    second = (first + rng.integers(1, number_of_classes, examples)) % number_of_classes
    share = rng.uniform(0, 1, examples).astype(np.float32)
    label = np.zeros((examples, number_of_classes), np.float32)
    label[np.arange(examples), first] += share
    label[np.arange(examples), second] += 1 - share
    gradient = per_sample_last_layer_gradients(jnp.asarray(weight), jnp.asarray(feature), jnp.asarray(label)).weight
    return weight, label, jax.block_until_ready(gradient)


def best_of_each(functions: dict[str, Callable[[], Any]], runs: int) -> dict[str, tuple[float, float]]:
    """First-call and best later wall time of each, the functions taking turns so that all see the same machine."""
    first = {}
    for name, function in functions.items():
        start = time.perf_counter()
        jax.block_until_ready(function())
        first[name] = time.perf_counter() - start
    best = dict.fromkeys(functions, np.inf)
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: (first[name] - best[name], best[name]) for name in functions}


def published_seconds(weight: np.ndarray, gradients: np.ndarray, labels: np.ndarray) -> dict[str, float] | None:
    """Seconds per sample of the published procedure over all of them, failures included; None without the peers."""
    try:
        from published_procedure import MIXUP_SETTINGS, check_swarms, recover_published  # noqa: PLC0415

        check_swarms()
    except ImportError as error:
        print(f"published procedure skipped: {error}", file=sys.stderr)
        return None
    np.random.seed(0)  # noqa: NPY002 - scikit-opt draws from the global generator
    start = time.perf_counter()
    found = [recover_published(weight, gradient, excluded=2, settings=MIXUP_SETTINGS) for gradient in gradients]
    seconds = (time.perf_counter() - start) / len(gradients)
    solved = sum(
        recovery.stage != "failed" and np.abs(recovery.label - label).max() < 1e-3
        for recovery, label in zip(found, labels, strict=True)
    )
    return {"seconds_per_sample": seconds, "recovered": int(solved), "total": len(gradients)}


def measure(shape: tuple[int, int], examples: int, peer_samples: int) -> dict[str, Any]:
    """One row of the benchmark."""
    number_of_classes, features = shape
    weight, labels, gradients = make_gradients(number_of_classes, features, examples, seed=0)
    observation = softinv_jax.observe(weight, gradients)
    total = jax.jit(jnp.sum)
    devices = jax.local_devices() if jax.local_device_count() > 1 else None

    def exact() -> softinv_jax.Recovery:
        return softinv_jax.recover_many(observation, devices=devices)

    timings = best_of_each({"exact": exact, "sum": lambda: total(gradients)}, RUNS)
    begun = time.process_time()
    result = exact()
    processor_seconds = time.process_time() - begun
    few = min(256 if number_of_classes < 1000 else 16, examples)
    few_observation = softinv_jax.observe(weight, gradients[:few])

    def variance() -> softinv_jax.Recovery:
        return softinv_jax.recover_many(few_observation, method="variance", label_format="mixup")

    variance_time = best_of_each({"variance": variance}, 2)["variance"]
    variance_error = label_error(variance().label, labels[:few]).largest
    exact_time, sum_time = timings["exact"], timings["sum"]
    return {
        "classes": number_of_classes,
        "features": features,
        "examples": examples,
        "samples_per_second": examples / exact_time[1],
        "compile_seconds": exact_time[0],
        "recovered": int(np.sum(result.verdict == softinv_jax.Verdict.UNIQUE)),
        "largest_label_error": float(np.max(label_error(result.label, labels).largest)),
        "processor_microseconds": 1e6 * processor_seconds / examples,
        "times_plain_sum": exact_time[1] / sum_time[1],
        "sum_gigabytes_per_second": gradients.nbytes / sum_time[1] / 1e9,
        "gigabytes_per_second": gradients.nbytes / exact_time[1] / 1e9,
        "variance_samples_per_second": few / variance_time[1],
        "variance_compile_seconds": variance_time[0],
        "variance_recovered": int(np.sum(variance_error < 1e-3)),
        "variance_total": few,
        "published": published_seconds(weight, np.asarray(gradients[:peer_samples]), labels[:peer_samples]),
    }


def stage_microseconds(weight: np.ndarray, gradients: np.ndarray) -> dict[str, float]:
    """Time for one sample up to and with each stage of the fast search."""
    unknowns, number_of_classes = Unknowns(scalar=True, scale=False), weight.shape[0]
    plan = plan_triples(number_of_classes, FAST_TRIPLES)
    direction_of = jnp.asarray(weight, jnp.float64)

    def equation(gradient: jax.Array) -> ScalarEquation:
        factors = dominant_factors(gradient)
        zeros = jnp.zeros(number_of_classes)
        right = factors.right.astype(jnp.float64) / factors.right_norm
        norm, roundoff = jnp.sqrt(jnp.sum(direction_of**2, axis=1)), jnp.asarray(6e-8)
        return ScalarEquation(
            direction_of @ right, zeros, factors.left, zeros, zeros, norm, roundoff, zeros[0], jnp.asarray(jnp.nan)
        )

    def scores(gradient: jax.Array) -> jax.Array:
        seen = equation(gradient)
        return score_hypotheses(seen, solve_hypotheses(seen, plan.triples, unknowns), unknowns)

    stages: dict[str, Callable[[jax.Array], Any]] = {
        "sum": jnp.sum,
        "factors": dominant_factors,
        "equation": equation,
        "triples solved": lambda gradient: solve_hypotheses(equation(gradient), plan.triples, unknowns),
        "hypotheses scored": scores,
        "consensus polished": lambda gradient: explain_by_consensus(equation(gradient), unknowns),
        "verdict": lambda gradient: recover(softinv_jax.Observation(direction_of, gradient), thorough=False),
    }
    compiled = {name: jax.jit(jax.vmap(stage)) for name, stage in stages.items()}
    best = best_of_each({name: lambda run=run: run(gradients) for name, run in compiled.items()}, RUNS)
    return {name: 1e6 * seconds / len(gradients) for name, (_, seconds) in best.items()}


def columns(peak: float | None) -> dict[str, Callable[[dict[str, Any]], object]]:
    """Of the table; `peak` memory bandwidth in gigabytes per second."""

    def rate(row: dict[str, Any]) -> float | None:
        return 1 / row["published"]["seconds_per_sample"] if row["published"] else None

    found: dict[str, Callable[[dict[str, Any]], object]] = {
        "(C, d)": lambda row: f"({row['classes']}, {row['features']})",
        "exact / s": lambda row: f"{row['samples_per_second']:,.0f}",
        "recovered": lambda row: f"{row['recovered']} of {row['examples']}",
        "CPU, us each": lambda row: f"{row['processor_microseconds']:.1f}",
        "x plain sum": lambda row: f"{row['times_plain_sum']:.1f}",
        "compile s": lambda row: f"{row['compile_seconds']:.1f}",
        "variance / s": lambda row: (
            f"{row['variance_samples_per_second']:,.0f} ({row['variance_recovered']} of {row['variance_total']})"
        ),
        "published / s": lambda row: (
            f"{rate(row):.1f} ({row['published']['recovered']} of {row['published']['total']})"
            if row["published"]
            else "skipped: extra peers"
        ),
    }
    if peak is not None:
        found["of peak, %"] = lambda row: f"{100 * row['gigabytes_per_second'] / peak:.1f}"
    return found


def main() -> None:
    """Command line."""
    parser = option_parser(__doc__)
    parser.add_argument("--stages", action="store_true", help="where the time goes; compiles six programs a shape more")
    parser.add_argument("--peak-bandwidth", type=float, metavar="GB/S", help="of the device's memory, to compare with")
    arguments = parser.parse_args()
    run = Run("labels", arguments)
    shapes = dict(list(SHAPES.items())[: 1 if arguments.quick else None])
    for shape, examples in shapes.items():
        few = run.size(256, examples, 16 * examples)
        row = measure(shape, few, run.size(3, 10, 100))
        if arguments.stages:
            weight, _, gradients = make_gradients(*shape, min(1024, few), seed=0)
            with jax.enable_x64(True):
                row["stage_microseconds"] = stage_microseconds(weight, np.asarray(gradients))
            for name, microseconds in row["stage_microseconds"].items():
                print(f"{shape} up to {name}: {microseconds:.1f} us a sample", file=sys.stderr)
        run.add(**row)
    run.finish("Soft labels per second, mixup, format unknown to exact", columns(arguments.peak_bandwidth))


if __name__ == "__main__":
    main()
