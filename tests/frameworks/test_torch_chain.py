"""The chain of layers read off a module: what it computes is what the module computes; else the operation is named."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from softinv_jax.images.layer_chain import Activation, Convolution, Dense, Flatten, Pool, apply_chain
from softinv_jax.images.verdicts import ImageVerdict
from softinv_jax.labels.verdicts import Verdict

pytestmark = pytest.mark.filterwarnings("ignore")
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch import nn
    from torch.nn import functional

    from softinv_jax.frameworks.torch_chain import NotAChainError, read_chain
    from softinv_jax.frameworks.torch_model import torch_model

SHAPE = (12, 10, 2)


class Functional(nn.Module):
    """Layers out of order, activations as functions and in place, padding by name, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 3 * 2, 3)
        self.body = nn.ModuleDict(
            {"last": nn.Conv2d(5, 4, 3, bias=False), "first": nn.Conv2d(2, 5, (4, 3), padding="same")}
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Any) -> Any:
        hidden = functional.avg_pool2d(torch.tanh_(self.body["first"](images)), 2)
        hidden = functional.max_pool2d(
            functional.leaky_relu(self.body["last"](hidden)), (2, 2), stride=1, padding=(0, 0)
        )
        return functional.log_softmax(self.head(self.drop(hidden.contiguous()).view(hidden.size(0), -1)), 1)


def sequence(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "functional": lambda: Functional().eval(),
    "strides and one-sided padding": lambda: sequence(
        nn.Conv2d(2, 3, (2, 4), (2, 3), padding=(1, 2)), nn.GELU(), features=3 * 7 * 4
    ),
    "even kernels, same": lambda: sequence(nn.Conv2d(2, 3, 4, padding="same"), nn.SiLU(), features=3 * 120),
    "global mean": lambda: sequence(nn.Conv2d(2, 3, 3), nn.ELU(), nn.AdaptiveAvgPool2d(1), features=3),
    "adaptive": lambda: sequence(
        nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.AdaptiveAvgPool2d((4, 5)), features=60
    ),
    "padded pooling": lambda: sequence(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1, 1), nn.Hardtanh(), features=2 * 7 * 6),
    "activations": lambda: sequence(nn.GELU("tanh"), nn.ReLU6(), nn.Sigmoid(), nn.Identity(), nn.ReLU(), features=240),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_chain_computes_what_the_module_does(name: str) -> None:
    """Logits here; gradients are compared where `network` is asked for."""
    torch.manual_seed(0)
    module = MODULES[name]()
    model = torch_model(module, SHAPE)
    assert model.chain is not None, model.not_a_chain
    images = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    with torch.no_grad():
        logits = torch.log_softmax(module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())), 1).numpy()
    parameters = model.tree({name: value.numpy() for name, value in module.state_dict().items()})
    found = np.asarray(apply_chain(model.chain, parameters, images))
    found = found - np.log(np.exp(found).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert model.network.chain is model.chain


def test_what_the_layers_are_called() -> None:
    assert read_chain(Functional().eval(), SHAPE) == (
        Convolution("body/first", (1, 1), ((1, 2), (1, 1))),
        Activation("tanh"),
        Pool("average", (2, 2), (2, 2)),
        Convolution("body/last", (1, 1)),
        Activation("leaky_relu"),
        Pool("max", (2, 2), (1, 1)),
        Flatten(),
        Dense("head"),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(240, 3)

    def forward(self, images: Any) -> Any:
        return self.head((images + self.conv(images)).flatten(1))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(240, 3)

    def forward(self, images: Any) -> Any:
        return self.head(torch.tanh(self.conv(torch.tanh(self.conv(images)))).flatten(1))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Residual, "branches"),
        (Shared, "share"),
        (lambda: sequence(nn.Conv2d(2, 4, 3, groups=2), features=320), "groups"),
        (lambda: sequence(nn.Conv2d(2, 4, 3, dilation=2), features=192), "dilation"),
        (lambda: sequence(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), features=320), "batch_norm"),
        (lambda: sequence(nn.MaxPool2d(5, 3, ceil_mode=True), features=2 * 4 * 3), "ceil_mode"),
        (lambda: sequence(nn.LeakyReLU(0.2), features=240), "negative_slope=0.2"),
        (lambda: sequence(nn.Dropout(0.5), features=240).train(), "dropout is on"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(240, 3), nn.Softmax(1)), "softmax"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(240, 4), nn.ReLU()), "Dense head"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(240, 3)), "follow|computed|mat1"),
        (lambda: sequence(nn.AdaptiveAvgPool2d(7), features=98), "several sizes"),
    ],
)
def test_what_is_no_chain_is_named(module: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(NotAChainError, match=said):
        read_chain(module(), SHAPE)


def test_an_update_gives_away_an_image_that_nobody_described() -> None:
    """Gray and not square, one step of SGD; the module is all that is told."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 6)
    )
    with torch.no_grad():
        for value in module.parameters():
            value.uniform_(-0.5, 0.5)
    before = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    image = np.random.default_rng(0).uniform(-1, 1, (12, 8, 1)).astype(np.float32)
    label = torch.tensor([[0.04, 0.04, 0.8, 0.04, 0.04, 0.04]])
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    functional.cross_entropy(module(torch.from_numpy(image.transpose(2, 0, 1)[None].copy())), label).backward()
    optimiser.step()
    model = torch_model(module, (12, 8, 1))
    after = {name: value.numpy() for name, value in module.state_dict().items()}
    found = model.invert([model.observe(before, after, learning_rate=0.5)])
    assert found.method == "exact"
    assert found.reason == ""
    assert found.recovery.label_verdict[0, 0] == Verdict.UNIQUE
    assert found.recovery.verdict[0, 0] == ImageVerdict.EXACT
    assert np.abs(found.recovery.images[0, 0] - image).max() < 0.01
