"""Any PyTorch module as a function of JAX arrays: logits, gradients and second derivatives are torch's; or an error."""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.frameworks.parameter_files import flat
from softinv_jax.images.objective import WholeBatch, logits_of, mean_loss_gradient

pytestmark = pytest.mark.filterwarnings("ignore")
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchax")
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import torch_networks as zoo

    sys.path.pop(0)
    from softinv_jax.frameworks.torch_model import torch_model

SHAPE = (32, 32, 3)


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    label = np.full((2, zoo.CLASSES), 0.1) + 0.5 * np.eye(zoo.CLASSES)[[1, 3]]
    return rng.normal(size=(2, *SHAPE)), label


def in_torch(module: Any, images: np.ndarray, label: np.ndarray, seed: int) -> tuple[Any, dict[str, Any], Any]:
    """Logits, gradient, and the derivative of the gradient's squared length by the images; in float64."""
    module = module.double()
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    torch.manual_seed(seed)
    # The default kernel of attention has no second derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = module(given)
    loss = -(torch.from_numpy(label) * torch.log_softmax(logits, 1)).sum(1).mean()
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    (second,) = torch.autograd.grad(sum((part**2).sum() for part in gradient), given)
    kept = {name: part.detach().numpy() for name, part in zip(names, gradient, strict=True)}
    return logits.detach().numpy(), kept, second.numpy().transpose(0, 2, 3, 1)


def in_jax(model: Any, images: np.ndarray, label: np.ndarray) -> tuple[Any, dict[str, Any], Any]:
    with jax.enable_x64(True):
        parameters, images, label = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (model.parameters, images, label)
        )

        def length(images: jax.Array) -> jax.Array:
            gradient = mean_loss_gradient(model.apply_fn, parameters, images, label)
            return sum(jnp.sum(part**2) for part in jax.tree.leaves(gradient))

        def everything() -> Any:
            gradient = mean_loss_gradient(model.apply_fn, parameters, images, label)
            return logits_of(model.apply_fn, parameters, images), gradient, jax.grad(length)(images)

        logits, gradient, second = jax.device_get(jax.jit(everything)())
    return logits, flat(gradient, "."), second


def check_against_torch(module: Any, batch: tuple[np.ndarray, np.ndarray], seed: int | None = None) -> Any:
    model = torch_model(module, SHAPE, dropout_seed=seed)
    found, expected = in_jax(model, *batch), in_torch(module, *batch, seed or 0)
    jax.tree.map(check_close, list(found), list(expected), is_leaf=lambda part: isinstance(part, dict))
    return model


def check_close(found: Any, expected: Any) -> None:
    """An array, or a gradient; in float64, but for constants inside that are float32."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6 * largest), found, expected)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_first_and_second_derivatives_are_torchs(name: str, batch: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(0)
    model = check_against_torch(zoo.ZOO[name](), batch)
    # Batch normalisation in training lets examples act on each other.
    assert isinstance(model.apply_fn, WholeBatch) == name.endswith("training")


def test_dropout_of_a_told_seed(batch: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(0)
    module = zoo.Dropouts().train()
    check_against_torch(module, batch, seed=11)
    other = torch_model(module, SHAPE, dropout_seed=12)
    assert not np.allclose(in_jax(other, *batch)[0], in_torch(module, *batch, 11)[0])


def test_a_single_image_and_vmap(batch: tuple[np.ndarray, np.ndarray]) -> None:
    torch.manual_seed(0)
    model = torch_model(zoo.VisionTransformer(), SHAPE)
    images = jnp.asarray(batch[0], jnp.float32)
    one_by_one = [model.apply_fn(model.parameters, image) for image in images]
    together = jax.jit(jax.vmap(model.apply_fn, (None, 0)))(model.parameters, images)
    np.testing.assert_allclose(jnp.stack(one_by_one), together, atol=1e-5)


def test_what_is_not_trained_is_no_parameter() -> None:
    module = zoo.depthwise().eval()
    module[0].requires_grad_(False)
    model = torch_model(module, SHAPE)
    assert "0" not in model.parameters
    assert "8" in model.parameters
    chain = zoo.get_started()
    chain[0].requires_grad_(False)
    assert "0.weight is not trained" in torch_model(chain, SHAPE).not_a_chain


def with_middle(function: Callable[[Any], Any]) -> Any:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(3, 2, 5), torch.nn.Linear(2 * 28 * 28, zoo.CLASSES)

        def forward(self, images: Any) -> Any:
            return self.head(function(self.conv(images)).flatten(1))

    return Module()


class StraightThrough(torch.autograd.Function):
    """Its gradient is not that of what it computes, as where weights are quantised."""

    @staticmethod
    def forward(context: Any, value: Any) -> Any:
        return torch.round(value)

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:
        return gradient


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: zoo.Dropouts().train(), "dropout_seed"),
        (lambda: with_middle(lambda value: value + torch.rand_like(value)), "random"),
        (lambda: with_middle(StraightThrough.apply), "conv.weight"),
        (lambda: with_middle(lambda value: torch.fake_quantize_per_tensor_affine(value, 0.1, 0, 0, 9)), "quantize"),
        (lambda: with_middle(lambda value: value if value.sum() > 0 else -value), "cannot be computed"),
        (lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 2, 5), torch.nn.Flatten()), "cannot take images"),
        (lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 2, 5)), "logits"),
        (torch.nn.Flatten, "nothing of the module is trained"),
    ],
)
def test_what_cannot_be_relied_on_is_refused(module: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _ = torch_model(module(), SHAPE).apply_fn


def test_random_layers_that_a_seed_does_not_explain() -> None:
    module = with_middle(lambda value: value + torch.rand_like(value))
    with pytest.raises(ValueError, match="random"):
        _ = torch_model(module, SHAPE, dropout_seed=1).apply_fn


def test_arrays_that_do_not_fit() -> None:
    model = torch_model(zoo.get_started(), SHAPE)
    arrays = {name: value.detach().numpy() for name, value in zoo.get_started().named_parameters()}
    with pytest.raises(ValueError, match=r"0\.weight"):
        model.tree({name: value for name, value in arrays.items() if name != "0.weight"})
    with pytest.raises(ValueError, match=r"11\.bias"):
        model.tree(arrays | {"11.bias": np.zeros(3, np.float32)})


def test_the_activation_that_recover_update_need_not_guess() -> None:
    assert torch_model(zoo.get_started(), SHAPE).dense_activation == "relu"
    assert torch_model(zoo.lenet5(), (28, 28, 1)).dense_activation == "tanh"
    assert torch_model(zoo.strided_lenet(), SHAPE).dense_activation == "auto"
    assert torch_model(zoo.VisionTransformer(), SHAPE).dense_activation == "auto"
