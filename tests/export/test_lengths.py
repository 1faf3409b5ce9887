"""Windows beyond scale times native window, which a calibrated schedule may ask for, in every runtime's words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import WINDOW
from checkpoints import checkpoint_info, save_checkpoint
from transformers import AutoModelForCausalLM

from e2llm.export import export
from e2llm.export.lengths import check_gguf_length, vllm_lengths
from e2llm.export.ollama import modelfile
from e2llm.export.plan import ExportPlan

SCHEDULE = [{"window": 64, "scale": 1.0}, {"window": 300, "scale": 3.0}]
"""300 tokens at scale 3 of native window 64: 108 more than 192."""
NONE = {"rope_type": "default", "rope_theta": 10000.0}


def exported(tmp_path: Path, target: str, method: str = "yarn", model_type: str = "llama", **info: Any) -> Any:
    fields = checkpoint_info(method, schedule=SCHEDULE, **info)
    name, _ = save_checkpoint(tmp_path / "model", model_type, info=fields, bpe=target in ("gguf", "ollama"))
    return export(name, tmp_path / "out", to=target, window=300)  # type: ignore[arg-type]


@pytest.mark.parametrize("method, slope", [("yarn", None), ("yarn", 0.04), ("linear", None), ("ntk", None)])
def test_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, slope: float | None) -> None:
    monkeypatch.setattr("e2llm.export.runtimes.installed_version", lambda *names: None)
    attention = {} if slope is None else {"training_slope": slope}
    result = exported(tmp_path, "vllm", method, attention=attention)
    (check,) = (check for check in result.checks if check.name == "window in vLLM")
    assert check.passed and "300 tokens at scale 3, past scale × native window = 192" in check.detail
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["max_position_embeddings"] == WINDOW, "native: who multiplies it must not scale twice"
    if method != "yarn":
        return
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["rope_parameters"]["factor"] == 3.0
    command = result.commands["vLLM"]
    told = json.loads(command[command.index("{") : command.rindex("}") + 1])
    rope = told["rope_parameters"]
    assert told["max_position_embeddings"] == 300 and rope["rope_type"] == "longrope"
    # What vLLM's class for LongRoPE makes of it, written from its definition.
    divisors = torch.tensor(rope["long_factor"], dtype=torch.float64)
    powers = rope["rope_theta"] ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    plain: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    rotary = plain.model.rotary_emb
    assert torch.allclose(1 / (divisors * powers), rotary.inv_freq.double(), rtol=1e-6)
    expected = 1 + (0.1 if slope is None else slope) * math.log(3)
    assert (
        rope["long_mscale"]
        == rope["short_mscale"]
        == pytest.approx(expected)
        == pytest.approx(rotary.attention_scaling)
    )
    assert rope["long_factor"] == rope["short_factor"]


def test_vllm_inside_the_reach_stays_yarn(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model", info=checkpoint_info())
    result = export(name, tmp_path / "out", to="vllm", window=256, verify=False)
    assert "longrope" not in result.commands["vLLM"]


def test_vllm_by_layer_type_is_refused_and_hf_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vLLM's YaRN reads 192 tokens at scale 3.*--scale 5"):
        exported(tmp_path, "vllm", model_type="gemma3_text")
    result = export(str(tmp_path / "model"), tmp_path / "out", to="hf", window=300)
    assert list(result.commands) == ["transformers"]
    assert any(check.name == "window in transformers" and check.passed for check in result.checks)


def test_bounds_of_vllm() -> None:
    """By hand, from its config/model.py and rotary_embedding."""
    yarn = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}
    assert vllm_lengths({"max_position_embeddings": 300, "rope_parameters": yarn}) == {
        "longest text, to 2026": 192,
        "longest text": 300,
        "rows of YaRN": 192,
    }
    linear = {"rope_type": "linear", "factor": 3.0}
    assert set(vllm_lengths({"max_position_embeddings": 64, "rope_parameters": linear}).values()) == {192}
    longrope = {"rope_type": "longrope", "factor": 3.0}
    assert set(vllm_lengths({"max_position_embeddings": 300, "rope_parameters": longrope}).values()) == {300}
    layered = {"full_attention": linear, "sliding_attention": NONE}
    assert set(vllm_lengths({"max_position_embeddings": 64, "rope_parameters": layered}).values()) == {192}


def test_a_command_that_stops_short_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the overrides that once were printed: YaRN with a longer max_position_embeddings alone."""
    monkeypatch.setattr("e2llm.export.runtimes.installed_version", lambda *names: None)
    monkeypatch.setattr("e2llm.export.vllm.overrides", lambda plan, config: {"max_position_embeddings": 300})
    with pytest.raises(ValueError, match=r"export is wrong: window in vLLM.* is 192 \(longest text, to 2026\)"):
        exported(tmp_path, "vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gguf", "ollama"])
def test_gguf_and_ollama(tmp_path: Path, target: str) -> None:
    result = exported(tmp_path, target)
    name = {"gguf": "window in llama.cpp", "ollama": "window in Ollama"}[target]
    (check,) = (check for check in result.checks if check.name == name)
    assert check.passed and "scale 3, past scale × native window = 192; context_length is 300" in check.detail
    if target == "ollama":
        assert "PARAMETER num_ctx 300" in (tmp_path / "out/Modelfile").read_text()


def test_a_modelfile_that_asks_for_less_is_seen(tmp_path: Path) -> None:
    plan = ExportPlan(method="yarn", scale=3.0, window=300, scale_window=300, native_window=64, slope=None, ropes={})
    path = tmp_path / "Modelfile"
    path.write_text(modelfile("x.gguf", 192, None))
    assert not check_gguf_length(300, path, plan).passed
    path.write_text(modelfile("x.gguf", 300, None))
    assert check_gguf_length(300, path, plan).passed and not check_gguf_length(192, path, plan).passed


def test_the_probe_passes_the_reach(tmp_path: Path) -> None:
    result = exported(tmp_path, "hf")
    assert any("logits of 32 and 300 tokens" in check.detail for check in result.checks)
