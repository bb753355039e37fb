"""Batches of images straight into a dense layer with ReLU: images from its update, labels from running the client."""

import numpy as np
import pytest

from softinv_jax import Verdict, observe_update
from softinv_jax.images.layer_chain import Activation, Convolution, Dense, Flatten
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict
from softinv_jax.local_training.first_layer import begins_dense
from softinv_jax.local_training.recovery import invert_updates

CHAIN = (Flatten(), Dense("dense1"), Activation("relu"), Dense("head"))
SHAPE = (4, 4, 3)


def attack(runs, steps, batch_size, **told) -> ImageRecovery:
    updates = [
        observe_update(run.sent, run.returned, local_steps=steps, **{"learning_rate": 0.02, "momentum": 0.9, **told})
        for run in runs
    ]
    return invert_updates(CHAIN, updates, SHAPE, batch_size=batch_size)


def places(found: ImageRecovery, index: int, run) -> np.ndarray:
    images = found.images[index][found.verdict[index] == ImageVerdict.EXACT].reshape(-1, run.inputs.shape[1])
    distance = np.sqrt(np.mean((images[:, None] - run.inputs) ** 2, axis=2))
    assert distance.min(axis=1).max() < 1e-5
    assert sorted(np.argmin(distance, axis=1)) == list(range(len(run.inputs)))
    return np.argmin(distance, axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_images_and_labels_of_whole_batches(dense_run, smoothing) -> None:
    run = dense_run(8, 4, smoothing=smoothing)
    found = attack([run], 4, 8)
    assert np.all(found.verdict == ImageVerdict.EXACT)
    assert np.all(found.label_verdict == Verdict.UNIQUE)
    assert np.all(found.misfit < 4)
    assert np.abs(found.labels[0] - run.labels[places(found, 0, run)]).max() < 1e-4


def test_minibatches_of_clients_with_different_numbers_of_examples(dense_run) -> None:
    runs = [dense_run(6, 9, 2), dense_run(4, 6, 2, seed=1)]
    update = {"steps": 6, "batch_size": "auto", "minibatch_size": 2}
    found = attack(runs[1:], **update)
    places(found, 0, runs[1])
    together = attack(runs, **update)
    assert together.images.shape == (2, 6, *SHAPE)
    for index, run in enumerate(runs):
        places(together, index, run)
    # What p was on the way the order decides, which is not known.
    assert np.all(together.label_verdict[together.verdict == ImageVerdict.EXACT] == Verdict.AMBIGUOUS)
    assert together.label_verdict[1, 4:].tolist() == [Verdict.NOT_FOUND] * 2


def test_another_rate_than_told_makes_no_label_unique(dense_run) -> None:
    run = dense_run(6, 4)
    found = attack([run], 4, 6, learning_rate=0.03)
    places(found, 0, run)
    assert not np.any(found.label_verdict == Verdict.UNIQUE)
    assert not np.all(found.misfit < 4)


def test_what_it_is_for() -> None:
    assert begins_dense(CHAIN)
    assert not begins_dense((Flatten(), Dense("dense1"), Activation("sigmoid"), Dense("head")))
    assert not begins_dense((Convolution("conv1", (1, 1), "SAME"), *CHAIN))
    assert not begins_dense((Flatten(), Dense("head")))


def test_what_is_refused(dense_run) -> None:
    run = dense_run(4, 4, 2)
    update = observe_update(run.sent, run.returned, learning_rate=0.02, local_steps=4, minibatch_size=2)
    smooth = (Flatten(), Dense("dense1"), Activation("tanh"), Dense("head"))
    with pytest.raises(ValueError, match="minibatches of 2 of 4 examples"):
        invert_updates(smooth, [update], SHAPE, batch_size=4)
    with pytest.raises(ValueError, match="'auto' is for chains"):
        invert_updates(smooth, [update], SHAPE, batch_size="auto")
    with pytest.raises(ValueError, match="minibatch_size must be a positive integer"):
        observe_update(run.sent, run.returned, local_steps=4, minibatch_size=0)
