"""PyTorch clients with other losses, weights, half precision, normalisation: labels are right, or not claimed."""

import numpy as np
import pytest

from softinv_jax import Verdict
from softinv_jax.frameworks.parameter_files import nested
from softinv_jax.labels.assumptions import Assumption, Loss
from softinv_jax.whole_models import recover_model

torch = pytest.importorskip("torch")
functional = torch.nn.functional

INPUTS, WIDTH, CLASSES, SIZE = 96, 120, 10, 12


def _client(loss, kind=torch.float32, between=None, seed=0):
    """Parameters, gradients, inputs and hard labels; loss: of logits and (B,) classes."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(INPUTS, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, CLASSES)]
    if between is not None:
        layers.insert(1, between)
    model = torch.nn.Sequential(*layers).to(kind)
    inputs, classes = torch.randn(SIZE, INPUTS).to(kind), torch.randint(0, CLASSES, (SIZE,))
    loss(model(inputs), classes).backward()
    parameters = nested({name: one.detach().float().numpy() for name, one in model.named_parameters()}, ".")
    gradients = nested({name: one.grad.float().numpy() for name, one in model.named_parameters()}, ".")
    return parameters, gradients, inputs.float().numpy(), np.eye(CLASSES, dtype=np.float32)[classes.numpy()]


def _focal(logits, classes):
    chosen = functional.log_softmax(logits, 1).gather(1, classes[:, None])[:, 0]
    return -((1 - chosen.exp()) ** 2 * chosen).mean()


def _weighted(logits, classes):
    weights = torch.linspace(0.5, 1.5, CLASSES)
    return functional.cross_entropy(logits, classes, weight=weights)


def _important(logits, classes):
    weights = torch.rand(SIZE, generator=torch.Generator().manual_seed(3)) + 0.5
    return (functional.cross_entropy(logits, classes, reduction="none") * weights).mean()


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("loss", [_focal, _weighted, _important])
def test_a_factor_on_each_example(loss, told, assert_dense_honest) -> None:
    parameters, gradients, inputs, labels = _client(loss)
    found = recover_model(
        parameters, gradients, batch_size=SIZE if told else "auto", activation="relu", unknown_scale=not told
    )
    assert_dense_honest(found, inputs, labels)
    assert np.all(found.verdict >= Verdict.AMBIGUOUS)
    if told:
        assert found.refuted & Assumption.SCALE
        assert np.sum(found.verdict == Verdict.UNIQUE) > SIZE / 2


def test_a_temperature(assert_dense_honest) -> None:
    parameters, gradients, inputs, labels = _client(lambda z, y: functional.cross_entropy(z / 2, y))
    found = recover_model(parameters, gradients, batch_size=SIZE, activation="relu")
    assert_dense_honest(found, inputs, labels)
    assert np.all(found.verdict >= Verdict.AMBIGUOUS)
    assert np.all(found.verdict == Verdict.UNIQUE)
    assert found.loss == Loss.TEMPERED_CROSS_ENTROPY


@pytest.mark.parametrize("unknown_scale", [False, True])
def test_independent_sigmoids(unknown_scale, assert_dense_honest) -> None:
    parameters, gradients, inputs, labels = _client(
        lambda z, y: functional.binary_cross_entropy_with_logits(z, functional.one_hot(y, CLASSES).float())
    )
    found = recover_model(parameters, gradients, batch_size=SIZE, activation="relu", unknown_scale=unknown_scale)
    _, place = assert_dense_honest(found, inputs, labels)
    assert found.refuted & Assumption.SOFTMAX
    assert np.all(found.verdict == Verdict.UNIQUE)
    np.testing.assert_allclose(found.label, labels[place], atol=1e-4)


def test_squared_errors_of_logits_are_no_cross_entropy(assert_dense_honest) -> None:
    parameters, gradients, inputs, labels = _client(
        lambda z, y: functional.mse_loss(z, functional.one_hot(y, CLASSES).float())
    )
    found = recover_model(parameters, gradients, batch_size=SIZE, activation="relu")
    assert_dense_honest(found, inputs, labels)
    assert np.all(found.verdict == Verdict.REFUTED)
    assert found.refuted & Assumption.SOFTMAX
    assert np.isnan(found.label).all()


@pytest.mark.parametrize(("kind", "accuracy"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_read_off_the_digits(kind, accuracy, assert_dense_honest) -> None:
    """As float32 arrays, which is how files and aggregators keep them."""
    parameters, gradients, inputs, labels = _client(
        lambda z, y: functional.cross_entropy(z, functional.one_hot(y, CLASSES).to(z.dtype)), kind
    )
    found = recover_model(parameters, gradients, batch_size=SIZE, activation="relu")
    _, place = assert_dense_honest(found, inputs, labels)
    assert np.all(found.verdict >= Verdict.AMBIGUOUS)
    np.testing.assert_allclose(found.label, labels[place], atol=accuracy)
    assert found.label_deviation.max() > 1e-4


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_batch_normalisation_in_training_is_not_found(activation) -> None:
    """The bias before it has no gradient."""
    parameters, gradients, *_ = _client(functional.cross_entropy, between=torch.nn.BatchNorm1d(WIDTH))
    found = recover_model(parameters, gradients, batch_size=SIZE, activation=activation)
    assert np.all(found.verdict < Verdict.AMBIGUOUS)


def test_dropped_units_are_seen(assert_dense_honest) -> None:
    parameters, gradients, inputs, labels = _client(functional.cross_entropy, between=torch.nn.Dropout(0.5))
    found = recover_model(parameters, gradients, batch_size=SIZE, activation="relu")
    assert_dense_honest(found, inputs, labels)
    assert found.refuted & Assumption.PARAMETERS
    assert np.all(found.verdict < Verdict.AMBIGUOUS)
