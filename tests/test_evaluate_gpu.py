"""benchmarks/evaluate_gpu.py: every part is a call that the command takes; parts are skipped, stopped and resumed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripts_of import load_script

import e2llm
from e2llm.cli import main
from e2llm.evaluate.config import LOSSES
from e2llm.records import Record

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "evaluate_gpu.py"
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


@pytest.mark.parametrize("small", [False, True])
def test_every_part_is_a_call_that_the_command_takes(
    script: Any, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from e2llm.evaluate import choice, run, short, suite

    seen: list[Any] = []

    def note(config: Any, **options: Any) -> Record:
        seen.append(config)
        return Record(kind="evaluate", config={}, rows=[], examples=[])

    for module, name in ((run, "run"), (suite, "run"), (short, "run"), (choice, "choice")):
        monkeypatch.setattr(module, name, note)
    files = ("ruler/qa_1.jsonl", "ruler/qa_2.jsonl", "kv_retrieval/kv-retrieval-75_keys.jsonl.gz")
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    args = argparse.Namespace(text=tmp_path, tasks=tmp_path, base_model="x", small=small)
    for part in script.PARTS:
        call = script.command(part, "base", str(TINY), tmp_path / f"{part.name}.json", args)
        assert main(call[3:]) == 0
        assert seen[-1].checkpoint == "base" and seen[-1].out == str(tmp_path / f"{part.name}.json")
    assert len(seen) == len(script.PARTS) == 21
    far = next(part for part in script.PARTS if part.name == "far")
    named = [script.command(far, label, "m", tmp_path, args).count("--scales") for label in ("paper", "recommended-x")]
    assert named == [1, 0]  # ours is trained for that window, the other refuses it unless a scale is named
    by_part = dict(zip((part.name for part in script.PARTS), seen, strict=True))
    assert by_part["ruler"].qa == {name: str(tmp_path / f"ruler/{name}.jsonl") for name in ("qa_1", "qa_2")}
    assert by_part["ruler"].left_out == () and by_part["kv_files"].kv_files == (str(tmp_path / files[2]),)
    assert [by_part[f"method-{m}"].method for m in script.WITHOUT_TRAINING] == [*script.WITHOUT_TRAINING]
    if not small:
        keys = by_part["keys"]
        assert by_part["sliding"].max_strides == 64 and by_part["unseen"].scales == tuple(map(float, script.UNSEEN))
        assert by_part["far"].windows == (8192, 262_144) and by_part["short"].scales == (1.0,)
        # At least a hundred prompts a window and task; of RULER's kinds together. Attention is looked at, not answered.
        for name, config in by_part.items():
            asked = set(getattr(config, "protocols", ())) - {*LOSSES, "attention"}
            together = len(asked) if name == "ruler" else 1
            assert not asked or config.prompts * together >= 100, name
        assert keys.prompts == 100 and max(keys.windows) == 131_072 and keys.method == "yarn"


def test_a_part_that_is_there_is_not_run_again_and_time_ends_it(tmp_path: Path) -> None:
    text = tmp_path / "text" / "novels"
    text.mkdir(parents=True)
    (text / "a.txt").write_text(SCRIPT.read_text(encoding="utf-8") * 10, encoding="utf-8")
    shutil.copytree(text, text.parent / "mathematics")
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), f"mine={TINY}", "--text", str(text.parent), "--out", str(out), "--small"]

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True)

    late = call("--only", "sliding", "--until", "0")
    assert late.returncode == 1 and "not finished: evaluate_mine_sliding.json" in late.stdout
    first = call("--only", "sliding")
    assert first.returncode == 0, first.stderr[-2000:]
    record = Record.load(out / "evaluate_mine_sliding.json")
    assert {row["corpus"] for row in record.rows} == {"mathematics", "novels"}
    assert {row["checkpoint"] for row in record.rows} == {"mine"}
    again = call("--only", "sliding")
    assert again.returncode == 0 and "exit" not in again.stdout and "not finished: nothing" in again.stdout
    nameless = subprocess.run([*command[:2], str(TINY), *command[3:]], capture_output=True, text=True)
    assert nameless.returncode == 2 and "write LABEL=MODEL" in nameless.stderr
