"""Residual networks against their definition in NumPy, torchvision's sizes, and what batch statistics do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client.networks import (
    LeNet,
    ResNet,
    ResNet18,
    ResNet50,
    apply_function,
    initial_batch_statistics,
    initialise,
)

SHAPE = (33, 40, 3)
THIN = ResNet(10, blocks=(1, 1, 1, 1), width=4, stem="cifar")


def draw(network: ResNet, shape: tuple[int, int, int], seed: int = 0) -> tuple[dict, dict]:
    """Parameters and statistics of a network that has been somewhere: no scale is 1, no mean 0."""
    generator = np.random.default_rng(seed)
    parameters = initialise(network, jax.random.key(seed), shape)
    # Wider than at the start, so that every branch counts.
    parameters = jax.tree.map(
        lambda leaf: leaf + generator.uniform(-0.3, 0.3, leaf.shape).astype(leaf.dtype), parameters
    )
    statistics = initial_batch_statistics(network, shape)
    statistics = jax.tree.map(lambda leaf: leaf + generator.uniform(0, 0.5, leaf.shape).astype(leaf.dtype), statistics)
    return parameters, statistics


@pytest.mark.parametrize(
    ("network", "published", "features"),
    [(ResNet18(1000), 11_689_512, 512), (ResNet50(1000), 25_557_032, 2048)],
)
def test_torchvisions_number_of_parameters(network, published, features) -> None:
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((224, 224, 3)))
    # torchvision's head has a bias.
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == published - 1000
    assert variables["params"]["head"]["kernel"].shape == (features, 1000)


@pytest.mark.parametrize(
    ("network", "size", "sides", "channels"),
    [
        (ResNet18(10), 224, (56, 28, 14, 7), (64, 128, 256, 512)),
        (ResNet18(10, stem="cifar"), 32, (32, 16, 8, 4), (64, 128, 256, 512)),
        (ResNet50(10), 224, (56, 28, 14, 7), (256, 512, 1024, 2048)),
    ],
)
def test_shapes_of_the_stages(network, size, sides, channels) -> None:
    run = partial(network.init_with_output, method="stage_outputs")
    outputs, _ = jax.eval_shape(run, jax.random.key(0), jnp.zeros((size, size, 3)))
    assert [output.shape for output in outputs] == [
        (side, side, width) for side, width in zip(sides, channels, strict=True)
    ]


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_residual_network_is_its_definition(stem, bottleneck, naive, quick_jit) -> None:
    network = ResNet(10, blocks=(2, 1, 1, 1), bottleneck=bottleneck, stem=stem, width=4)
    parameters, statistics = draw(network, SHAPE)
    image = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)

    def convolve_and_normalise(hidden, layers, state, conv, norm, stride):
        padding = len(layers[conv]["kernel"]) // 2
        return naive.normalise(naive.convolve(hidden, layers[conv], stride, padding), layers[norm], state[norm])

    stride = 2 if stem == "imagenet" else 1
    hidden = convolve_and_normalise(image.astype(np.float64), parameters, statistics, "stem_conv", "stem_norm", stride)
    hidden = np.maximum(hidden, 0)
    hidden = naive.max_pool(hidden, padding=1) if stem == "imagenet" else hidden
    for name in ("stages_0_0", "stages_0_1", "stages_1_0", "stages_2_0", "stages_3_0"):
        apply = partial(convolve_and_normalise, layers=parameters[name], state=statistics[name])
        stride = 1 if name.startswith("stages_0") else 2
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        branch = hidden
        for number, own in enumerate(strides, start=1):
            branch = apply(branch, conv=f"conv{number}", norm=f"norm{number}", stride=own)
            branch = np.maximum(branch, 0) if number < len(strides) else branch
        if "shortcut_conv" in parameters[name]:
            hidden = apply(hidden, conv="shortcut_conv", norm="shortcut_norm", stride=stride)
        hidden = np.maximum(branch + hidden, 0)
    features = hidden.mean(axis=(0, 1))
    logits = features @ np.asarray(parameters["head"]["kernel"], np.float64)
    variables = {"params": parameters, "batch_stats": statistics}
    found = quick_jit(partial(network.apply, method="logits_and_features"))(variables, image)
    # Each of up to 16 layers sums up to 300 float32 terms.
    np.testing.assert_allclose(found[1], features, rtol=1e-4, atol=1e-5 * features.max())
    np.testing.assert_allclose(found[0], logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max())


def test_in_evaluation_an_image_is_on_its_own_and_in_training_it_is_not(quick_jit) -> None:
    parameters, statistics = draw(THIN, (16, 16, 3))
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    function = apply_function(THIN, statistics)
    batched = quick_jit(function)(parameters, images)
    single = quick_jit(function)(parameters, images[1])
    np.testing.assert_allclose(single, batched[1], rtol=1e-4)
    mapped = quick_jit(jax.vmap(function, in_axes=(None, 0)))(parameters, images)
    np.testing.assert_allclose(mapped, batched, rtol=1e-4)
    training = quick_jit(partial(THIN.clone(training=True).apply, mutable=["batch_stats"]))
    variables = {"params": parameters, "batch_stats": statistics}
    together, pair = (training(variables, batch)[0][0] for batch in (images, images[:2]))
    assert float(jnp.max(jnp.abs(together - pair))) > 0.01 * float(jnp.max(jnp.abs(pair)))


def test_gradient_is_with_respect_to_the_parameters_alone() -> None:
    parameters, statistics = draw(THIN, (16, 16, 3))
    gradient = jax.eval_shape(
        jax.grad(lambda trained: jnp.sum(apply_function(THIN, statistics)(trained, jnp.ones((16, 16, 3))))), parameters
    )
    assert jax.tree.structure(gradient) == jax.tree.structure(parameters)
    assert "stem_norm" in gradient
    assert sorted(gradient["stem_norm"]) == ["bias", "scale"]


def test_untrained_batch_normalisation() -> None:
    parameters = initialise(THIN, jax.random.key(0), SHAPE)
    statistics = initial_batch_statistics(THIN, SHAPE)
    np.testing.assert_array_equal(parameters["stem_norm"]["scale"], np.ones(4))
    np.testing.assert_array_equal(parameters["stem_norm"]["bias"], np.zeros(4))
    np.testing.assert_array_equal(statistics["stages_1_0"]["shortcut_norm"]["mean"], np.zeros(8))
    np.testing.assert_array_equal(statistics["stages_1_0"]["shortcut_norm"]["var"], np.ones(8))
    assert initial_batch_statistics(LeNet(10), SHAPE) == {}
    kernel = parameters["stages_0_0"]["conv1"]["kernel"]
    assert 0.9 / 6 < float(jnp.max(jnp.abs(kernel))) <= 1 / 6


def test_equal_statistics_share_one_function() -> None:
    first, second = initial_batch_statistics(THIN, SHAPE), initial_batch_statistics(THIN, SHAPE)
    assert apply_function(THIN, first) is apply_function(THIN, second)
    second["stem_norm"]["mean"] = second["stem_norm"]["mean"] + 1
    assert apply_function(THIN, first) is not apply_function(THIN, second)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="batch_statistics of ResNet18, got None"):
        apply_function(ResNet18(10))
    with pytest.raises(ValueError, match="training=False"):
        apply_function(THIN.clone(training=True), initial_batch_statistics(THIN, SHAPE))
    with pytest.raises(ValueError, match="stem='large'"):
        initialise(ResNet18(10, stem="large"), jax.random.key(0), SHAPE)
    with pytest.raises(ValueError, match=r"got \(8, 8\)"):
        apply_function(THIN, initial_batch_statistics(THIN, SHAPE))(
            initialise(THIN, jax.random.key(0), SHAPE), jnp.zeros((8, 8))
        )
