"""What readers are told: the README's Python, the examples in docstrings, and that nothing public is without one."""

import doctest
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import softinv_jax

README = Path(__file__).parents[1] / "README.md"
NAMES = [module.name for module in pkgutil.walk_packages(softinv_jax.__path__, "softinv_jax.")]
# Those that need an optional library are checked where it is.
OPTIONAL = {"flower": "flwr", "torch_chain": "torch", "torch_model": "torch", "torch_bridge": "torchax"}
MODULES = [
    name
    for name in NAMES
    if not name.endswith((".flower", ".__main__"))
    and importlib.util.find_spec(OPTIONAL.get(name.rpartition(".")[2], "softinv_jax"))
]


@pytest.fixture(scope="module", params=MODULES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def test_everything_public_has_a_docstring(module: ModuleType) -> None:
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)) or thing.__module__ != module.__name__:
            continue
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(f"{name}("), f"{name}: only what dataclass writes by itself"


def test_examples_in_docstrings(module: ModuleType) -> None:
    failed = doctest.testmod(module).failed
    assert failed == 0


def test_there_are_examples() -> None:
    count = sum(len(test.examples) for test in doctest.DocTestFinder().find(softinv_jax.recover, globs={}))
    assert count > 0


def test_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile(block, README.name, "exec"), {})
    assert capsys.readouterr().out.startswith("unique [0.02")


def test_the_site_has_every_page() -> None:
    index = (README.parent / "docs" / "index.md").read_text(encoding="utf-8").split()
    for page in (README.parent / "docs").glob("*.md"):
        assert page.stem == "index" or page.stem in index


def test_links_between_documents_lead_somewhere() -> None:
    """Files and folders of the repository, from wherever the link stands."""
    root = README.parent
    pages = [*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "examples").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
