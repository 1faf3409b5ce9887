"""benchmarks/llamacpp_frames.py on a tiny random model: what its Record says of the frames and of its controls."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; see scripts/ci_llamacpp.sh")

from scripts_of import load_script
from served import make_checkpoint

from e2llm.records import Record

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "llamacpp_frames.py"


def test_frames_are_nearer_than_controls(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script(SCRIPT)
    checkpoint = make_checkpoint(here / "model", "llama", "self_extend", neighbours=22)
    (here / "text.txt").write_text(SCRIPT.read_text(encoding="utf-8"))
    options = ["--windows", "250", "400", "--new-tokens", "60", "--threads", "1", "--out", "found.json"]
    monkeypatch.setattr("sys.argv", ["llamacpp_frames.py", checkpoint, "text.txt", *options])
    assert script.main() == 0
    record = Record.load("found.json")
    assert record.config["texts"] == ["text.txt"] and record.config["neighbours"] == 22
    assert str(here) not in Path("found.json").read_text(encoding="utf-8")
    for window, scale in ((250, 4.0), (400, 8.0)):
        rows = [row for row in record.rows if row["window"] == window]
        assert {row["scale"] for row in rows} == {scale}
        assert {row["reading"] for row in rows} == {"served", "finer", "scale 1", "group twice"}
        apart = {(r["reading"], r["part"]): r for r in rows if r["metric"] == "nats_apart"}
        assert apart["served", "answer"]["n"] == 60 and apart["served", "near"]["n"] == 1
        assert apart["served", "near"]["value"] == apart["scale 1", "near"]["value"], "nothing is moved yet"
        for part in ("pieces", "answer"):
            controls = (apart["scale 1", part]["value"], apart["group twice", part]["value"])
            assert apart["served", part]["value"] < 0.5 * min(controls), (part, apart)
        assert {row["engine"] for row in rows if row["metric"] == "loss"} == {"e2llm", "llamacpp"}


def test_a_window_without_far_tokens_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script(SCRIPT)
    checkpoint = make_checkpoint(here / "model", "llama", "self_extend", neighbours=22)
    (here / "text.txt").write_text(SCRIPT.read_text(encoding="utf-8"))
    for window, message in (("64", "scale 1 reads it with every key"), ("30000", "a window needs 30000")):
        monkeypatch.setattr("sys.argv", ["x", checkpoint, "text.txt", "--windows", window, "--out", "found.json"])
        with pytest.raises(ValueError, match=message):
            script.main()
