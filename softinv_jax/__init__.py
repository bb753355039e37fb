"""softinv: what a client's gradient gives away in federated learning.

The observer's side, `recover` and `recover_many`, turns the gradient of a model's last dense layer into the client's
soft label and last-layer feature, with a verdict and its evidence; with `batch_size`, those of every example behind
one averaged gradient. The client's side, for experiments, is in `softinv_jax.client`.
"""

TYPE_CHECKING = False  # Not from typing, whose loading takes longer than all of this.
if TYPE_CHECKING:
    from softinv_jax.batches.batch_recovery import BatchRecovery
    from softinv_jax.batches.class_counts import ClassCounts, count_classes
    from softinv_jax.dense_layers.recovery import DenseRecovery
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
    from softinv_jax.recoveries import recover, recover_many
    from softinv_jax.whole_models import recover_model, recover_update

__all__ = [
    "Assumption",
    "Assumptions",
    "BatchRecovery",
    "Candidates",
    "ClassCounts",
    "DenseRecovery",
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
    "recover_model",
    "recover_update",
    "verdict_names",
]

# Loaded when first asked for: the command line must be able to end in one line while jax is still loading.
_HOMES = {
    "softinv_jax.batches.batch_recovery": ("BatchRecovery",),
    "softinv_jax.batches.class_counts": ("ClassCounts", "count_classes"),
    "softinv_jax.labels.assumptions": ("Assumption", "Loss", "explain_assumptions"),
    "softinv_jax.labels.verdicts": (
        "Assumptions",
        "Candidates",
        "Evidence",
        "LabelFormat",
        "LabelKind",
        "MeanLabel",
        "Recovery",
        "Verdict",
        "verdict_names",
    ),
    "softinv_jax.observation.head": (
        "Observation",
        "find_head",
        "observe",
        "observe_head",
    ),
    "softinv_jax.observation.updates": (
        "ObservedUpdate",
        "observe_update",
        "observe_update_head",
    ),
    "softinv_jax.recoveries": (
        "recover",
        "recover_many",
    ),
    "softinv_jax.dense_layers.recovery": ("DenseRecovery",),
    "softinv_jax.whole_models": (
        "recover_model",
        "recover_update",
    ),
}


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415 - as all here

    for home, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(home), name)
            globals()[name] = found
            return found
    try:
        return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
