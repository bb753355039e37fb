"""Whole batches from the gradients of dense layers, end to end: what is put in comes out, and nothing else."""

from collections.abc import Callable

import numpy as np
import pytest

from softinv_jax import Verdict
from softinv_jax.dense_layers.recovery import recover_dense


@pytest.mark.parametrize(("widths", "batch_size"), [((96, 64, 6), 1), ((192, 120, 10), 12), ((96, 64, 64, 6), 4)])
def test_float64(
    dense_client: Callable, assert_dense_honest: Callable, widths: tuple[int, ...], batch_size: int
) -> None:
    client = dense_client(widths, batch_size, seed=1, dtype=np.float64)
    found = recover_dense(client.layers, batch_size)
    assert found.inputs.dtype == np.float64
    given, _ = assert_dense_honest(found, client.hidden[found.layer], client.labels)
    assert given == batch_size
    assert np.all(found.verdict >= Verdict.CONDITIONAL)
    assert found.input_deviation.max() < 1e-12
    assert found.label_deviation.max() < 1e-12
