"""What a recovery claims, and the result that carries the claim with its evidence."""

import enum
from dataclasses import dataclass, field
from functools import cached_property

import jax
import numpy as np

from softinv_jax.labels.features import FeatureSource, features_of

__all__ = [
    "Assumptions",
    "Candidates",
    "Evidence",
    "LabelFormat",
    "LabelKind",
    "MeanLabel",
    "Recovery",
    "Verdict",
    "verdict_names",
]


class Verdict(enum.IntEnum):
    """How sure a recovery is.

    Attributes:
      REFUTED: the gradient contradicts what was assumed of it, and nothing that was tried explains it; see
        `Recovery.assumptions`.
      NOT_FOUND: one of a batch that the search did not find, or not surely enough; nothing is said of it.
      NO_SIGNAL: the gradient is zero, or noise: nothing can be said.
      UNIDENTIFIABLE: more labels than can be listed explain the gradient; see `Recovery.interval`.
      AMBIGUOUS: a few labels explain it, or one whose structure could be an accident; see `Recovery.candidates`.
      CONDITIONAL: the label is right if the loss, the scale and whatever else `Recovery.assumptions` names are as told:
        nothing in the gradient confirms them.
      UNIQUE: no other soft label that singles out as few classes explains the gradient.
    """

    REFUTED = -2
    NOT_FOUND = -1
    NO_SIGNAL = 0
    UNIDENTIFIABLE = 1
    AMBIGUOUS = 2  # A label is given from here on.
    CONDITIONAL = 3
    UNIQUE = 4


def verdict_names(codes: object) -> np.ndarray:
    """Verdict codes of any shape as lower-case strings."""
    names = {int(verdict): verdict.name.lower() for verdict in Verdict}
    ordered = np.array([names[code] for code in sorted(names)])
    return ordered[np.asarray(codes) - min(names)]


class LabelKind(enum.IntEnum):
    """Family of a recovered label. k-way mixup and CutMix have the form of mixup."""

    UNKNOWN = 0
    HARD = 1
    SMOOTHING = 2
    MIXUP = 3
    SMOOTHED_MIXUP = 4
    DENSE = 5
    MULTI_LABEL = 6  # Several ones, of independent sigmoids.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelFormat:
    """The format read off a label y = (1 - smoothing) * mixture + smoothing / C.

    Attributes:
      kind: () int32, a `LabelKind`.
      classes: (K,) int32, the classes singled out by falling weight, then -1; K = min(C, 8).
      weights: (K,) their shares in the mixture, sum 1, then 0.
      count: () int32, how many classes are singled out (may exceed K).
      smoothing: () strength of label smoothing.
    """

    kind: jax.Array
    classes: jax.Array
    weights: jax.Array
    count: jax.Array
    smoothing: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Distinct explanations, the best first; NaN where there are fewer than K.

    Attributes:
      scalar: (K,) lambda. scale: (K,) factor on the gradient. label: (K, C).
      surprise: (K,) nats, see `Evidence.surprise`.
    """

    scalar: jax.Array
    scale: jax.Array
    label: jax.Array
    surprise: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Evidence:
    """Why the verdict is what it is.

    Attributes:
      agreeing: () int32, classes on which the label is one common level.
      informative: () int32, how many distinguishable softmax entries those have; agreement of these could fail.
      distinct_logits: () int32, number of distinguishable softmax entries among the C classes.
      surprise: () nats by which this much agreement would surprise if the label were dense.
      misfit: () mean squared deviation of the agreeing classes from their level, in units of the expected error.
      scalar_deviation: () standard deviation of lambda. label_deviation: (C,) of the label's entries.
      rank_one_residual: () part of the gradient that is not one outer product, relative.
      is_noiseless: () bool, that part is explained by the rounding of the gradient's dtype.
      residual: () relative distance between the gradient and scale (softmax(W x + b) - y) x^T as recovered.
    """

    agreeing: jax.Array
    informative: jax.Array
    distinct_logits: jax.Array
    surprise: jax.Array
    misfit: jax.Array
    scalar_deviation: jax.Array
    label_deviation: jax.Array
    rank_one_residual: jax.Array
    is_noiseless: jax.Array
    residual: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Assumptions:
    """What the recovery takes for granted, what the gradient says against it, and the loss that was found.

    Attributes:
      loss: () int32, the `Loss` that explains the gradient.
      temperature: () T of the softmax; 1 unless it was found, NaN where nothing was.
      logit_error: () standard deviation of what the client's arithmetic (TF32, bfloat16), or parameters that are not
        quite those given, add to each logit; 0 unless the gradient shows it.
      refuted: () int32, `Assumption` flags of what was told or taken for granted and is not so.
      rests_on: () int32, `Assumption` flags of what a conditional label is right under.
      examples: () int32, how many examples stand out of the noise; 0 where that was not looked at. At most 32 are
        counted, and never more than the classes.
    """

    loss: jax.Array
    temperature: jax.Array
    logit_error: jax.Array
    refuted: jax.Array
    rests_on: jax.Array
    examples: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanLabel:
    """The mean label of several examples behind one gradient; NaN where it is of one, or not known.

    Attributes:
      label: (C,). deviation: (C,) standard deviation.
    """

    label: jax.Array
    deviation: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recovery:
    """What one gradient gives away. Under `vmap` every field has a leading axis.

    Attributes:
      label: (C,) soft label; NaN unless the verdict is unique, conditional or ambiguous (then the best candidate's).
      stored_feature: the feature, or what it is made from; see `feature`.
      scalar: () lambda = |x| with the sign that goes with the singular vector.
      scale: () factor between the observed gradient and dL/dW; 1 where the scale was known.
      format: the label's format.
      verdict: () int32, a `Verdict`.
      interval: (2,) the lambda for which y is a valid label, where the verdict is unidentifiable.
      candidates: distinct explanations.
      evidence: why.
      assumptions: the loss, and what the verdict takes for granted.
      mean: the mean label, where the gradient is of several examples.
      all but the integers in the dtype of the gradient, or float64 where that was given.
    """

    label: jax.Array
    # Files name it by what it holds.
    stored_feature: jax.Array | FeatureSource = field(metadata={"name": "feature"})
    scalar: jax.Array
    scale: jax.Array
    format: LabelFormat
    verdict: jax.Array
    interval: jax.Array
    candidates: Candidates
    evidence: Evidence
    assumptions: Assumptions
    mean: MeanLabel

    @cached_property
    def feature(self) -> jax.Array:
        """(d,) last-layer feature, NaN where the label is; of many it is made when it is first asked for.

        Raises:
          ValueError: where NumPy gradients were overwritten since.
        """
        stored = self.stored_feature
        return features_of(stored) if isinstance(stored, FeatureSource) else stored

    @property
    def verdict_name(self) -> np.ndarray:
        """The verdict as lower-case strings, in the shape of `verdict`."""
        return verdict_names(self.verdict)
