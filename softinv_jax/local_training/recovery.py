"""From a client's update of several local steps to its images and labels, with a verdict on each."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softinv_jax.batches.batch_recovery import recover_batch
from softinv_jax.dense_layers.recovery import DenseRecovery
from softinv_jax.float64 import in_float64
from softinv_jax.images.determinacy import count_equations, is_determined
from softinv_jax.images.distances import norm
from softinv_jax.images.joint import first_images, from_head
from softinv_jax.images.layer_chain import Chain, Dense, can_be_undone
from softinv_jax.images.verdicts import EXPLAINED, ImageRecovery, ImageVerdict, judge_image
from softinv_jax.labels.explanations import SHARP_LABEL
from softinv_jax.labels.scalar_equation import TOLERANCE
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.local_training.certainty import settle
from softinv_jax.local_training.client_run import run_client
from softinv_jax.local_training.first_layer import begins_dense, labels_by_trial, recover_first_layer
from softinv_jax.local_training.polish import summing_to_one
from softinv_jax.local_training.problem import Guess, Problem
from softinv_jax.local_training.search import first_guess, search, search_from, search_labels
from softinv_jax.observation.rank_one import unit_roundoff
from softinv_jax.observation.updates import ObservedUpdate, observe_update_head
from softinv_jax.recoveries import recover

__all__ = ["invert_updates"]


def invert_updates(
    chain: Chain,
    updates: Sequence[ObservedUpdate],
    image_shape: tuple[int, int, int],
    *,
    batch_size: int | Literal["auto"] = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ImageRecovery:
    """Recover the images and labels behind each update of several local steps.

    The client is run on guesses of the examples until one explains the update to its last digit; the label format is
    not told. Then the labels are `unique` and, where the layers are determined, the images `exact`, as far as their
    expected errors are small, which follow from the update's noise (`certainty`). Where no guess explains the update,
    the labels are the head's hint, as `recover` gives it, and the images `inconsistent`. Batches begin with what the
    head tells apart in the average gradient; where it does not, they are `not_found`.

    Of a chain that begins with a dense layer and ReLU the images of any batch follow from that layer alone, also of
    minibatches in any order and at an unknown rate (`first_layer`); running the client then gives the labels.

    Args:
      chain: the network, see `images/layer_chain`.
      updates: from `observe_update`, with the learning rate told (but for such a chain), for cross-entropy with labels
        of sum 1.
      image_shape: (H, W, channels).
      batch_size: B examples, on the mean of whose losses each step is taken, or on minibatches of them; `auto`, for
        such a chain: as many as the update's rank shows.
      progress: called with (updates done, updates).

    Returns:
      An `ImageRecovery` of N updates, B images each; `misfit` is that of the whole update, for each layer the same.

    Raises:
      ValueError: for an update without a learning rate, or without gradient, or a chain that does not fit it.
    """
    if not updates:
        raise ValueError("no updates; give at least one")
    from_start = begins_dense(chain)
    if not (batch_size == "auto" and from_start) and (
        isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    ):
        raise ValueError(
            f"batch_size must be a positive integer, not {batch_size!r}; 'auto' is for chains that begin with a dense"
            " layer and ReLU"
        )
    parts = []
    for index, update in enumerate(updates):
        found = _by_first_layer(chain, update, image_shape, batch_size) if from_start else None
        if found is None:
            found = _invert(chain, update, image_shape, 1 if batch_size == "auto" else batch_size)
        parts.append(found)
        if progress is not None:
            progress(index + 1, len(updates))
    return _together(parts)


def _together(parts: Sequence[ImageRecovery]) -> ImageRecovery:
    """Rows of NaN where one update shows fewer examples than another."""
    examples = max(part.images.shape[1] for part in parts)

    def stacked(name: str) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        if name in ("residual", "condition", "misfit"):  # Of an update.
            return np.concatenate(arrays)
        nothing = {"verdict": ImageVerdict.NOT_FOUND, "label_verdict": Verdict.NOT_FOUND}.get(name, np.nan)
        missing = [[(0, 0), (0, examples - array.shape[1])] + [(0, 0)] * (array.ndim - 2) for array in arrays]
        padded = [np.pad(array, width, constant_values=nothing) for array, width in zip(arrays, missing, strict=True)]
        return np.concatenate(padded)

    names = [name for name in vars(parts[0]) if name != "layers"]
    return ImageRecovery(**{name: stacked(name) for name in names}, layers=parts[0].layers)


def _by_first_layer(
    chain: Chain, update: ObservedUpdate, image_shape: tuple[int, int, int], batch_size: int | Literal["auto"]
) -> ImageRecovery | None:
    """None where it finds nothing and the head may."""
    names = tuple(count.layer for count in count_equations(chain, update.parameters, image_shape, 1))
    found = recover_first_layer(chain, update, batch_size)
    examples = len(found.verdict)
    heads = _Hint(found.label, found.feature, found.verdict)
    known = np.all(np.isfinite(found.inputs), axis=1)
    whole = update.training.minibatch_size is None and update.scale_known
    if not np.any(known):
        classes, features = found.label.shape[1], found.feature.shape[1]
        if whole and batch_size != "auto" and batch_size < min(classes, features + 1):
            return None
        images = np.full((examples, *image_shape), np.nan)
        return _concluded(heads, images, ImageVerdict.NOT_FOUND, np.nan, found.input_deviation, np.nan, names)
    images = found.inputs.reshape(examples, *image_shape)
    misfit, residual = np.nan, np.nan
    if whole and np.all(known):
        heads, misfit, residual = _labels_of(chain, update, found, _problem(chain, update, image_shape))
    roundoff = float(jnp.finfo(found.label.dtype).eps)
    verdicts = [
        judge_image(True, 0.0, float(error), image, roundoff) if seen else ImageVerdict.NOT_FOUND
        for error, image, seen in zip(found.input_deviation, images, known, strict=True)
    ]
    return _concluded(heads, images, np.array(verdicts), residual, found.input_deviation, misfit, names)


@in_float64
def _labels_of(
    chain: Chain, update: ObservedUpdate, found: DenseRecovery, problem: Problem
) -> tuple["_Hint", float, float]:
    """The labels with which the client, run on images that are known, explains its update; the misfit; the residual."""
    heads = _Hint(found.label, found.feature, found.verdict)
    own, trial = labels_by_trial(chain, update, found, problem)
    # Where trials end on the wrong side of a unit, a hard label may be what they are near to.
    hard = np.eye(found.label.shape[1])[np.argmax(trial.labels, axis=1)]
    guess, misfit = search_labels(own, trial._replace(labels=jnp.asarray(hard)))
    if not misfit < EXPLAINED:
        guess, misfit = search_labels(own, trial)
    if not misfit < EXPLAINED:
        return heads, misfit, np.nan
    certain = settle(own, guess)
    _, residual = _seen(own, certain.guess)
    label = np.asarray(certain.guess.labels, heads.label.dtype)
    return heads._replace(label=label, verdict=_label_verdicts(certain.label_error)), certain.misfit, residual


def _label_verdicts(error: np.ndarray) -> np.ndarray:
    return np.where(TOLERANCE * error <= SHARP_LABEL, Verdict.UNIQUE, Verdict.AMBIGUOUS)


def _invert(chain: Chain, update: ObservedUpdate, image_shape: tuple[int, int, int], batch_size: int) -> ImageRecovery:
    if not update.scale_known:
        raise ValueError("several local steps can be run again only if learning_rate is told")
    if update.training.minibatch_size is not None and update.training.minibatch_size < batch_size:
        raise ValueError(
            f"minibatches of {update.training.minibatch_size} of {batch_size} examples, in an unknown order, can be"
            " solved only for chains that begin with a dense layer and ReLU"
        )
    counts = count_equations(chain, update.parameters, image_shape, batch_size)
    determined = is_determined(chain, update.parameters, image_shape, batch_size)
    problem = _problem(chain, update, image_shape)
    hint = _hint(chain, update, batch_size)
    names = tuple(count.layer for count in counts)
    if batch_size == 1 and can_be_undone(chain):
        guess, misfit = search(problem)
    elif np.all(np.isfinite(hint.feature)):
        guess, misfit = search_from(problem, _guess_of_average(problem, update, hint))
    elif batch_size == 1:
        guess, misfit = search_from(problem, first_guess(problem))
    else:
        nothing = np.full((batch_size, *image_shape), np.nan)
        return _concluded(hint, nothing, ImageVerdict.NOT_FOUND, np.nan, np.full(batch_size, np.nan), np.nan, names)
    images = np.asarray(guess.images)
    if not misfit < EXPLAINED:
        _, residual = _seen(problem, guess)
        unknown = np.full(batch_size, np.nan)
        return _concluded(hint, images, ImageVerdict.INCONSISTENT, residual, unknown, misfit, names)
    guess, misfit, error, label_error = settle(problem, guess)
    images = np.asarray(guess.images)
    features, residual = _seen(problem, guess)
    roundoff = float(jnp.finfo(hint.label.dtype).eps)
    # That they agree the misfit has said: parameters sent back can hold less than half of an update's digits.
    verdicts = [judge_image(determined, 0.0, own, image, roundoff) for own, image in zip(error, images, strict=True)]
    kind = hint.label.dtype
    found = _Hint(np.asarray(guess.labels, kind), features.astype(kind), _label_verdicts(label_error))
    return _concluded(found, images, np.array(verdicts), residual, error, misfit, names)


class _Hint(NamedTuple):
    """Labels (B, C), features (B, d), and verdicts (B,) on the labels."""

    label: np.ndarray
    feature: np.ndarray
    verdict: np.ndarray


def _concluded(
    heads: _Hint,
    images: np.ndarray,
    verdict: ImageVerdict | np.ndarray,
    residual: float,
    error: np.ndarray,
    misfit: float,
    layers: tuple[str, ...],
) -> ImageRecovery:
    """Of one update."""
    examples = len(images)
    return ImageRecovery(
        images=images[None].astype(heads.label.dtype),
        labels=heads.label[None],
        features=heads.feature[None],
        label_verdict=np.asarray(heads.verdict, np.int32)[None],
        verdict=np.broadcast_to(np.asarray(verdict, np.int32), (1, examples)),
        residual=np.array([residual]),
        expected_error=error[None],
        condition=np.full((1, len(layers)), np.nan),
        misfit=np.full((1, len(layers)), misfit),
        layers=layers,
    )


@in_float64
def _guess_of_average(problem: Problem, update: ObservedUpdate, hint: _Hint) -> Guess:
    """As if the average gradient were one: what the head tells apart, and the images with these features."""
    task = from_head(problem.chain, update.parameters, update.gradients, hint.feature, problem.image_shape)
    return summing_to_one(Guess(first_images(task), jnp.asarray(hint.label, jnp.float64)))


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
    """The head's inputs (B, d), and the largest relative distance of an array of the update from the one observed."""
    run = _run(problem.chain, problem.parameters, guess.images, guess.labels, problem.training)
    distances = jax.tree.map(
        lambda one, other: float(norm(one - other) / norm(other)) if jnp.any(other) else 0.0,
        run.update,
        problem.observed,
    )
    return np.asarray(run.inputs[-1]), max(jax.tree.leaves(distances))


def _hint(chain: Chain, update: ObservedUpdate, batch_size: int) -> _Hint:
    """What the head gives of the average gradient."""
    head = chain[-1]
    assert isinstance(head, Dense)
    observation = observe_update_head(update, name=head.name)
    if batch_size == 1:
        found = recover(observation, approximate=True)
        return _Hint(*(np.asarray(part)[None] for part in (found.label, found.feature, found.verdict)))
    classes, features = observation.weight.shape
    if batch_size >= min(classes, features + 1):
        raise ValueError(
            f"batch_size = {batch_size}, but only batches smaller than the number of classes, C = {classes}, and not"
            f" larger than the number of features, d = {features}, can be told apart"
        )
    batch = recover_batch(observation, batch_size)
    if len(batch.verdict) != batch_size:  # The rank shows another number.
        labels, inputs = (np.full((batch_size, size), np.nan, batch.label.dtype) for size in (classes, features))
        return _Hint(labels, inputs, np.full(batch_size, Verdict.NOT_FOUND))
    return _Hint(batch.label, batch.feature, batch.verdict)
