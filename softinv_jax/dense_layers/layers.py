"""The dense end of a network as arrays: dense layers with an activation after each but the last, the head."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from softinv_jax.activations import ACTIVATIONS, open_gates
from softinv_jax.observation.rank_one import significant_rounding, unit_roundoff

__all__ = ["DenseLayers", "dense_layers"]


@dataclass(frozen=True)
class DenseLayers:
    """L dense layers z = W^T h + b, NumPy float64, and the gradient of the mean or sum of a batch's losses.

    Attributes:
      kernels: (inputs, outputs) of each layer, from the first to the head. biases: (outputs,), or None.
      kernel_gradients, bias_gradients: their gradients, likewise.
      activations: L - 1 names of `ACTIVATIONS`, what follows each layer but the head.
      dtype: what the gradients were computed in: their own, or a narrower one that holds all of their digits.
    """

    kernels: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray | None, ...]
    kernel_gradients: tuple[np.ndarray, ...]
    bias_gradients: tuple[np.ndarray | None, ...]
    activations: tuple[str, ...]
    dtype: np.dtype

    @property
    def number_of_classes(self) -> int:
        return int(self.kernels[-1].shape[1])

    def output(self, index: int, inputs: np.ndarray) -> np.ndarray:
        """(n, outputs) of one layer, before its activation."""
        bias = self.biases[index]
        return inputs @ self.kernels[index] + (0.0 if bias is None else bias)

    def before(self, index: int, inputs: np.ndarray) -> list[np.ndarray]:
        """The outputs of the layers from `index` on, before activations; the last are the logits; inputs: (n, d)."""
        values, hidden = [], inputs
        for place in range(index, len(self.kernels)):
            values.append(self.output(place, hidden))
            if place < len(self.activations):
                hidden = self.activate(place, values[-1])
        return values

    def predictions(self, index: int, inputs: np.ndarray) -> np.ndarray:
        """(n, C) softmax of the logits."""
        return np.asarray(softmax(self.before(index, inputs)[-1], axis=-1))

    def activate(self, index: int, before: np.ndarray) -> np.ndarray:
        """What the activation after layer `index` makes of its input."""
        with jax.enable_x64(True):
            return np.asarray(ACTIVATIONS[self.activations[index]].apply(jnp.asarray(before)))

    def slope(self, index: int, before: np.ndarray) -> np.ndarray:
        """The derivative of the activation after layer `index`."""
        with jax.enable_x64(True):
            return np.asarray(_slope(self.activations[index], jnp.asarray(before)))

    def gates(self, index: int, before: np.ndarray) -> np.ndarray:
        """Where that derivative has the larger of its two values; see `activations.open_gates`."""
        with jax.enable_x64(True):
            return np.asarray(open_gates(self.activations[index], jnp.asarray(before)))

    def backward(self, index: int, before: Sequence[np.ndarray], logit_gradient: np.ndarray) -> list[np.ndarray]:
        """The loss's derivatives by the outputs of the layers from `index` on, (n, outputs) each.

        before: as from `before(index, ...)`. logit_gradient: (n, C).
        """
        deltas = [logit_gradient]
        for place in range(len(self.kernels) - 1, index, -1):
            deltas.append((deltas[-1] @ self.kernels[place].T) * self.slope(place - 1, before[place - 1 - index]))
        return deltas[::-1]


def _slope(function: str, before: jax.Array) -> jax.Array:
    return jax.grad(lambda values: ACTIVATIONS[function].apply(values).sum())(before)


def dense_layers(
    kernels: Sequence[np.ndarray],
    biases: Sequence[np.ndarray | None],
    kernel_gradients: Sequence[np.ndarray],
    bias_gradients: Sequence[np.ndarray | None],
    activations: Sequence[str],
) -> DenseLayers:
    """Check that everything fits, and bundle it; see `DenseLayers`.

    Raises:
      ValueError: naming the layer and the shapes, dtype or activation that do not fit, or values that are not finite.
    """
    if len(kernels) < 1 or len(activations) != len(kernels) - 1:
        raise ValueError(f"{len(kernels)} dense layers need {len(kernels) - 1} activations between, not {activations}")
    unknown = sorted(set(activations) - set(ACTIVATIONS))
    if unknown:
        raise ValueError(f"unknown activation {', '.join(unknown)}; choose from {', '.join(ACTIVATIONS)}")
    dtype = _number_format([gradient for gradient in (*kernel_gradients, *bias_gradients) if gradient is not None])
    for place, (kernel, bias, gradient, bias_gradient) in enumerate(
        zip(kernels, biases, kernel_gradients, bias_gradients, strict=True)
    ):
        name = f"dense layer {place + 1} of {len(kernels)}"
        if kernel.ndim != 2 or gradient.shape != kernel.shape:
            raise ValueError(f"{name} has a kernel {kernel.shape} and a gradient {gradient.shape}; both (in, out)")
        if place and kernel.shape[0] != kernels[place - 1].shape[1]:
            raise ValueError(f"{name} takes {kernel.shape[0]} inputs, but {kernels[place - 1].shape[1]} come before it")
        if (bias is None) != (bias_gradient is None):
            raise ValueError(f"{name}: give the bias and its gradient, or neither")
        if bias is not None and bias_gradient is not None and not bias.shape == bias_gradient.shape == kernel.shape[1:]:
            raise ValueError(f"{name} has a bias {bias.shape} and its gradient {bias_gradient.shape}")
        for what, array in (("kernel", kernel), ("gradient", gradient), ("bias", bias), ("bias", bias_gradient)):
            if array is not None and not np.all(np.isfinite(array)):
                raise ValueError(f"{name}: its {what} is not finite everywhere")
    double = _doubles(kernels), _doubles(biases), _doubles(kernel_gradients), _doubles(bias_gradients)
    return DenseLayers(*double, tuple(activations), dtype)  # type: ignore[arg-type]


def _number_format(arrays: Sequence[np.ndarray]) -> np.dtype:
    """float16 or bfloat16 where no entry has more binary digits than that, as autocast leaves in a float32 gradient."""
    own = np.result_type(*(array.dtype for array in arrays))
    if own.itemsize < np.dtype(np.float32).itemsize:
        return own
    with jax.enable_x64(True):
        rounding = float(significant_rounding(jnp.asarray(np.concatenate([np.ravel(array) for array in arrays]))))
    formats = (jnp.bfloat16, np.float16, np.float32, np.float64)
    return next(np.dtype(one) for one in formats if unit_roundoff(jnp.dtype(one)) == rounding)


def _doubles(arrays: Sequence[np.ndarray | None]) -> tuple[np.ndarray | None, ...]:
    return tuple(None if array is None else np.asarray(array, np.float64) for array in arrays)
