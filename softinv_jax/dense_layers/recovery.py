"""`recover_dense`: every example of a batch, and its soft label, from the gradients of a network's dense layers.

A dense layer of m units tells B < m examples apart, whatever the number of classes. For the layer that is chosen the
examples' deltas are found, by their open gates or by the equation of a smooth activation; the inputs follow by duality;
run forward they give the head's features, and what the deltas say of g = p - y the labels. Run backward, everything
found must give the gradient of every dense layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
import numpy as np

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.assembly import Assembled, assemble, assemble_smooth
from softinv_jax.dense_layers.choice import ChosenLayer, choose_layers, with_fewer
from softinv_jax.dense_layers.gate_fit import fit_gates, is_credible
from softinv_jax.dense_layers.gate_rounds import search_all_gates
from softinv_jax.dense_layers.labels import LabelsFound, find_labels
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.single_rows import peel
from softinv_jax.dense_layers.smooth import search_smooth
from softinv_jax.labels.assumptions import Assumption
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Verdict

__all__ = ["MOST_NOISE", "DenseRecovery", "nothing_recovered", "number_told", "recover_dense"]

# Share of the units that a client closes at random, at least.
FEWEST_DROPPED = 0.01
# Deviation of an input's entries over their root mean square.
MOST_NOISE = 0.1


@dataclass(frozen=True)
class DenseRecovery:
    """What the dense layers' gradients of one batch give away; NumPy, examples in no order, those not found last.

    Attributes:
      inputs: (B, d) of the layer `layer`, NaN where not found. input_deviation: (B,) standard
        deviation of an entry, as root mean square.
      label: (B, C) soft labels. label_deviation: (B, C). verdict: (B,) int32, a `Verdict`.
      feature: (B, d') the head's inputs. logit_gradient: (B, C) g = p - y, as the client computed it.
      delta: (B, m) the loss's derivative by the output of `layer`.
      misfit: (B,) root mean square residual of the example's own equations, in deviations. surprise: (B,) nats, minus
        the logarithm of how many such examples an accident would be expected to show.
      noise: standard deviation of an entry of that layer's gradient, as root mean square.
      layer: index of the layer that told them apart, -1 for none. rank: of its gradient, the number of examples that it
        shows. excess: equations that an example had there beyond its unknowns.
      residual: (L,) relative distance of each layer's gradient from that of all examples together; NaN unless all were
        found.
      scale: factor on the gradient, 1 unless it was to be found. loss, refuted: as of `BatchRecovery`.
      rests_on: (B,) `Assumption` flags that a conditional label is right under.
    """

    inputs: np.ndarray
    input_deviation: np.ndarray
    label: np.ndarray
    label_deviation: np.ndarray
    verdict: np.ndarray
    feature: np.ndarray
    logit_gradient: np.ndarray
    delta: np.ndarray
    misfit: np.ndarray
    surprise: np.ndarray
    noise: float
    layer: int
    rank: int
    excess: int
    residual: np.ndarray
    scale: float
    loss: int
    refuted: int
    rests_on: np.ndarray


def recover_dense(
    layers: DenseLayers,
    batch_size: int | Literal["auto"],
    *,
    reduction: Literal["mean", "sum"] = "mean",
    unknown_scale: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DenseRecovery:
    """Recover every example behind one gradient of a network's dense layers.

    Args:
      layers: see `layers.dense_layers`; at least one before the head.
      batch_size: B, or `auto`: as many as the gradient's rank shows.
      reduction: whether the loss was the mean or the sum over the batch.
      unknown_scale: the gradient carries an unknown factor (learning rate, mean or sum).
      seed: of the starts.
      progress: called with (examples found, B).

    Returns:
      A `DenseRecovery`.

    Raises:
      ValueError: where there is no layer before the head, or for a batch size that cannot be.
    """
    if not layers.activations:
        raise ValueError("recover_dense needs a dense layer before the head; use recover for a head alone")
    told = number_told(batch_size)
    report = progress or (lambda found, total: None)
    best: tuple[tuple[int, int], ChosenLayer, Assembled] | None = None
    for chosen in choose_layers(layers, told):
        total = told or chosen.space.rank
        divisor = float(max(total, chosen.space.rank)) if reduction == "mean" else 1.0
        seen, assembled = _search(layers, chosen, divisor, seed, partial(_report, report, total))
        wrong = _is_wrong(assembled)
        # How many inputs agree with their own deltas, and how many there are.
        score = int(np.count_nonzero(~wrong)), len(wrong)
        if best is None or score > best[0]:
            best = score, seen, assembled
        if assembled.complete and not np.any(wrong):
            break
    if best is None:
        return nothing_recovered(layers, told or 1)
    _, chosen, assembled = best
    total = told or chosen.space.rank
    if not len(assembled.inputs):
        return nothing_recovered(layers, total, chosen)
    # How many examples leave no gradient at all is not known, and so not what the mean was divided by.
    missing = 0 if reduction == "sum" else None if told is None else max(told - chosen.space.rank, 0)
    labels = find_labels(layers, chosen.index, assembled, unknown_scale=unknown_scale, missing=missing)
    report(total, total)
    divisor = float(max(total, chosen.space.rank)) if reduction == "mean" else 1.0
    return _conclude(layers, chosen, assembled, labels, total, told, divisor)


def number_told(batch_size: int | Literal["auto"]) -> int | None:
    """B, or None for `auto`.

    Raises:
      ValueError: for a batch size that cannot be.
    """
    if batch_size == "auto":
        return None
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer or 'auto', not {batch_size!r}")
    return batch_size


def _is_wrong(assembled: Assembled) -> np.ndarray:
    """(k,) whether an input opens other units than its delta says, or is mostly noise, as all that follows from it."""
    size = np.sqrt(np.mean(assembled.inputs**2, axis=1))
    noisy = ~(assembled.input_deviation() < MOST_NOISE * size)
    return np.asarray((assembled.closed > 0) | (assembled.opened > 0) | noisy)


def _report(progress: Callable[[int, int], None], total: int, found: int) -> None:
    progress(min(found, total), total)


def _search(
    layers: DenseLayers, chosen: ChosenLayer, divisor: float, seed: int, progress: Callable[[int], None]
) -> tuple[ChosenLayer, Assembled]:
    """What is found at a layer, and that layer as it was seen in the end."""
    index, space, following = chosen.index, chosen.space, chosen.following
    if ACTIVATIONS[layers.activations[index]].slopes is None:
        smooth = search_smooth(layers, index, space, space.rank, seed, progress)
        return chosen, assemble_smooth(layers, index, space, smooth, divisor)
    # Hard tanh's open units lie between two planes; relu6's all but always on one side of one, as ReLU's.
    half_space = layers.activations[index] != "hard_tanh"
    # Its inputs are zero where the layer before is closed.
    sparse = half_space and index > 0 and layers.activations[index - 1] == "relu"
    search = partial(
        search_all_gates, space, following, progress=progress, half_space=half_space, sparse=sparse, seed=seed
    )
    known = peel(layers, index, space, following)
    progress(len(known))
    found = [row.solution for row in known]
    found += search(known, [])
    if known and len(found) < space.rank:
        # A row that was two examples' misleads the search for the others: once more without what rows say of inputs.
        found += search([], found)
    if 0 < len(found) < space.rank:
        fewer = with_fewer(layers, chosen, len(found))
        solutions = [fit_gates(fewer.space, fewer.following, one.gates) for one in found]
        if all(is_credible(one, fewer.space.common) for one in solutions):
            # The others leave so little that it is noise for these.
            return fewer, assemble(layers, index, fewer.space, fewer.following, solutions, [], divisor)
    confirmed = [row for row in known if row.confirmed]
    return chosen, assemble(layers, index, space, following, found, confirmed, divisor)


def _conclude(
    layers: DenseLayers,
    chosen: ChosenLayer,
    assembled: Assembled,
    labels: LabelsFound,
    total: int,
    told: int | None,
    divisor: float,
) -> DenseRecovery:
    index, rank = chosen.index, chosen.space.rank
    inputs = assembled.inputs * labels.factor[:, None]
    before = layers.before(index, inputs)
    deltas = layers.backward(index, before, labels.logit_gradient)
    # A unit at zero may be open or closed: which it was, its own delta says.
    deltas[0] = assembled.delta / labels.factor[:, None]
    residual = np.full(len(layers.kernels), np.nan)
    if assembled.complete:
        residual[index:] = _residuals(layers, index, inputs, before, deltas, divisor)
    verdict = labels.verdict.copy()
    refuted = int(np.bitwise_or.reduce(labels.refuted))
    if told is not None and rank > told:
        refuted |= int(Assumption.BATCH_SIZE)
    tolerated = _tolerated(layers, chosen, before, deltas, divisor)
    strange = assembled.complete and bool(np.any(residual[index + 1 :] > tolerated[index + 1 :]))
    if told is None and divisor != 1 and np.all(labels.scale == 1):
        verdict = np.where(verdict == Verdict.CONDITIONAL, np.int32(Verdict.AMBIGUOUS), verdict)
    wrong = _is_wrong(assembled)
    # An input that opens more units than its delta has is no error where the client drops units at random.
    dropped = not np.any(assembled.closed) and bool(np.median(assembled.opened) > FEWEST_DROPPED * deltas[0].shape[1])
    if strange or dropped:
        refuted |= int(Assumption.PARAMETERS)
        wrong = np.full(len(wrong), not dropped)
        verdict[:] = Verdict.REFUTED
        labels.label[:], labels.label_deviation[:] = np.nan, np.nan
    verdict[wrong] = Verdict.NOT_FOUND
    for array in (inputs, labels.label, labels.label_deviation, labels.feature, labels.logit_gradient, deltas[0]):
        array[wrong] = np.nan
    size = np.sqrt(np.mean(assembled.inputs**2, axis=1))
    deviation = np.hypot(assembled.input_deviation() * labels.factor, size * labels.factor_deviation)
    order = np.lexsort((-assembled.surprise, wrong))
    rows = max(total, len(order))

    def filled(array: np.ndarray, nothing: float = math.nan) -> np.ndarray:
        whole = np.full((rows, *array.shape[1:]), nothing, array.dtype)
        whole[: len(order)] = array[order]
        return whole

    kind = np.promote_types(layers.dtype, np.float32)
    return DenseRecovery(
        inputs=filled(inputs).astype(kind),
        input_deviation=filled(deviation),
        label=filled(labels.label).astype(kind),
        label_deviation=filled(labels.label_deviation),
        verdict=filled(verdict, Verdict.NOT_FOUND),
        feature=filled(labels.feature).astype(kind),
        logit_gradient=filled(labels.logit_gradient),
        delta=filled(deltas[0]),
        misfit=filled(assembled.misfit),
        surprise=filled(assembled.surprise),
        noise=float(np.sqrt(np.mean(chosen.space.noise**2))),
        layer=index,
        rank=rank,
        excess=chosen.excess,
        residual=residual,
        scale=float(np.nanmedian(labels.scale)) if np.any(np.isfinite(labels.scale)) else math.nan,
        loss=int(np.bincount(labels.loss).argmax()),
        refuted=refuted,
        rests_on=filled(np.where(verdict == Verdict.CONDITIONAL, labels.rests_on, 0), 0),
    )


def _residuals(
    layers: DenseLayers,
    index: int,
    inputs: np.ndarray,
    before: list[np.ndarray],
    deltas: list[np.ndarray],
    divisor: float,
) -> list[float]:
    """Relative distance between what all examples give together and the gradient, of each layer from `index` on."""
    distances, hidden = [], inputs
    for place in range(index, len(layers.kernels)):
        observed, own = layers.kernel_gradients[place], hidden.T @ deltas[place - index] / divisor
        bias, own_bias = layers.bias_gradients[place], deltas[place - index].sum(axis=0) / divisor
        if bias is not None:
            observed, own = np.concatenate([observed, bias[None]]), np.concatenate([own, own_bias[None]])
        distances.append(float(np.linalg.norm(own - observed) / (np.linalg.norm(observed) or 1.0)))
        if place < len(layers.activations):
            hidden = layers.activate(place, before[place - index])
    return distances


def _tolerated(
    layers: DenseLayers,
    chosen: ChosenLayer,
    before: list[np.ndarray],
    deltas: list[np.ndarray],
    divisor: float,
) -> np.ndarray:
    """(L,) what a layer's residual may be: agreement in half of the digits, or noise as on the layer that was chosen.

    And what a unit does that lies so near a corner of its activation that the client may have had it on the other side.
    """
    noise = TOLERANCE * float(np.sqrt(np.mean(chosen.space.noise**2)))
    sizes = np.array([max(float(np.linalg.norm(gradient)), 1e-300) for gradient in layers.kernel_gradients])
    counts = np.array([gradient.size for gradient in layers.kernel_gradients])
    tolerated = np.maximum(np.sqrt(jnp.finfo(layers.dtype).eps), noise * np.sqrt(counts) / sizes)
    corner = np.zeros(len(sizes))
    for place in range(chosen.index + 1, len(layers.activations)):
        if ACTIVATIONS[layers.activations[place]].slopes is None:
            continue
        own = place - chosen.index
        hidden = layers.activate(place - 1, before[own - 1])
        lengths = np.linalg.norm(hidden, axis=1, keepdims=True)
        reach = TOLERANCE * chosen.space.roundoff * lengths * np.linalg.norm(layers.kernels[place], axis=0)
        near = layers.gates(place, before[own] - reach) != layers.gates(place, before[own] + reach)
        arriving = deltas[own + 1] @ layers.kernels[place + 1].T
        corner[: place + 1] += np.linalg.norm(near * lengths * arriving) / divisor / sizes[: place + 1]
    return np.asarray(tolerated + corner)


def nothing_recovered(layers: DenseLayers, total: int, chosen: ChosenLayer | None = None) -> DenseRecovery:
    """Where no example was found: the gradient is zero, or no layer has equations to spare, or the search ended."""
    signal = any(np.any(gradient) for gradient in layers.kernel_gradients)
    index = 0 if chosen is None else chosen.index
    kernel = layers.kernels[index]

    def nan(*shape: int) -> np.ndarray:
        return np.full((total, *shape), np.nan, np.promote_types(layers.dtype, np.float32))

    return DenseRecovery(
        inputs=nan(kernel.shape[0]),
        input_deviation=nan(),
        label=nan(layers.number_of_classes),
        label_deviation=nan(layers.number_of_classes),
        verdict=np.full(total, Verdict.NOT_FOUND if signal else Verdict.NO_SIGNAL, np.int32),
        feature=nan(layers.kernels[-1].shape[0]),
        logit_gradient=nan(layers.number_of_classes),
        delta=nan(kernel.shape[1]),
        misfit=nan(),
        surprise=nan(),
        noise=0.0,
        layer=-1 if chosen is None else index,
        rank=0 if chosen is None else chosen.space.rank,
        excess=0 if chosen is None else chosen.excess,
        residual=np.full(len(layers.kernels), np.nan),
        scale=math.nan,
        loss=0,
        refuted=0,
        rests_on=np.zeros(total, np.int64),
    )
