"""The audit's page: everything in one file, escaped, and fit for a browser, a telephone and paper."""

import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from softinv_jax.audit import AuditResult, AuditSettings, Sweep, System
from softinv_jax.audit.cells import Cell
from softinv_jax.audit.findings import findings
from softinv_jax.audit.summary import summarise
from softinv_jax.audit.threat_model import threat_model
from softinv_jax.client import load_photographs
from softinv_jax.images.layer_chain import Dense, Flatten
from softinv_jax.labels.verdicts import Verdict
from softinv_jax.report.audit_figures import audit_figures
from softinv_jax.report.audit_report import UpdateRow, render_report, render_updates_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>document.title="owned"</script>'


def made_up_cell(certain: int, total: int = 6) -> Cell:
    true = np.eye(10)[np.arange(total) % 10]
    known = np.arange(total) < certain
    rng = np.random.default_rng(certain)
    images = rng.uniform(size=(2, 8, 8, 3))
    return {
        "verdict": np.where(known, Verdict.UNIQUE, Verdict.UNIDENTIFIABLE),
        "label": np.where(known[:, None], true, np.nan),
        "true_label": true,
        "label_error": np.where(known, 1e-7, np.nan),
        "class_found": np.ones(total, bool),
        "feature_error": np.where(known, 1e-6, np.nan),
        "cosine": np.full(total, 0.9),
        "original": images,
        "recovered": images if certain else np.full_like(images, np.nan),
        "image_tried": np.ones(2, bool),
        "image_verdict": np.full(2, 4 if certain else 0, np.int32),
        "psnr": np.full(2, 90.0 if certain else np.nan),
    }


@pytest.fixture(scope="module")
def result() -> AuditResult:
    """What an audit returns, without the attack."""
    sweeps = (Sweep("gaussian_noise", (1e-6, 1e-4, 1e-2)), Sweep("quantisation", (16.0, 4.0)), Sweep("sign", (1.0,)))
    settings = AuditSettings(title=f"Audit of {EVIL}", samples=6, images=2, sweeps=sweeps)
    data = load_photographs(per_class=1, image_size=8)
    chain = (Flatten(), Dense("head"))
    system = System("a small network", lambda parameters, image: image, {"head": {}}, chain, data)
    baseline = summarise((), made_up_cell(6))
    measured = [[made_up_cell(certain) for certain in counts] for counts in ((6, 3, 0), (5, 0), (0,))]
    swept = tuple(
        (sweep, tuple(summarise(((sweep.defence, strength),), cell) for strength, cell in zip(sweep.strengths, cells)))  # noqa: B905
        for sweep, cells in zip(sweeps, measured, strict=True)
    )
    return AuditResult(
        settings=settings,
        system=system,
        threat_model=threat_model(settings, system),
        findings=findings(baseline, swept),
        norm=1.5,
        versions={"jax": "0.0"},
        baseline=baseline,
        sweeps=swept,
        baseline_cell=made_up_cell(6),
        shown=tuple((sweep.title, cells[len(cells) // 2]) for sweep, cells in zip(sweeps, measured, strict=True)),
        notes=(),
        seconds=2.0,
    )


@pytest.fixture(scope="module")
def page(result: AuditResult) -> str:
    pictures = {}
    for name, figure in audit_figures(result).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        pictures[name] = buffer.getvalue()
    assert list(pictures) == ["labels", "images", "leakage-gaussian_noise", "leakage-quantisation"]
    return render_report(result, pictures)


@pytest.fixture(scope="module")
def updates_page() -> str:
    rows = [
        UpdateRow("client1.pt", "unique", "hard: class 3", "hard", "exact", ""),
        UpdateRow(EVIL, "", "", "", "", "no head was found"),
    ]
    return render_updates_report("Updates", ["One leaks."], rows, [("Observer", "a server")], {"updates": 2}, {})


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.targets: list[str] = []
        self.names: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value is not None:
                (self.targets if value.startswith("#") else self.sources).append(value)
            if name == "id" and value is not None:
                self.names.append(value)
            if tag == "img" and name == "alt":
                assert value


@pytest.mark.parametrize("kind", ["page", "updates_page"])
def test_the_page_needs_nothing_else_and_its_links_lead_somewhere(kind: str, request: pytest.FixtureRequest) -> None:
    links = _Links()
    links.feed(request.getfixturevalue(kind))
    assert all(source.startswith("data:") for source in links.sources)
    assert {target[1:] for target in links.targets} == set(links.names)
    assert "script" not in links.tags


def test_the_page_says_what_was_found(page: str, result: AuditResult) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for sentence in result.findings:
        assert sentence.replace("'", "&#39;") in text
    for subject, _ in (*result.threat_model.assumptions, *result.threat_model.rests_on):
        assert subject in text
    assert "3 of 6" in text
    assert "3 unique, 3 unidentifiable" in text
    assert "&lt;script&gt;" in page
    assert EVIL not in page


BROWSER = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET = ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
# Put at the end of a copy of the page: measures the layout as a reader's browser has it.
PROBE = """<iframe id="frame" style="width: {width}px; height: 800px; border: 0"></iframe><pre id="seen"></pre><script>
const frame = document.getElementById("frame"), errors = [];
frame.onload = () => {{
  const inner = frame.contentDocument, root = inner.documentElement;
  document.getElementById("seen").textContent = JSON.stringify({{
    wide: root.scrollWidth, width: root.clientWidth, title: inner.title,
    broken: [...inner.images].filter(image => !image.complete || !image.naturalWidth).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource")
      .filter(one => !one.name.startsWith("data:")).length,
  }});
}};
frame.srcdoc = {page};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("kind", ["page", "updates_page"])
def test_in_a_browser(kind: str, width: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No horizontal scrolling, no picture missing, nothing asked of the network, and no script of the data's run."""
    page = request.getfixturevalue(kind)
    encoded = json.dumps(page).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(PROBE.format(width=width, page=encoded), encoding="utf-8")
    options = (*BROWSER, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr")
    target = f"file://{tmp_path / 'probe.html'}"
    command = [str(CHROMIUM), *options, "--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom", target]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', run.stdout).group(1)))
    assert seen["width"] == width
    assert seen["wide"] <= width
    assert (seen["broken"], seen["requests"]) == (0, 0)
    assert seen["title"] != "owned"
    assert "CONSOLE" not in run.stderr
