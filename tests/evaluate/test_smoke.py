"""`e2llm evaluate --suite smoke` on the quickstart's base: every protocol once, and a page that shows them all."""

from __future__ import annotations

from pathlib import Path

import pytest

import e2llm
from e2llm.cli import main
from e2llm.evaluate.suites import SUITES
from e2llm.records import Record

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_protocol_gives_rows_and_stands_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(e2llm.__file__).parent / "assets" / "tiny-512"
    assert main(["evaluate", str(model), "--suite", "smoke", "--out", "smoke.json"]) == 0
    record = Record.load("smoke.json")
    measured = {row.get("protocol") for row in record.rows} | {row.get("task") for row in record.rows}
    assert set(SUITES["smoke"]["protocols"]) <= measured
    assert main(["report", "smoke.json", "--out", "smoke.html"]) == 0
    page = Path("smoke.html").read_text()
    for part in ("perplexity", "retrieval", "ruler", "context", "attention"):
        assert f'<section id="{part}"' in page
    assert '<section id="others"' not in page
