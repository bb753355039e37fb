"""The code on docs/frameworks.md and docs/your-model.md, as a reader runs it."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs"
BLOCKS = [
    (name, block)
    for name in ("frameworks.md", "your-model.md")
    for block in re.findall(
        r"^```python\n(.*?)^```", (PAGES / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]
OPTIONAL = ("torch", "flwr")


def test_there_is_code() -> None:
    assert [name for name, _ in BLOCKS] == ["frameworks.md"] * 4 + ["your-model.md"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore")
def test_a_block_runs(number: int) -> None:
    name, block = BLOCKS[number]
    for library in OPTIONAL:
        if re.search(rf"^(import|from) {library}\b", block, re.MULTILINE) and not importlib.util.find_spec(library):
            pytest.skip(f"needs {library}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block, f"{name}, block {number + 1}", "exec"), {})
