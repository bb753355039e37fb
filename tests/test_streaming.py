"""Recovery part by part: the same as in one go, taken up again after a kill, shared by devices and by processes.

How parts are divided does not depend on what is recovered: most tests use iDLG, which compiles in seconds.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from softinv_jax import Recovery, observe, recover_many, streaming
from softinv_jax.streaming import read_recovery, recover_stream

EXAMPLES = 24
FAMILIES = ("hard", "smoothing", "mixup", "smoothed_mixup")


@pytest.fixture(scope="module")
def samples(draw: Callable, client: Callable) -> list:
    """Gradients of one head, soft labels of every format."""
    weight = draw("hard", 0).weight
    drawn = [draw(FAMILIES[seed % len(FAMILIES)], seed) for seed in range(EXAMPLES)]
    return [client(weight, sample.feature, sample.label) for sample in drawn]


@pytest.fixture(scope="module")
def files(samples: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weight.npy and gradients.npy."""
    folder = tmp_path_factory.mktemp("gradients")
    np.save(folder / "weight.npy", samples[0].weight)
    np.save(folder / "gradients.npy", np.stack([sample.gradient for sample in samples]))
    return folder


@pytest.fixture(scope="module")
def arrays(files: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(files / "weight.npy"), np.load(files / "gradients.npy", mmap_mode="r")


@pytest.fixture(scope="module")
def together(arrays: tuple) -> Recovery:
    return recover_many(observe(*arrays), method="idlg")


def assert_same(found: Recovery, expected: Recovery) -> None:
    np.testing.assert_array_equal(found.verdict, expected.verdict)
    np.testing.assert_array_equal(found.format.classes, expected.format.classes)
    np.testing.assert_allclose(found.label, expected.label, atol=1e-6)
    np.testing.assert_allclose(found.feature, expected.feature, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.interval, expected.interval, rtol=1e-4)
    # What features are made from is not written, but what is made of it.
    found, expected = (replace(one, stored_feature=one.feature) for one in (found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(found)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]


def test_parts_give_what_one_go_gives(arrays: tuple, together: Recovery, tmp_path: Path) -> None:
    seen = []
    recover_stream(*arrays, tmp_path / "parts", chunk=12, method="idlg", progress=lambda *done: seen.append(done))
    assert seen == [(12, 24), (24, 24)]
    assert_same(read_recovery(tmp_path / "parts"), together)


class Watched:
    """An array on a disk, as it were: nothing but its shape, its dtype, and the parts asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, chosen: slice | int) -> np.ndarray:
        part = self.array[chosen]
        self.read.append(part.nbytes)
        return part


def test_no_more_than_a_part_is_read_at_once(arrays: tuple, together: Recovery, tmp_path: Path) -> None:
    watched = Watched(arrays[1])
    recover_stream(arrays[0], watched, tmp_path, chunk=12, method="idlg")
    assert max(watched.read) == arrays[1][:12].nbytes
    assert_same(read_recovery(tmp_path), together)


def test_finished_parts_are_kept_and_missing_ones_made(
    arrays: tuple, together: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(part, **options):
        sizes.append(len(part.weight_gradient))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return recover_many(part, **options)

    monkeypatch.setattr(streaming, "recover_many", counted)
    with pytest.raises(KeyboardInterrupt):
        recover_stream(*arrays, tmp_path, chunk=12, method="idlg")
    with pytest.raises(ValueError, match=r"lacks 1 of 2 parts \(part-00000001.npz"):
        read_recovery(tmp_path)
    recover_stream(*arrays, tmp_path, chunk=12, method="idlg")
    assert sizes == [12, 12, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "part-00000000.npz",
        "part-00000001.npz",
        "settings.json",
    ]
    assert_same(read_recovery(tmp_path), together)


def test_parts_of_other_settings_or_other_gradients_are_not_mixed(
    arrays: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "recover_many", lambda part, **options: pytest.fail("nothing should be recovered"))
    weight, gradients = arrays
    with pytest.raises(pytest.fail.Exception):
        recover_stream(weight, gradients, tmp_path, chunk=12, method="idlg")
    other = np.array(gradients)
    other[0, 0, 0] += 1
    for changed, words in (
        ((weight, gradients, 8, "idlg"), "chunk 12, not 8"),
        ((weight, gradients, 12, "exact"), "{'method': 'idlg'}, not {'method': 'exact'}"),
        ((weight, other, 12, "idlg"), "gradients '"),
        ((weight * 2, gradients, 12, "idlg"), "head '"),
    ):
        with pytest.raises(ValueError, match=f"(?s){words}.*choose another folder"):
            recover_stream(*changed[:2], tmp_path, chunk=changed[2], method=changed[3])


def test_bad_input_is_named(arrays: tuple, tmp_path: Path) -> None:
    weight, gradients = arrays
    with pytest.raises(ValueError, match=r"\(N, C, d\) with N >= 1, not \(10, 32\)"):
        recover_stream(weight, gradients[0], tmp_path)
    with pytest.raises(ValueError, match="chunk must be a positive number of gradients, not 0"):
        recover_stream(weight, gradients, tmp_path, chunk=0)
    with pytest.raises(ValueError, match=r"bias_gradient must have shape \(24, 10\), not \(23, 10\)"):
        recover_stream(weight, gradients, tmp_path, bias=np.zeros(10), bias_gradient=np.zeros((23, 10)))
    with pytest.raises(ValueError, match=r"holds no settings.json"):
        read_recovery(tmp_path)
    broken = np.array(gradients)
    broken[13, 2, 1] = np.nan
    with pytest.raises(
        ValueError, match=r"weight_gradient holds 1 entries .* gradients 12 to 23, .* index \(13, 2, 1\)"
    ):
        recover_stream(weight, broken, tmp_path / "broken", chunk=12, method="idlg")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "part-00000000.npz").write_bytes(b"not ours")
    with pytest.raises(ValueError, match=r"holds part-00000000\.npz but no settings\.json"):
        recover_stream(weight, gradients, tmp_path / "strange", chunk=12, method="idlg")


def test_a_damaged_part_is_named(arrays: tuple, tmp_path: Path) -> None:
    recover_stream(*arrays, tmp_path, chunk=24, method="idlg")
    for content in (b"", b"text", (tmp_path / "part-00000000.npz").read_bytes()[:200]):
        (tmp_path / "part-00000000.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"part-00000000\.npz is damaged .*; remove it"):
            read_recovery(tmp_path)


def run_python(program: str, files: Path, *arguments: object, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(streaming.__file__).parents[1])} | variables
    environment["JAX_COMPILATION_CACHE_DIR"] = str(jax.config.jax_compilation_cache_dir)
    # An accelerator's plugin, where there is one, would take the devices asked for here.
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    command = [sys.executable, "-c", program, str(files), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return out


ON_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from softinv_jax.streaming import recover_stream
files = Path(sys.argv[1])
assert jax.local_device_count() == 8
recover_stream(np.load(files / "weight.npy"), np.load(files / "gradients.npy", mmap_mode="r"), sys.argv[2])
"""
# Least optimised machine code takes half the time to make.
QUICKLY = "--xla_backend_optimization_level=0"


def test_eight_devices_give_what_one_gives(files: Path, samples: list, tmp_path: Path, recover_one: Callable) -> None:
    finish(run_python(ON_DEVICES, files, tmp_path, XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICKLY}"))
    found = read_recovery(tmp_path)
    assert found.verdict_name.tolist() == ["unique"] * EXAMPLES
    for index, sample in enumerate(samples):
        expected = recover_one(sample, thorough=False)
        np.testing.assert_allclose(found.label[index], expected.label, atol=1e-6)
        np.testing.assert_allclose(found.feature[index], expected.feature, rtol=1e-4, atol=1e-6)


IN_PROCESSES = """
import sys
from pathlib import Path
import jax, numpy as np
from softinv_jax.streaming import recover_stream
files, folder, address, index = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
jax.distributed.initialize(address, num_processes=2, process_id=index)
assert (jax.process_count(), jax.process_index()) == (2, index)
gradients = np.load(files / "gradients.npy", mmap_mode="r")
recover_stream(np.load(files / "weight.npy"), gradients, folder, chunk=12, method="idlg")
"""


def test_two_processes_share_the_parts(files: Path, together: Recovery, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [run_python(IN_PROCESSES, files, tmp_path, address, index) for index in range(2)]
    for process in processes:
        finish(process)
    assert_same(read_recovery(tmp_path), together)


ONE_BY_ONE = """
import sys, time
from pathlib import Path
import numpy as np
from softinv_jax import streaming
files = Path(sys.argv[1])
recover_many = streaming.recover_many
def slowly(part, **options):
    print("part", flush=True)
    found = recover_many(part, **options)
    time.sleep(60)
    return found
streaming.recover_many = slowly
weight, gradients = np.load(files / "weight.npy"), np.load(files / "gradients.npy")
streaming.recover_stream(weight, gradients, sys.argv[2], chunk=12, method="idlg")
"""


def test_a_killed_run_leaves_only_whole_parts(files: Path, arrays: tuple, together: Recovery, tmp_path: Path) -> None:
    process = run_python(ONE_BY_ONE, files, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "part\n"
    process.kill()
    process.communicate()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["chunk"] == 12
    recover_stream(*arrays, tmp_path, chunk=12, method="idlg")
    assert_same(read_recovery(tmp_path), together)
