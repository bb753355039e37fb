"""Make the notebooks from their sources: `python notebooks/build.py` writes NAME.ipynb from source/NAME.py.

The sources are Python with `# %%` between cells. What all notebooks share, the badge and the guarded installation, is
written here once.
"""

from pathlib import Path

import jupytext
import nbformat

__all__ = ["SOURCES", "build", "notebook_text"]

FOLDER = Path(__file__).parent
SOURCES = sorted((FOLDER / "source").glob("*.py"))
REPOSITORY = "softinv/softinv"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    f"(https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{{name}}.ipynb)"
)
INSTALL = f"""# Only where it is not installed, as on Colab.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("softinv_jax") is None:
    packages = ["softinv_jax @ git+https://github.com/{REPOSITORY}"]
    # Where that brings another jax, its half for the GPU or TPU has to come along.
    halves = {{"jax_cuda13_plugin": "jax[cuda13]", "jax_cuda12_plugin": "jax[cuda12]", "libtpu": "jax[tpu]"}}
    packages += [package for module, package in halves.items() if importlib.util.find_spec(module)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# Shows figures as pictures.
%matplotlib inline
import jax

print("jax", jax.__version__, "on", ", ".join(str(device) for device in jax.devices()))"""


def notebook_text(source: Path) -> str:
    """The .ipynb of one source, as JSON."""
    notebook = jupytext.read(source, fmt="py:percent")
    cells = [
        nbformat.v4.new_markdown_cell(BADGE.format(name=source.stem)),
        notebook.cells[0],
        nbformat.v4.new_code_cell(INSTALL),
        *notebook.cells[1:],
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel)) + "\n"


def build() -> None:
    """Write every notebook beside this file."""
    for source in SOURCES:
        (FOLDER / f"{source.stem}.ipynb").write_text(notebook_text(source), encoding="utf-8")


if __name__ == "__main__":
    build()
