"""Images behind gradients or updates of a whole model, by whichever way leads to them.

A chain of layers is inverted exactly where it is determined; updates of several steps are solved by running the client;
everything else is matched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import jax
import numpy as np

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts
from softinv_jax.images.dense_batches import dense_end
from softinv_jax.images.determinacy import count_equations, equations_together, is_determined
from softinv_jax.images.inversion import invert, match
from softinv_jax.images.layer_chain import Chain, apply_chain
from softinv_jax.images.objective import ApplyFunction, MatchingSettings, Model
from softinv_jax.images.verdicts import ImageRecovery, ImageVerdict
from softinv_jax.labels.verdicts import Recovery, Verdict
from softinv_jax.local_training.first_layer import begins_dense
from softinv_jax.local_training.recovery import invert_updates
from softinv_jax.observation.head import observe_head, stack_observations
from softinv_jax.observation.updates import ObservedUpdate, observe_update_head
from softinv_jax.recoveries import recover, recover_many
from softinv_jax.whole_models import as_batch, find_dense_end, recover_model, recover_update

__all__ = [
    "Inversion",
    "Method",
    "Network",
    "describe_determinacy",
    "invert_gradients",
    "invert_observed",
    "stack_gradients",
]

DEFAULT_MATCHING = MatchingSettings()
Method = Literal["auto", "exact", "matching"]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Network:
    """What an observer knows of a network; a chain, a function, or both.

    Attributes:
      image_shape: (H, W, channels).
      chain: its layers, where they are a chain; else None.
      function: (parameters, image) -> logits, or a `WholeBatch`; None for that of the chain.
      head: name of the last dense layer, where shapes and names do not tell it.
    """

    image_shape: tuple[int, int, int]
    chain: Chain | None = None
    function: Model | None = None
    head: str | None = None

    @cached_property
    def apply_fn(self) -> Model:
        """One function object, so that what is compiled for it compiles once.

        Raises:
          ValueError: where there is neither.
        """
        if self.function is not None:
            return self.function
        if self.chain is None:
            raise ValueError("a Network needs a chain of layers or a function")
        return partial(apply_chain, self.chain)

    @cached_property
    def features_fn(self) -> ApplyFunction | None:
        """What enters the head of a chain."""
        return None if self.chain is None else partial(apply_chain, self.chain[:-1])


@dataclass(frozen=True)
class Inversion:
    """Images, and how they were found.

    Attributes:
      method: `exact` (layer by layer, or all layers together), `client` (the client run on guesses), `matching`, or
        `labels` where only these were looked for, because more cannot be known.
      recovery: an `ImageRecovery`.
      reason: why it is not `exact`, in a sentence; empty where it is.
    """

    method: Literal["exact", "client", "matching", "labels"]
    recovery: ImageRecovery
    reason: str = ""


def describe_determinacy(
    chain: Chain, parameters: Mapping[str, Any], image_shape: tuple[int, int, int], batch_size: int = 1
) -> str:
    """In one sentence: the layer with too few equations, and how many all of them together have; empty if enough.

    Raises:
      ValueError: if the chain, the parameters and the image do not fit each other.
    """
    if is_determined(chain, parameters, image_shape, batch_size):
        return ""
    images = batch_size * int(np.prod(image_shape))
    end = dense_end(chain)
    known_from = len(chain) - 1 if end is None else end[0]
    together = equations_together(chain, parameters, image_shape, batch_size, known_from)
    plural = "image has" if batch_size == 1 else f"{batch_size} images have"
    few = [count for count in count_equations(chain, parameters, image_shape, batch_size) if not count.determined]
    first = few[0]
    return (
        f"The {plural} {images} unknowns, for which all layers together have at most {together} equations (layer"
        f" {first.layer} by itself: {first.forward_equations + first.gradient_equations} for {first.unknowns}): many"
        " images fit."
    )


def invert_gradients(
    network: Network,
    parameters: Mapping[str, Any],
    gradients: Mapping[str, Any],
    *,
    batch_size: int | Literal["auto"] = 1,
    unknown_scale: bool = False,
    method: Method = "auto",
    matching: MatchingSettings | None = DEFAULT_MATCHING,
    restarts: int = 1,
    progress: Progress | None = None,
) -> Inversion:
    """Recover labels and images behind N gradients of a whole model.

    Args:
      network: see `Network`. parameters: as its function, or chain, takes them.
      gradients: the same, each array with a leading axis N.
      batch_size: examples behind each gradient; `auto`, for a chain with several dense layers.
      unknown_scale: the gradients carry an unknown factor; then nothing is matched.
      method: `exact`, for a chain only; `matching`; `auto`: exact where the layers are determined, else matching, with
        what the chain's layers tell of labels and features.
      matching: its settings, or None: where the layers do not determine the images, only labels are recovered.
      restarts: of matching.
      progress: called with (done, all, what).

    Raises:
      ValueError: as `inversion.invert` and `inversion.match`.
    """
    told = _Told(network, parameters, gradients, batch_size, unknown_scale, method, matching, restarts, progress)
    return _invert(told, None, None)


def invert_observed(
    network: Network,
    updates: Sequence[ObservedUpdate],
    *,
    batch_size: int | Literal["auto"] = 1,
    method: Method = "auto",
    matching: MatchingSettings | None = DEFAULT_MATCHING,
    restarts: int = 1,
    progress: Progress | None = None,
) -> Inversion:
    """Recover labels and images behind clients' updates; those of several steps by running the client, if possible.

    Args:
      updates: see `observe_update`, all of the same kind.
      others: see `invert_gradients`.

    Raises:
      ValueError: as `invert_gradients`, or for no updates.
    """
    if not updates:
        raise ValueError("no updates; give at least one")
    first = updates[0]
    told = _Told(
        network,
        first.parameters,
        stack_gradients(updates),
        batch_size,
        not first.scale_known,
        method,
        matching,
        restarts,
        progress,
    )
    if network.chain is not None and _runs_client(told, first):
        report = told.report
        found = invert_updates(
            network.chain,
            updates,
            network.image_shape,
            batch_size=batch_size,
            progress=lambda done, total: report(done, total, "running the client on guesses"),
        )
        return Inversion("client", found)
    heads = None
    if batch_size == 1:
        # With the noise that the parameters' rounding is known to leave, which gradients alone do not tell.
        observation = stack_observations([observe_update_head(update, name=network.head) for update in updates])
        heads = recover_many(observation, unknown_scale=told.unknown_scale, approximate=not first.exact, thorough=True)
    inversion = _invert(told, heads, updates)
    if first.exact:
        return inversion
    return replace(inversion, recovery=_without_certainty(inversion.recovery))


def stack_gradients(updates: Sequence[ObservedUpdate]) -> Any:
    """The gradients of N updates, each array with a leading axis N."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(update.gradients for update in updates))


