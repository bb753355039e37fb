"""Which dense layers a model ends in, read off names and shapes."""

import numpy as np
import pytest

from softinv_jax.whole_models import find_dense_end


def _model(*layers, key="kernel"):
    """(name, inputs, outputs) of each, in the order in which the mapping has them."""
    return {
        name: {key: np.zeros((inputs, outputs) if key == "kernel" else (outputs, inputs))}
        for name, inputs, outputs in layers
    }


def test_digits_are_numbers() -> None:
    layers = [(f"dense{place}", 20, 20) for place in range(1, 12)]
    model = _model(*sorted(layers), ("head", 20, 10))
    assert find_dense_end(model) == [name for name, *_ in layers] + ["head"]


def test_by_shapes_whatever_the_order_of_the_names() -> None:
    model = _model(("output", 30, 10), ("z_hidden", 40, 30), key="weight")
    assert find_dense_end(model) == ["z_hidden", "output"]


def test_convolutions_end_the_chain() -> None:
    model = {"0": {"weight": np.zeros((6, 3, 5, 5))}} | _model(
        ("4", 400, 120), ("6", 120, 84), ("8", 84, 10), key="weight"
    )
    assert find_dense_end(model) == ["4", "6", "8"]


def test_nested_names() -> None:
    model = {"backbone": {"fc": {"weight": np.zeros((50, 90))}}, "classifier": {"weight": np.zeros((10, 50))}}
    assert find_dense_end(model) == ["backbone/fc", "classifier"]


def test_a_head_alone() -> None:
    assert find_dense_end(_model(("head", 30, 10), ("other", 12, 7)), head="head") == ["head"]


def test_no_dense_layer_is_named() -> None:
    with pytest.raises(ValueError, match="no dense layer"):
        find_dense_end({"0": {"weight": np.zeros((6, 3, 5, 5))}})
