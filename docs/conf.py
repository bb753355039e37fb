"""How the site is made of docs/ and of the docstrings: `make docs`."""

from importlib.metadata import version as installed_version
from importlib.util import find_spec

project = "softinv"
author = "The softinv authors"
copyright = "2026, The softinv authors"
release = version = installed_version("softinv_jax")

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "softinv"

# Adapters are documented where what they adapt is installed.
_NEEDS = {"flower": "flwr", "torch_chain": "torch", "torch_model": "torch", "torch_bridge": "torchax"}
_MISSING = [f"../softinv_jax/frameworks/{file}.py" for file, name in _NEEDS.items() if not find_spec(name)]

apidoc_modules = [
    {
        "path": "../softinv_jax",
        "destination": "reference",
        "exclude_patterns": ["../softinv_jax/command_line/*", "../softinv_jax/__main__.py", *_MISSING],
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_typehints = "none"  # Signatures are long enough; docstrings give shapes.
autodoc_default_options = {"member-order": "bysource"}
napoleon_use_ivar = True
# Links to files of the repository that are no pages; Args with several names; labels of the reference.
suppress_warnings = ["myst.xref_missing", "docutils", "ref.python", "misc.highlighting_failure"]
