"""`recover_model` and `recover_update`: what gradients of a whole model give away, by its head or the layers before it.

The head tells fewer examples apart than there are classes. Where there are more, the dense layers before it do, if the
model ends in several; which they are is read off the parameters' shapes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts, without_certainty
from softinv_jax.batches.elimination import TARGETS
from softinv_jax.dense_layers.layers import DenseLayers, dense_layers
from softinv_jax.dense_layers.many_steps import recover_over_steps
from softinv_jax.dense_layers.recovery import DenseRecovery, recover_dense
from softinv_jax.labels import many
from softinv_jax.labels.losses import LossName
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation, find_head, list_dense_layers, stack_observations
from softinv_jax.observation.updates import ObservedUpdate, observe_update_head
from softinv_jax.recoveries import BatchSize, as_approximate, recover

__all__ = ["as_batch", "find_dense_end", "recover_model", "recover_update"]

# In the order in which they are tried where none is told.
TRIED = ("relu", "leaky_relu", "gelu", "tanh", "sigmoid", "silu")


def find_dense_end(parameters: Mapping[str, Any], *, head: str | None = None) -> list[str]:
    """Paths of the dense layers that a model ends in, the head last: each has as many outputs as the next has inputs.

    Of several with as many, the one whose name comes before, digits read as numbers.

    Args:
      parameters: see `find_head`. head: its name, where shapes and names do not tell it.

    Raises:
      ValueError: where no head is found.
    """
    sizes = list_dense_layers(parameters)
    path = [find_head(parameters, name=head)]
    while True:
        inputs = sizes[path[0]][0]
        before = [name for name, (_, outputs) in sizes.items() if outputs == inputs and name not in path]
        earlier = [name for name in before if _in_order(name) < _in_order(path[0])]
        # The head's name need not come after the others'.
        fitting = earlier or (before if len(path) == 1 else [])
        if not fitting:
            return path
        path.insert(0, max(fitting, key=_in_order))


def _in_order(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def recover_model(
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    *,
    batch_size: int | Literal["auto"] = "auto",
    activation: str = "auto",
    reduction: Literal["mean", "sum"] = "mean",
    unknown_scale: bool = False,
    head: str | None = None,
) -> DenseRecovery:
    """Recover every example behind one gradient from the dense layers that a model ends in.

    Args:
      parameters: nested mapping of layers, with `kernel` (inputs, outputs) or `weight` (outputs, inputs).
      gradients: the same, of one gradient.
      batch_size, reduction, unknown_scale: see `recover_dense`.
      activation: between the dense layers, a name of `softinv_jax.activations.ACTIVATIONS`; `auto` tries ReLU, leaky
        ReLU, GELU, tanh, sigmoid and SiLU, and takes the one under which most is found.
      head: name of the last layer, where shapes and names do not tell it.

    Returns:
      A `DenseRecovery`; its `inputs` are those of the dense layer `layer`, counted from the first of the dense end.

    Raises:
      ValueError: as `recover_dense`, or where the model has no dense layer before its head.
    """
    names = find_dense_end(parameters, head=head)
    if len(names) < 2:
        raise ValueError(f"no dense layer ends where the head {names[0]!r} begins; use recover for the head alone")
    found: DenseRecovery | None = None
    for function in TRIED if activation == "auto" else (activation,):
        layers = _layers(names, parameters, gradients, function)
        one = recover_dense(layers, batch_size, reduction=reduction, unknown_scale=unknown_scale)
        if found is None or _number_found(one) > _number_found(found):
            found = one
        if _number_found(found) >= found.rank > 0 or found.verdict[0] == Verdict.NO_SIGNAL:
            break
    assert found is not None
    return found


def _number_found(recovery: DenseRecovery) -> int:
    return int(np.sum(np.isfinite(recovery.input_deviation)))


def _layers(
    names: Sequence[str], parameters: Mapping[str, Any], gradients: Mapping[str, Any], activation: str
) -> DenseLayers:
    kernels, kernel_gradients = [], []
    biases: list[np.ndarray | None] = []
    bias_gradients: list[np.ndarray | None] = []
    for name in names:
        held, given = _part(parameters, name), _part(gradients, name)
        turned = "kernel" not in held
        matrix = "weight" if turned else "kernel"
        if matrix not in given:
            raise ValueError(f"the gradients of layer {name!r} have no {matrix!r}")
        kernel, gradient = np.asarray(held[matrix]), np.asarray(given[matrix])
        kernels.append(kernel.T if turned else kernel)
        kernel_gradients.append(gradient.T if turned else gradient)
        for arrays, layer in ((biases, held), (bias_gradients, given)):
            arrays.append(np.asarray(layer["bias"]) if "bias" in layer else None)
    return dense_layers(kernels, biases, kernel_gradients, bias_gradients, [activation] * (len(names) - 1))


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Any = tree
    for part in name.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            raise ValueError(f"the gradients have no layer {name!r}, which the parameters have")
        found = found[part]
    assert isinstance(found, Mapping)
    return found


def as_batch(recovery: DenseRecovery) -> BatchRecovery:
    """What a `DenseRecovery` says of labels and last-layer features, as a batch told apart by the head would."""
    examples, classes = recovery.label.shape
    known = np.isfinite(recovery.input_deviation)
    targets = np.full((examples, TARGETS), -1, np.int32)
    for row in np.flatnonzero(np.all(np.isfinite(recovery.label), axis=1)):
        label, reach = recovery.label[row], TOLERANCE * recovery.label_deviation[row]
        if np.isnan(reach).any():
            # Of an estimate without an error: what stands out of the others by half of what the largest does.
            reach = np.full(len(label), (label.max() - np.median(label)) / 2)
        order = np.argsort(-label)[:TARGETS]
        targets[row] = np.where(label[order] > np.median(label) + reach[order], order, -1)
    residual = recovery.residual[np.isfinite(recovery.residual)]
    return BatchRecovery(
        label=recovery.label,
        feature=recovery.feature,
        label_deviation=recovery.label_deviation.astype(recovery.label.dtype),
        feature_deviation=np.full(examples, np.nan, recovery.label.dtype),
        targets=targets,
        verdict=recovery.verdict,
        surprise=recovery.surprise,
        misfit=recovery.misfit,
        rank=recovery.rank,
        singular_values=np.empty(0),
        noise=np.full(classes, recovery.noise),
        scale=recovery.scale,
        scale_deviation=math.nan,
        factor=np.where(known, 1.0, np.nan),
        factor_deviation=np.where(known, 0.0, np.nan),
        loss=recovery.loss,
        refuted=recovery.refuted,
        joint_misfit=math.nan,
        joint_surprise=float(np.nansum(recovery.surprise)),
        residual=float(residual.max()) if residual.size else math.nan,
    )


def recover_update(
    update: ObservedUpdate,
    *,
    batch_size: BatchSize = 1,
    head: str | None = None,
    loss: LossName = "auto",
    reduction: Literal["mean", "sum"] = "mean",
    activation: str = "auto",
) -> Recovery | BatchRecovery | ClassCounts:
    """Recover labels and features behind a client's update of a whole model; docs/frameworks.md has examples.

    By the head, and where that cannot tell the examples apart, by the dense layers before it. Of several steps on
    several examples by the first dense layer, if the model begins with it and ReLU (`dense_layers/many_steps`).

    Args:
      update: see `observe_update`.
      batch_size: examples behind the update; see `recover`.
      head: name of the last dense layer, where shapes and names do not tell it; see `find_head`.
      loss: see `recover`.
      reduction: whether the loss was the mean over the batch or the sum.
      activation: between the model's dense layers; see `recover_model`.

    Returns:
      A `Recovery` of NumPy arrays, or a `BatchRecovery` for another batch size than 1, whose `scale`
      includes the learning rate where that is not known. Where the update is not exact, nothing is `unique`
      and no count is sure. `ClassCounts` for as many examples as classes or more.

    Raises:
      ValueError: as `recover`, and for a head that is not found.
    """
    observation = observe_update_head(update, name=head)
    if not _is_one(batch_size):
        batch = _recover_batch(
            update, observation, batch_size, head, activation, {"loss": loss, "reduction": reduction}
        )
        if update.exact:
            return batch
        return without_certainty(batch) if isinstance(batch, ClassCounts) else as_approximate(batch)
    # Rounding of the parameters is noise, which only the thorough search can deal with.
    found = many.recover_many(
        stack_observations([observation]),
        unknown_scale=not update.scale_known,
        loss=loss,
        approximate=not update.exact,
        thorough=True,
    )
    return jax.tree.map(lambda leaf: leaf[0], found)


def _over_steps(update: ObservedUpdate, batch_size: BatchSize, head: str | None) -> BatchRecovery | None:
    """By the first dense layer, if that takes the model's inputs themselves; None where not all are found."""
    names = find_dense_end(update.parameters, head=head)
    arrays, _ = jax.tree.flatten_with_path(update.gradients)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in arrays]
    if len(names) < 2 or any(path.rpartition("/")[0] not in names for path in paths):
        return None
    layers = _layers(names, update.parameters, update.gradients, "relu")
    moved = update.training.total_weight()
    found = recover_over_steps(layers, moved, batch_size, scale_known=update.scale_known)
    return as_batch(found) if np.all(np.isfinite(found.inputs)) else None


