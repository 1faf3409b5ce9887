"""Checkpoints become a GGUF folder once, and files that are one already are found. Needs no llama.cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import checkpoint_info, save_checkpoint

from e2llm.hf import CheckpointInfo
from e2llm.llamacpp.convert import find_gguf
from e2llm.llamacpp.gguf_model import read_gguf


def test_a_checkpoint_is_converted_once(here: Path) -> None:
    checkpoint, _ = save_checkpoint(here / "runs" / "first" / "model", bpe=True)
    told: list[str] = []
    found = find_gguf(checkpoint, dtype="float32", tell=told.append)
    assert found.parent.parent == Path(".e2llm-cache/gguf") and found.parent.name.startswith("first-f32-")
    assert "once" in told[0] and any(line.startswith("verified: tensors") for line in told)
    again: list[str] = []
    assert find_gguf(checkpoint, dtype="float32", tell=again.append) == found and not again
    assert find_gguf(checkpoint, tell=again.append) != found, "another storage is another file"
    model = read_gguf(found)
    assert (model.method, model.native_window, model.max_scale, model.notes) == ("yarn", 64, 8.0, ())
    assert model.stored_as_float32 and model.kv_values == 2 * 2 * 32


def test_a_new_calibration_is_seen(here: Path) -> None:
    checkpoint, _ = save_checkpoint(here / "model", bpe=True)
    first = find_gguf(checkpoint, tell=lambda line: None)
    path = Path(checkpoint) / "e2llm.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "schedule": [{"window": 512, "scale": 5.0}]}))
    second = find_gguf(checkpoint, tell=lambda line: None)
    assert first != second and read_gguf(second).schedule[0].scale == 5.0


def test_a_conversion_that_fails_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = save_checkpoint(here / "model", bpe=True, info=checkpoint_info("yarn"))

    def broken(*arguments: object) -> None:
        raise ValueError("no room left")

    monkeypatch.setattr("e2llm.export.open_gguf.write_beside", broken)
    with pytest.raises(ValueError, match="no room left"):
        find_gguf(checkpoint, tell=lambda line: None)
    assert not [path for path in Path(".e2llm-cache/gguf").iterdir()]


def test_what_a_killed_process_left_is_taken_away(here: Path) -> None:
    checkpoint, _ = save_checkpoint(here / "model", bpe=True)
    name = find_gguf(checkpoint, tell=lambda line: None).parent.name
    shutil.rmtree(Path(".e2llm-cache/gguf") / name)
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = Path(f".e2llm-cache/gguf/.{name}.{gone.pid}.partial")
    other = Path(".e2llm-cache/gguf/.another-bf16-0123.77.partial")
    parent = Path(f".e2llm-cache/gguf/.{name}.{os.getppid()}.partial")
    for path in (dead, other, parent):
        path.mkdir()
    find_gguf(checkpoint, tell=lambda line: None)
    assert not dead.exists() and other.exists() and parent.exists()


def test_what_is_given_is_found(here: Path) -> None:
    checkpoint, _ = save_checkpoint(here / "model", bpe=True)
    made = find_gguf(checkpoint, tell=lambda line: None)
    assert find_gguf(str(made.parent), tell=print) == find_gguf(str(made), tell=print) == made
    with pytest.raises(ValueError, match="leave dtype out"):
        find_gguf(str(made), dtype="float32", tell=print)
    (made.parent / "second.gguf").write_bytes(made.read_bytes())
    with pytest.raises(ValueError, match=r"2 \.gguf files; name one"):
        find_gguf(str(made.parent), tell=print)
    (here / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither a config.json nor a .gguf"):
        find_gguf("empty", tell=print)
    with pytest.raises(ValueError, match="dtype = 'int4'"):
        find_gguf(checkpoint, dtype="int4", tell=print)


def test_families_that_are_not_known_are_refused(here: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(here / "other.gguf", "gemma2")
    writer.add_context_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gemma2': this engine serves llama, qwen2, qwen3"):
        read_gguf(here / "other.gguf")


def test_an_info_beside_a_file_is_checked(here: Path) -> None:
    checkpoint, _ = save_checkpoint(here / "model", bpe=True)
    made = find_gguf(checkpoint, tell=lambda line: None)
    (made.parent / "e2llm.json").write_text('{"schema": 1, "method": "nothing"}')
    with pytest.raises(ValueError, match=r"e2llm\.json"):
        read_gguf(made)
    info = CheckpointInfo(method="longrope", native_window=64, training_window=32, max_scale=4.0)
    info.save(made.parent)
    with pytest.raises(ValueError, match=r"longrope.*--engine e2llm"):
        read_gguf(made)
    checkpoint_info("self_extend", neighbours=1).save(made.parent)
    with pytest.raises(ValueError, match=r"neighbours = 1: .*--engine e2llm"):
        read_gguf(made)
