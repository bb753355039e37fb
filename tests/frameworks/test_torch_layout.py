"""PyTorch's parameters, updates and files against the same network in linen: logits, gradients, images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client import LeNet, apply_function, load_photographs, per_sample_model_gradients
from softinv_jax.frameworks.parameter_files import flat, read_parameter_file
from softinv_jax.frameworks.torch_layout import linen_from_torch
from softinv_jax.observation.updates import observe_update

CLASSES, SIDE = 4, 16
RATE = 0.5

torch = pytest.importorskip("torch")


class TorchLeNet(torch.nn.Module):
    """The paper's LeNet as PyTorch's users write it, with a head that has a bias."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 12, 2), (12, 12, 2), (12, 12, 1))
        layers = []
        for inputs, outputs, stride in sizes:
            layers += [torch.nn.Conv2d(inputs, outputs, 5, stride, padding=2), torch.nn.Sigmoid()]
        self.body = torch.nn.Sequential(*layers)
        self.fc = torch.nn.Linear(12 * (SIDE // 4) ** 2, CLASSES)

    def forward(self, images: Any) -> Any:
        return self.fc(torch.flatten(self.body(images), 1))


NAMES = {"body.0": "conv1", "body.2": "conv2", "body.4": "conv3", "fc": "head"}
FLATTENED = {"fc": (12, SIDE // 4, SIDE // 4)}


def to_linen(state: Mapping[str, Any]) -> dict:
    arrays = {name: np.asarray(value.detach()) for name, value in state.items()}
    parameters, statistics = linen_from_torch(arrays, flattened=FLATTENED, names=NAMES)
    assert statistics == {}
    return parameters


@pytest.fixture(scope="module")
def client() -> dict[str, Any]:
    """One PyTorch training step: a photograph with a smoothed label, the parameters before and after it."""
    torch.manual_seed(0)
    model = TorchLeNet()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    image = np.asarray(load_photographs(per_class=1, image_size=SIDE).normalised()[:1])
    label = np.full((1, CLASSES), 0.05, np.float32)
    label[0, 2] = 0.85
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    logits = model(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(label)).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    optimiser.step()
    return {
        "before": before,
        "after": model.state_dict(),
        "gradients": gradients,
        "logits": logits.detach().numpy(),
        "image": image,
        "label": label,
    }


def test_logits_and_gradients_are_pytorchs(client: dict[str, Any]) -> None:
    network = LeNet(CLASSES, head_bias=True)
    parameters = to_linen(client["before"])
    logits = network.apply({"params": parameters}, client["image"])
    # Sums of 300 float32 products, in another order.
    np.testing.assert_allclose(logits, client["logits"], rtol=0, atol=1e-5)
    gradients = per_sample_model_gradients(apply_function(network), parameters, client["image"], client["label"])
    theirs, ours = flat(to_linen(client["gradients"])), flat(jax.tree.map(lambda leaf: np.asarray(leaf)[0], gradients))
    assert set(theirs) == set(ours)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=3e-6 * np.abs(expected).max(), err_msg=name)


def test_without_the_order_of_flattening_the_logits_are_wrong(client: dict[str, Any]) -> None:
    arrays = {name: np.asarray(value) for name, value in client["before"].items()}
    parameters, _ = linen_from_torch(arrays, names=NAMES)
    logits = LeNet(CLASSES, head_bias=True).apply({"params": parameters}, client["image"])
    assert np.abs(logits - client["logits"]).max() > 1e-3


def test_the_update_is_the_gradient(client: dict[str, Any]) -> None:
    update = observe_update(to_linen(client["before"]), to_linen(client["after"]), learning_rate=RATE)
    assert update.exact
    deviations, expected = flat(update.rounding), flat(to_linen(client["gradients"]))
    for name, gradient in flat(update.gradients).items():
        # Uniform errors: never beyond sqrt(3) deviations, but for the rounding of the quotient and of rate times g.
        error = np.abs(gradient - expected[name])
        assert np.all(error <= 1.74 * deviations[name] + 2e-7 * np.abs(expected[name])), name


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_hold_the_same(client: dict[str, Any], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    state = client["before"] | {"norm.num_batches_tracked": torch.tensor(3)}
    if suffix == "pt":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    arrays = read_parameter_file(str(path))
    assert set(arrays) == set(client["before"])
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, client["before"][name].numpy())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_bfloat16_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    values = torch.tensor([[1.5, -0.1], [3e38, 0.0]], dtype=torch.bfloat16)
    if suffix == "pt":
        torch.save({"head.weight": values}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file({"head.weight": values}, path)
    array = read_parameter_file(str(path))["head.weight"]
    assert array.dtype == jnp.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), values.float().numpy())


def test_every_kind_of_layer_against_torch() -> None:
    """A grouped convolution, batch normalisation with statistics, and a dense layer, applied by XLA and by torch."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.BatchNorm2d(6), torch.nn.Flatten())
    model.append(torch.nn.Linear(6 * 4, 3))
    images = torch.randn(8, 4, 4, 4)
    model(images)  # moves the running statistics
    model.eval()
    state = {name: np.asarray(value.detach()) for name, value in model.state_dict().items()}
    parameters, statistics = linen_from_torch(state, flattened={"3": (6, 2, 2)}, names={"0": "conv", "1": "norm"})
    hidden = jax.lax.conv_general_dilated(
        images.numpy().transpose(0, 2, 3, 1),
        parameters["conv"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    hidden = np.asarray(hidden) + parameters["conv"]["bias"]
    spread = np.sqrt(statistics["norm"]["var"] + 1e-5)
    hidden = (hidden - statistics["norm"]["mean"]) / spread * parameters["norm"]["scale"] + parameters["norm"]["bias"]
    logits = hidden.reshape(8, -1) @ parameters["3"]["kernel"] + parameters["3"]["bias"]
    np.testing.assert_allclose(logits, model(images).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("state", "options", "said"),
    [
        ({"rnn.weight_ih_l0": np.ones((4, 3))}, {}, "rnn.weight_ih_l0 of shape .4, 3. is no weight or bias"),
        ({"weight": np.ones((4, 3))}, {}, "weight of shape"),
        ({"fc.weight": np.ones((4, 3))}, {"flattened": {"fc": (2, 2, 1)}}, "fc.weight of shape .* = .2, 2, 1."),
        ({"fc.weight": np.ones((4, 3))}, {"flattened": {"head": (3, 1, 1)}}, "flattened names head, .* fc"),
        ({"fc.weight": np.ones((4, 3))}, {"names": {"head": "x"}}, "names names head"),
        ({"a.weight": np.ones((4, 3)), "b.weight": np.ones(3)}, {"names": {"a": "b"}}, "names gives b to several"),
        ({"fc.weight": np.full((4, 3), np.nan)}, {}, "fc/kernel holds entries that are not finite"),
    ],
)
def test_what_does_not_fit_is_named(state: dict, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linen_from_torch(state, **options)
