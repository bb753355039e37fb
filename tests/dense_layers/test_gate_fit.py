"""One example, given which units it opens: the truth fits to noise, and nothing else is credible."""

import dataclasses

import numpy as np
import pytest

from softinv_jax.dense_layers.choice import ChosenLayer, choose_layers
from softinv_jax.dense_layers.gate_fit import fit_gates, is_among, is_credible


def _chosen(client) -> ChosenLayer:
    return next(choose_layers(client.layers, None))


def _gates(client) -> np.ndarray:
    return client.layers.gates(0, client.layers.output(0, client.hidden[0].astype(np.float64)))


def _sine(first: np.ndarray, second: np.ndarray) -> float:
    """Of the angle between two directions, in double precision."""
    first, second = (one.astype(np.float64) / np.linalg.norm(one.astype(np.float64)) for one in (first, second))
    return float(np.linalg.norm(first - (first @ second) * second))


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_true_gates_give_the_true_derivatives(dense_client, activation, noise) -> None:
    client = dense_client((60, 120, 5), 8, 1, activation=activation, labels="dense", noise=noise)
    chosen = _chosen(client)
    for gates, delta, logit_gradient in zip(_gates(client), *client.deltas, strict=True):
        solution = fit_gates(chosen.space, chosen.following, gates, rounds=1)
        assert 0.2 < solution.misfit < 3
        assert is_credible(solution, chosen.space.common)
        found = chosen.following.basis @ solution.combination
        # What the client itself rounded, in float32, is no part of it.
        assert _sine(found, logit_gradient) < 6 * np.linalg.norm(solution.combination_deviation) + 1e-6
        assert _sine(chosen.space.noise * (chosen.space.left @ solution.coordinates), delta) < max(1e-5, 100 * noise)


def test_a_few_wrong_gates_are_mended(dense_client) -> None:
    client = dense_client((60, 160, 5), 6, 2)
    chosen, generator = _chosen(client), np.random.default_rng(0)
    for gates in _gates(client):
        turned = gates.copy()
        turned[generator.choice(np.flatnonzero(gates), 3, replace=False)] = False
        assert not is_credible(fit_gates(chosen.space, chosen.following, turned, rounds=1), chosen.space.common)
        solution = fit_gates(chosen.space, chosen.following, turned)
        assert is_credible(solution, chosen.space.common)
        # Where next to nothing arrives, the gate says nothing.
        assert np.array_equal(solution.gates[solution.told], gates[solution.told])


def test_random_gates_are_no_example(dense_client) -> None:
    client = dense_client((60, 160, 5), 40, 3)
    chosen, generator = _chosen(client), np.random.default_rng(0)
    for _ in range(50):
        gates = generator.random(160) < 0.5
        assert not is_credible(fit_gates(chosen.space, chosen.following, gates, rounds=1), chosen.space.common)


def test_no_open_unit_is_no_example_and_no_warning(dense_client, recwarn) -> None:
    chosen = _chosen(dense_client())
    solution = fit_gates(chosen.space, chosen.following, np.zeros(64, bool), rounds=1)
    assert not is_credible(solution, chosen.space.common)
    assert not [one for one in recwarn if issubclass(one.category, RuntimeWarning)]


def test_examples_that_open_the_same_units_are_uncertain_and_say_so(dense_client) -> None:
    # Inputs so near to each other that no unit lies between them: a mixture of their deltas fits nearly as well.
    generator = np.random.default_rng(4)
    inputs = np.repeat(generator.normal(0.1, 1, (4, 40)), 2, axis=0)
    inputs[1::2] += 1e-4 * generator.normal(size=(4, 40))
    client = dense_client((40, 80, 5), seed=4, inputs=inputs, labels="dense")
    gates = _gates(client)
    assert np.array_equal(gates[0], gates[1])
    chosen = _chosen(client)
    assert chosen.space.rank == 8
    for own, logit_gradient in zip(gates, client.deltas[1], strict=True):
        solution = fit_gates(chosen.space, chosen.following, own, rounds=1)
        error = _sine(chosen.following.basis @ solution.combination, logit_gradient)
        known = error < 6 * np.linalg.norm(solution.combination_deviation) + 1e-6
        assert known or not is_credible(solution, chosen.space.common)


def test_the_same_example_is_recognised(dense_client) -> None:
    client = dense_client()
    chosen, gates = _chosen(client), _gates(client)
    first, second = (fit_gates(chosen.space, chosen.following, one) for one in gates[:2])
    turned = dataclasses.replace(first, coordinates=-2 * first.coordinates)
    assert is_among(turned, [second, first])
    assert not is_among(first, [second])
    assert not is_among(first, [])


def test_the_next_layers_gradient_bounds_its_derivative(dense_client) -> None:
    """With fewer examples than classes g lies in the column space of the head's own gradient: fewer unknowns."""
    client = dense_client((60, 120, 30), 8, 5, labels="dense")
    chosen = _chosen(client)
    assert chosen.following.weight.shape == (120, 8)
    assert chosen.excess == 120 - 8 - 8 + 1
    outside = client.deltas[1] @ (np.eye(30) - np.linalg.pinv(chosen.following.basis.T) @ chosen.following.basis.T)
    assert np.linalg.norm(outside) < 1e-5 * np.linalg.norm(client.deltas[1])
