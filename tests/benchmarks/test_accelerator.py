"""`accelerator.py`: rows that fail or come too late, results on the disk at any time, clients, memory, processes."""

import argparse
import json
import signal
import time
from importlib import import_module as module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import softinv_jax

FOLDER = Path(__file__).parents[2] / "benchmarks"


def session_of(folder: Path, seconds: float) -> Any:
    options = argparse.Namespace(seeds=1, quick=True, full=False, out=folder, time_limit=seconds)
    run = module("runner").Run("accelerator", options)
    return module("accelerator_session").Session(run, "Title", module("accelerator").COLUMNS)


def written(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "accelerator.json").read_text())["rows"]


def test_a_row_that_fails_says_so_and_the_rest_goes_on(tmp_path: Path) -> None:
    session = session_of(tmp_path, 60.0)

    def fails() -> dict[str, Any]:
        raise RuntimeError("no\nroom")

    session.measure("labels", "case", "what", fails)
    assert written(tmp_path)[0]["error"] == "RuntimeError: no room"  # At once: the next may kill the process.
    session.measure("labels", "case", "what", lambda: {"count": 10, "unit": "labels", "seconds": 0.05})
    assert [row.get("count") for row in written(tmp_path)] == [None, 10]
    table = (tmp_path / "accelerator.md").read_text()
    assert "RuntimeError: no room" in table
    assert "200 labels/s" in table


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the platform has no timers")
def test_rows_end_with_the_time(tmp_path: Path) -> None:
    session = session_of(tmp_path, 0.2)
    start = time.perf_counter()
    session.measure("labels", "case", "endless", lambda: time.sleep(60) or {})
    session.measure("labels", "case", "too late", lambda: pytest.fail("begun"))
    assert time.perf_counter() - start < 30
    assert [row["skipped"] for row in written(tmp_path)] == ["skipped: 0 s are over"] * 2


def test_a_recovery_is_counted_as_wrong_beyond_what_it_states() -> None:
    unique, ambiguous = softinv_jax.Verdict.UNIQUE, softinv_jax.Verdict.AMBIGUOUS
    truth = np.zeros((4, 3))
    label = np.array([[0, 0, 9e-5], [0, 0, 5e-3], [0, 0, 5e-3], [0, 0, 1.0]])
    deviation = np.array([[0.0] * 3, [1e-3] * 3, [1e-4] * 3, [0.0] * 3])
    found = SimpleNamespace(
        verdict=np.array([unique, unique, unique, ambiguous]),
        label=label,
        evidence=SimpleNamespace(label_deviation=deviation),
    )
    assert module("accelerator_session").score(found, truth) == {
        "given": 4,
        "unique": 3,
        "right": 2,
        "wrong": 1,
    }


def test_gradients_of_a_case_are_those_of_its_clients_and_halved_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = module("accelerator_labels")
    case = labels.Case(5, 8, 6)
    weight, label, gradient = (np.asarray(array, np.float64) for array in case.clients)
    np.testing.assert_allclose(label.sum(axis=1), 1, rtol=1e-6)
    # Rank one, and the error p - y sums to zero.
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)
    assert np.all(np.linalg.matrix_rank(gradient, tol=1e-5) == 1)
    assert weight.shape == (5, 8)
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 6 * 1000})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert module("accelerator_session").fitting(64, 100) == 8


def test_stand_in_images_are_smooth_and_use_all_gray_levels() -> None:
    data = module("accelerator_images").smooth_fields(20)
    assert data.name == "smooth random fields"
    assert (data.images.min(), data.images.max()) == (0, 255)
    steps = np.abs(np.diff(data.images.astype(int), axis=1))
    assert np.median(steps) < 12


def test_a_peer_is_told_the_device_only_if_it_takes_one() -> None:
    pytest.importorskip("torch", reason="the published attacks need the extra peers")
    call = module("accelerator_images").on_torch_device
    assert call(lambda value: value, 3) == 3
    assert call(lambda value, device="nowhere": (value, str(device)), 3)[1] in ("cpu", "cuda")


def test_memory_is_what_a_call_holds_at_most() -> None:
    meter = module("accelerator_growth").MemoryMeter()
    held = np.ones(64 * 2**20, np.uint8)
    del held
    used = meter.bytes()
    assert used is None or 60 * 2**20 < used < 200 * 2**20


def test_a_point_that_fails_says_why_and_one_that_takes_too_long_too() -> None:
    growth = module("accelerator_growth")
    assert "error" in growth.measure_apart(2, 4, 1, seconds=60.0)  # Two classes without a bias are refused.
    assert growth.measure_apart(10, 16, 16, seconds=0.01)["error"].startswith("not done after 0 s")


def test_where_the_time_of_a_start_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_up = module("accelerator_start_up")
    start_up.write_observation(tmp_path / "seen.npz", 10, 32)
    parts = start_up.time_parts(str(tmp_path / "seen.npz"), str(tmp_path / "out.npz"))
    assert parts["code"] == 0
    assert (tmp_path / "out.npz").exists()
    assert 0 < parts["tracing"] + parts["compiling"] < parts["command"]
    assert capsys.readouterr().out == ""
