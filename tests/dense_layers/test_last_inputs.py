"""The last examples of a layer by duality: every one that is missing, and none where there is nothing to go by."""

from collections.abc import Callable

import numpy as np
import pytest

from softinv_jax.dense_layers.choice import choose_layers
from softinv_jax.dense_layers.gate_fit import fit_gates
from softinv_jax.dense_layers.last_inputs import find_last


@pytest.mark.parametrize("missing", [1, 2])
def test_the_last_ones_follow_from_the_others(dense_client: Callable, missing: int) -> None:
    client = dense_client(batch_size=5, seed=1)
    chosen = next(choose_layers(client.layers, 5))
    solutions = [fit_gates(chosen.space, chosen.following, hidden > 0, rounds=1) for hidden in client.hidden[1]]
    added = find_last(client.layers, 0, chosen.space, chosen.following, solutions[missing:])
    assert len(added) == missing
    gates = {one.gates[one.told].tobytes() for one in added}
    assert gates == {one.gates[one.told].tobytes() for one in solutions[:missing]}


def test_nothing_found_nothing_added(dense_client: Callable) -> None:
    client = dense_client(batch_size=3)
    chosen = next(choose_layers(client.layers, 3))
    assert find_last(client.layers, 0, chosen.space, chosen.following, []) == []
    assert np.all(chosen.space.singular_values > 0)
