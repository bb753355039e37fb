"""`audit`: from settings to a result, cell by cell, reusing the cells that are there."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from softinv_jax.audit.cells import Cell, Composition, draw_examples, median_gradient_norm, run_cells
from softinv_jax.audit.findings import findings
from softinv_jax.audit.settings import AuditSettings, Sweep
from softinv_jax.audit.summary import CellSummary, summarise
from softinv_jax.audit.system import System, make_system
from softinv_jax.audit.threat_model import ThreatModel, threat_model
from softinv_jax.client.defences import differential_privacy_epsilon
from softinv_jax.versions import package_versions

__all__ = ["AuditResult", "audit"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
      settings, system: what was audited. threat_model: what was assumed. findings: sentences for people.
      norm: median norm of an undefended gradient, the unit of the noise. versions: of what computed it.
      baseline: without a defence. sweeps: (sweep, one summary for each strength).
      baseline_cell: what was measured of each client without a defence, for the pictures.
      shown: (title, cell) of each sweep at its middle strength. notes: what was left out, and why.
      seconds: it took.
    """

    settings: AuditSettings
    system: System
    threat_model: ThreatModel
    findings: tuple[str, ...]
    norm: float
    versions: dict[str, str]
    baseline: CellSummary
    sweeps: tuple[tuple[Sweep, tuple[CellSummary, ...]], ...]
    baseline_cell: Cell
    shown: tuple[tuple[str, Cell], ...]
    notes: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything but arrays, in types JSON has: null stands for what is not known or not finite."""
        return _plain(
            {
                "findings": self.findings,
                "notes": self.notes,
                "settings": dataclasses.asdict(self.settings),
                "system": {
                    "name": self.system.name,
                    "classes": self.system.data.class_names,
                    "dataset": self.system.data.name,
                    "training_accuracy": self.system.accuracy,
                    "median_gradient_norm": self.norm,
                },
                "threat_model": dataclasses.asdict(self.threat_model),
                "baseline": dataclasses.asdict(self.baseline),
                "sweeps": [
                    {"defence": sweep.defence, "title": sweep.title, "cells": [dataclasses.asdict(c) for c in cells]}
                    for sweep, cells in self.sweeps
                ],
                "versions": self.versions,
                "seconds": round(self.seconds, 1),
            }
        )


def audit(
    settings: AuditSettings,
    system: System | None = None,
    *,
    cells: MutableMapping[str, Cell] | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Attack a system's clients without and with defences, and say what leaks.

    Args:
      settings: what to try.
      system: what to attack; by default what `make_system(settings)` gives.
      cells: finished cells by identifier, taken from here and put here; a mapping over files lets an interrupted
        audit go on where it was.
      progress: called with (cells done, cells in all, stage).

    Raises:
      ValueError: where settings and system do not fit each other.
      FileNotFoundError: where the data set is not prepared.
    """
    start = time.perf_counter()
    report = progress or (lambda done, total, stage: None)
    store: MutableMapping[str, Cell] = {} if cells is None else cells
    total = 1 + sum(len(sweep.strengths) for sweep in settings.sweeps)
    report(0, total, "reading images and preparing the network")
    system = system or make_system(settings)
    versions = package_versions()
    identity = _identity(settings, system, versions)
    examples = draw_examples(settings, system, ())
    norm = median_gradient_norm(system, examples)
    report(0, total, "attacking without a defence")
    (baseline_cell,) = _cells(settings, system, [()], norm, identity, store)
    done, swept, shown, notes = 1, [], [], []
    for sweep in settings.sweeps:
        report(done, total, f"attacking: {sweep.title}")
        compositions = [((sweep.defence, float(strength)), *sweep.others) for strength in sweep.strengths]
        measured = _cells(settings, system, compositions, norm, identity, store)
        summaries = []
        for composition, cell in zip(compositions, measured, strict=True):
            epsilon, note = _epsilon(settings, composition)
            notes += [note] if note and note not in notes else []
            summaries.append(summarise(composition, cell, epsilon))
        swept.append((sweep, tuple(summaries)))
        middle = len(measured) // 2
        strength = f", {sweep.strengths[middle]:g}" if len(measured) > 1 else ""
        shown.append((f"{sweep.title}{strength}", measured[middle]))
        done += len(measured)
    report(total, total, "writing the report")
    baseline = summarise((), baseline_cell)
    if system.chain is None and settings.images:
        notes.append("Images were not inverted: this network is no chain of layers; see softinv invert.")
    return AuditResult(
        settings=settings,
        system=system,
        threat_model=threat_model(settings, system),
        findings=findings(baseline, swept),
        norm=norm,
        versions=versions,
        baseline=baseline,
        sweeps=tuple(swept),
        baseline_cell=baseline_cell,
        shown=tuple(shown),
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
    )


def _cells(
    settings: AuditSettings,
    system: System,
    compositions: Sequence[Composition],
    norm: float,
    identity: str,
    store: MutableMapping[str, Cell],
) -> list[Cell]:
    names = [hashlib.sha256(f"{identity}{composition!r}".encode()).hexdigest()[:32] for composition in compositions]
    missing = [place for place, name in enumerate(names) if name not in store]
    if missing:
        for place, cell in zip(
            missing, run_cells(settings, system, [compositions[place] for place in missing], norm), strict=True
        ):
            store[names[place]] = cell
    return [store[name] for name in names]


def _identity(settings: AuditSettings, system: System, versions: Mapping[str, str]) -> str:
    """A digest of all that a cell depends on beside its defences."""
    digest = hashlib.sha256()
    kept = ("label_format", "scale_known", "samples", "images", "seed", "network", "epochs")
    digest.update(json.dumps({name: getattr(settings, name) for name in kept}).encode())
    digest.update(json.dumps([system.name, repr(system.chain), dict(versions)]).encode())
    probe = system.apply_fn(system.parameters, system.data.normalised()[0])
    for array in (system.data.images, system.data.classes, probe, *jax.tree.leaves(system.parameters)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _epsilon(settings: AuditSettings, composition: Composition) -> tuple[float | None, str]:
    strengths = [strength for name, strength in composition if name == "differential_privacy"]
    if not strengths:
        return None, ""
    try:
        return differential_privacy_epsilon(
            strengths[0], sampling_rate=settings.sampling_rate, steps=settings.steps, delta=settings.delta
        ), ""
    except ModuleNotFoundError as error:
        return None, f"No epsilon is stated. {error}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
