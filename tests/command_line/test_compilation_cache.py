"""Where compiled programs are kept, and how not to keep them."""

from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from softinv_jax.command_line import commands, compilation_cache
from softinv_jax.command_line.main import main


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is set, instead of setting it."""
    found: dict[str, str] = {}
    empty = SimpleNamespace(jax_compilation_cache_dir=None, update=found.__setitem__)
    monkeypatch.setattr(jax, "config", empty)
    monkeypatch.setenv("JAX_LOGGING_LEVEL", "ERROR")
    return found


def test_programs_are_kept_under_the_users_cache(
    config: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.keep_compiled_programs()
    folder = Path(config["jax_compilation_cache_dir"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "softinv"


def test_a_place_already_chosen_or_not_writable_is_left_alone(
    config: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation_cache.keep_compiled_programs()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.jax_compilation_cache_dir = str(tmp_path / "elsewhere")
    compilation_cache.keep_compiled_programs()
    assert config == {}
    jax.config.jax_compilation_cache_dir = str(tmp_path / "file" / "elsewhere")
    compilation_cache.keep_compiled_programs()
    assert config == {"jax_compilation_cache_dir": None}


def test_the_command_line_can_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: kept.append(True))
    command = ["recover", str(tmp_path / "missing.npz"), "--out", str(tmp_path / "out.npz")]
    assert main(["--no-compilation-cache", *command]) == 2
    assert kept == []
    assert main(command) == 2
    assert kept == [True]
