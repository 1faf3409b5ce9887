"""Task files: folder, zip and hub hold the same samples; what cannot be read is counted with its reason."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from e2llm.evaluate.samples import Sample, open_source, read_samples
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.evaluate.task_suites import SUITES, LeftOutWarning, load_data

LONGBENCH = SUITES["longbench"]


def row(index: int) -> dict[str, Any]:
    return {"_id": f"id{index}", "input": "Who?", "context": f"Text {index}\u2028 of Bob", "answers": ["Bob"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "tasks"
    root.mkdir()
    lines = [
        json.dumps(row(0), ensure_ascii=False),
        "",
        "{broken",
        json.dumps({"context": "x"}),
        "[1]",
        json.dumps(row(5)),
    ]
    (root / "hotpotqa.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "lcc.jsonl").write_text("\n")
    (root / "trec.jsonl").write_text(
        json.dumps(row(0) | {"answers": ["Date"], "all_classes": ["Date"]}) + "\n", encoding="utf-8"
    )
    return root


def config(folder: Path | str, **options: Any) -> SuiteConfig:
    return SuiteConfig(suite="longbench", model="m", tasks_folder=str(folder), **options)


def test_rows_left_out_are_counted_with_line_and_reason(folder: Path) -> None:
    with pytest.warns(LeftOutWarning) as warned:
        data = load_data(LONGBENCH, config(folder))
    assert {task: [s.identity for s in samples] for task, samples in data.samples.items()} == {
        "hotpotqa": ["id0", "id5"],
        "trec": ["id0"],
    }
    assert [(one.identity, one.reason) for one in data.skipped] == [
        ("line 3", "no JSON: Expecting property name enclosed in double quotes at column 2"),
        ("line 4", "input is missing, a text is expected"),
        ("line 5", "a list, an object is expected"),
    ]
    assert len(data.absent) == 19 and "qasper" in data.absent and "lcc" in data.absent  # whose file is empty
    messages = [str(one.message) for one in warned]
    assert any("no data for narrativeqa" in text for text in messages)
    assert any("hotpotqa: 3 left out" in text and "line 3" in text for text in messages)


def test_a_zip_and_the_hub_hold_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "hotpotqa.jsonl", "data/hotpotqa.jsonl")
    asked: list[tuple[str, str, str]] = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    sources = [str(folder), str(archive), "hub"]
    with pytest.warns(LeftOutWarning):
        found = [load_data(LONGBENCH, config(source, tasks=("hotpotqa",))).samples for source in sources]
    assert found[0] == found[1] == found[2] and len(found[0]["hotpotqa"]) == 2
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]


def test_a_hub_out_of_reach_is_named() -> None:
    """Tests run with HF_HUB_OFFLINE: the real client refuses."""
    with pytest.raises(ValueError, match=r"data.zip of THUDM/LongBench cannot be had .*give the folder"):
        load_data(LONGBENCH, config("hub", tasks=("hotpotqa",)))


def test_what_cannot_be_asked_at_all_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no qasper.jsonl there"):
        load_data(LONGBENCH, config(folder, tasks=("qasper",)))
    with pytest.raises(ValueError, match=r"has no 'hotpot'; did you mean 'hotpotqa'"):
        load_data(LONGBENCH, config(folder, tasks=("hotpot",)))
    with pytest.raises(ValueError, match=r"no such folder or .zip"):
        load_data(LONGBENCH, config(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no usable sample of longbench there; files such as narrativeqa.jsonl"):
        load_data(LONGBENCH, config(tmp_path / "empty"))
    (tmp_path / "empty" / "lcc.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"first complaint: lcc, line 1: context is missing"):
        load_data(LONGBENCH, config(tmp_path / "empty"))
    (tmp_path / "empty" / "lcc.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"lcc.jsonl is no UTF-8 at byte 0"):
        load_data(LONGBENCH, config(tmp_path / "empty"))


def test_samples_are_drawn_by_seed(tmp_path: Path) -> None:
    (tmp_path / "hotpotqa.jsonl").write_text("\n".join(json.dumps(row(i)) for i in range(30)))

    def drawn(seed: int) -> list[str]:
        with pytest.warns(LeftOutWarning):
            samples = load_data(LONGBENCH, config(tmp_path, max_examples=5, seed=seed)).samples["hotpotqa"]
        return [one.identity for one in samples]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(drawn(0)) == 5 and drawn(0) == sorted(drawn(0), key=lambda name: int(name[2:]))


def test_a_task_that_is_not_there_is_none(folder: Path) -> None:
    def make(task: str, row: Any, identity: str) -> list[Sample]:
        raise AssertionError

    source = open_source(str(folder), lambda task: folder, lambda task: task)
    assert read_samples(source, "nothing", make) is None