def _without_certainty(recovery: ImageRecovery) -> ImageRecovery:
    """Of a gradient that several steps were averaged to: no stated error covers what they change."""
    sure = recovery.label_verdict > Verdict.AMBIGUOUS
    exact = recovery.verdict == ImageVerdict.EXACT
    return replace(
        recovery,
        label_verdict=np.where(sure, Verdict.AMBIGUOUS, recovery.label_verdict),
        verdict=np.where(exact, ImageVerdict.APPROXIMATE, recovery.verdict),
    )


@dataclass(frozen=True, eq=False)
class _Told:
    """What `invert_gradients` was told."""

    network: Network
    parameters: Mapping[str, Any]
    gradients: Mapping[str, Any]
    batch_size: int | Literal["auto"]
    unknown_scale: bool
    method: Method
    matching: MatchingSettings | None
    restarts: int
    progress: Progress | None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {self.method!r}")
        if self.method == "exact" and self.network.chain is None:
            raise ValueError("method 'exact' needs a network that is a chain of layers; use 'matching'")
        if self.method == "matching" and self.matching is None:
            raise ValueError("method 'matching' needs its settings: matching=MatchingSettings()")

    @property
    def report(self) -> Progress:
        return self.progress or (lambda done, total, what: None)

    @property
    def examples(self) -> int:
        """For counting equations."""
        return 1 if self.batch_size == "auto" else self.batch_size


def _runs_client(told: _Told, first: ObservedUpdate) -> bool:
    """Whether updates of several steps can be solved as such.

    Several examples: a chain that begins with a dense layer and ReLU tells them apart by it. With others the dense
    layers tell more apart in the average gradient than the head, with which running the client begins.
    """
    chain = told.network.chain
    if first.exact or told.method != "auto" or chain is None:
        return False
    if begins_dense(chain):
        return first.scale_known or told.batch_size != 1
    determined = is_determined(chain, told.parameters, told.network.image_shape, told.examples)
    return determined and first.scale_known and told.batch_size == 1


def _invert(told: _Told, heads: Recovery | None, updates: Sequence[ObservedUpdate] | None) -> Inversion:
    network, reason, known = told.network, "", None
    if network.chain is not None and told.method != "matching":
        reason = describe_determinacy(network.chain, told.parameters, network.image_shape, told.examples)
        known = invert(
            network.chain,
            told.parameters,
            told.gradients,
            network.image_shape,
            batch_size=told.batch_size,
            unknown_scale=told.unknown_scale,
            heads=heads,
            noise=None if updates is None else _noise_of(updates),
            progress=lambda done, total: told.report(done, total, "inverting layer by layer"),
        )
        if told.method == "exact" or not reason:
            return Inversion("exact", known, reason)
        if told.unknown_scale or np.all(np.any(known.label_verdict < Verdict.AMBIGUOUS, axis=1)):
            return Inversion("labels", known, reason)
    if told.matching is None:
        return Inversion("labels", known or _labels(told, heads, updates), reason)
    return Inversion("matching", _match(told, known, heads, updates), reason)


