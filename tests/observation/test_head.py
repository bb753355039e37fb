"""What `observe` refuses and says, and where `find_head` finds the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softinv_jax import find_head, observe, observe_head

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
GRADIENT = WEIGHT / 7
BIAS = np.zeros(4, np.float32)


def with_entry(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    changed = array.copy()
    changed[index] = value
    return changed


REFUSED = {
    "bias alone": ((WEIGHT, GRADIENT, BIAS), "bias is given without bias_gradient"),
    "bias gradient alone": ((WEIGHT, GRADIENT, None, BIAS), "bias_gradient is given without bias;"),
    "integer weight": ((WEIGHT.astype(int), GRADIENT), "weight must be floating, but its dtype is int64"),
    "list of integers": ((WEIGHT, [[1, 2]]), "weight_gradient must be floating"),
    "complex gradient": ((WEIGHT, GRADIENT + 0j), "weight_gradient must be floating, .* complex64"),
    "object": ((WEIGHT, np.full((4, 3), None)), "weight_gradient must be floating, .* object"),
    "integer bias": ((WEIGHT, GRADIENT, BIAS.astype(int), BIAS), "bias must be floating"),
    "integer bias gradient": ((WEIGHT, GRADIENT, BIAS, BIAS > 0), "bias_gradient must be .* bool"),
    "flat weight": ((BIAS, GRADIENT), r"weight must have shape \(C, d\), .* \(4,\)"),
    "no features": ((WEIGHT[:, :0], GRADIENT[:, :0]), r"weight must have shape .* \(4, 0\)"),
    "two classes": ((WEIGHT[:2], GRADIENT[:2]), r"C = 2 rows and there is no bias.* \(2, 3\)"),
    "transposed gradient": ((WEIGHT, GRADIENT.T), r"weight_gradient .* \(4, 3\) .* has shape \(3, 4\)"),
    "no examples": ((WEIGHT, GRADIENT[None][:0]), r"weight_gradient .* N >= 1, .* \(0, 4, 3\)"),
    "four axes": ((WEIGHT, GRADIENT[None, None]), r"weight_gradient .* \(1, 1, 4, 3\)"),
    "long bias": ((WEIGHT, GRADIENT, np.zeros(5), BIAS), r"bias must have shape \(C,\) = \(4,\), not \(5,\)"),
    "one bias gradient for many": (
        (WEIGHT, GRADIENT[None], BIAS, BIAS),
        r"bias_gradient must have shape \(1, 4\), not \(4,\)",
    ),
    "NaN weight": ((with_entry(WEIGHT, (2, 1), np.nan), GRADIENT), r"weight .* first nan at index \(2, 1\)"),
    "infinite gradient": (
        (WEIGHT, with_entry(GRADIENT, (0, 2), np.inf)),
        r"weight_gradient holds 1 entries .* inf at index \(0, 2\)",
    ),
    "NaN in one of many": (
        (WEIGHT, np.stack([GRADIENT, GRADIENT * np.nan])),
        r"weight_gradient holds 12 entries .* nan at index \(1, 0, 0\)",
    ),
    "NaN bias": ((WEIGHT, GRADIENT, BIAS * np.nan, BIAS), r"bias holds 4 entries"),
    "infinite bias gradient": ((WEIGHT, GRADIENT, BIAS, BIAS - np.inf), r"bias_gradient .* -inf at index \(0,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_observe_names_the_array_and_what_is_wrong(case: str) -> None:
    arrays, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        observe(*arrays)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_observe_keeps_the_dtype_of_the_gradient(dtype: type) -> None:
    observation = observe(WEIGHT, GRADIENT.astype(dtype))
    assert observation.weight_gradient.dtype == dtype
    np.testing.assert_array_equal(np.asarray(observation.weight_gradient), GRADIENT.astype(dtype))


def test_observe_takes_lists_of_floats_and_jax_arrays() -> None:
    observation = observe(WEIGHT.tolist(), jnp.asarray(GRADIENT))
    np.testing.assert_array_equal(np.asarray(observation.weight), WEIGHT)


def test_observe_checks_shapes_while_tracing() -> None:
    def trace(gradient: jax.Array) -> jax.Array:
        return observe(WEIGHT, gradient).weight_gradient

    jax.jit(trace)(GRADIENT)
    with pytest.raises(ValueError, match="weight_gradient must have shape"):
        jax.jit(trace)(GRADIENT.T)


def dense(inputs: int, outputs: int, has_bias: bool = False) -> dict:
    layer = {"kernel": np.random.default_rng(inputs).normal(size=(inputs, outputs)).astype(np.float32)}
    return layer | ({"bias": np.zeros(outputs, np.float32)} if has_bias else {})


CONVOLUTION = {"kernel": np.zeros((5, 5, 3, 12), np.float32), "bias": np.zeros(12, np.float32)}
LENET = {"conv_0": CONVOLUTION, "conv_1": CONVOLUTION, "head": dense(768, 10)}
FCN = {"dense_0": dense(48, 20), "dense_1": dense(20, 30), "head": dense(30, 10)}
UNNAMED = {"Dense_0": dense(48, 20), "Dense_1": dense(20, 30), "Dense_2": dense(30, 10)}


@pytest.mark.parametrize(("model", "head"), [(LENET, "head"), (FCN, "head"), (UNNAMED, "Dense_2")])
def test_head_is_found_whatever_the_order_of_the_layers(model: dict, head: str) -> None:
    assert find_head(model) == head
    assert find_head(dict(reversed(model.items()))) == head


def test_head_is_found_in_nested_models() -> None:
    model = {"params": {"backbone": {"mlp": {"fc1": dense(8, 16)}}, "top": {"classifier": dense(16, 5)}}}
    assert find_head(model) == "params/top/classifier"


def test_head_may_be_a_torch_like_weight() -> None:
    model = {"fc": {"weight": np.zeros((10, 30), np.float32)}, "body": {"weight": np.zeros((30, 8), np.float32)}}
    assert find_head(model) == "fc"


def test_a_tie_goes_to_the_name_of_a_head() -> None:
    assert find_head({"projection": dense(16, 7), "logits": dense(16, 5)}) == "logits"


def test_number_of_classes_singles_the_head_out() -> None:
    assert find_head({"a": dense(16, 7), "b": dense(16, 5)}, number_of_classes=5) == "b"


@pytest.mark.parametrize("name", ["b", "tower/b"])
def test_name_singles_the_head_out(name: str) -> None:
    assert find_head({"tower": {"a": dense(16, 7), "b": dense(16, 5)}}, name=name) == "tower/b"


def test_a_square_layer_before_the_head_is_not_mistaken_for_it() -> None:
    assert find_head({"a": dense(10, 10), "b": dense(10, 10), "head": dense(10, 10)}) == "head"


def test_several_that_fit_are_listed() -> None:
    with pytest.raises(ValueError, match=r"2 of the dense .* a \(16 -> 7\), b \(16 -> 5\)"):
        find_head({"a": dense(16, 7), "b": dense(16, 5)})


@pytest.mark.parametrize("asked", [{"name": "nowhere"}, {"number_of_classes": 99}])
def test_none_that_fits_lists_the_layers(asked: dict) -> None:
    with pytest.raises(ValueError, match=r"0 of the dense layers fit .* head \(768 -> 10\)"):
        find_head(LENET, **asked)


@pytest.mark.parametrize("model", [{}, {"conv": CONVOLUTION}])
def test_a_model_without_dense_layers_is_refused(model: dict) -> None:
    with pytest.raises(ValueError, match="no dense layer"):
        find_head(model)


@pytest.mark.parametrize("examples", [(), (3,)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_observe_head_turns_the_kernel_round(examples: tuple[int, ...], has_bias: bool) -> None:
    model = {"body": dense(6, 8), "head": dense(8, 4, has_bias)}
    gradients = jax.tree.map(lambda leaf: np.broadcast_to(leaf + 1, examples + leaf.shape), model)
    observation = observe_head(model, gradients)
    np.testing.assert_array_equal(np.asarray(observation.weight), model["head"]["kernel"].T)
    np.testing.assert_array_equal(
        np.asarray(observation.weight_gradient), np.swapaxes(gradients["head"]["kernel"], -1, -2)
    )
    assert observation.weight_gradient.shape == (*examples, 4, 8)
    assert (observation.bias is not None) == has_bias


def test_a_float64_kernel_keeps_its_digits() -> None:
    model = {"head": {"kernel": np.random.default_rng(0).normal(size=(8, 4))}}
    observation = observe_head(model, {"head": {"kernel": model["head"]["kernel"] / 3}})
    assert observation.weight_gradient.dtype == np.float64
    np.testing.assert_array_equal(np.asarray(observation.weight_gradient), model["head"]["kernel"].T / 3)


def test_the_matrix_of_a_layer_is_told_by_its_axes() -> None:
    layer = {"weight": WEIGHT, "kernel": np.zeros(1, np.float32)}
    observation = observe_head({"head": layer}, {"head": layer | {"weight": GRADIENT}})
    np.testing.assert_array_equal(np.asarray(observation.weight_gradient), GRADIENT)
    with pytest.raises(ValueError, match="no matrix 'weight'"):
        observe_head({"head": layer}, {"head": layer | {"weight": np.zeros(3, np.float32)}})


def test_observe_head_takes_a_torch_like_weight_as_it_is() -> None:
    model = {"fc": {"weight": WEIGHT, "bias": BIAS}}
    observation = observe_head(model, {"fc": {"weight": GRADIENT, "bias": BIAS + 1}})
    np.testing.assert_array_equal(np.asarray(observation.weight_gradient), GRADIENT)
    np.testing.assert_array_equal(np.asarray(observation.bias_gradient), BIAS + 1)


@pytest.mark.parametrize("gradients", [{}, {"body": {}}, {"top": {}}])
def test_gradients_without_the_head_are_refused(gradients: dict) -> None:
    with pytest.raises(ValueError, match="gradients have no layer 'top/head'"):
        observe_head({"top": {"head": dense(8, 4)}}, gradients)


def test_gradients_whose_head_lacks_its_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="head"):
        observe_head({"head": dense(8, 4)}, {"head": {"bias": BIAS}})


def test_a_path_of_the_gradients_that_is_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="top/head"):
        observe_head({"top": {"head": dense(8, 4)}}, {"top": np.zeros(3)})
