"""The thorough search of many examples, in groups by what each of them needs.

Under `vmap` both sides of every branch would run, and every loop until its slowest lane is done. Here an example takes
part in a stage only if it needs it: likelihood under noise, another loss where the one told does not explain it, the
interval where nothing does. The host decides that, between stages, from a flag an example.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.labels import recovery
from softinv_jax.labels.explanations import is_unbalanced
from softinv_jax.labels.lanes import Place, for_each, groups_of, in_turn, join, put_rows, rows_of, take_rows
from softinv_jax.labels.losses import Attempts, Kept, Outcome, attempt, attempts_for, is_settled, keep_better
from softinv_jax.labels.reading import Reading
from softinv_jax.labels.recovery import Stages
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.observation.head import Observation

__all__ = ["read_one", "search_thoroughly"]

Result = TypeVar("Result")

# float64 numbers that one example's search holds at once, for each class (hypotheses, starts) and each entry.
NUMBERS_A_CLASS, NUMBERS_AN_ENTRY = 1500, 4
CACHE_BYTES = 32 * 2**20
CPU_LANES, ACCELERATOR_LANES = 64, 8192
FEW = 64
# The same of what is kept of an example between stages.
NUMBERS_KEPT = 80
BLOCK_GROUPS = 16


def search_thoroughly(
    observation: Observation,
    indices: np.ndarray,
    stages: Stages,
    place: Place,
    report: Callable[[int], None],
) -> Iterator[tuple[int, Recovery]]:
    """The examples at `indices`, block by block: how many, and their recoveries along a leading axis on the devices,
    which is longer than that where a block is filled up.

    Args:
      observation: of N examples. stages: static, thorough. report: called with how many of them are searched.
    """
    lanes, most = _sizes(observation, indices.size, place)
    for start in range(0, indices.size, most):
        block = _Block(observation, indices[start : start + most], stages, place, lanes)

        def report_block(count: int, start: int = start) -> None:
            report(start + count)

        yield block.indices.size, _search_block(block, report_block)


def _sizes(observation: Observation, count: int, place: Place) -> tuple[int, int]:
    """Examples in a group, and in a block."""
    classes, features = observation.weight.shape
    held = 8 * classes * (NUMBERS_A_CLASS + NUMBERS_AN_ENTRY * features)
    most, limit = (CACHE_BYTES, CPU_LANES) if place.is_cpu else (place.free_bytes // 3, ACCELERATOR_LANES)
    lanes = 1 << (min(max(most // held, 1), limit).bit_length() - 1)
    # A few are common, after the fast search, and a single one; they do not wait for a large group's sake.
    lanes = (1 if count == 1 else min(lanes, FEW) if count <= 4 * FEW else lanes) * place.shares
    groups = BLOCK_GROUPS
    if not place.is_cpu:
        groups = min(groups, max(place.free_bytes // 8 // (8 * classes * NUMBERS_KEPT * lanes), 1))
    return lanes, groups * lanes


class _Block(NamedTuple):
    """Examples that go through the stages together.

    Attributes:
      observation: of all. indices: (n,) which of them. stages: static. place: where. lanes: size of a group.
    """

    observation: Observation
    indices: np.ndarray
    stages: Stages
    place: Place
    lanes: int

    @property
    def everyone(self) -> np.ndarray:
        return np.arange(self.indices.size)

    @property
    def head(self) -> tuple:
        return self.observation.weight, self.observation.bias

    def gradients(self, group: np.ndarray) -> tuple:
        """Of the examples at these positions in the block."""
        part = rows_of(self.observation, self.indices[group], self.place)
        return part.weight_gradient, part.bias_gradient, part.noise

    def each(
        self, stage: Callable, shared: Any, given: Callable[[np.ndarray, jax.Array], Any], chosen: np.ndarray
    ) -> Iterator[tuple[jax.Array, Any]]:
        """Positions, on the device, and what the stage makes of what is `given` for them, by groups of `chosen`.

        Args:
          given: takes the positions, on the host and on the device.
        """

        def work(group: np.ndarray) -> tuple[jax.Array, Any]:
            at = jax.device_put(group.astype(np.int32))
            inputs = jax.tree.map(self.place.put, given(group, at))
            return at, for_each(stage, self.stages, self.place, shared, inputs)

        return in_turn(work, groups_of(chosen, self.lanes), self.place, program=(stage, self.stages, self.lanes))

    def improve(self, tree: Result, stage: Callable, context: Any, chosen: np.ndarray) -> Result:
        """The tree, with what the stage makes of the context's rows and its own in the places of `chosen`."""
        before = tree
        for at, part in self.each(stage, None, lambda _, at: take_rows((context, before), at), chosen):
            tree = put_rows(tree, at, part)
        return tree

    def of_all(self, stage: Callable, shared: Any, given: Callable[[np.ndarray, jax.Array], Any]) -> Any:
        """The same of everyone in the block, as one tree."""
        return join([part for _, part in self.each(stage, shared, given, self.everyone)])

    def those(self, *flags: jax.Array) -> list[np.ndarray]:
        """Positions in the block where each of the flags is set; fetched in one go."""
        return [np.flatnonzero(each[: self.indices.size]) for each in jax.device_get(flags)]


