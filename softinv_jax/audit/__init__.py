"""The audit: what a training system's gradients give away, and what would stop it, measured and stated."""

from softinv_jax.audit.run import AuditResult, audit
from softinv_jax.audit.settings import AuditSettings, Sweep, default_sweeps, quick_settings, settings_from_toml
from softinv_jax.audit.system import System, make_system

__all__ = [
    "AuditResult",
    "AuditSettings",
    "Sweep",
    "System",
    "audit",
    "default_sweeps",
    "make_system",
    "quick_settings",
    "settings_from_toml",
]
