"""Records survive the disk unchanged; what cannot be trusted is refused by file and row."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import e2llm
from e2llm.records import Record, check_row, environment_snapshot, labels_of, make_row, merge, source_names


def _record(**changes):
    rows = [make_row("perplexity", 4.37, "ratio", 100, checkpoint="base", window=w, scale=1.0) for w in (4096, 8192)]
    return Record(
        **{"kind": "evaluate", "config": {"seed": 0}, "rows": rows, "examples": [{"seed": 1, "text": "é"}], **changes}
    )


def _saved(tmp_path, change):
    path = _record().save(tmp_path / "record.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_round_trip(tmp_path):
    record = _record()
    path = record.save(tmp_path / "new" / "record.json")
    assert Record.load(path) == record
    assert [child.name for child in path.parent.iterdir()] == ["record.json"]  # no temporary file stays behind
    assert json.loads(path.read_text())["schema"] == 1


def test_one_line_a_row(tmp_path):
    text = _record().save(tmp_path / "record.json").read_text()
    assert sum('"metric": "perplexity"' in line for line in text.splitlines()) == 2


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = _record().save(tmp_path / "record.json")
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        _record(kind="other").save(path)
    assert path.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "4.37", None])
def test_row_values_are_finite_numbers(value):
    with pytest.raises(ValueError, match="value ="):
        check_row({"metric": "loss", "value": value, "unit": "nats", "n": 1}, where="here")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.json: no Record that can be read: No such file"):
        Record.load(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"no Record that can be read: Is a directory"):
        Record.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "Perplexity"}, "metric ="),
        ({"metric": "retrieval", "value": 85.0}, "retrieval lies between 0 and 1"),
        ({"value": 0.5}, "perplexity lies between 1 and inf"),
        ({"unit": ""}, "unit ="),
        ({"n": 0}, "n = 0"),
        ({"n": 1.0}, "n = 1.0"),
        ({"window": [1]}, "window ="),
        ({"scale": math.inf}, "scale = inf"),
    ],
)
def test_rows_refused(changes, message):
    row = make_row("perplexity", 4.0, "ratio", 5) | changes
    with pytest.raises(ValueError, match=message):
        check_row(row, where="here")


def test_missing_field_and_label_clash():
    with pytest.raises(ValueError, match="here has no unit"):
        check_row({"metric": "loss", "value": 1.0, "n": 1}, where="here")
    with pytest.raises(TypeError):
        make_row("loss", 1.0, "nats", 1, metric="x")


def test_duplicate_labels_name_both_rows():
    row = make_row("loss", 1.0, "nats", 1, step=5)
    with pytest.raises(ValueError, match=r"rows\[2\] repeats rows\[0\].*'step': 5"):
        _record(rows=[row, row | {"step": 6}, row | {"value": 2.0}])
    _record(rows=[row, row | {"metric": "other"}])  # another metric is another measurement


def test_rows_added_later_are_checked_when_saving(tmp_path):
    record = _record()
    record.rows.append(dict(record.rows[0]))
    with pytest.raises(ValueError, match=r"record\.json: rows\[2\] repeats rows\[0\]"):
        record.save(tmp_path / "record.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "schema = 2"),
        (lambda d: d.pop("config"), "no config"),
        (lambda d: d.update(notes=""), "unknown key 'notes'"),
        (lambda d: d.update(rows={}), "rows is a dict"),
        (lambda d: d.update(kind=""), "kind ="),
        (lambda d: d["rows"][1].update(value="x"), r"rows\[1\]: value = 'x'"),
        (lambda d: d["rows"][1].update(value=math.nan), "NaN"),
        (lambda d: d["examples"].append(5), "examples"),
    ],
)
def test_load_names_file_and_row(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"record\.json.*{message}"):
        Record.load(_saved(tmp_path, change))


@pytest.mark.parametrize("text", ["", "[1]", "{]", '"x"'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        Record.load(path)


def test_config_has_to_be_json():
    with pytest.raises(ValueError, match="config cannot be written as JSON"):
        _record(config={"value": math.nan})
    with pytest.raises(ValueError, match="config cannot be written as JSON"):
        _record(config={"value": object()})


def test_merge_names_sources_apart(tmp_path):
    for place in ("a/results", "b/results", "b/other"):
        _record().save(tmp_path / f"{place}.json")
    records = [Record.load(tmp_path / f"{place}.json") for place in ("a/results", "b/results", "b/other")]
    assert source_names(records) == ["a/results", "b/results", "other"]
    rows = merge(records)
    assert len(rows) == 6
    assert rows[2] == records[1].rows[0] | {"source": "b/results"}
    assert "source" not in records[1].rows[0]
    assert source_names([records[0], records[0]]) == ["results #1", "results #2"]


def test_environment_snapshot():
    snapshot = environment_snapshot()
    assert snapshot["python"] == ".".join(map(str, sys.version_info[:3]))
    assert snapshot["num_cpus"] >= 1
    assert snapshot["torch"]
    json.dumps(snapshot)


def test_versions_are_of_the_code_that_runs_and_of_the_peers(tmp_path):
    site = tmp_path / "litgpt-9.9.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Name: litgpt\nVersion: 9.9\n")
    code = "import json, e2llm.records as r; print(json.dumps(r.environment_snapshot()))"
    folders = [str(Path(e2llm.__file__).parents[1]), str(tmp_path)]
    # -S: no installed package, as where a checkout is put on the path.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["e2llm"] == e2llm.__version__ and found["litgpt"] == "9.9"
    assert {"triton", "liger-kernel", "unsloth", "torch"} <= found.keys() and found["unsloth"] is None


def test_imports_no_torch():
    code = (
        "import sys, e2llm.records as r, e2llm.report; r.environment_snapshot(); "
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_labels_of():
    assert labels_of(make_row("loss", 1.0, "nats", 3, step=5, split=None)) == {"step": 5, "split": None}


def test_an_interval_is_no_label() -> None:
    row = make_row("retrieval", 0.5, "share", 20, window=4096, low=0.3, high=0.7)
    assert labels_of(row) == {"window": 4096}
    twin = make_row("retrieval", 0.5, "share", 20, window=4096, low=0.2, high=0.8)
    with pytest.raises(ValueError, match="repeats"):
        Record("evaluate", {}, [row, twin])


@pytest.mark.parametrize(
    ("ends", "complaint"),
    [
        ({"low": 0.3}, "an interval has two finite ends"),
        ({"low": 0.7, "high": 0.3}, "in this order"),
        ({"low": 0.5, "high": 1.2}, "retrieval lies in 0 to 1"),
        ({"low": math.nan, "high": 0.9}, "two finite ends"),
    ],
)
def test_intervals_that_cannot_be(ends: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_row("retrieval", 0.5, "share", 20, **ends)