def _search_block(block: _Block, report: Callable[[int], None]) -> Recovery:
    stages = block.stages
    readings = block.of_all(read_one, block.head, lambda group, _: block.gradients(group))
    outcome = _explain(block, readings, report)
    found: Recovery = block.of_all(_conclude, None, lambda _, at: take_rows((readings, outcome), at))
    unidentifiable, several = block.those(*_kinds(found))
    if recovery.is_open_question(stages):
        interval = block.improve(found.interval, _interval, readings, unidentifiable)
        found = replace(found, interval=interval)
    told = found
    for at, part in block.each(
        _count_several, block.head, lambda group, at: (block.gradients(group), take_rows(told, at)), several
    ):
        found = put_rows(found, at, part)
    return _in_kept_dtype(found, block.observation.weight_gradient.dtype)


def _explain(block: _Block, readings: Reading, report: Callable[[int], None]) -> Outcome:
    classes, stages = block.observation.weight.shape[0], block.stages
    if trials := recovery.softmax_trials(classes, stages):
        outcome = _search_losses(block, readings, jax.device_put(attempts_for(trials)), report)
    else:
        outcome = block.of_all(_unexplained, None, lambda _, at: take_rows(readings, at))
        report(block.indices.size)
    if not recovery.may_be_independent(stages):
        return outcome
    unsure = block.everyone
    if not recovery.is_independent(classes, stages):
        (unsure,) = block.those(_may_be_independent(readings, outcome))
    return block.improve(outcome, _or_independent, readings, unsure)


def _search_losses(block: _Block, readings: Reading, attempts: Attempts, report: Callable[[int], None]) -> Outcome:
    """As `losses.search_losses`, each attempt with those only that need it."""
    noisy = np.ones(block.indices.size, bool)
    noisy[block.those(readings.is_rounding)[0]] = False
    kept: Kept | None = None
    done, losses = 0, int(jax.device_get(attempts.losses))
    for number in range(attempts.error.size):
        index = jax.device_put(np.int32(number))
        (active,) = (block.everyone,) if kept is None else block.those(_is_unsettled(readings, kept, attempts, index))
        if not active.size:  # Nor will they be by what comes later.
            break
        by_likelihood = noisy[active] | (number >= losses)
        for stage, chosen in ((_attempt_exact, active[~by_likelihood]), (_attempt_noisy, active[by_likelihood])):
            for at, outcome in block.each(stage, (attempts, index), lambda _, at: take_rows(readings, at), chosen):
                if number == 0:
                    new = Kept(outcome, outcome.explanations.cost)
                    kept = put_rows(_blank(readings.residual, new) if kept is None else kept, at, new)
                    done = min(done + block.lanes, block.indices.size)
                    report(done)
                else:
                    kept = _keep(kept, at, outcome, attempts, index)
    assert kept is not None
    return kept.outcome


# Every stage takes the static options, what is shared by all examples, and one example's part.
def read_one(stages: Stages, head: tuple, gradients: tuple) -> Reading:
    """One example's gradients (of the weight, the bias or None, and the noise or None) under a head (weight, bias)."""
    return recovery.read(_single(head, gradients), stages)


def _attempt_exact(_: Stages, shared: tuple, reading: Reading) -> Outcome:
    return attempt(reading, *shared, noisy=False)


def _attempt_noisy(_: Stages, shared: tuple, reading: Reading) -> Outcome:
    return attempt(reading, *shared, noisy=True)


def _unexplained(stages: Stages, _: None, reading: Reading) -> Outcome:
    return recovery.unexplained(reading, stages)


def _or_independent(stages: Stages, _: None, one: tuple[Reading, Outcome]) -> Outcome:
    reading, outcome = one
    return recovery.or_independent(reading, outcome, stages)


def _conclude(stages: Stages, _: None, one: tuple[Reading, Outcome]) -> Recovery:
    reading, outcome = one
    return recovery.verdict_of(reading, outcome, stages)


def _interval(stages: Stages, _: None, one: tuple[Reading, jax.Array]) -> jax.Array:
    return recovery.interval_of(one[0], stages)


def _count_several(_: Stages, head: tuple, one: tuple) -> Recovery:
    gradients, found = one
    return recovery.count_several(_single(head, gradients), found)


def _single(head: tuple, gradients: tuple) -> Observation:
    (weight, bias), (weight_gradient, bias_gradient, noise) = head, gradients
    return Observation(weight, weight_gradient, bias, bias_gradient, noise)


# Small programs of all examples of a block, between the stages.
@jax.jit
def _blank(each: jax.Array, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((each.size, *leaf.shape[1:]), leaf.dtype), rows)


@jax.jit
def _keep(kept: Kept, at: jax.Array, outcome: Outcome, attempts: Attempts, index: jax.Array) -> Kept:
    better = jax.vmap(lambda one, new: keep_better(one, new, attempts, index))(take_rows(kept, at), outcome)
    return jax.tree.map(lambda leaf, new: leaf.at[at].set(new, mode="drop"), kept, better)


@jax.jit
def _is_unsettled(readings: Reading, kept: Kept, attempts: Attempts, index: jax.Array) -> jax.Array:
    return ~jax.vmap(lambda reading, outcome: is_settled(reading, outcome, attempts, index))(readings, kept.outcome)


@jax.jit
def _may_be_independent(readings: Reading, outcome: Outcome) -> jax.Array:
    return ~outcome.unique & jax.vmap(is_unbalanced)(readings.equation)


@jax.jit
def _kinds(found: Recovery) -> tuple[jax.Array, jax.Array]:
    return found.verdict == Verdict.UNIDENTIFIABLE, recovery.is_of_several(found)


_in_kept_dtype = jax.jit(recovery.in_kept_dtype, static_argnums=1)
