"""Labels from the gradient of a whole network, one example each, format not told."""

from functools import partial

import jax
import numpy as np
import pytest

import softinv_jax
from softinv_jax.client import (
    AlexNet,
    ResNet,
    ResNet18,
    apply_function,
    initial_batch_statistics,
    initialise,
    load_photographs,
    per_sample_model_gradients,
    sample_batch,
)

FORMATS = ("hard", "smoothing", "mixup", "smoothed_mixup")


@pytest.mark.parametrize(
    ("network", "image_size"),
    [
        (ResNet18(10, stem="cifar"), 32),
        (ResNet(10, blocks=(1, 1, 1, 1), width=16), 32),
        (ResNet(10, blocks=(1, 1, 1, 1), bottleneck=True, width=8), 32),
        (AlexNet(10, width=8, hidden=128), 64),
    ],
    ids=["resnet18_cifar_stem", "thin_imagenet_stem", "thin_bottleneck", "thin_alexnet"],
)
def test_one_example_of_each_format(network, image_size, quick_jit) -> None:
    data = load_photographs(per_class=2, image_size=image_size)
    shape = data.images.shape[1:]
    parameters = initialise(network, jax.random.key(0), shape)
    batches = [
        sample_batch(jax.random.key(place), family, data.normalised(), data.classes, 10, 1)
        for place, family in enumerate(FORMATS)
    ]
    images, labels = (
        np.concatenate([np.asarray(getattr(batch, name)) for batch in batches]) for name in ("images", "labels")
    )
    function = apply_function(network, initial_batch_statistics(network, shape))
    gradients = quick_jit(partial(per_sample_model_gradients, function))(parameters, images, labels)
    recovery = softinv_jax.recover_many(softinv_jax.observe_head(parameters, gradients))
    assert list(recovery.verdict) == [softinv_jax.Verdict.UNIQUE] * 4
    error = np.max(np.abs(np.asarray(recovery.label) - labels), axis=1)
    deviation = np.max(np.asarray(recovery.evidence.label_deviation), axis=1)
    assert np.all(error < 1e-6 + 10 * deviation)
    # Logits of untrained networks differ by 1e-3 to 1e-2, and float32 knows each to 1e-7.
    assert np.all(deviation < 1e-4)
