"""What the observer sees of a head: its parameters and the gradient, checked; and where it lies in a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from softinv_jax.float64 import in_float64

__all__ = [
    "HEAD_NAMES",
    "Observation",
    "append_bias",
    "check_finite",
    "find_head",
    "list_dense_layers",
    "observe",
    "observe_head",
    "stack_observations",
]

HEAD_NAMES = (
    *("head", "heads", "classifier", "fc", "linear", "logits", "output", "predictions"),
    *("score", "lm_head", "classification_head", "last_linear"),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """One last dense layer z = W x + b and the gradient of one example's loss; for many, `vmap` or a leading axis.

    Attributes:
      weight: (C, d) W.
      weight_gradient: (C, d) dL/dW, or (N, C, d) for N examples.
      bias: (C,) b, or None for a head without one.
      bias_gradient: (C,) or (N, C) dL/db, or None.
      noise: (C,) or (N, C) standard deviation that noise on each row's entries is known to have, bias included, or
        None. Noise is measured in any case; the larger counts.
    """

    weight: jax.Array
    weight_gradient: jax.Array
    bias: jax.Array | None = None
    bias_gradient: jax.Array | None = None
    noise: jax.Array | None = None


def observe(
    weight: ArrayLike,
    weight_gradient: ArrayLike,
    bias: ArrayLike | None = None,
    bias_gradient: ArrayLike | None = None,
    noise: ArrayLike | None = None,
    *,
    check_values: bool = True,
) -> Observation:
    """Check shapes, dtypes and values and bundle them.

    >>> import numpy as np
    >>> observe(np.ones((10, 4), np.float32), np.ones((7, 10, 4), np.float32)).weight_gradient.shape
    (7, 10, 4)
    >>> observe(np.ones((10, 4)), np.ones((10, 5)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...

    Args:
      weight: (C, d), floating. weight_gradient: (C, d) or (N, C, d), floating.
      bias: (C,) and bias_gradient: (C,) or (N, C), or neither.
      noise: (C,) or (N, C), zero or positive, or None; see `Observation`.
      check_values: look for NaN and infinite entries, which reads every byte once. NumPy arrays stay NumPy arrays.

    Raises:
      ValueError: naming the array and what is wrong with it: a shape that does not fit, fewer than 3 classes without a
        bias, a dtype that is not floating, NaN or infinite entries, or one of bias and bias_gradient without the other.
    """
    if (bias is None) != (bias_gradient is None):
        given, missing = ("bias", "bias_gradient") if bias_gradient is None else ("bias_gradient", "bias")
        raise ValueError(
            f"{given} is given without {missing}; give both, or neither for a head without a bias"
            " (a zero bias is np.zeros(C))"
        )
    arrays = {"weight": weight, "weight_gradient": weight_gradient}
    if bias is not None and bias_gradient is not None:
        arrays |= {"bias": bias, "bias_gradient": bias_gradient}
    if noise is not None:
        arrays |= {"noise": noise}
    checked = {name: _floating(name, value) for name, value in arrays.items()}
    _check_shapes(checked)
    if check_values:
        for name, value in checked.items():
            check_finite(name, value)
        noise = checked.get("noise")
        if noise is not None and not isinstance(noise, jax.core.Tracer) and np.any(np.asarray(noise) < 0):
            raise ValueError(f"noise must be zero or positive, but its smallest entry is {np.asarray(noise).min()}")
    return Observation(**checked)


def append_bias(observation: Observation) -> tuple[jax.Array, jax.Array]:
    """W and dL/dW of one gradient with the bias as last column: the weight of a constant feature 1.

    Returns:
      weight and weight_gradient, (C, d + 1); for a head without a bias as they are, (C, d).
    """
    weight, gradient = observation.weight, observation.weight_gradient
    if observation.bias is None or observation.bias_gradient is None:
        return weight, gradient
    bias = observation.bias[:, None].astype(weight.dtype)
    bias_gradient = observation.bias_gradient[:, None].astype(gradient.dtype)
    return jnp.concatenate([weight, bias], axis=1), jnp.concatenate([gradient, bias_gradient], axis=1)


def stack_observations(observations: Sequence[Observation]) -> Observation:
    """One observation of N examples from N of one each, all of one head; NumPy arrays."""
    first = observations[0]
    stacked = {
        name: None if array is None else np.stack([np.asarray(getattr(one, name)) for one in observations])
        for name, array in vars(first).items()
    }
    return Observation(**stacked | {"weight": first.weight, "bias": first.bias})  # type: ignore[arg-type]


def _floating(name: str, value: ArrayLike) -> jax.Array:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        value = np.asarray(value)
        dtype = value.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, but its dtype is {dtype}; convert it with .astype(np.float32)")
    if isinstance(value, jax.Array | np.ndarray):
        return value  # type: ignore[return-value]  # NumPy stays NumPy until it is moved to the device
    with jax.enable_x64(True):  # A float64 gradient keeps its digits, whatever the caller's default.
        return jnp.asarray(value)


def _check_shapes(arrays: Mapping[str, jax.Array]) -> None:
    weight, gradient = arrays["weight"], arrays["weight_gradient"]
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight must have shape (C, d), but it has shape {weight.shape}")
    number_of_classes = weight.shape[0]
    if number_of_classes < 3 and "bias" not in arrays:
        raise ValueError(
            f"weight has C = {number_of_classes} rows and there is no bias: the gradient is then one equation for two"
            " unknowns, the label and the length of the feature; from C = 3 on there are more equations (is weight"
            f" transposed? it has shape {weight.shape}, and (C, d) is expected)"
        )
    if gradient.ndim not in (2, 3) or gradient.shape[-2:] != weight.shape or 0 in gradient.shape:
        raise ValueError(
            f"weight_gradient must have shape (C, d) = {weight.shape} or (N, C, d) with N >= 1, but it has shape"
            f" {gradient.shape}"
        )
    if "bias" in arrays and arrays["bias"].shape != (number_of_classes,):
        raise ValueError(f"bias must have shape (C,) = ({number_of_classes},), not {arrays['bias'].shape}")
    expected = (*gradient.shape[:-2], number_of_classes)
    for name in ("bias_gradient", "noise"):
        if name in arrays and arrays[name].shape != expected:
            raise ValueError(f"{name} must have shape {expected}, not {arrays[name].shape}")


def check_finite(name: str, value: jax.Array) -> None:
    """Raise ValueError where a concrete array holds NaN or infinite entries, naming the first."""
    if isinstance(value, jax.core.Tracer):
        return  # Values are unknown while tracing; the recovery then gives NaN and an honest verdict.
    # One pass without a second array, where the array is: a sum hides no NaN and no infinity.
    with np.errstate(all="ignore"):
        total = jax.device_get(_sum(value)) if isinstance(value, jax.Array) else np.sum(value)
    if np.isfinite(total):
        return
    array = np.asarray(jax.device_get(value))
    finite = np.isfinite(array)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        count = int((~finite).sum())
        raise ValueError(
            f"{name} holds {count} entries that are not finite, the first {array[index]} at index"
            f" {index}; leave out the samples concerned"
        )


_sum = in_float64(jax.jit(jnp.sum))


def find_head(parameters: Mapping[str, Any], *, name: str | None = None, number_of_classes: int | None = None) -> str:
    """Path of the last dense layer in a parameter pytree, by shape and name, never by position.

    A dense layer is a mapping with a 2-D `kernel` (d, C) or `weight` (C, d). Among them the head is the one called
    `name`; or the only one with `number_of_classes` outputs; or the only one whose outputs no other dense layer
    takes in; ties go to a name of `HEAD_NAMES`, then to a layer inside one so named; then to any, where all of them are
    one array under several names (tied weights).

    Returns:
      The path with parts joined by "/", for example "head".

    Raises:
      ValueError: no dense layer, or several that fit; the message lists them.
    """
    layers = list_dense_layers(parameters)
    if not layers:
        raise ValueError("no dense layer (2-D 'kernel' or 'weight') in these parameters")
    listing = ", ".join(f"{path} ({inputs} -> {outputs})" for path, (inputs, outputs) in layers.items())
    fitting = dict(layers)
    if name is not None:
        fitting = {path: size for path, size in layers.items() if name in (path, path.rsplit("/", 1)[-1])}
    if number_of_classes is not None:
        fitting = {path: size for path, size in fitting.items() if size[1] == number_of_classes}
    if len(fitting) > 1:
        taken_in = {inputs for inputs, _ in layers.values()}
        fitting = {path: size for path, size in fitting.items() if size[1] not in taken_in} or fitting
    if len(fitting) > 1:
        named = {path: size for path, size in fitting.items() if path.rsplit("/", 1)[-1] in HEAD_NAMES}
        inside = {path: size for path, size in fitting.items() if set(path.split("/")) & set(HEAD_NAMES)}
        fitting = named or inside or fitting
    if len(fitting) > 1 and _are_tied(parameters, list(fitting)):
        last = list(fitting)[-1]
        fitting = {last: fitting[last]}
    if len(fitting) != 1:
        asked = f"name={name!r}, number_of_classes={number_of_classes}"
        raise ValueError(f"{len(fitting)} of the dense layers fit {asked}; name the head. Dense layers: {listing}")
    return next(iter(fitting))


def list_dense_layers(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every dense layer by its path, parts joined by "/"."""
    layers: dict[str, tuple[int, int]] = {}
    for key, value in parameters.items():
        if not isinstance(value, Mapping):
            continue
        path, held = f"{prefix}{key}", _held(value)
        if held is not None:
            rows, columns = value[held].shape
            layers[path] = (rows, columns) if held == "kernel" else (columns, rows)
        layers |= list_dense_layers(value, f"{path}/")
    return layers


def _are_tied(parameters: Mapping[str, Any], paths: Sequence[str]) -> bool:
    """Whether these layers hold one matrix under several names."""
    matrices: list[Any] = []
    for path in paths:
        layer: Any = parameters
        for part in path.split("/"):
            layer = layer[part]
        matrices.append(layer[_held(layer)])
    first = matrices[0]
    if all(one is first for one in matrices):
        return True
    # Values are unknown while tracing.
    known = not any(isinstance(one, jax.core.Tracer) or not hasattr(one, "__array__") for one in matrices)
    return known and all(np.array_equal(np.asarray(one), np.asarray(first)) for one in matrices)


def _held(layer: Mapping[str, Any]) -> str | None:
    """What a dense layer's matrix is called: `kernel` (d, C) or `weight` (C, d); None for another layer."""
    return next((name for name in ("kernel", "weight") if getattr(layer.get(name), "ndim", 0) == 2), None)


def observe_head(
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    *,
    name: str | None = None,
    number_of_classes: int | None = None,
) -> Observation:
    """The observation of the head of a whole model.

    Args:
      parameters: nested mapping of layers, as flax linen makes them (`kernel` (d, C)) or with `weight` (C, d).
      gradients: the same structure, with or without a leading axis of examples.
      name, number_of_classes: see `find_head`.

    Raises:
      ValueError: from `find_head` or `observe`, or where the gradients lack the head.
    """
    path = find_head(parameters, name=name, number_of_classes=number_of_classes)
    layer, gradient = parameters, gradients
    for part in path.split("/"):
        if part not in gradient:
            raise ValueError(f"the gradients have no layer {path!r}, the parameters' head")
        layer, gradient = layer[part], gradient[part]
    held = _held(layer)
    assert held is not None  # or find_head would not have found it
    if held not in gradient or getattr(gradient[held], "ndim", 0) < 2:
        raise ValueError(f"the gradients of layer {path!r}, the parameters' head, have no matrix {held!r}")
    if held == "kernel":
        with jax.enable_x64(True):  # As in `_floating`.
            weight, weight_gradient = (
                jnp.swapaxes(layer["kernel"], -1, -2),
                jnp.swapaxes(gradient["kernel"], -1, -2),
            )
    else:
        weight, weight_gradient = layer["weight"], gradient["weight"]
    return observe(weight, weight_gradient, layer.get("bias"), gradient.get("bias"))
