"""Many inversions in one program: as one by one, whatever becomes of the others, and on other platforms."""

import re
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from softinv_jax.client import load_photographs, per_sample_model_gradients
from softinv_jax.images import groups
from softinv_jax.images.groups import Inverted, group_size, invert_groups
from softinv_jax.images.layer_chain import Activation, Convolution, Dense, Flatten, apply_chain

CHAIN = (
    Convolution("conv1", (2, 2), ((1, 1), (1, 1))),
    Activation("tanh"),
    Convolution("conv2", (1, 1), ((1, 1), (1, 1))),
    Activation("sigmoid"),
    Flatten(),
    Dense("head"),
)
SHAPE = (8, 8, 3)
GRADIENTS = 5
ROUNDOFF = float(np.finfo(np.float32).eps) / 2


@pytest.fixture(scope="module")
def client() -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Parameters, gradients (N, ...), features (N, 1, d) and images (N, H, W, channels)."""
    rng = np.random.default_rng(0)
    shapes = {"conv1": (3, 3, 3, 14), "conv2": (3, 3, 14, 16), "head": (4 * 4 * 16, 10)}
    parameters = {
        name: {"kernel": rng.uniform(-1, 1, shape).astype(np.float32) * np.float32(np.sqrt(3 / np.prod(shape[:-1])))}
        for name, shape in shapes.items()
    }
    images = np.asarray(load_photographs(per_class=1, image_size=8).normalised())[:GRADIENTS]
    labels = rng.dirichlet(np.ones(10), GRADIENTS).astype(np.float32)
    gradients = jax.device_get(per_sample_model_gradients(partial(apply_chain, CHAIN), parameters, images, labels))
    # What goes into the head, exactly.
    features = apply_chain(CHAIN[:-1], parameters, images)
    return parameters, gradients, np.asarray(features)[:, None], images


def run(client: Any, gradients: Any, *, size: int, together: bool) -> Inverted:
    parameters, _, features, _ = client
    parts = list(
        invert_groups(
            CHAIN,
            parameters,
            gradients,
            features,
            range(GRADIENTS),
            SHAPE,
            unit_roundoff=ROUNDOFF,
            size=size,
            together=together,
        )
    )
    assert [index for rows, _ in parts for index in rows] == list(range(GRADIENTS))
    return Inverted(*(np.concatenate(arrays) for arrays in zip(*(found for _, found in parts), strict=True)))


def test_groups_are_as_one_by_one(client: Any) -> None:
    _, gradients, _, images = client
    apart, together = (run(client, gradients, size=size, together=size > 1) for size in (1, 3))
    assert np.sqrt(np.mean((apart.images[:, 0] - images) ** 2)) < 1e-3
    np.testing.assert_allclose(together.images, apart.images, atol=1e-6)
    np.testing.assert_allclose(together.deviation, apart.deviation, rtol=0.02)
    np.testing.assert_allclose(together.misfit, apart.misfit, rtol=1e-3)
    np.testing.assert_allclose(together.residual, apart.residual, atol=3e-7)
    np.testing.assert_allclose(together.condition, apart.condition, rtol=0.5)


def test_a_failed_member_leaves_the_others_alone(client: Any) -> None:
    """NaN and a gradient of zeros beside good ones."""
    _, gradients, _, _ = client
    spoilt = jax.tree.map(np.array, gradients)
    spoilt["conv2"]["kernel"][1, 0, 0, 0, 0] = np.nan
    for layer in spoilt.values():
        layer["kernel"][2] = 0
    good, found = (run(client, given, size=GRADIENTS, together=True) for given in (gradients, spoilt))
    for row in (0, 3, 4):
        np.testing.assert_allclose(found.images[row], good.images[row], atol=1e-6)
        np.testing.assert_allclose(found.deviation[row], good.deviation[row], rtol=1e-6)
    assert np.all(np.isnan(found.images[1:3]))


def test_device_arrays_are_used_where_they_are(client: Any) -> None:
    _, gradients, _, _ = client
    on_device = jax.tree.map(jax.numpy.asarray, gradients)
    given, moved = (run(client, held, size=GRADIENTS, together=True) for held in (gradients, on_device))
    np.testing.assert_array_equal(given.images, moved.images)


def test_groups_fit_into_memory(client: Any) -> None:
    parameters = client[0]
    assert group_size(CHAIN, parameters, SHAPE, 1, "cpu") == 1
    assert group_size(CHAIN, parameters, SHAPE, 1, "gpu") == groups.LARGEST_GROUP
    wide = {"dense": {"kernel": np.broadcast_to(np.float32(0), (192, 1 << 20))}}
    wide["head"] = {"kernel": np.broadcast_to(np.float32(0), (1 << 20, 10))}
    assert group_size((Flatten(), Dense("dense"), Dense("head")), wide, SHAPE, 1, "gpu") == 5


def test_the_program_for_a_tpu(client: Any) -> None:
    """As in tests/labels/test_tpu.py: no 64-bit number's bits, no LAPACK, nothing sorted."""
    parameters, gradients, features, _ = client
    with jax.enable_x64(True):
        traced = groups._compiled("cpu").trace(
            CHAIN, parameters, gradients, features.astype(np.float64), SHAPE, unit_roundoff=ROUNDOFF, together=True
        )
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "f64" in program
    assert not re.findall(r"bitcast_convert.*[fi]64|custom_call|stablehlo\.sort", program)
