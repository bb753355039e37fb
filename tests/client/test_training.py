"""Training on photographs that are always at hand, and the training batch's labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax.client.datasets import load_photographs
from softinv_jax.client.networks import LeNet, ResNet, apply_function, initial_batch_statistics, initialise_fan_in
from softinv_jax.client.training import evaluate, train

NETWORK = LeNet(10)


@pytest.fixture(scope="module")
def photographs() -> tuple[jax.Array, np.ndarray]:
    data = load_photographs(per_class=64, image_size=16)
    return data.normalised(), data.classes


@pytest.fixture(scope="module")
def start() -> dict:
    return initialise_fan_in(NETWORK, jax.random.key(0), (16, 16, 3))


@pytest.mark.parametrize(("family", "epochs"), [("smoothing", 15), ("mixup", 15)])
def test_training_learns_and_reports_what_it_did(family, epochs, photographs, start) -> None:
    images, classes = photographs
    reports = []
    result = train(
        jax.random.key(1),
        NETWORK,
        start,
        images,
        classes,
        number_of_classes=10,
        family=family,
        epochs=epochs,
        batch_size=32,
        progress=lambda done, total, note: reports.append((done, total, note)),
    )
    assert result.losses.shape == (epochs,)
    assert float(result.losses[-1]) < float(result.losses[0])
    # Chance is 0.1.
    assert float(result.accuracy) > 0.5
    assert [report[:2] for report in reports] == [(epoch + 1, epochs) for epoch in range(epochs)]
    assert reports[-1][2] == f"loss {float(result.losses[-1]):.4f}"
    assert jax.tree.structure(result.parameters) == jax.tree.structure(start)
    assert result.batch_statistics == {}
    # The accuracy reported is that of the parameters returned, on the images given.
    logits = jax.jit(apply_function(NETWORK))(result.parameters, images)
    np.testing.assert_allclose(result.accuracy, np.mean(np.argmax(logits, axis=1) == classes), atol=1e-6)


def test_same_key_gives_the_same_network_and_another_key_another(photographs, start) -> None:
    images, classes = photographs
    results = [
        train(jax.random.key(seed), NETWORK, start, images, classes, number_of_classes=10, epochs=1)
        for seed in (2, 2, 3)
    ]
    heads = [np.asarray(result.parameters["head"]["kernel"]) for result in results]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 1e-4


def test_first_loss_is_that_of_the_soft_labels_alone(start) -> None:
    # With a zero head all logits are 0, so the cross-entropy is log C for every label of sum 1.
    zero_head = {**start, "head": jax.tree.map(jnp.zeros_like, start["head"])}
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    result = train(
        jax.random.key(0),
        NETWORK,
        zero_head,
        images,
        np.arange(8),
        number_of_classes=10,
        family="k_way_mixup",
        epochs=1,
        batch_size=8,
    )
    np.testing.assert_allclose(result.losses, [np.log(10)], rtol=1e-5)


def test_evaluate_counts_right_classes_where_batches_do_not_fit(photographs, start) -> None:
    images, classes = photographs[0][:7], photographs[1][:7]
    predicted = np.argmax(jax.jit(apply_function(NETWORK))(start, images), axis=1)
    expected = np.mean(predicted == classes)
    accuracy = evaluate(NETWORK, start, images, classes, batch_size=3)
    np.testing.assert_allclose(accuracy, expected, atol=1e-6)
    assert float(evaluate(NETWORK, start, images, predicted, batch_size=3)) == 1.0


def test_training_moves_running_statistics_towards_those_of_its_batches() -> None:
    network = ResNet(10, blocks=(1, 1, 1, 1), width=2, stem="cifar")
    shape = (8, 8, 3)
    start = initialise_fan_in(network, jax.random.key(0), shape)
    images = 3 + np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    options = {"number_of_classes": 10, "epochs": 2, "batch_size": 6, "flips": False, "family": "smoothing"}
    result = train(jax.random.key(1), network, start, images, np.arange(6), **options)
    # What the first normalisation sees: the stem's 3x3 convolution, one zero on each side.
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    seen = np.einsum("nijcab,abck->nijk", patches, start["stem_conv"]["kernel"])
    statistics = result.batch_statistics["stem_norm"]
    # Two steps of 10 %; the first one's learning rate is 0, so both see the same.
    np.testing.assert_allclose(statistics["mean"], 0.19 * seen.mean(axis=(0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(statistics["var"], 0.81 + 0.19 * seen.var(axis=(0, 1, 2)), rtol=1e-4)
    assert jax.tree.structure(result.batch_statistics) == jax.tree.structure(initial_batch_statistics(network, shape))
    assert not np.array_equal(result.parameters["stem_conv"]["kernel"], start["stem_conv"]["kernel"])
    # The accuracy reported is that of evaluation mode, with the statistics returned.
    logits = jax.jit(apply_function(network, result.batch_statistics))(result.parameters, jnp.asarray(images))
    np.testing.assert_allclose(result.accuracy, np.mean(np.argmax(logits, axis=1) == np.arange(6)), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, r"batch_size=9 in \[1, 8\]"),
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"family": "none"}, "Unknown family='none'"),
    ],
)
def test_bad_input_is_named(change, message, start) -> None:
    images, classes = np.zeros((8, 16, 16, 3), np.float32), np.arange(8)
    arguments = {"number_of_classes": 10, "batch_size": 4} | change
    with pytest.raises(ValueError, match=message):
        train(jax.random.key(0), NETWORK, start, images, classes, **arguments)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        train(jax.random.key(0), NETWORK, start, images, classes[:7], number_of_classes=10)
