"""What to audit: a frozen record, from Python, flags or a TOML file, checked before any work."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softinv_jax.audit.catalogue import DEFENCES
from softinv_jax.audit.models import MODELS
from softinv_jax.client.dataset_names import PHOTOGRAPHS_NAME
from softinv_jax.client.soft_labels import FAMILIES

__all__ = ["AuditSettings", "Sweep", "default_sweeps", "quick_settings", "settings_from_toml"]

_SWITCHES = ("sign", "head_withheld", "cutmix")
# These need no second compiled search, for gradients of unknown scale.
_QUICK = ("gaussian_noise", "pruning", "smoothing", "head_withheld")


@dataclass(frozen=True)
class Sweep:
    """One defence at several strengths.

    Attributes:
      defence: a name of `DEFENCES`. strengths: from weak to strong; one, 1, for a defence that has none.
      others: (name, strength) of defences that are always on, applied after it.
    """

    defence: str
    strengths: tuple[float, ...]
    others: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for name, strength in ((self.defence, None), *self.others):
            if name not in DEFENCES:
                raise ValueError(f"defence {name!r} is unknown; choose among {', '.join(DEFENCES)}")
            for value in self.strengths if strength is None else (strength,):
                _check_strength(name, value)
        if not self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths of {self.defence} are {self.strengths}; give one or more, each once")
        of_labels = [name for name in (self.defence, *dict(self.others)) if DEFENCES[name].make is None]
        if len(of_labels) > 1:
            raise ValueError(f"{' and '.join(of_labels)} both make the label; combine only one of them with others")

    @property
    def title(self) -> str:
        """For people."""
        others = [f"{DEFENCES[name].title} {strength:g}" for name, strength in self.others]
        return " + ".join([DEFENCES[self.defence].title, *others])


def _check_strength(name: str, value: Any) -> None:
    low, high = DEFENCES[name].bounds
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high
        or value == float("inf")
    ):
        what = DEFENCES[name].strength or "on or off: give 1"
        upper = "" if high == float("inf") else f" to {high:g}"
        raise ValueError(f"{name} has the strength {value!r}, but needs a number from {low:g}{upper} ({what})")


def default_sweeps(names: tuple[str, ...], others: tuple[tuple[str, float], ...] = ()) -> tuple[Sweep, ...]:
    """A sweep of each defence over its default strengths.

    Raises:
      ValueError: on an unknown name.
    """
    for name in names:
        if name not in DEFENCES:
            raise ValueError(f"defence {name!r} is unknown; choose among {', '.join(DEFENCES)}")
    return tuple(Sweep(name, DEFENCES[name].strengths, others) for name in names)


@dataclass(frozen=True)
class AuditSettings:
    """What to audit.

    Attributes:
      title: of the report.
      network: a name of `MODELS`. epochs: of training on the data before the attack; 0 for the untrained network.
      dataset: `photographs`, `folder:PATH`, `FILE.npz`, or a prepared TFDS data set. data_dir: where that was prepared.
      label_format: a name of `FAMILIES`: what clients train on where the defence is not one of the label.
      scale_known: whether the observer knows the factor between what clients send and the gradient of their loss.
      samples: clients, each with one example, in each cell (defence and strength).
      images: of how many of them the image is inverted too, where the network is a chain of layers.
      sweeps: the defences. seed: the same seed gives the same audit.
      sampling_rate, steps, delta: of the training run that the epsilon of DP-SGD is stated for.

    Raises:
      ValueError: naming the field, its value and what it may be.
    """

    title: str = "What the gradients give away"
    network: str = "lenet"
    epochs: int = 0
    dataset: str = PHOTOGRAPHS_NAME
    data_dir: str | None = None
    label_format: str = "hard"
    scale_known: bool = True
    samples: int = 100
    images: int = 3
    sweeps: tuple[Sweep, ...] = default_sweeps(
        ("differential_privacy", "gaussian_noise", "pruning", "quantisation", "smoothing", *_SWITCHES)
    )
    seed: int = 0
    sampling_rate: float = 0.01
    steps: int = 1000
    delta: float = 1e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name))
        for name, choices in (("network", tuple(MODELS)), ("label_format", FAMILIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)!r} is unknown; choose among {', '.join(choices)}")
        least = {"samples": 1, "images": 0, "epochs": 0, "seed": 0, "steps": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} = {getattr(self, name)}: give {smallest} or more")
        if self.seed >= 2**32:
            raise ValueError(f"seed = {self.seed}: give a number below 2^32")
        if self.images > self.samples:
            raise ValueError(f"images = {self.images}, but there are only samples = {self.samples}; give fewer images")
        if not 0 < self.sampling_rate <= 1 or not 0 < self.delta < 1:
            raise ValueError(
                f"sampling_rate = {self.sampling_rate} must lie in (0, 1], and delta = {self.delta} in (0, 1)"
            )
        if self.data_dir is not None and self.dataset == PHOTOGRAPHS_NAME:
            raise ValueError(f"data_dir = {self.data_dir!r} is for a TFDS data set; name that as the dataset")
        keys = [(sweep.defence, sweep.others) for sweep in self.sweeps]
        if len(set(keys)) < len(keys):
            raise ValueError("a defence is swept twice; put all its strengths into one sweep")


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("title", "network", "dataset", "label_format"), (str,)),
    **dict.fromkeys(("epochs", "samples", "images", "seed", "steps"), (int,)),
    **dict.fromkeys(("sampling_rate", "delta"), (int, float)),
    "data_dir": (str, type(None)),
    "scale_known": (bool,),
    "sweeps": (tuple,),
}


def _check_type(name: str, value: Any) -> None:
    expected = _TYPES[name]
    # A Boolean is an int for Python, but not for people.
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        names = " or ".join(kind.__name__ for kind in expected)
        raise ValueError(f"{name} = {value!r} must be of type {names}")


def quick_settings(settings: AuditSettings) -> AuditSettings:
    """A smaller audit of the same system: 24 clients, two images, every other strength; of the default sweeps four."""
    chosen = default_sweeps(_QUICK) if settings.sweeps == AuditSettings.sweeps else settings.sweeps
    sweeps = tuple(dataclasses.replace(one, strengths=one.strengths[1::2] or one.strengths) for one in chosen)
    samples = min(settings.samples, 24)
    return dataclasses.replace(settings, samples=samples, images=min(settings.images, 2, samples), sweeps=sweeps)


def settings_from_toml(text: str) -> AuditSettings:
    """Read settings from TOML: the fields of `AuditSettings`, and `[[sweep]]` tables.

    A sweep has `defence`, perhaps `strengths`, and perhaps `with`, a list of {defence, strength} that are always on.

    >>> settings = settings_from_toml('''
    ... samples = 50
    ... [[sweep]]
    ... defence = "pruning"
    ... strengths = [0.5, 0.9]
    ... with = [{defence = "clipping", strength = 1.0}]
    ... ''')
    >>> settings.samples, settings.sweeps[0].title
    (50, 'Pruning (top-k) + Clipping 1')

    Raises:
      ValueError: on text that is not TOML, an unknown key, or a value out of range, naming it.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from error
    sweeps = table.pop("sweep", None)
    allowed = [field.name for field in dataclasses.fields(AuditSettings) if field.name != "sweeps"]
    unknown = sorted(set(table) - set(allowed))
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; known are {', '.join(allowed)}, and [[sweep]] tables")
    if sweeps is not None:
        if not isinstance(sweeps, list) or not all(isinstance(sweep, dict) for sweep in sweeps):
            raise ValueError("sweep must be given as tables: [[sweep]] on a line of its own, then its keys")
        table["sweeps"] = tuple(_sweep(sweep) for sweep in sweeps)
    return AuditSettings(**table)


def _sweep(table: Mapping[str, Any]) -> Sweep:
    unknown = sorted(set(table) - {"defence", "strengths", "with"})
    if unknown or not isinstance(table.get("defence"), str):
        problem = f"unknown: {', '.join(unknown)}" if unknown else "it names no defence"
        raise ValueError(f"[[sweep]]: {problem}; its keys are defence, strengths and with")
    name, others = table["defence"], table.get("with", [])
    if not isinstance(others, list) or not all(
        isinstance(other, dict) and set(other) in ({"defence"}, {"defence", "strength"}) for other in others
    ):
        raise ValueError(f"[[sweep]] {name}: with = {others!r}; give a list of {{defence = ..., strength = ...}}")
    (plain,) = default_sweeps((name,))
    strengths = table.get("strengths", list(plain.strengths))
    if not isinstance(strengths, list):
        raise ValueError(f"[[sweep]] {name}: strengths = {strengths!r}; give a list of numbers")
    return Sweep(name, tuple(strengths), tuple((other["defence"], other.get("strength", 1.0)) for other in others))
