"""An audit end to end: what leaks is counted rightly, defences reach the observer, and cells are used again."""

import dataclasses

import jax
import numpy as np
import pytest

from softinv_jax.audit import AuditResult, AuditSettings, Sweep, System, audit
from softinv_jax.audit.cells import draw_examples, median_gradient_norm, run_cells
from softinv_jax.audit.summary import share, summarise
from softinv_jax.client.defences import global_norm
from softinv_jax.client.gradients import model_gradient
from softinv_jax.labels.verdicts import Verdict

SETTINGS = AuditSettings(
    samples=6,
    images=2,
    label_format="mixup",
    sweeps=(
        Sweep("pruning", (0.0, 0.9)),
        Sweep("head_withheld", (1.0,)),
        Sweep("mixup", (0.1, 0.4)),
        Sweep("clipping", (0.5,)),
    ),
)


@pytest.fixture(scope="module")
def cells() -> dict:
    return {}


@pytest.fixture(scope="module")
def result(system: System, cells: dict) -> AuditResult:
    return audit(SETTINGS, system, cells=cells)


def test_without_a_defence_everything_leaks(result: AuditResult, system: System) -> None:
    assert (result.baseline.certain.count, result.baseline.certain.total) == (6, 6)
    assert result.baseline.class_found.count == 6
    assert result.baseline.image_verdicts["exact"] == 2
    assert result.baseline.label_error.value < 1e-5
    assert result.baseline.feature_error.value < 1e-5
    cell = result.baseline_cell
    np.testing.assert_allclose(cell["label"], cell["true_label"], atol=1e-5)
    np.testing.assert_allclose(cell["recovered"], cell["original"], atol=1e-3)
    assert result.baseline.cosine.value == pytest.approx(1)


def test_a_defence_of_no_strength_changes_nothing_and_a_strong_one_does(result: AuditResult) -> None:
    _, (none, strong) = result.sweeps[0]
    assert none.certain.count == 6
    assert strong.certain.count == 0
    assert strong.wrong.count == 0
    assert 0 < strong.cosine.value < none.cosine.value


def test_a_withheld_head_leaves_nothing(result: AuditResult) -> None:
    _, (withheld,) = result.sweeps[1]
    assert withheld.verdicts["no_signal"] == 6
    assert withheld.label_error.value is None
    assert withheld.image_verdicts == {
        "exact": 0,
        "approximate": 0,
        "inconsistent": 0,
        "undetermined": 0,
        "not_found": 2,
    }


def test_a_rescaled_gradient_is_recovered_with_its_scale(result: AuditResult) -> None:
    _, (clipped,) = result.sweeps[3]
    assert clipped.certain.count == 6
    assert clipped.cosine.value == pytest.approx(1)


def test_the_label_is_the_defences_where_that_makes_it(result: AuditResult) -> None:
    for (_, strength), cell in zip((("mixup", 0.1), ("mixup", 0.4)), result.sweeps[2][1], strict=True):
        assert cell.composition == (("mixup", strength),)
        assert cell.certain.count == 6
    true = result.shown[2][1]["true_label"]
    np.testing.assert_allclose(np.sort(true, axis=1)[:, -2:], [[0.4, 0.6]] * 6, atol=1e-6)


def test_findings_name_every_sweep_and_count_claims(result: AuditResult) -> None:
    text = " ".join(result.findings)
    assert result.findings[0].startswith("Without a defence, 6 of 6 clients' labels leak with certainty")
    for sweep, _ in result.sweeps:
        assert sweep.title in text
    assert "none are wrong by more than 0.1" in text


def test_the_norm_is_the_median_of_the_clients(result: AuditResult, system: System) -> None:
    examples = draw_examples(SETTINGS, system, ())
    norms = [
        global_norm(model_gradient(system.apply_fn, system.parameters, image, label))
        for image, label in zip(examples.images, examples.labels, strict=True)
    ]
    assert result.norm == pytest.approx(np.median(norms), rel=1e-5)
    assert median_gradient_norm(system, examples) == pytest.approx(result.norm)


def test_finished_cells_are_used_again_and_other_settings_have_their_own(
    result: AuditResult, system: System, cells: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = [], dict(cells)
    monkeypatch.setattr("softinv_jax.audit.run.run_cells", lambda *args: run.append(args[2]) or run_cells(*args))
    again = audit(SETTINGS, system, cells=kept)
    assert run == []
    assert dataclasses.replace(again, seconds=0).to_json() == dataclasses.replace(result, seconds=0).to_json()
    # One cell lost, as by an interruption: it alone is computed, and is what it was.
    lost = next(iter(cells))
    kept.pop(lost)
    audit(SETTINGS, system, cells=kept)
    assert [len(compositions) for compositions in run] == [1]
    jax.tree.map(np.testing.assert_array_equal, kept[lost], cells[lost])
    audit(dataclasses.replace(SETTINGS, seed=1, sweeps=()), system, cells=kept)
    assert [len(compositions) for compositions in run] == [1, 1]


def test_json_has_no_number_json_does_not_know(result: AuditResult) -> None:
    import json  # noqa: PLC0415

    json.dumps(result.to_json(), allow_nan=False)


def test_wilson_interval() -> None:
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    some, none = share(np.arange(263) < 81), share(np.zeros(20, bool))
    assert (some.low, some.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_a_claim_that_is_wrong_is_counted_as_wrong(result: AuditResult) -> None:
    cell = dict(result.baseline_cell)
    cell["label_error"] = np.array([0, 0.2, 0.2, np.nan, 0, 0])
    unique, ambiguous, unknown = Verdict.UNIQUE, Verdict.AMBIGUOUS, Verdict.UNIDENTIFIABLE
    cell["verdict"] = np.array([unique, unique, ambiguous, unknown, ambiguous, unique])
    summary = summarise((), cell)
    assert (summary.certain.count, summary.wrong.count, summary.likely.count) == (2, 1, 1)
