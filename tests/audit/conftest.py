"""A small system: softmax regression on photographs of 4x4 pixels, whose input is its feature."""

from functools import partial

import numpy as np
import pytest

from softinv_jax.audit import System
from softinv_jax.client import load_photographs
from softinv_jax.images.layer_chain import Dense, Flatten, apply_chain

CHAIN = (Flatten(), Dense("head"))
APPLY = partial(apply_chain, CHAIN)


@pytest.fixture(scope="package")
def system() -> System:
    data = load_photographs(per_class=4, image_size=4)
    rng = np.random.default_rng(0)
    kernel = rng.uniform(-0.3, 0.3, (48, data.number_of_classes)).astype(np.float32)
    return System("softmax regression", APPLY, {"head": {"kernel": kernel}}, CHAIN, data)
