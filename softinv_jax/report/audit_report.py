"""report.html: one file that needs nothing else, for a browser, a telephone or paper."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jinja2

from softinv_jax.audit.catalogue import DEFENCES
from softinv_jax.audit.run import AuditResult
from softinv_jax.audit.summary import CellSummary, Estimate, Share

__all__ = ["UpdateRow", "render_report", "render_updates_report"]

VERDICTS = (
    ("unique", "no other label that singles out as few classes explains the gradient"),
    ("conditional", "the label is right if loss, scale and parameters are as told; nothing confirms them"),
    ("ambiguous", "a few labels explain it; the likeliest is meant where one is shown"),
    ("unidentifiable", "more labels explain it than can be listed"),
    ("refuted", "the gradient contradicts what was assumed of it: one example, its loss, its scale"),
    ("no_signal", "the gradient is zero, or noise"),
    ("not_found", "one of a batch that the search did not find"),
    ("counted", "numbers of examples of each class, of some classes for sure"),
    ("likely", "the likeliest numbers of examples of each class"),
)


IMAGE_VERDICTS = (
    ("exact", "the client's image: its gradient is the one sent, and it is known to half a gray level"),
    ("approximate", "its gradient is the one sent; it is known less exactly than that"),
    ("undetermined", "one of many images that have this gradient: a picture of it, if any, is no evidence"),
    ("inconsistent", "its gradient is not quite the one sent: a likeness at best"),
    ("not_found", "no image, because nothing told the examples apart"),
)


@dataclass(frozen=True)
class UpdateRow:
    """What one example behind one client's update gives away, in words.

    Attributes:
      client: the update's file. verdict: of the label. label: the classes and their shares. kind: the label's format.
      certainty: of the label's entries. problem: why there is nothing, or "".
    """

    client: str
    verdict: str
    label: str
    kind: str
    certainty: str
    problem: str


def render_report(result: AuditResult, pictures: Mapping[str, bytes]) -> str:
    """The report of an audit as HTML.

    Args:
      result: what `audit` returned. pictures: PNG by name, as `audit_figures` names them.
    """
    sections = []
    names = [name for name in pictures if name.startswith("leakage-")]
    for sweep, cells in result.sweeps:
        kind = DEFENCES[sweep.defence]
        picture = names.pop(0) if len(cells) > 1 and names else None
        sections.append(
            {
                "title": sweep.title,
                "explanation": f"The client {kind.explanation}.",
                "strength": kind.strength,
                "rescales": kind.rescales,
                "picture": picture,
                "rows": [_cells_row(strength, cell) for strength, cell in zip(sweep.strengths, cells, strict=True)],
                "has_epsilon": any(cell.epsilon is not None for cell in cells),
            }
        )
    settings = {field.name: getattr(result.settings, field.name) for field in fields(result.settings)}
    settings.pop("sweeps")
    baseline = result.baseline
    return _render(
        "audit_report.html",
        title=result.settings.title,
        findings=result.findings,
        notes=result.notes,
        baseline=_cells_row(None, baseline),
        sections=sections,
        assumptions=result.threat_model.assumptions,
        rests_on=result.threat_model.rests_on,
        settings=settings | {"median gradient norm": f"{result.norm:.4g}"},
        versions=result.versions,
        pictures=_embedded(pictures),
        verdicts=VERDICTS,
        seconds=round(result.seconds),
        clients=baseline.certain.total,
        system=result.system.name,
        dataset=result.system.data.name,
        accuracy=result.system.accuracy,
    )


def render_updates_report(
    title: str,
    findings: Sequence[str],
    rows: Sequence[UpdateRow],
    assumptions: Sequence[tuple[str, str]],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    *,
    advice: Sequence[str] = (),
    pictures: Mapping[str, bytes] | None = None,
) -> str:
    """The report on updates that real clients sent, whose labels nobody told, as HTML.

    Args:
      advice: what to do next, a sentence each. pictures: PNG by name, `images` for those recovered.
    """
    return _render(
        "updates_report.html",
        advice=advice,
        pictures=_embedded(pictures or {}),
        image_verdicts=IMAGE_VERDICTS,
        title=title,
        findings=findings,
        rows=rows,
        assumptions=assumptions,
        settings=settings,
        versions=versions,
        verdicts=VERDICTS,
    )


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("softinv_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _embedded(pictures: Mapping[str, bytes]) -> dict[str, str]:
    return {name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in pictures.items()}


def _cells_row(strength: float | None, cell: CellSummary) -> dict[str, Any]:
    return {
        "strength": "" if strength is None else f"{strength:g}",
        "certain": _share(cell.certain),
        "likely": _share(cell.likely),
        "wrong": _share(cell.wrong),
        "class_found": _share(cell.class_found),
        "label_error": _estimate(cell.label_error, ".0e"),
        "feature_error": _estimate(cell.feature_error, ".0e"),
        "psnr": _estimate(cell.psnr, ".0f"),
        "cosine": _estimate(cell.cosine, ".2f"),
        "epsilon": "" if cell.epsilon is None else f"{cell.epsilon:.3g}",
        "verdicts": [(name, count) for name, count in cell.verdicts.items() if count],
        "image_verdicts": [(name, count) for name, count in cell.image_verdicts.items() if count],
    }


def _share(share: Share) -> dict[str, str]:
    interval = f"{100 * share.low:.0f} to {100 * share.high:.0f} %"
    return {"text": f"{share.count} of {share.total}", "interval": interval}


def _estimate(estimate: Estimate, digits: str) -> dict[str, str]:
    def written(value: float) -> str:
        return "0" if value == 0 else format(value, digits)

    if estimate.value is None:
        return {"text": "-", "interval": ""}
    ends = estimate.low, estimate.high
    interval = "" if None in ends else " to ".join(written(end) for end in ends if end is not None)
    return {"text": written(estimate.value), "interval": interval}
