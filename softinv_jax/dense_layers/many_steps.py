"""`recover_over_steps`: the inputs of a network's first dense layer from an update of any number of steps.

The update is sum_b c_b x_b^T (`summed_deltas`). Once every c_b is found, the inputs follow by duality, as for a single
gradient (`assembly`), and the constant 1 of the bias gives their lengths. The labels are read off roughly, from what
the layers behind make of the inputs at the parameters sent and returned.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
import numpy as np

from softinv_jax.activations import ACTIVATIONS
from softinv_jax.dense_layers.gate_fit import NextLayer, next_layer
from softinv_jax.dense_layers.gate_rounds import SHARPNESS, TRUST, left_over, outputs_left, whitened
from softinv_jax.dense_layers.gate_search import search_gates
from softinv_jax.dense_layers.layers import DenseLayers
from softinv_jax.dense_layers.recovery import MOST_NOISE, DenseRecovery, nothing_recovered, number_told
from softinv_jax.dense_layers.space import LayerSpace, layer_space
from softinv_jax.dense_layers.summed_deltas import BalancedRows, SummedDelta, balance, certify, refine
from softinv_jax.labels.assumptions import Assumption
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Verdict

__all__ = ["recover_over_steps", "returned_layers", "rough_logit_gradients"]

STARTS = 32
SEARCH_STEPS = 150  # Of the gate search.
BARREN_ROUNDS = 6
SAME = 1 - 1e-6  # Of two coordinates' cosine.
# Units in which one of two is zero and the other is not. By accident deltas cancel in one or two units more than can be
# chosen: the chance of each is the number of units times the noise, 1e-3 or so.
FEWEST_ALONE = 12
DEPENDENT = 100.0  # Of the errors: what is left of one less the others.
# Share of the units that an example surely opens, before and after, and whose zeros say that it never did.
MOST_CONTRADICTIONS = 0.05


def recover_over_steps(
    layers: DenseLayers,
    moved: float,
    batch_size: int | Literal["auto"],
    *,
    scale_known: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DenseRecovery:
    """Recover every example behind an update of several steps, of minibatches in any order.

    The first layer must have a bias and ReLU behind it, and the optimiser be linear in the gradients: SGD with or
    without momentum, not Adam.

    Args:
      layers: with the mean gradient over the steps in place of a gradient. The first takes what the client put in.
      moved: the parameters returned are those sent less this times the mean gradient.
      batch_size: B different examples in all minibatches, or `auto`: as many as the update's rank shows.
      scale_known: whether the mean gradient has the client's scale. If not, no label is told.
      seed: of the starts. progress: called with (examples found, B).

    Returns:
      A `DenseRecovery` of layer 0. Inputs are given where all are found, else none. A label is `ambiguous` at best,
      its deviation NaN: what p was on the way is not known.

    Raises:
      ValueError: for a batch size that cannot be.
    """
    told = number_told(batch_size)
    slopes = ACTIVATIONS[layers.activations[0]].slopes if layers.activations else None
    if slopes is None or slopes[0] != 0 or layers.biases[0] is None or not np.any(layers.kernel_gradients[0]):
        return nothing_recovered(layers, told or 1)
    returned = returned_layers(layers, moved)
    space = layer_space(
        layers.kernels[0],
        layers.biases[0],
        layers.kernel_gradients[0],
        layers.bias_gradients[0],
        layers.dtype,
        None,  # A wrong number told must hide nothing.
    )
    total = max(told or 0, space.rank)
    report = progress or (lambda found, of: None)
    balanced = balance(space)
    found = _search(layers, returned, space, balanced, seed, lambda count: report(min(count, total), total))
    report(total, total)
    if len(found) < space.rank or not _are_examples(balanced, found):
        return replace(nothing_recovered(layers, total), rank=space.rank)
    recovery = _conclude(layers, returned, space, found, total, scale_known)
    return replace(recovery, refuted=int(Assumption.BATCH_SIZE)) if told is not None and told < total else recovery


def returned_layers(layers: DenseLayers, moved: float) -> DenseLayers:
    """The layers with the parameters sent back."""
    pairs = zip(layers.biases, layers.bias_gradients, strict=True)
    return replace(
        layers,
        kernels=tuple(
            kernel - moved * gradient for kernel, gradient in zip(layers.kernels, layers.kernel_gradients, strict=True)
        ),
        biases=tuple(bias if bias is None or gradient is None else bias - moved * gradient for bias, gradient in pairs),
    )


def _search(
    layers: DenseLayers,
    returned: DenseLayers,
    space: LayerSpace,
    balanced: BalancedRows,
    seed: int,
    progress: Callable[[int], None],
) -> list[SummedDelta]:
    """Summed deltas, no two the same, at most as many as there are examples."""
    if not np.any(balanced.live):
        return []
    generator = np.random.default_rng(seed)
    found: list[SummedDelta] = []
    end = _directions(returned, space)
    # Between the two ends, where neither is right.
    halfway = replace(space, directions=(space.directions + end) / 2)
    following = next_layer((layers.kernels[1] + returned.kernels[1]) / 2, None, (0.0, 1.0))
    barren = 0
    while len(found) < space.rank and barren < BARREN_ROUNDS:
        before = len(found)
        if barren <= 1:
            # What is found takes its share out of the rows, so that others may now stand alone.
            for closed in _closed_for_rows(space, balanced, end, left_over(space, found)):
                # Where that finds no more, only some of the units are asked.
                asked = generator.random(closed.shape) < generator.random((len(closed), 1)) if barren else 1.0
                _enter(space, balanced, closed * asked, generator, found)
                progress(len(found))
        _enter(space, balanced, _closed_by_gates(halfway, following, found, generator), generator, found)
        progress(len(found))
        barren = 0 if len(found) > before else barren + 1
    return found


def _directions(layers: DenseLayers, space: LayerSpace) -> np.ndarray:
    """(m, B) as of `LayerSpace`, for other parameters."""
    kernel, bias = layers.kernels[0], layers.biases[0]
    assert bias is not None
    return np.concatenate([kernel, bias[None]]).T @ space.right


def _closed_for_rows(
    space: LayerSpace, balanced: BalancedRows, end: np.ndarray, basis: np.ndarray
) -> Iterator[np.ndarray]:
    """(S, m) which units stay closed, if the input were what a row of the update is a multiple of.

    The rows are mixtures of examples, those first that are of no larger range than a mixture is. basis: (B, k) of the
    coordinates that inputs not yet found can have.
    """
    coordinates = (space.left * space.singular_values)[balanced.live] @ basis @ basis.T
    constant = coordinates @ space.constant
    coordinates = coordinates[constant != 0] / constant[constant != 0, None]
    coordinates = coordinates[np.argsort(np.linalg.norm(coordinates * np.linalg.norm(space.right, axis=0), axis=1))]
    for first in range(0, len(coordinates), STARTS):
        yield _surely_closed(space, end, coordinates[first : first + STARTS])


def _surely_closed(space: LayerSpace, end: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """(S, m) how surely inputs of these coordinates (S, B) never opened a unit: from 0 to 1, for the most closed."""
    largest = np.maximum(coordinates @ space.directions.T, coordinates @ end.T)
    below = np.maximum(-largest, 0)
    return below / (below + np.mean(np.abs(largest), axis=1, keepdims=True))


def _closed_by_gates(
    space: LayerSpace, following: NextLayer, found: list[SummedDelta], generator: np.random.Generator
) -> np.ndarray:
    """(STARTS, m) as the gate search for a single gradient has them, which the mean over the steps nearly is."""
    deltas, weight = whitened(space, following, [])
    outputs = outputs_left(space, found)
    starts = generator.standard_normal((STARTS, space.rank)).astype(np.float32)
    gates, _ = search_gates(
        deltas,
        weight,
        outputs,
        (starts @ outputs.T > 0).astype(np.float32),
        generator.standard_normal((STARTS, weight.shape[1])).astype(np.float32),
        generator.choice(np.asarray(SHARPNESS, np.float32), STARTS),
        generator.choice(np.asarray(TRUST, np.float32), STARTS),
        np.float32(1),
        np.int32(SEARCH_STEPS),
        following.slopes,
    )
    return ~np.asarray(gates)


def _enter(
    space: LayerSpace,
    balanced: BalancedRows,
    closed: np.ndarray,
    generator: np.random.Generator,
    found: list[SummedDelta],
) -> bool:
    """Refine guesses of closed units, and add what is new to `found`; whether there was any."""
    guesses = np.zeros((STARTS, len(space.noise)), np.float32)
    guesses[: len(closed)] = closed * balanced.live
    starts = generator.standard_normal((STARTS, space.rank)).astype(np.float32)
    directions = refine(jnp.asarray(balanced.rows, jnp.float32), guesses, starts)
    before = len(found)
    for direction in np.asarray(directions, np.float64)[: len(closed)]:
        if len(found) == space.rank or not np.all(np.isfinite(direction)):
            continue
        one = certify(space, balanced, direction)
        if one is not None and not any(abs(one.coordinates @ other.coordinates) > SAME for other in found):
            found[:] = _sparsest([*found, one])
    return len(found) > before


def _sparsest(candidates: list[SummedDelta]) -> list[SummedDelta]:
    """Of candidates of which some are mixtures of others those with the most zeros, as many as are independent."""
    kept: list[SummedDelta] = []
    basis = np.zeros((len(candidates[0].coordinates), 0))
    error = max(float(np.linalg.norm(one.errors)) for one in candidates)
    for one in sorted(candidates, key=lambda each: -each.freedom):
        rest = one.coordinates - basis @ (basis.T @ one.coordinates)
        size = float(np.linalg.norm(rest))
        if size > DEPENDENT * error:
            kept.append(one)
            basis = np.column_stack([basis, rest / size])
    return kept


def _are_examples(balanced: BalancedRows, found: list[SummedDelta]) -> bool:
    """Whether none is a mixture of others, found in place of an example that is missing.

    A mixture is zero where all that are mixed are, and in the few units where they cancel by accident. There alone each
    of them is not zero: of an example and any other this is so in many units, which one has closed and the other not.
    """
    closed = np.stack([one.closed for one in found])
    alone = closed.astype(int) @ (balanced.live & ~closed).astype(int).T
    np.fill_diagonal(alone, FEWEST_ALONE)
    return bool(np.all(alone >= FEWEST_ALONE))


@dataclass(frozen=True)
class _Inputs:
    """(B, d) inputs, (B,) their deviation, root mean square, and (B, m) the mean deltas, over B."""

    inputs: np.ndarray
    deviation: np.ndarray
    delta: np.ndarray


def _by_duality(space: LayerSpace, found: list[SummedDelta]) -> _Inputs:
    mixing = np.linalg.inv(np.stack([one.coordinates for one in found], axis=1))
    coordinates = mixing * space.singular_values
    scale = coordinates @ space.constant
    inputs = ((coordinates / scale[:, None]) @ space.right.T)[:, :-1]
    # Of noise on the update, of deviation 1; and how much of each other input is in one, from errors of its deltas.
    own = space.common * np.linalg.norm(mixing, axis=1) / np.abs(scale)
    carried = np.stack([np.linalg.norm(mixing @ one.errors, axis=1) for one in found], axis=1)
    carried = carried * np.abs(scale) / np.abs(scale)[:, None]
    # Its length is as uncertain as the constant 1 is.
    length = np.hypot(own * space.columns[-1], np.linalg.norm(carried, axis=1))
    square = (own[:, None] * space.columns[None, :-1]) ** 2 + carried**2 @ inputs**2
    deviation = np.sqrt(np.mean(square, axis=1) + length**2 * np.mean(inputs**2, axis=1))
    delta = scale[:, None] * space.noise * (np.stack([one.coordinates for one in found]) @ space.left.T)
    return _Inputs(inputs, deviation, delta)


def _surely_open(layers: DenseLayers, returned: DenseLayers, inputs: _Inputs, roundoff: float) -> np.ndarray:
    """(B, m) the units that an input opens at the parameters sent and at those returned."""
    lengths = np.sqrt(inputs.inputs.shape[1]) * inputs.deviation + roundoff * np.linalg.norm(inputs.inputs, axis=1)
    reach = TOLERANCE * lengths[:, None] * np.linalg.norm(layers.kernels[0], axis=0)
    return np.asarray((layers.output(0, inputs.inputs) > reach) & (returned.output(0, inputs.inputs) > reach))


def rough_logit_gradients(
    layers: DenseLayers, returned: DenseLayers, inputs: np.ndarray, delta: np.ndarray
) -> np.ndarray:
    """(B, C) p - y, mean over the steps: by least squares from the deltas, with the layers behind as they are halfway.

    Args:
      layers, returned: as sent and as sent back. inputs: (B, d). delta: (B, m) mean derivative of each example's loss.
    """
    opened = (layers.output(0, inputs) > 0) & (returned.output(0, inputs) > 0)
    kernels = tuple((sent + back) / 2 for sent, back in zip(layers.kernels, returned.kernels, strict=True))
    halfway = replace(layers, kernels=kernels)
    before = halfway.before(0, inputs)
    slopes = np.zeros((len(opened), layers.number_of_classes))
    for row, units in enumerate(opened):
        arriving = kernels[-1]
        for place in range(len(kernels) - 2, 0, -1):
            arriving = kernels[place] @ (halfway.slope(place, before[place][row])[:, None] * arriving)
        if np.any(units):
            slopes[row] = np.linalg.lstsq(arriving[units], delta[row, units], rcond=None)[0]
    # The sum over the classes is zero, and nothing that arrives may tell it.
    return slopes - np.mean(slopes, axis=1, keepdims=True)


def _conclude(
    layers: DenseLayers,
    returned: DenseLayers,
    space: LayerSpace,
    found: list[SummedDelta],
    total: int,
    scale_known: bool,
) -> DenseRecovery:
    nothing = replace(nothing_recovered(layers, total), rank=space.rank)
    inputs = _by_duality(space, found)
    sizes = np.sqrt(np.mean(inputs.inputs**2, axis=1))
    if not np.all(inputs.deviation < MOST_NOISE * sizes):
        return nothing
    opened = _surely_open(layers, returned, inputs, space.roundoff)
    closed = np.stack([one.closed for one in found])
    contradicted = np.count_nonzero(opened & closed, axis=1) > MOST_CONTRADICTIONS * np.count_nonzero(opened, axis=1)
    if np.any(contradicted):
        # One wrong delta makes mixtures of all inputs.
        return nothing
    # The gradient is the mean over all examples.
    slopes = rough_logit_gradients(layers, returned, inputs.inputs, total * inputs.delta)
    predictions = (layers.predictions(0, inputs.inputs) + returned.predictions(0, inputs.inputs)) / 2
    kind = np.promote_types(layers.dtype, np.float32)
    rank = space.rank

    def filled(array: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.concatenate([array.astype(rest.dtype), rest[rank:]])

    verdict = np.full(rank, Verdict.AMBIGUOUS if scale_known else Verdict.UNIDENTIFIABLE, np.int32)
    label = predictions - slopes if scale_known else np.full(slopes.shape, np.nan)
    feature = layers.activate(len(layers.kernels) - 2, layers.before(0, inputs.inputs)[-2])
    return replace(
        nothing,
        inputs=filled(inputs.inputs, nothing.inputs),
        input_deviation=filled(inputs.deviation, nothing.input_deviation),
        label=filled(label, nothing.label),
        verdict=filled(verdict, nothing.verdict),
        feature=filled(feature.astype(kind), nothing.feature),
        logit_gradient=filled(slopes, nothing.logit_gradient),
        delta=filled(total * inputs.delta, nothing.delta),
        misfit=filled(np.array([one.misfit for one in found]), nothing.misfit),
        surprise=filled(np.array([one.surprise for one in found]), nothing.surprise),
        noise=float(np.sqrt(np.mean(space.noise**2))),
        layer=0,
        rank=rank,
        excess=min(one.freedom for one in found),
        scale=1.0 if scale_known else math.nan,
    )
