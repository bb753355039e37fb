"""From a client's update of several local steps to its image and label, with a verdict."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.float64 import in_float64
from softinv_jax.images.determinacy import count_equations
from softinv_jax.images.distances import norm
from softinv_jax.images.layer_chain import Chain, Dense, can_be_undone
from softinv_jax.images.verdicts import EXPLAINED, ImageRecovery, ImageVerdict, judge_image
from softinv_jax.labels.explanations import SHARP_LABEL
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.local_training.certainty import LARGEST, settle
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.local_training.search import search
from softinv_jax.observation.rank_one import unit_roundoff
from softinv_jax.observation.updates import ObservedUpdate, observe_update_head
from softinv_jax.recoveries import recover

__all__ = ["invert_updates"]


def invert_updates(
    chain: Chain,
    updates: Sequence[ObservedUpdate],
    image_shape: tuple[int, int, int],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ImageRecovery:
    """Recover the image and the label behind each update of several local steps on one example.

    The client is run on guesses of the example until one explains the update to its last digit; the label format is not
    told. Then the label is `unique` and, where every layer is determined, the image `exact`, as far as their expected
    errors are small. These follow from the update's noise by the Jacobian at the solution, up to `certainty.LARGEST`
    unknowns; beyond, they are not known, the label is `ambiguous` and the image `approximate`. Where no guess explains
    the update, the label is the head's hint, as `recover` gives it, and the image `inconsistent`.

    Args:
      chain: the network, see `images/layer_chain`.
      updates: from `observe_update`, with the learning rate told, for cross-entropy with a label of sum 1.
      image_shape: (H, W, channels).
      progress: called with (updates done, updates).

    Returns:
      An `ImageRecovery` of N updates, one image each; `misfit` is that of the whole update, for each layer the same.

    Raises:
      ValueError: for an update without a learning rate, or without gradient, a chain that does not fit it, or one with
        an activation that falls and rises (GELU, SiLU).
    """
    if not updates:
        raise ValueError("no updates; give at least one")
    parts = []
    for index, update in enumerate(updates):
        parts.append(_invert(chain, update, image_shape))
        if progress is not None:
            progress(index + 1, len(updates))
    names = [name for name in vars(parts[0]) if name != "layers"]
    stacked = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return ImageRecovery(**stacked, layers=parts[0].layers)


def _invert(chain: Chain, update: ObservedUpdate, image_shape: tuple[int, int, int]) -> ImageRecovery:
    if not update.scale_known:
        raise ValueError("several local steps can be run again only if learning_rate is told")
    if not can_be_undone(chain):
        raise ValueError("an activation of the chain falls and rises, so that it cannot be undone; use matching")
    counts = count_equations(chain, update.parameters, image_shape)
    problem = _problem(chain, update, image_shape)
    (guess, misfit), error, label_error = search(problem), np.nan, np.inf
    dtype = jnp.result_type(*jax.tree.leaves(update.gradients))
    explained = misfit < EXPLAINED
    if explained and guess.image.size + guess.label.size <= LARGEST:
        guess, misfit, error, label_error = settle(problem, guess)
    feature, residual = _seen(problem, guess)
    label, verdict = np.asarray(guess.label), ImageVerdict.INCONSISTENT
    label_verdict = Verdict.UNIQUE if TOLERANCE * label_error <= SHARP_LABEL else Verdict.AMBIGUOUS
    if explained:
        determined = all(count.determined for count in counts)
        # An error that is not known is no small one.
        expected = error if np.isfinite(error) else np.inf
        verdict = judge_image(determined, residual, expected, np.asarray(guess.image), float(jnp.finfo(dtype).eps))
    else:
        hint = _hint(chain, update)
        label, label_verdict, feature = np.asarray(hint.label), Verdict(int(hint.verdict)), np.asarray(hint.feature)

    def row(value: Any, kind: Any = dtype) -> np.ndarray:
        return np.asarray(value, kind)[None]

    layers = tuple(count.layer for count in counts)
    return ImageRecovery(
        images=row(guess.image)[None],
        labels=row(label)[None],
        features=row(feature)[None],
        label_verdict=row([label_verdict], np.int32),
        verdict=row([verdict], np.int32),
        residual=row(residual, np.float64),
        expected_error=row([error], np.float64),
        condition=np.full((1, len(layers)), np.nan),
        misfit=np.full((1, len(layers)), misfit),
        layers=layers,
    )


@in_float64
def _problem(chain: Chain, update: ObservedUpdate, image_shape: tuple[int, int, int]) -> Problem:
    roundoff = unit_roundoff(jnp.result_type(*jax.tree.leaves(update.gradients)))
    observed = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), update.gradients)
    # Of the parameters sent back, and of the gradients that the client computed.
    noise = jax.tree.map(
        lambda rounding, leaf: jnp.hypot(jnp.asarray(rounding), roundoff * jnp.max(jnp.abs(leaf))),
        update.rounding,
        observed,
    )
    if all(not np.any(leaf) for leaf in jax.tree.leaves(update.gradients)):
        raise ValueError("the update is zero everywhere: nothing was trained, or before and after are the same file")
    parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), update.parameters)
    return Problem(chain, image_shape, update.training, parameters, observed, noise, roundoff)


_run = jax.jit(run_client, static_argnames=("chain", "training"))


@in_float64
def _seen(problem: Problem, guess: Guess) -> tuple[np.ndarray, float]:
    """The head's input (d,), and the largest relative distance between an array of the update and the one observed."""
    run = _run(problem.chain, problem.parameters, guess.image[None], guess.label[None], problem.training)
    distances = jax.tree.map(
        lambda one, other: float(norm(one - other) / norm(other)) if jnp.any(other) else 0.0,
        run.update,
        problem.observed,
    )
    return np.asarray(run.inputs[-1][0]), max(jax.tree.leaves(distances))


def _hint(chain: Chain, update: ObservedUpdate) -> Recovery:
    head = chain[-1]
    assert isinstance(head, Dense)
    return recover(observe_update_head(update, name=head.name), approximate=True)
