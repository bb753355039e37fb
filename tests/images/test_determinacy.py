"""Counted equations against the ranks of the equations themselves."""

import itertools

import numpy as np
import pytest

from softinv_jax.convolution import output_size
from softinv_jax.images.determinacy import count_equations
from softinv_jax.images.layer_chain import Activation, Chain, Convolution, Dense, Flatten, fcn_chain, lenet_chain


def gradient_rank(
    size: tuple[int, int],
    kernel: tuple[int, int],
    layer: Convolution,
    outputs: tuple[int, int, int],
    batch: int,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Rank and zero columns of dL/dK as a linear function of one input channel, the derivative being random."""
    delta = rng.normal(size=(batch, *outputs))
    matrix = np.zeros((*kernel, outputs[2], batch, *size))
    for i, j, top, left in itertools.product(*map(range, (*kernel, *outputs[:2]))):
        row = top * layer.strides[0] + i - layer.padding[0][0]
        column = left * layer.strides[1] + j - layer.padding[1][0]
        if 0 <= row < size[0] and 0 <= column < size[1]:
            matrix[i, j, :, :, row, column] += delta[:, top, left, :].T
    matrix = matrix.reshape(-1, batch * size[0] * size[1])
    return int(np.linalg.matrix_rank(matrix)), int(np.sum(~matrix.any(axis=0)))


def parameters_of(**shapes: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    return {name: {"kernel": np.zeros(shape, np.float32)} for name, shape in shapes.items()}


SIZES = [(8, 8), (7, 9), (6, 5)]
KERNELS = [(3, 3), (5, 4), (2, 3)]
STRIDES = [(1, 1), (2, 2), (3, 3), (1, 2), (3, 2)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("strides", STRIDES)
def test_gradient_equations_are_the_rank(strides: tuple[int, int], channels: int, batch: int) -> None:
    """For a random derivative the gradient's equations are as independent as the phases of the strides allow."""
    rng = np.random.default_rng(0)
    for size, kernel in itertools.product(SIZES, KERNELS):
        for above, right in ((0, 0), (1, 2)):
            layer = Convolution("conv", strides, ((above, 1), (1, right)))
            height, width = (output_size(size[k], kernel[k], strides[k], layer.padding[k]) for k in range(2))
            chain = (layer, Activation("relu"), Flatten(), Dense("head"))
            parameters = parameters_of(conv=(*kernel, 2, channels), head=(height * width * channels, 10))
            (count,) = count_equations(chain, parameters, (*size, 2), batch)
            assert count.layer == "conv"
            assert count.unknowns == batch * size[0] * size[1] * 2
            assert count.forward_equations == 0
            rank, unmet = gradient_rank(size, kernel, layer, (height, width, channels), batch, rng)
            # Two input channels meet the same derivative, each its own part of the kernel.
            assert count.gradient_equations == 2 * rank, (size, kernel, layer)
            assert count.unmet == 2 * unmet, (size, kernel, layer)


def test_lenet_is_determined() -> None:
    """Known sizes: 12 channels of 5x5, strides 2, 2, 1, on 32x32."""
    parameters = parameters_of(conv1=(5, 5, 3, 12), conv2=(5, 5, 12, 12), conv3=(5, 5, 12, 12), head=(768, 10))
    counts = count_equations(lenet_chain(), parameters, (32, 32, 3))
    assert [count.layer for count in counts] == ["conv3", "conv2", "conv1"]
    assert [count.unknowns for count in counts] == [768, 3072, 3072]
    assert [count.forward_equations for count in counts] == [768, 768, 3072]
    assert all(count.determined for count in counts)
    assert counts[2].gradient_equations <= 900
    # A batch shares one gradient.
    for one, two in zip(counts, count_equations(lenet_chain(), parameters, (32, 32, 3), 2), strict=True):
        assert (two.unknowns, two.forward_equations) == (2 * one.unknowns, 2 * one.forward_equations)
        assert one.gradient_equations <= two.gradient_equations <= 2 * one.gradient_equations


@pytest.mark.parametrize(
    ("chain", "determined"),
    [
        ((Convolution("conv", (3, 3)), Activation("sigmoid"), Flatten(), Dense("head")), False),
        ((Convolution("conv"), Activation("sigmoid"), Flatten(), Dense("head")), True),
        # Without the forward equations: 4 entries of each of 3 * 8 kernels for 3 * 64 unknowns.
        ((Convolution("conv"), Activation("relu"), Flatten(), Dense("head")), False),
    ],
)
def test_small_convolutions(chain: Chain, determined: bool) -> None:
    length = output_size(8, 2, chain[0].strides[0], (0, 0)) ** 2 * 8  # type: ignore[union-attr]
    (count,) = count_equations(chain, parameters_of(conv=(2, 2, 3, 8), head=(length, 10)), (8, 8, 3))
    assert count.determined is determined


def test_pixels_in_no_window_are_not_determined() -> None:
    """However many equations the others have: with stride 3, rows and columns 2, 5 and 8 are in no window of 2x2."""
    chain = (Convolution("conv", (3, 3)), Activation("sigmoid"), Flatten(), Dense("head"))
    parameters = parameters_of(conv=(2, 2, 1, 50), head=(450, 10))
    (count,) = count_equations(chain, parameters, (9, 9, 1))
    assert count.forward_equations + count.gradient_equations > count.unknowns
    assert count.unmet == 81 - 36
    assert not count.determined


def test_dense_layers_up_to_as_many_examples_as_outputs() -> None:
    parameters = parameters_of(dense1=(48, 20), dense2=(20, 5), head=(5, 10))
    for batch in (1, 5, 6):
        counts = count_equations(fcn_chain(2), parameters, (4, 4, 3), batch)
        assert [count.layer for count in counts] == ["dense2", "dense1"]
        assert [count.unknowns for count in counts] == [20 * batch, 48 * batch]
        assert [count.determined for count in counts] == [batch <= 5, True]


def test_a_head_alone_has_nothing_to_count() -> None:
    assert count_equations((Flatten(), Dense("head")), parameters_of(head=(12, 5)), (2, 2, 3)) == []


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"'head'.*\(47, 10\)"):
        count_equations((Flatten(), Dense("head")), parameters_of(head=(47, 10)), (4, 4, 3))
