"""The defences an audit can sweep, as data: what their strength means, and how each is made."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from softinv_jax.client.defences import (
    Clipping,
    Defence,
    DifferentialPrivacy,
    GaussianNoise,
    HeadNoise,
    HeadWithheld,
    LaplaceNoise,
    Pruning,
    Quantisation,
    Sign,
)

__all__ = ["DEFENCES", "DefenceKind", "make_defence"]

Make = Callable[[jax.Array, jax.Array, str], Defence]


@dataclass(frozen=True)
class DefenceKind:
    """One defence.

    Attributes:
      title: for people. strength: what the number is, "" for a defence without one.
      explanation: what the client does, in a sentence.
      strengths: a default sweep, from weak to strong; each must lie in `bounds`.
      make: (strength, reference norm, path of the head) -> the defence of the gradient; None for one of the label.
      rescales: it changes the gradient by a factor the observer cannot know, who then takes the scale as unknown.
    """

    title: str
    strength: str
    explanation: str
    strengths: tuple[float, ...]
    bounds: tuple[float, float]
    make: Make | None
    rescales: bool = False


_NOISE = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_POSITIVE = (0.0, float("inf"))
_SHARE = (0.0, 1.0)
_RELATIVE = "of the median norm of a gradient"

DEFENCES = {
    "gaussian_noise": DefenceKind(
        "Gaussian noise",
        f"standard deviation of each entry, as a fraction {_RELATIVE}",
        "adds Gaussian noise to every entry",
        _NOISE,
        _POSITIVE,
        lambda strength, norm, head: GaussianNoise(strength * norm),
    ),
    "laplace_noise": DefenceKind(
        "Laplace noise",
        f"scale of the noise on each entry, as a fraction {_RELATIVE}",
        "adds Laplace noise to every entry",
        _NOISE,
        _POSITIVE,
        lambda strength, norm, head: LaplaceNoise(strength * norm),
    ),
    "differential_privacy": DefenceKind(
        "DP-SGD (clipping and noise)",
        "noise multiplier: standard deviation of each entry over the clipping norm",
        "clips to the median norm of a gradient and adds Gaussian noise in proportion to it",
        _NOISE,
        _POSITIVE,
        lambda strength, norm, head: DifferentialPrivacy(norm, strength),
        rescales=True,
    ),
    "clipping": DefenceKind(
        "Clipping",
        f"clipping norm, as a fraction {_RELATIVE}",
        "scales the gradient down to a largest norm",
        (2.0, 1.0, 0.5, 0.1, 0.01, 0.001),
        (1e-12, float("inf")),
        lambda strength, norm, head: Clipping(strength * norm),
        rescales=True,
    ),
    "pruning": DefenceKind(
        "Pruning (top-k)",
        "share of the smallest entries of each layer that are set to zero",
        "keeps only the largest entries of each layer",
        (0.1, 0.5, 0.8, 0.9, 0.99, 0.999),
        _SHARE,
        lambda strength, norm, head: Pruning(strength),
    ),
    "quantisation": DefenceKind(
        "Quantisation",
        "bits of each entry",
        "rounds the entries of each layer to evenly spaced levels",
        (16.0, 12.0, 8.0, 6.0, 4.0, 2.0),
        (2.0, 32.0),
        lambda strength, norm, head: Quantisation(strength),
    ),
    "sign": DefenceKind(
        "Sign",
        "",
        "sends the sign of each entry alone",
        (1.0,),
        (1.0, 1.0),
        lambda strength, norm, head: Sign(),
        rescales=True,
    ),
    "head_withheld": DefenceKind(
        "Last layer withheld",
        "",
        "sends zeros for the last layer",
        (1.0,),
        (1.0, 1.0),
        lambda strength, norm, head: HeadWithheld(head),
    ),
    "head_noise": DefenceKind(
        "Noise on the last layer",
        f"standard deviation of each entry of the last layer, as a fraction {_RELATIVE}",
        "adds Gaussian noise to the last layer's entries alone",
        _NOISE,
        _POSITIVE,
        lambda strength, norm, head: HeadNoise(strength * norm, head),
    ),
    "smoothing": DefenceKind(
        "Label smoothing",
        "smoothing strength",
        "trains on (1 - a) y + a / C instead of the hard label y",
        (0.01, 0.05, 0.1, 0.2, 0.5, 0.9),
        _SHARE,
        None,
    ),
    "mixup": DefenceKind(
        "Mixup",
        "share of the second image and label",
        "mixes two images and their labels",
        (0.01, 0.05, 0.1, 0.2, 0.3, 0.5),
        _SHARE,
        None,
    ),
    "cutmix": DefenceKind(
        "CutMix", "", "pastes a box of a second image and mixes the labels", (1.0,), (1.0, 1.0), None
    ),
    "distillation": DefenceKind(
        "Distillation labels",
        "share of a random dense label in the label",
        "trains on labels of which every entry is free, as a teacher network gives them",
        (0.001, 0.01, 0.05, 0.1, 0.5, 1.0),
        _SHARE,
        None,
    ),
}


def make_defence(name: str, strength: jax.Array, norm: jax.Array, head: str) -> Defence | None:
    """The defence `name` of the gradient at a strength, which may be traced; None for a defence of the label.

    Args:
      norm: () reference norm that strengths are fractions of. head: path of the last layer.
    """
    make = DEFENCES[name].make
    return None if make is None else make(strength, norm, head)
