"""One name for one example and for batches."""

import jax
import numpy as np
import pytest

from softinv_jax import BatchRecovery, observe, recover, recover_many
from softinv_jax.batches.batch_recovery import recover_batch
from softinv_jax.labels import recovery

# As in tests/batches, so that compiled programs are shared.
CLASSES, FEATURES, SIZE = 40, 96, 4


def draw(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight = rng.uniform(-0.5, 0.5, (CLASSES, FEATURES)).astype(np.float32)
    features = rng.uniform(0, 1, (size, FEATURES))
    labels = np.eye(CLASSES)[3 * np.arange(size)] * 0.8 + 0.2 / CLASSES
    prediction = np.asarray(jax.nn.softmax(features @ weight.T, axis=1))
    return weight, ((prediction - labels).T @ features / size).astype(np.float32)


def test_one_example_is_what_it_was() -> None:
    observation = observe(*draw(0, 1))
    expected = recovery.recover(observation, thorough=False)
    found = recover(observation, batch_size=1, thorough=False)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_batches_one_and_many() -> None:
    weight, first = draw(1, SIZE)
    gradients = np.stack([first, 2 * first])
    one = recover(observe(weight, first), batch_size=SIZE)
    assert isinstance(one, BatchRecovery)
    np.testing.assert_array_equal(one.label, recover_batch(observe(weight, first), SIZE).label)
    seen: list[tuple[int, int]] = []
    many = recover_many(
        observe(weight, gradients), batch_size=SIZE, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(many[0].label, one.label)
    summed = recover(observe(weight, SIZE * first), batch_size="auto", reduction="sum")
    np.testing.assert_allclose(np.sort(summed.label, axis=0), np.sort(one.label, axis=0), atol=1e-6)


def test_options_of_the_other_kind() -> None:
    weight, gradient = draw(2, SIZE)
    with pytest.raises(ValueError, match="method and thorough are for batch_size=1 only"):
        recover(observe(weight, gradient), batch_size=SIZE, thorough=True, method="exact")
    with pytest.raises(ValueError, match="recover_many takes"):
        recover_many(observe(weight, gradient), batch_size=SIZE)
