"""Nothing of the user's is lost, and nothing ends in a traceback: folders, streams, signals, variables, full disks."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import softinv_jax
from softinv_jax import atomic_file, streaming
from softinv_jax.command_line import parts_folder
from softinv_jax.command_line.main import main

IDLG = ("--method", "idlg")
LONG = "x" * 300


@pytest.fixture
def seen(tmp_path: Path, draw: Callable) -> str:
    samples = [draw("hard", seed) for seed in range(2)]
    path = tmp_path / "seen.npz"
    gradients = np.stack([sample.gradient for sample in samples])
    np.savez(path, weight=samples[0].weight, weight_gradient=gradients)
    return str(path)


def assert_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("softinv")
    assert error.count("\n") == 1, error


def no_work(*args: object, **options: object) -> None:
    raise AssertionError("the work has started")


class TestParts:
    @pytest.mark.parametrize("names", [[], ["thesis.tex"], ["part-00000000.npz", "settings.json"]])
    def test_a_folder_of_the_users_is_left_alone(
        self,
        names: list[str],
        seen: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(streaming, "recover_many", no_work)
        folder = tmp_path / "out.npz.parts"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("mine")
        assert main(["recover", seen, "--out", str(tmp_path / "out.npz"), *IDLG, "--chunk", "1"]) == 2
        assert_one_line(capsys, "not made by softinv")
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)

    def test_a_file_put_into_ours_is_left_alone(self, tmp_path: Path) -> None:
        path = str(tmp_path / "out.npz.parts")
        with parts_folder.claim_parts(path):
            for name in ("part-00000000.npz", "settings.json", "thesis.tex"):
                (Path(path) / name).touch()
            parts_folder.remove_parts(path)
        assert [one.name for one in Path(path).iterdir()] == ["thesis.tex"]

    def test_two_runs_on_one_output(self, seen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out.npz"
        command = ["recover", seen, "--out", str(out), *IDLG, "--chunk", "1"]
        with parts_folder.claim_parts(f"{out}.parts"):
            assert main(command) == 2
            assert_one_line(capsys, "another run is using it")
        assert main(command) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "seen.npz"]

    def test_a_full_disk_is_not_the_inputs_fault(
        self, seen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A real limit on the size of files, which ends writes in OSError as a full disk does."""
        command = ["recover", seen, "--out", str(tmp_path / "out.npz"), *IDLG, "--chunk", "1"]
        with files_limited_to(1000):
            code = main(command)
        assert code == 2
        assert_one_line(capsys, "out.npz.parts: cannot be written (File too large)")
        assert main(command) == 0  # Goes on where it stopped.
        assert not (tmp_path / "out.npz.parts").exists()


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestOutputs:
    def test_no_output_overwrites_another_or_an_input(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model, gradients = tmp_path / "model.npz", tmp_path / "gradients.npz"
        for path in (model, gradients):
            path.write_bytes(b"mine")
        os.link(model, tmp_path / "hard-link")
        os.symlink(gradients, tmp_path / "soft-link")
        out, figure = str(tmp_path / "out"), str(tmp_path / "out")
        base = ["invert", "--model", "lenet", "--parameters", str(model), "--gradients", str(gradients)]
        cases = [
            ([*base, "--out", out, "--figure", figure], "--out and --figure name one file"),
            ([*base, "--out", out, "--figure", str(model)], "--figure would overwrite an input"),
            ([*base, "--out", str(tmp_path / "hard-link")], "--out would overwrite an input"),
            ([*base, "--out", str(tmp_path / "soft-link")], "--out would overwrite an input"),
            (["recover", str(model), "--out", str(tmp_path / "hard-link")], "--out would overwrite an input"),
        ]
        results = tmp_path / "results.json"
        results.write_bytes(b"mine")
        audit = ["audit", "--out", str(tmp_path), "--updated", str(results), "--parameters", str(model)]
        cases.append((audit, "results.json would overwrite an input"))
        cases.append((["audit", "--out", str(tmp_path), "--config", str(results)], "would overwrite an input"))
        for command, words in cases:
            assert main(command) == 2
            assert_one_line(capsys, words)
        assert {path.read_bytes() for path in (model, gradients, results)} == {b"mine"}

    @pytest.mark.parametrize(
        "command",
        [
            ["audit", "--samples", "0"],
            ["audit", "--updated", "none.npz", "--parameters", "none.npz"],
            ["audit", "--dataset", "imagenet9"],
            ["audit", "--head", "fc"],
            ["demo", "--dataset", "imagenet9"],
            ["demo", "--samples", "0"],
        ],
    )
    def test_refused_options_leave_no_folders(self, command: list[str], tmp_path: Path) -> None:
        assert main([*command, "--out", str(tmp_path / "new" / "folder")]) == 2
        assert list(tmp_path.iterdir()) == []

    def test_names_longer_than_the_file_system_takes(
        self, seen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = ["invert", "--model", "lenet", "--gradients", seen]
        for command, words in (
            (["recover", seen, "--out", str(tmp_path / LONG)], "too long"),
            (["recover", LONG, "--out", str(tmp_path / "out")], "no such file"),
            (["recover", seen, "--out", str(tmp_path / LONG[:252]), *IDLG, "--chunk", "1"], "too long"),
            (["recover", "--parameters", LONG, "--updated", seen, "--out", str(tmp_path / "out")], "no such file"),
            (["recover", "--parameters", f"{LONG}.pt", "--updated", seen, "--out", str(tmp_path / "out")], "no such"),
            ([*model, "--parameters", seen, "--out", str(tmp_path / LONG)], "too long"),
            ([*model, "--parameters", LONG, "--out", str(tmp_path / "out")], "no such file"),
            (["audit", "--out", str(tmp_path / LONG)], "too long"),
            (["audit", "--out", str(tmp_path / "out"), "--config", LONG], "too long"),
            (["demo", "--out", str(tmp_path / LONG)], "too long"),
        ):
            assert main(command) == 2
            assert_one_line(capsys, words)
        # The longest that it takes.
        assert main(["recover", seen, "--out", str(tmp_path / LONG[:255]), *IDLG]) == 0

    def test_temporary_files_can_be_discarded(self, tmp_path: Path) -> None:
        def interrupted(file: object) -> None:
            assert len(list(tmp_path.iterdir())) == 1
            atomic_file.discard_unfinished()
            assert list(tmp_path.iterdir()) == []
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            atomic_file.write_atomically(tmp_path / "x", interrupted)
        assert atomic_file._unfinished == set()


def test_what_nobody_foresaw_is_one_line(
    seen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, words in ((ZeroDivisionError("a\nb"), "unexpected ZeroDivisionError: a b"), (MemoryError(), "memory")):

        def fail(*args: object, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("softinv_jax.labels.many.recover_many", fail)
        assert main(["recover", seen, "--out", str(tmp_path / "out.npz")]) == 1
        assert_one_line(capsys, words)


def start(*arguments: str, shell: str = "", **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(softinv_jax.__file__).parents[1])} | variables
    command = [sys.executable, "-m", "softinv_jax", *arguments]
    if shell:
        command = [
            "bash",
            "-c",
            f'exec "$@" {shell}' if "|" not in shell else f'set -o pipefail; "$@" {shell}',
            "x",
            *command,
        ]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_streams_and_variables(seen: str, tmp_path: Path) -> None:
    """All at once, because each takes a second or two to start."""
    recover = ("recover", seen, *IDLG, "--out")
    missing = "recover", str(tmp_path / "missing"), "--out", str(tmp_path / "none")
    cases = {
        "closed": (start(*recover, str(tmp_path / "1"), shell=">&-"), 0, ""),
        "full": (start(*recover, str(tmp_path / "2"), shell="> /dev/full"), 2, "standard output: No space left"),
        "full version": (
            start("--version", shell="> /dev/full", PYTHONUNBUFFERED=""),
            2,
            "standard output: No space left",
        ),
        "platform": (start(*missing, JAX_PLATFORMS="nonsense"), 2, "JAX_PLATFORMS=nonsense"),
        # Neither is this on any machine with less than a hundred accelerators.
        "no such platform": (start(*missing, JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="99"), 2, "no device"),
        "x64": (start(*missing, JAX_ENABLE_X64="nonsense"), 2, "JAX_ENABLE_X64=nonsense"),
        "nans": (start(*recover, str(tmp_path / "3"), JAX_DEBUG_NANS="1"), 0, "JAX_DEBUG_NANS is not heeded"),
    }
    for name, (process, code, words) in cases.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, (name, errors)
        assert words in errors, name
        assert errors.count("\n") == bool(words), (name, errors)


def test_interrupted_while_it_loads_and_while_it_works(tmp_path: Path) -> None:
    moments = (
        (signal.SIGINT, 0.3, "interrupted"),
        (signal.SIGTERM, 0.5, "terminated"),
        (signal.SIGINT, 3, "interrupted"),
    )
    started = [start("audit", "--quick", "--out", str(tmp_path / f"audit{index}"), "--json") for index in range(3)]
    for process, (number, delay, _) in zip(started, moments, strict=True):
        time.sleep(delay)
        process.send_signal(number)
    for process, (number, _, word) in zip(started, moments, strict=True):
        text, errors = process.communicate(timeout=60)
        assert (process.returncode, text, errors) == (128 + number, "", f"softinv: {word}\n")


def test_the_package_loads_jax_only_when_asked() -> None:
    """Or an interruption in the first second would come before anything of ours could answer it."""
    program = "import sys, softinv_jax.command_line.main; print('jax' in sys.modules, 'numpy' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(softinv_jax.__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"
    assert all(getattr(softinv_jax, name) is not None for name in softinv_jax.__all__)
    assert softinv_jax.streaming is streaming
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        softinv_jax.nonsense  # noqa: B018


def test_files_with_nothing_in_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.npz").mkdir()
    for name in ("zero.npz", "zero.pt", "zero.safetensors"):
        (tmp_path / name).touch()
    np.savez(tmp_path / "empty.npz")
    np.savez(tmp_path / "none.npz", weight=np.ones((10, 4)), weight_gradient=np.ones((0, 10, 4)))
    out = ("--out", str(tmp_path / "out"))
    for path in sorted(tmp_path.iterdir()):
        one, two = ["recover", str(path), *out], ["recover", "--parameters", str(path), "--updated", str(path), *out]
        for command in (one, [*one, "--chunk", "1"], two):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert error.startswith("softinv: ")
    assert not (tmp_path / "out.parts").exists()
