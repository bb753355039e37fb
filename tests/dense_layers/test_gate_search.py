"""The search for gates against a naive twin, one start at a time; and that starts do not depend on each other."""

import contextlib

import numpy as np
import pytest
from scipy.special import expit

from softinv_jax.dense_layers import gate_search
from softinv_jax.dense_layers.choice import choose_layers
from softinv_jax.dense_layers.gate_rounds import outputs_left, search_all_gates, whitened
from softinv_jax.dense_layers.gate_search import search_gates

STEPS = 20


def twin(deltas, weight, outputs, gate, combination, sharpness, trust, forward, steps, slopes):
    """One start in NumPy float64, in the words of the module: nothing shared, nothing vectorised over starts."""
    low, high = slopes
    number = len(weight)
    outputs = outputs * np.sqrt(number)

    def fit(gate, combination):
        masked = np.diag(low + (high - low) * gate) @ weight
        gram = masked.T @ masked
        outside = masked.T @ (np.eye(number) - deltas @ deltas.T) @ masked
        shifted = outside + gate_search.RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        for _ in range(gate_search.INVERSE_ITERATIONS):
            combination = np.linalg.solve(shifted, gram @ combination)
            combination = combination / np.linalg.norm(combination)
        target = weight @ combination
        delta = deltas @ (deltas.T @ (masked @ combination))
        vote = np.clip(2 * (delta * target / (target**2 + 1e-12 * np.mean(target**2)) - low) / (high - low) - 1, -1, 1)
        return target, vote, combination

    with contextlib.suppress(np.linalg.LinAlgError):
        return _alternate(fit, outputs, gate, combination, sharpness, trust, forward, steps)
    # No unit is open any more: nothing is left to solve for.
    return np.zeros(number, bool)


def _alternate(fit, outputs, gate, combination, sharpness, trust, forward, steps):
    for step in range(steps):
        target, vote, combination = fit(gate, combination)
        confidence = np.minimum(abs(target), np.sqrt(np.mean(target**2)))
        confidence = confidence / confidence.mean()
        guess = np.zeros(outputs.shape[1])
        for place in range(gate_search.DESCENTS):
            rest = vote - (outputs @ guess / len(vote) if place else 0)
            guess = guess + outputs.T @ (confidence * rest)
        value = outputs @ guess
        field = forward * value / np.sqrt(np.mean(value**2)) + trust * vote
        gate = expit(sharpness * (gate_search.SHARPEST / sharpness) ** (step / steps) * field)
    gate = (gate > 0.5).astype(float)
    for _ in range(gate_search.HARD_STEPS):
        _, vote, combination = fit(gate, combination)
        gate = (vote > 0).astype(float)
    return gate > 0.5


def _problem(dense_client, activation="relu", starts=8):
    client = dense_client((40, 80, 5), 6, 0, activation=activation)
    chosen = next(choose_layers(client.layers, None))
    deltas, weight = whitened(chosen.space, chosen.following, [])
    outputs = outputs_left(chosen.space, [])
    generator = np.random.default_rng(0)
    places = generator.standard_normal((starts, outputs.shape[1])).astype(np.float32)
    gates = (places @ outputs.T > 0).astype(np.float32)
    combinations = generator.standard_normal((starts, weight.shape[1])).astype(np.float32)
    return client, chosen, deltas, weight, outputs, gates, combinations


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("forward", [0, 1])
def test_against_a_naive_twin(dense_client, activation, forward) -> None:
    _, chosen, deltas, weight, outputs, gates, combinations = _problem(dense_client, activation)
    sharp, trust = np.float32([0.5, 1, 20, 5] * 2), np.float32([1, 0.5, 3, 1] * 2)
    slopes = chosen.following.slopes
    found, _ = search_gates(
        deltas, weight, outputs, gates, combinations, sharp, trust, np.float32(forward), np.int32(STEPS), slopes
    )
    arrays = [np.asarray(one, np.float64) for one in (deltas, weight, outputs)]
    agreed = [
        np.mean(
            twin(*arrays, gates[lane].astype(float), combinations[lane].astype(float), *own, forward, STEPS, slopes)
            == np.asarray(found[lane])
        )
        for lane, own in enumerate(zip(sharp.astype(float), trust.astype(float), strict=True))
    ]
    # float32 may turn a gate at which next to nothing arrives, and a start that comes to nothing goes anywhere.
    assert np.median(agreed) > 0.99
    assert np.mean(agreed) > 0.9


def test_starts_do_not_depend_on_each_other(dense_client) -> None:
    _, chosen, deltas, weight, outputs, gates, combinations = _problem(dense_client)
    rest = np.float32(1), np.int32(STEPS), chosen.following.slopes
    one = np.ones(8, np.float32)
    together, misfit = search_gates(deltas, weight, outputs, gates, combinations, one, one, *rest)
    order = np.roll(np.arange(8), 3)
    turned, _ = search_gates(deltas, weight, outputs, gates[order], combinations[order], one, one, *rest)
    assert np.array_equal(np.asarray(together)[order], np.asarray(turned))
    assert np.all(np.asarray(misfit) >= -1e-5)


def test_one_program_for_any_number_of_steps(dense_client) -> None:
    _, chosen, deltas, weight, outputs, gates, combinations = _problem(dense_client)
    one = np.ones(8, np.float32)
    search_gates.clear_cache()
    for steps in (5, 50):
        rest = np.float32(1), np.int32(steps), chosen.following.slopes
        search_gates(deltas, weight, outputs, gates, combinations, one, one, *rest)
    assert search_gates._cache_size() == 1


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_all_examples_are_found_from_random_starts(dense_client, activation) -> None:
    client = dense_client((60, 120, 5), 24, 1, activation=activation, labels="dense")
    chosen = next(choose_layers(client.layers, None))
    counts: list[int] = []
    found = search_all_gates(chosen.space, chosen.following, [], [], counts.append)
    assert len(found) == 24
    assert counts == sorted(counts)
    assert counts[-1] == 24
    deltas = np.stack([chosen.space.noise * (chosen.space.left @ one.coordinates) for one in found])
    deltas = deltas / np.linalg.norm(deltas, axis=1, keepdims=True)
    true = client.deltas[0] / np.linalg.norm(client.deltas[0], axis=1, keepdims=True)
    cosines = np.abs(deltas @ true.T)
    assert np.all(cosines.max(axis=1) > 1 - 1e-6)
    assert len(set(cosines.argmax(axis=1))) == 24


def test_found_examples_are_dual_to_where_others_are_looked_for(dense_client) -> None:
    client = dense_client((60, 120, 5), 12, 2)
    chosen = next(choose_layers(client.layers, None))
    found = search_all_gates(chosen.space, chosen.following, [], [], lambda number: None)
    assert len(found) == 12
    outputs = outputs_left(chosen.space, found[:-1])
    # One direction is left: what the layer makes of the last example's input, by unit size.
    assert np.count_nonzero(np.any(outputs, axis=0)) == 1
    column = outputs[:, np.any(outputs, axis=0)][:, 0]
    agreed = np.mean((column > 0) == found[-1].gates)
    assert max(agreed, 1 - agreed) > 0.98
