"""`accelerator.py --start-up`: `softinv recover` of one gradient in a new process, and where its time goes.

Cold: with an empty folder for compiled programs; warm: with what the cold run left there, the best of several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TITLE = "`softinv recover` of one gradient, in a new process"
SHAPES = ((10, 768), (1000, 2048))
WARM_RUNS = 3
LONGEST_RUN = 240.0  # Seconds.
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
    "/jax/compilation_cache/cache_retrieval_time_sec": "loading",
}


def write_observation(path: Path, classes: int, features: int) -> None:
    """One gradient with a mixup label, made without jax: the device stays free for the process that is timed."""
    rng = np.random.default_rng(0)
    weight, feature = rng.uniform(-0.5, 0.5, (classes, features)), rng.uniform(0, 1, features)
    powers = np.exp(weight @ feature - np.max(weight @ feature))
    label = 0.3 * np.eye(classes)[1] + 0.7 * np.eye(classes)[2]
    gradient = np.outer(powers / powers.sum() - label, feature)
    np.savez(path, weight=weight.astype(np.float32), weight_gradient=gradient.astype(np.float32))


def time_parts(observation: str, out: str) -> dict[str, Any]:
    """Run the command in this process, which must be new: seconds by what they go to, the rest included.

    "compiling" has the loading of programs that are kept in it, where there are some.
    """
    start = time.perf_counter()
    import jax  # noqa: PLC0415 - this is timed

    from softinv_jax.command_line import observation_file, outputs, recovery_file  # noqa: F401, PLC0415
    from softinv_jax.command_line.commands import run_command  # noqa: PLC0415
    from softinv_jax.recoveries import recover_many  # noqa: F401, PLC0415

    seconds = dict.fromkeys(("importing", "device", *EVENTS.values()), 0.0)
    seconds["importing"] = time.perf_counter() - start

    def note(event: str, duration: float, **_: Any) -> None:
        if event in EVENTS:
            seconds[EVENTS[event]] += duration

    jax.monitoring.register_event_duration_secs_listener(note)
    start = time.perf_counter()
    device = jax.devices()[0]
    seconds["device"] = time.perf_counter() - start
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_command(["recover", observation, "--out", out, "--json"])
    return seconds | {"command": time.perf_counter() - start, "code": code, "device_kind": device.device_kind}


def run_apart(folder: Path, observation: Path) -> dict[str, Any]:
    """One run of the command in a process of its own, with compiled programs kept in `folder`.

    Raises:
      RuntimeError: the command did not end well.
    """
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder), "PYTHONPATH": path}
    command = [sys.executable, __file__, str(observation), str(observation.with_suffix(".out.npz"))]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONGEST_RUN, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["ended without a word"])[-1][:300])
    return {"seconds": seconds} | json.loads(done.stdout.splitlines()[-1])


def run_start_up(arguments: argparse.Namespace) -> None:
    """Every shape, cold and warm."""
    import jax  # noqa: PLC0415 - not in a process that is timed
    from runner import Run  # noqa: PLC0415

    jax.config.update("jax_platforms", "cpu")  # The device is for the processes that are timed, one at a time.
    run = Run("accelerator_start_up", arguments)
    for classes, features in SHAPES[: 1 if arguments.quick else None]:
        with tempfile.TemporaryDirectory() as name:
            observation, programs = Path(name) / "seen.npz", Path(name) / "programs"
            write_observation(observation, classes, features)
            for cache in ("cold", "warm"):
                row: dict[str, Any] = {"classes": classes, "features": features, "cache": cache}
                try:
                    runs = [run_apart(programs, observation) for _ in range(1 if cache == "cold" else WARM_RUNS)]
                    row |= min(runs, key=lambda one: one["seconds"])
                    run.notes["device"] = row["device_kind"]
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    row["error"] = str(error)[:300]
                run.add(**row)
                run.write(TITLE, COLUMNS)
    run.finish(TITLE, COLUMNS)


def _seconds(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[name]:.2f}" if name in row else ""


def _rest(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return ""
    named = sum(row[name] for name in ("importing", "device", "tracing", "lowering", "compiling"))
    return f"{row['seconds'] - named:.2f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], object]] = {
    "(C, d)": lambda row: f"({row['classes']}, {row['features']})",
    "cache": lambda row: row["cache"],
    "seconds": lambda row: f"{row['seconds']:.2f}" if "seconds" in row else row["error"],
    "importing": _seconds("importing"),
    "starting the device": _seconds("device"),
    "tracing": _seconds("tracing"),
    "lowering": _seconds("lowering"),
    "compiling or loading": _seconds("compiling"),
    "the rest": _rest,
}


if __name__ == "__main__":
    parts = time_parts(*sys.argv[1:3])
    print(json.dumps(parts))
    sys.exit(parts["code"])
