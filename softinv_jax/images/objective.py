"""What gradient matching minimises: the settings, the gradient of a dummy example, and the loss between the two."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from softinv_jax.images.distances import DISTANCES, total_variation
from softinv_jax.observation.head import find_head

__all__ = [
    "DEEP_LEAKAGE",
    "ApplyFunction",
    "Distance",
    "Guess",
    "MatchingSettings",
    "Method",
    "Model",
    "Optimiser",
    "Target",
    "WholeBatch",
    "guessed_label",
    "kept_leaves",
    "logits_of",
    "mean_loss_gradient",
    "objective",
]

ApplyFunction = Callable[[Any, jax.Array], jax.Array]
"""(parameters, image (H, W, channels)) -> logits (C,), or features (d,)."""


class WholeBatch(NamedTuple):
    """A model whose examples act on each other, as through batch normalisation in training.

    apply: (parameters, images (B, H, W, channels)) -> logits (B, C).
    """

    apply: Callable[[Any, jax.Array], jax.Array]


Model = ApplyFunction | WholeBatch

Distance = Literal["l2", "cosine", "layerwise_cosine"]
Method = Literal["g", "f", "gf"]
Optimiser = Literal["adam", "signed_adam", "lbfgs"]


@dataclass(frozen=True)
class MatchingSettings:
    """How to match; the default is the paper's for cosine distances and an untrained network.

    Attributes:
      distance: between gradients; `cosine` takes all layers as one vector, `layerwise_cosine` each array by itself.
      method: `g` matches the gradient of all layers, `f` of all but the head and the head's input, `gf` both.
      optimiser: Adam, Adam on the sign of the gradient, or L-BFGS with a line search.
      steps: of the optimiser. Adam's rate falls to a tenth at 3/8, 5/8 and 7/8 of them.
      learning_rate: of Adam at the start; of L-BFGS, the longest step in units of its own.
      total_variation: weight of the anisotropic total variation; the paper's is 1e-2 untrained and 1e-3 trained.
      feature_weight: of the head's input in methods `f` and `gf`.
      optimise_label: move the label together with the image (DLG) instead of holding it fixed.

    Source: Wang, Liang and He, ICLR 2024, section 4.3; Geiping et al. 2020 for the cosine settings.
    """

    distance: Distance = "cosine"
    method: Method = "g"
    optimiser: Optimiser = "signed_adam"
    steps: int = 4800
    learning_rate: float = 0.1
    total_variation: float = 1e-2
    feature_weight: float = 1.0
    optimise_label: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("distance", Distance), ("method", Method), ("optimiser", Optimiser)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a positive integer, not {self.steps!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, not {self.learning_rate!r}")
        for name in ("total_variation", "feature_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite weight >= 0, not {getattr(self, name)!r}")

    @property
    def matches_feature(self) -> bool:
        """Whether the head's input is one of the things matched."""
        return self.method != "g"


DEEP_LEAKAGE = MatchingSettings(
    distance="l2", optimiser="lbfgs", steps=300, learning_rate=1.0, total_variation=0.0, optimise_label=True
)
"""Deep leakage from gradients, Zhu et al. 2019: l2, L-BFGS, and the label moves with the image."""


class Target(NamedTuple):
    """What is matched, and what is known: all arrays of one observation.

    gradient: pytree like the parameters. label: (C,) or (B, C). feature: (d,) or (B, d), or None.
    low, high: (channels,) smallest and largest value of a pixel.
    """

    gradient: Any
    label: jax.Array
    feature: jax.Array | None
    low: jax.Array
    high: jax.Array


class Guess(NamedTuple):
    """What is optimised: an image (H, W, channels) or (B, H, W, channels), and logits like the label or None."""

    image: jax.Array
    label_logits: jax.Array | None


def guessed_label(guess: Guess, target: Target) -> jax.Array:
    """The label of a guess: the given one, or where it is optimised the softmax of its logits."""
    return target.label if guess.label_logits is None else jax.nn.softmax(guess.label_logits)