def _is_one(batch_size: BatchSize) -> bool:
    return isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size == 1


def _recover_batch(
    update: ObservedUpdate,
    observation: Observation,
    batch_size: BatchSize,
    head: str | None,
    activation: str,
    options: dict[str, Any],
) -> BatchRecovery | ClassCounts:
    options = {"unknown_scale": not update.scale_known, **options}
    if update.training.steps > 1 and activation in ("auto", "relu"):
        over_steps = _over_steps(update, batch_size, head)
        if over_steps is not None:
            return over_steps
    if len(find_dense_end(update.parameters, head=head)) < 2:
        return recover(observation, batch_size=batch_size, **options)
    by_layers = as_batch(
        recover_model(
            update.parameters,
            update.gradients,
            batch_size=batch_size,
            activation=activation,
            reduction=options["reduction"],
            unknown_scale=not update.scale_known,
            head=head,
        )
    )
    if np.all(by_layers.verdict != Verdict.NOT_FOUND):
        return by_layers
    try:
        # By the head; or, where that tells nothing apart, what the examples have in common.
        by_head = recover(observation, batch_size=batch_size, **options)
    except ValueError:
        # Not even that can be known here, which the verdicts say.
        return by_layers
    if isinstance(by_head, ClassCounts):
        return by_layers if np.any(by_layers.verdict != Verdict.NOT_FOUND) else by_head
    return by_layers if np.sum(by_layers.verdict > 0) > np.sum(by_head.verdict > 0) else by_head