def _noise_of(updates: Sequence[ObservedUpdate]) -> Any:
    """(N,) root mean square of what rounding of the parameters leaves on each array."""
    return jax.tree.map(
        lambda *leaves: np.array([np.sqrt(np.mean(np.square(leaf))) for leaf in leaves]),
        *(update.rounding for update in updates),
    )


def _match(
    told: _Told, known: ImageRecovery | None, heads: Recovery | None, updates: Sequence[ObservedUpdate] | None
) -> ImageRecovery:
    network = told.network
    if told.unknown_scale:
        raise ValueError(
            "the gradients' scale is not known (--unknown-scale, or no learning rate), and matching compares gradients"
            " with their scale; use the exact method, or tell the rate"
        )
    if known is None:
        known = _labels(told, heads, updates)
    settings, features_fn = told.matching, None
    assert settings is not None
    if network.chain is not None and network.function is None and settings.method == "g":
        features_fn, settings = network.features_fn, replace(settings, method="gf")
    found = match(
        network.apply_fn,
        told.parameters,
        told.gradients,
        network.image_shape,
        known=known,
        features_fn=features_fn,
        settings=settings,
        restarts=told.restarts,
        progress=lambda done, total: told.report(done, total, "matching gradients"),
    )
    if network.chain is None or is_determined(network.chain, told.parameters, network.image_shape, told.examples):
        return found
    # One of many images that have this gradient.
    several = found.verdict == ImageVerdict.APPROXIMATE
    return replace(found, verdict=np.where(several, ImageVerdict.UNDETERMINED, found.verdict))


def _labels(told: _Told, heads: Recovery | None, updates: Sequence[ObservedUpdate] | None) -> ImageRecovery:
    """Without images: by the head, or for batches by the dense layers that the model ends in."""
    if told.batch_size == 1:
        own = heads
        if own is None:
            observation = observe_head(told.parameters, told.gradients, name=told.network.head)
            own = recover_many(observation, unknown_scale=told.unknown_scale)
        labels, features, verdicts = (np.asarray(part)[:, None] for part in (own.label, own.feature, own.verdict))
    else:
        total = len(jax.tree.leaves(told.gradients)[0])
        labels, features, verdicts = _side_by_side(
            [_batch(told, None if updates is None else updates[index], index) for index in range(total)]
        )
    total, examples = verdicts.shape
    images = np.full((total, examples, *told.network.image_shape), np.nan, np.float32)
    unseen = np.full((total, examples), ImageVerdict.NOT_FOUND, np.int32)
    residual, expected, empty = np.full(total, np.nan), np.full((total, examples), np.nan), np.empty((total, 0))
    return ImageRecovery(images, labels, features, verdicts, unseen, residual, expected, empty, empty, ())


def _batch(told: _Told, update: ObservedUpdate | None, index: int) -> BatchRecovery | None:
    """Of one gradient; None where nothing tells its examples apart."""
    head = told.network.head
    options: dict[str, Any] = {"batch_size": told.batch_size, "unknown_scale": told.unknown_scale}
    found: Any
    if update is not None:
        found = recover_update(update, batch_size=told.batch_size, head=head)
    else:
        own = jax.tree.map(lambda leaf: leaf[index], told.gradients)
        if len(find_dense_end(told.parameters, head=head)) > 1:
            found = as_batch(recover_model(told.parameters, own, head=head, **options))
        else:
            found = recover(observe_head(told.parameters, own, name=head), **options)
    return None if isinstance(found, ClassCounts) else found


def _side_by_side(batches: Sequence[BatchRecovery | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N, B, C), features (N, B, d) and verdicts (N, B); NaN where one has fewer examples than another."""
    seen = [batch for batch in batches if batch is not None]
    if not seen:
        raise ValueError(
            "nothing tells the examples of a batch apart here: as many as classes or more, and no dense layer before"
            " the head; recover gives their mean label and counts of classes"
        )
    examples = max(len(batch.verdict) for batch in seen)
    labels = np.full((len(batches), examples, seen[0].label.shape[1]), np.nan, seen[0].label.dtype)
    features = np.full((len(batches), examples, seen[0].feature.shape[1]), np.nan, seen[0].feature.dtype)
    verdicts = np.full((len(batches), examples), Verdict.NOT_FOUND, np.int32)
    for row, batch in enumerate(batches):
        if batch is not None:
            found = len(batch.verdict)
            labels[row, :found], features[row, :found] = batch.label, batch.feature
            verdicts[row, :found] = batch.verdict
    return labels, features, verdicts
