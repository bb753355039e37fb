"""Gradients that PyTorch made: whole models of dense layers, more examples than classes."""

from itertools import pairwise

import numpy as np
import pytest

from softinv_jax import Verdict
from softinv_jax.dense_layers.recovery import DenseRecovery
from softinv_jax.frameworks.parameter_files import nested
from softinv_jax.whole_models import find_dense_end, recover_model

torch = pytest.importorskip("torch")

INPUTS, CLASSES = 96, 10


def _client(widths, size, seed, activation="ReLU", bias=True, reduction="mean", labels="mixup"):
    """Parameters and gradients by PyTorch's names, nested, and the truth."""
    torch.manual_seed(seed)
    sizes = (INPUTS, *widths, CLASSES)
    parts = []
    for before, after in pairwise(sizes):
        parts += [torch.nn.Linear(before, after, bias=bias), getattr(torch.nn, activation)()]
    model = torch.nn.Sequential(*parts[:-1])
    inputs = torch.randn(size, INPUTS)
    targets = torch.nn.functional.one_hot(torch.randint(0, CLASSES, (size,)), CLASSES).float()
    if labels == "mixup":
        share = torch.rand(size, 1) / 2 + 0.5
        targets = share * targets + (1 - share) * targets.roll(1, 0)
    elif labels == "dense":
        targets = torch.rand(size, CLASSES).softmax(dim=1)
    torch.nn.functional.cross_entropy(model(inputs), targets, reduction=reduction).backward()
    parameters = nested({name: one.detach().numpy() for name, one in model.named_parameters()}, ".")
    gradients = nested({name: one.grad.numpy() for name, one in model.named_parameters()}, ".")
    return parameters, gradients, inputs.numpy(), targets.numpy()


def _all_found(found: DenseRecovery, inputs: np.ndarray, labels: np.ndarray) -> None:
    """Every label, and the inputs where they are the client's own."""
    assert np.all(found.verdict >= Verdict.CONDITIONAL)
    distance = np.abs(found.label[:, None] - labels[None]).max(axis=2)
    assert distance.min(axis=1).max() < 1e-5
    if found.layer == 0:
        apart = np.abs(found.inputs[:, None] - inputs[None]).max(axis=2)
        assert len(set(apart.argmin(axis=1))) == len(inputs)
        assert apart.min(axis=1).max() < 1e-3
    assert np.nanmax(found.residual) < 1e-5


@pytest.mark.parametrize("labels", ["hard", "mixup", "dense"])
@pytest.mark.parametrize("size", [32, "auto"])
def test_more_examples_than_classes(labels, size) -> None:
    parameters, gradients, inputs, truth = _client((200,), 32, 0, labels=labels)
    found = recover_model(parameters, gradients, batch_size=size, activation="relu")
    assert found.rank == 32
    if size == "auto" and labels == "dense":
        # How many more examples the mean was over, without a gradient, nothing tells.
        assert np.all(found.verdict == Verdict.AMBIGUOUS)
        return
    _all_found(found, inputs, truth)
    if labels != "dense":
        assert np.all(found.verdict == Verdict.UNIQUE)


@pytest.mark.parametrize(("activation", "name"), [("LeakyReLU", "leaky_relu"), ("Sigmoid", "sigmoid")])
def test_other_activations(activation, name) -> None:
    size = 24 if name == "leaky_relu" else 6
    parameters, gradients, inputs, truth = _client((160,), size, 1, activation)
    _all_found(recover_model(parameters, gradients, batch_size=size, activation=name), inputs, truth)


def test_two_hidden_layers_and_a_sum() -> None:
    parameters, gradients, inputs, truth = _client((160, 120), 24, 2, reduction="sum")
    assert find_dense_end(parameters) == ["0", "2", "4"]
    _all_found(recover_model(parameters, gradients, batch_size=24, activation="relu", reduction="sum"), inputs, truth)


def test_without_biases_the_label_gives_the_length() -> None:
    parameters, gradients, inputs, truth = _client((160,), 16, 3, bias=False, labels="hard")
    _all_found(recover_model(parameters, gradients, batch_size=16, activation="relu"), inputs, truth)


def test_the_activation_is_found() -> None:
    parameters, gradients, inputs, truth = _client((160,), 16, 4, "LeakyReLU")
    _all_found(recover_model(parameters, gradients, batch_size=16), inputs, truth)


def test_what_does_not_fit_is_named() -> None:
    parameters, gradients, *_ = _client((40,), 4, 5)
    with pytest.raises(ValueError, match="have no layer '2'"):
        recover_model(parameters, {"0": gradients["0"]}, batch_size=4)
    with pytest.raises(ValueError, match="no dense layer ends where the head '2' begins"):
        recover_model({"2": parameters["2"]}, {"2": gradients["2"]}, batch_size=4)
    with pytest.raises(ValueError, match="unknown activation swish"):
        recover_model(parameters, gradients, batch_size=4, activation="swish")
    for size in (0, -1, True, "all"):
        with pytest.raises(ValueError, match="batch_size must be"):
            recover_model(parameters, gradients, batch_size=size)
    with pytest.raises(ValueError, match="not finite"):
        broken = {"0": {"weight": gradients["0"]["weight"] * np.nan, "bias": gradients["0"]["bias"]}}
        recover_model(parameters, gradients | broken, batch_size=4)


def test_no_gradient_is_no_signal() -> None:
    parameters, gradients, *_ = _client((40,), 4, 6)
    zero = {name: {kind: np.zeros_like(array) for kind, array in layer.items()} for name, layer in gradients.items()}
    assert np.all(recover_model(parameters, zero, batch_size=4).verdict == Verdict.NO_SIGNAL)


def test_more_examples_than_units_are_not_found() -> None:
    parameters, gradients, *_ = _client((40,), 60, 7)
    found = recover_model(parameters, gradients, batch_size=60, activation="relu")
    assert np.all(found.verdict == Verdict.NOT_FOUND)
    assert np.isnan(found.label).all()
