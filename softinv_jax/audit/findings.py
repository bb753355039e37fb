"""The findings in plain sentences, the most important first."""

from collections.abc import Sequence

from softinv_jax.audit.catalogue import DEFENCES
from softinv_jax.audit.settings import Sweep
from softinv_jax.audit.summary import CellSummary, Share

__all__ = ["findings"]


def findings(baseline: CellSummary, sweeps: Sequence[tuple[Sweep, Sequence[CellSummary]]]) -> tuple[str, ...]:
    """What leaks without a defence, what each defence changes, and how far the claims can be trusted."""
    total = baseline.certain.total
    sentences = [_without_defence(baseline)]
    sentences += [_sweep(sweep, cells) for sweep, cells in sweeps]
    cells = [baseline, *(cell for _, swept in sweeps for cell in swept)]
    claims = sum(cell.certain.count + cell.wrong.count for cell in cells)
    wrong = sum(cell.wrong.count for cell in cells)
    verb = "is" if wrong == 1 else "are"
    if claims:
        sentences.append(
            f"Of {claims:,} labels called unique in all cells, {wrong or 'none'} {verb} wrong by more than 0.1."
        )
    sentences.append(
        f"Each figure comes from {total} clients; where none of {total} leaks, the true share is below"
        f" {_upper(total):.1%} with 95 % confidence. An observer who adapts to a defence may see more than this one."
    )
    return tuple(sentences)


def _upper(total: int) -> float:
    # The Wilson interval of none of `total`.
    return 1.96**2 / (total + 1.96**2)


def _without_defence(cell: CellSummary) -> str:
    text = f"Without a defence, {_of(cell.certain)} clients' labels leak with certainty"
    if cell.label_error.value is not None:
        text += f" (typical error {cell.label_error.value:.0e})" if cell.label_error.value > 0 else " (no error)"
    text += f", and the class of {_of(cell.class_found)}"
    if cell.images:
        exact = cell.image_verdicts["exact"]
        text += f"; {exact} of {cell.images} images come back exactly"
        if cell.psnr.value is not None:
            text += f" (mean PSNR {cell.psnr.value:.0f} dB)"
    return text + "."


def _sweep(sweep: Sweep, cells: Sequence[CellSummary]) -> str:
    kind = DEFENCES[sweep.defence]
    last = cells[-1]
    classes = f"the class is still found for {_of(last.class_found)}"
    if not kind.strength:
        return f"{sweep.title}: {_of(last.certain)} labels leak with certainty, and {classes}."
    strengths = sweep.strengths
    leaking = [place for place, cell in enumerate(cells) if cell.certain.count + cell.likely.count]
    if not leaking:
        return f"{sweep.title}: from {strengths[0]:g} on no label is recovered, but at {strengths[-1]:g} {classes}."
    worst = leaking[-1]
    if worst == len(cells) - 1:
        known = last.certain.count + last.likely.count
        return (
            f"{sweep.title} does not stop the leak: at its strongest ({strengths[-1]:g}), {known} of"
            f" {last.certain.total} labels are recovered, {last.certain.count} with certainty, and {classes}."
        )
    return (
        f"{sweep.title}: labels are recovered up to {strengths[worst]:g}; from {strengths[worst + 1]:g} on none is, but"
        f" at {strengths[-1]:g} {classes}. What is sent then has a cosine of {last.cosine.value or 0:.2f} with the"
        " gradient."
    )


def _of(share: Share) -> str:
    return f"{share.count} of {share.total}"
