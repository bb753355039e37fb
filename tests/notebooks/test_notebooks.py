"""The notebooks are what their sources say, and do what they claim."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))
build = pytest.importorskip("build", reason="needs jupytext, of the extra 'dev'")
NAMES = [source.stem for source in build.SOURCES]
# Reached by the others' tests too: run on demand, SOFTINV_ALL_NOTEBOOKS=1.
SLOWER = ("images", "batches")


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
def test_it_runs_and_its_claims_hold(name: str, tmp_path: Path) -> None:
    if name in SLOWER and os.environ.get("SOFTINV_ALL_NOTEBOOKS") != "1":
        pytest.skip("set SOFTINV_ALL_NOTEBOOKS=1 to run it")
    # Without IPython's display, which only a notebook has.
    text = (FOLDER / "source" / f"{name}.py").read_text(encoding="utf-8")
    script = tmp_path / f"{name}.py"
    script.write_text(text.replace("from IPython.display import display", "display = print"), encoding="utf-8")
    cache = str(Path(__file__).parents[2] / ".jax_cache")
    environment = {**os.environ, "SOFTINV_FAST": "1", "JAX_COMPILATION_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