def logits_of(apply_fn: Model, parameters: Any, image: jax.Array) -> jax.Array:
    """(C,) of one image (H, W, channels), or (B, C) of a batch (B, H, W, channels)."""
    if isinstance(apply_fn, WholeBatch):
        logits = apply_fn.apply(parameters, image if image.ndim == 4 else image[None])
        return logits if image.ndim == 4 else logits[0]
    return apply_fn(parameters, image) if image.ndim == 3 else jax.vmap(apply_fn, (None, 0))(parameters, image)


def mean_loss_gradient(apply_fn: Model, parameters: Any, image: jax.Array, label: jax.Array) -> Any:
    """Gradient by all parameters of the cross-entropy with a soft label; of a batch, of the mean over its examples.

    Args:
      apply_fn: the model of one image.
      parameters: pytree of arrays.
      image: (H, W, channels) or (B, H, W, channels). label: (C,) or (B, C).
    """

    def loss(candidate: Any) -> jax.Array:
        return -jnp.mean(jnp.sum(label * jax.nn.log_softmax(logits_of(apply_fn, candidate, image)), axis=-1))

    return jax.grad(loss)(parameters)


def kept_leaves(parameters: Any, method: Method, head: str | None) -> tuple[bool, ...]:
    """Which leaves of the gradient are matched: all, or for method `f` those outside the last dense layer.

    Args:
      parameters: pytree; for method `f` nested mappings of layers, in which `find_head` finds the head.
      method: see `MatchingSettings`.
      head: the head's name where there are several candidates.

    Raises:
      ValueError: if no head, or no other layer, is found.
    """
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    if method != "f":
        return (True,) * len(leaves)
    if not isinstance(parameters, Mapping):
        raise ValueError(
            "method='f' leaves the last layer out, and looks for it in nested mappings of layers, not in a"
            f" {type(parameters).__name__}; use 'g' or 'gf'"
        )
    path = tuple(find_head(parameters, name=head).split("/"))
    kept = tuple(tuple(str(getattr(part, "key", part)) for part in parts[: len(path)]) != path for parts, _ in leaves)
    if not any(kept):
        raise ValueError(f"method='f' matches all layers but {'/'.join(path)!r}, and there is no other; use 'gf'")
    return kept


def objective(
    guess: Guess,
    target: Target,
    parameters: Any,
    apply_fn: Model,
    features_fn: ApplyFunction | None,
    settings: MatchingSettings,
    kept: tuple[bool, ...],
) -> jax.Array:
    """The loss () of one guess: distance of the gradients, of the head's input, and total variation.

    `features_fn` repeats the forward pass only on paper: the compiler sees that it is the same computation.
    """
    label = guessed_label(guess, target)
    distance = DISTANCES[settings.distance]
    gradient = mean_loss_gradient(apply_fn, parameters, guess.image, label)
    loss = distance(_select(gradient, kept), _select(target.gradient, kept))
    if settings.matches_feature and features_fn is not None and target.feature is not None:
        loss += settings.feature_weight * _feature_distance(
            guess.image, target.feature, parameters, features_fn, settings
        )
    if settings.total_variation:
        loss += settings.total_variation * total_variation(guess.image)
    return loss


def _feature_distance(
    image: jax.Array, feature: jax.Array, parameters: Any, features_fn: ApplyFunction, settings: MatchingSettings
) -> jax.Array:
    distance = DISTANCES[settings.distance]
    if image.ndim == 3:
        return distance(features_fn(parameters, image), feature)
    features = jax.vmap(features_fn, (None, 0))(parameters, image)
    return jnp.mean(jax.vmap(distance)(features, feature))


def _select(tree: Any, kept: tuple[bool, ...]) -> list[jax.Array]:
    return [leaf for leaf, keep in zip(jax.tree.leaves(tree), kept, strict=True) if keep]
