"""The code on docs/frameworks.md, as a reader runs it."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
OPTIONAL = ("torch", "flwr")


def test_there_is_code() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("number", range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore")
def test_a_block_runs(number: int) -> None:
    block = BLOCKS[number]
    for library in OPTIONAL:
        if re.search(rf"^(import|from) {library}\b", block, re.MULTILINE) and not importlib.util.find_spec(library):
            pytest.skip(f"needs {library}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), {})
