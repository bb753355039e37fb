"""examples/flower: the federation of the get-started guide runs as its README says, and no label told is wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower" / "federation.py"

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("flwr", "ray", "torch")),
    reason="the example needs torch and flwr[simulation]",
)


@pytest.mark.parametrize(("batch_size", "examples"), [(1, 1), (3, 3), (3, 6)])
def test_the_server_learns_the_labels(batch_size: int, examples: int, tmp_path: Path) -> None:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    command = [sys.executable, str(EXAMPLE), "--batch-size", str(batch_size), "--examples", str(examples)]
    command += ["--match-steps", "3", "--out", str(tmp_path / "audit.json")]
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    clients = json.loads((tmp_path / "audit.json").read_text())["clients"]
    assert len(clients) == 2
    for client in clients:
        assert client["problem"] is None
        assert client["sure and wrong"] == 0
        if batch_size == examples:
            assert client["labels right"] == client["labels sure"] == examples
            assert "many images fit" in client["why not exact"]
            assert "exact" not in client["verdicts"]
        else:
            assert client["labels sure"] == 0  # Two steps are no gradient.
