"""softinv: what a client's gradient gives away in federated learning.

The observer's side, `recover` and `recover_many`, turns the gradient of a model's last dense layer into the client's
soft label and last-layer feature, with a verdict and its evidence; with `batch_size`, those of every example behind
one averaged gradient. The client's side, for experiments, is in `softinv_jax.client`.
"""

from softinv_jax.batches.batch_recovery import BatchRecovery
from softinv_jax.batches.class_counts import ClassCounts, count_classes
from softinv_jax.labels.assumptions import Assumption, Loss, explain_assumptions
from softinv_jax.labels.verdicts import (
    Assumptions,
    Candidates,
    Evidence,
    LabelFormat,
    LabelKind,
    MeanLabel,
    Recovery,
    Verdict,
    verdict_names,
)
from softinv_jax.observation.head import Observation, find_head, observe, observe_head
from softinv_jax.observation.updates import ObservedUpdate, observe_update, observe_update_head
from softinv_jax.recoveries import recover, recover_many, recover_update

__all__ = [
    "Assumption",
    "Assumptions",
    "BatchRecovery",
    "Candidates",
    "ClassCounts",
    "Evidence",
    "LabelFormat",
    "LabelKind",
    "Loss",
    "MeanLabel",
    "Observation",
    "ObservedUpdate",
    "Recovery",
    "Verdict",
    "count_classes",
    "explain_assumptions",
    "find_head",
    "observe",
    "observe_head",
    "observe_update",
    "observe_update_head",
    "recover",
    "recover_many",
    "recover_update",
    "verdict_names",
]
