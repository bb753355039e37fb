"""Outputs of ReLU as vertices of a cone: those that are there, and no others."""

import numpy as np
import pytest

from softinv_jax import Verdict
from softinv_jax.dense_layers.sparse_inputs import search_sparse_inputs
from softinv_jax.frameworks.parameter_files import nested
from softinv_jax.whole_models import recover_model


def _inputs(number, features, seed, zeros=0.5):
    """(number, features), half of all entries zero, and any basis of what they span."""
    generator = np.random.default_rng(seed)
    inputs = np.maximum(generator.standard_normal((number, features)) - (zeros - 0.5) * 2, 0)
    inputs[:, -3:] = 0  # Units that no example opens.
    return inputs, inputs.T @ generator.standard_normal((number, number)), generator


def _directions(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
@pytest.mark.parametrize(("number", "features"), [(8, 60), (16, 120)])
def test_every_input_is_found_and_nothing_else(number, features, noise) -> None:
    inputs, right, generator = _inputs(number, features, number)
    right = right + noise * generator.standard_normal(right.shape)
    found = _directions(search_sparse_inputs(right, 12 * number, generator) @ right.T)
    distances = np.linalg.norm(found[:, None] - _directions(inputs)[None], axis=2)
    assert distances.min(axis=0).max() < 1e-3
    # More zeros than a vertex needs are no accident.
    assert distances.min(axis=1).max() < 1e-3


def test_inputs_without_zeros_are_not_guessed() -> None:
    generator = np.random.default_rng(0)
    right = (generator.random((6, 80)) + 0.1).T @ generator.standard_normal((6, 6))
    assert search_sparse_inputs(right, 30, generator).shape == (0, 6)


def test_inputs_of_both_signs_are_not_guessed() -> None:
    generator = np.random.default_rng(1)
    assert search_sparse_inputs(generator.standard_normal((80, 6)), 30, generator).shape == (0, 6)


def test_all_labels_behind_a_convolutional_network_with_ten_classes() -> None:
    """The network of PyTorch's and Flower's introductions: 24 images, a gradient of 84 and 120 units."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 6, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(6, 16, 5), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()),
        *(torch.nn.Linear(400, 120), torch.nn.ReLU(), torch.nn.Linear(120, 84), torch.nn.ReLU()),
        torch.nn.Linear(84, 10),
    )
    size = 24
    classes = torch.arange(size) % 10
    torch.nn.functional.cross_entropy(model(torch.randn(size, 3, 32, 32)), classes).backward()
    parameters = nested({name: one.detach().numpy() for name, one in model.named_parameters()}, ".")
    gradients = nested({name: one.grad.numpy() for name, one in model.named_parameters()}, ".")
    found = recover_model(parameters, gradients, batch_size=size, activation="relu")
    assert np.all(found.verdict == Verdict.UNIQUE)
    assert np.array_equal(np.sort(found.label.argmax(axis=1)), np.sort(classes.numpy()))
    np.testing.assert_allclose(found.label.max(axis=1), 1, atol=1e-4)
