"""Errors of labels and features: values worked out by hand, NaN kept, shapes refused."""

import numpy as np
import pytest

from softinv_jax.measures.label_error import feature_error, label_error

NAN = float("nan")


def test_errors_by_hand() -> None:
    true = np.array([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    recovered = np.array([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]])
    error = label_error(recovered, true)
    np.testing.assert_array_equal(error.largest, [0.25, 0.0])
    np.testing.assert_array_equal(error.squared, [0.125, 0.0])
    np.testing.assert_array_equal(feature_error([[3.0, 4.5], [0.0, 2.0]], [[3.0, 4.0], [0.0, 2.0]]), [0.1, 0.0])


def test_what_is_not_recovered_has_no_error() -> None:
    true = np.ones((2, 3))
    recovered = np.array([[NAN, 1.0, 1.0], [1.0, 1.0, 1.0]])
    error = label_error(recovered, true)
    np.testing.assert_array_equal(error.largest, [NAN, 0.0])
    np.testing.assert_array_equal(error.squared, [NAN, 0.0])
    np.testing.assert_array_equal(feature_error(recovered, true), [NAN, 0.0])


def test_zero_features_do_not_divide_by_zero() -> None:
    recovered = np.array([[0.0, 0.0], [1.0, 0.0], [NAN, NAN]])
    np.testing.assert_array_equal(feature_error(recovered, np.zeros((3, 2))), [0.0, np.inf, NAN])


def test_float32_inputs_are_compared_in_float64() -> None:
    true = np.array([[1.0, 0.0, 0.0]], np.float32)
    recovered = np.array([[np.nextafter(np.float32(1), np.float32(0)), 0, 0]], np.float32)
    error = label_error(recovered, true)
    assert error.largest.dtype == np.float64
    assert error.largest[0] == 2.0**-24


@pytest.mark.parametrize("function", [label_error, feature_error])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (3,)), ((2, 3), (1, 3)), ((2, 0), (2, 0))])
def test_shapes_that_do_not_fit_are_refused(function, shapes) -> None:
    with pytest.raises(ValueError, match="one shape"):
        function(np.ones(shapes[0]), np.ones(shapes[1]))
