"""The notebooks are what their sources say, and do what they claim."""

import importlib
import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))
build = importlib.import_module("build")
NAMES = [source.stem for source in build.SOURCES]
PICTURES = {"quickstart": 1, "images": 1, "defences": 1, "throughput": 1, "batches": 1}  # In FAST mode.


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_its_source(name: str) -> None:
    assert (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8") == build.notebook_text(
        FOLDER / "source" / f"{name}.py"
    ), "run python notebooks/build.py"


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_has_what_readers_expect(name: str) -> None:
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    assert "colab-badge" in text[0]
    assert "pip" in text[2]
    assert "jax.devices()" in text[2]
    assert text[3].startswith("# Parameters.")
    assert "FAST = " in text[3]
    assert "assert " in text[-1]
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_its_claims_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a kernel, as a reader does, with all figures shown."""
    monkeypatch.setenv("SOFTINV_FAST", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[2] / ".jax_cache"))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == PICTURES.get(name, 0)
