"""What the observer is assumed to know, and what each recovered quantity rests on, as data."""

from dataclasses import dataclass

from softinv_jax.audit.settings import AuditSettings
from softinv_jax.audit.system import System

__all__ = ["ThreatModel", "threat_model"]


@dataclass(frozen=True)
class ThreatModel:
    """Attributes:
    assumptions: (subject, what is assumed of it). rests_on: (recovered quantity, what it is computed from).
    """

    assumptions: tuple[tuple[str, str], ...]
    rests_on: tuple[tuple[str, str], ...]


def threat_model(settings: AuditSettings, system: System) -> ThreatModel:
    """The assumptions of an audit of this system with these settings."""
    scale = (
        "known: the observer has the gradient of the client's loss itself; unknown where a defence rescales it"
        " (clipping, DP-SGD, sign)"
        if settings.scale_known
        else "unknown: any factor (learning rate, sum or mean, clipping) may have been applied"
    )
    norm = (
        "evaluation mode: its running statistics are fixed and known"
        if system.has_batch_norm
        else "the network has none"
    )
    images = (
        "the gradient of every layer, the recovered feature, and the network being a chain of invertible layers"
        if system.chain is not None
        else "not attempted here: the network is no chain of layers (softinv invert --method matching does)"
    )
    return ThreatModel(
        assumptions=(
            (
                "Observer",
                "an honest-but-curious server that sees each client's upload by itself (no secure aggregation)",
            ),
            ("Parameters", f"known exactly: the server sent them ({system.name})"),
            ("Upload", "the gradient of one local step"),
            ("Batch size", "1 example, known"),
            ("Scale", scale),
            ("Label format", "not told"),
            ("Batch normalisation", norm),
            (
                "Defence",
                "its strength and its random numbers are not told; noise is estimated from the gradient itself, as what"
                " is not one outer product. The observer does not adapt to the defence: a leak shown here is real, but"
                " none shown is no proof that there is none",
            ),
            ("Data", "no prior knowledge of images or labels; the normalisation of pixels is used for display only"),
        ),
        rests_on=(
            ("Label", "the last layer's weights and gradient, and the label being equal on all but a few classes"),
            ("Feature", "the same: it is the gradient's row space times the recovered scalar"),
            (
                "Class",
                "the recovered label; where there is none, the row of the last layer's gradient with the smallest"
                " sum, which is right where features are not negative",
            ),
            ("Image", images),
        ),
    )
