"""What the plan says of runtimes, against what exports, loaders and the plugin really do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_config, with_rope
from checkpoints import checkpoint_info, save_checkpoint
from transformers import AutoModelForCausalLM

from e2llm.cli import main
from e2llm.export import export
from e2llm.hf import CheckpointInfo, load_model
from e2llm.hf.rotary import read_rope
from e2llm.infer import Engine
from e2llm.plan.checks import warnings_of
from e2llm.plan.runtimes import Applied, applied, table
from e2llm.plan.shape import read_config, shape_of
from e2llm.positions.frequencies import frequencies
from e2llm.vllm_plugin.scaling import make_scaling

Rows = dict[str, Applied]
SLOPE = {"training_slope": 0.04}


def rows_of(folder: Path | str) -> Rows:
    config, _ = read_config(str(folder))
    return {row.runtime: row for row in applied(config, CheckpointInfo.load(folder), str(folder))}


def rows_with(info: CheckpointInfo | None = None, model_type: str = "llama", **rope: Any) -> Rows:
    config = with_rope(tiny_config(model_type), **rope)
    return {row.runtime: row for row in applied(config, info, "model")}


@pytest.mark.parametrize(("method", "attention"), [("yarn", {}), ("yarn", SLOPE), ("linear", {}), ("ntk", {})])
def test_an_export_in_transformers_and_vllm(tmp_path: Path, method: str, attention: dict[str, float]) -> None:
    name, _ = save_checkpoint(tmp_path / "model", info=checkpoint_info(method, attention=attention))
    result = export(name, tmp_path / "out", to="vllm", window=4 * WINDOW, verify=False)
    rows = rows_of(tmp_path / "out")
    base: Any = AutoModelForCausalLM.from_pretrained(name)
    scaled: Any = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    (scale,) = rows["transformers"].scales
    rope = read_rope(base.model.rotary_emb, base.config)
    assert torch.equal(frequencies(rope, method, scale).inv_freq, scaled.model.rotary_emb.inv_freq)
    assert rows["transformers"].method == scaled.config.rope_parameters["rope_type"]
    assert rows["transformers"].window is None
    assert rows["e2llm"].scales == rows["vLLM"].scales == (scale,)
    assert rows["e2llm"].window == Engine.load(str(tmp_path / "out")).native_window == 4 * WINDOW
    assert any("ignore attention_factor" in note for note in rows["vLLM"].notes) == bool(attention)
    assert any("may be dropped" in note for note in rows["llama.cpp"].notes) == bool(attention)
    left = rows["vLLM with e2llm's plugin"]
    assert (left.scales, left.window) == (rows["vLLM"].scales, rows["vLLM"].window)
    command = result.commands["vLLM"]
    if method == "linear":
        assert "{" not in command and rows["vLLM"].window == 4 * WINDOW
        return
    assert rows["vLLM"].window == WINDOW and any("exported for 256 tokens" in note for note in rows["vLLM"].notes)
    shutil.copytree(tmp_path / "out", tmp_path / "told")  # as if the command's overrides stood in the config
    told = json.loads((tmp_path / "told" / "config.json").read_text())
    told |= json.loads(command[command.index("{") : command.rindex("}") + 1])
    (tmp_path / "told" / "config.json").write_text(json.dumps(told))
    mended = rows_of(tmp_path / "told")["vLLM"]
    assert mended.window == 4 * WINDOW and mended.notes == ()


def test_a_checkpoint_is_scaled_by_what_reads_e2llm_json(tmp_path: Path) -> None:
    schedule = [{"window": WINDOW, "scale": 1.0}, {"window": 300, "scale": 3.0}]
    name, _ = save_checkpoint(tmp_path / "model", info=checkpoint_info("yarn", schedule=schedule))
    rows = rows_of(name)
    plain: Any = AutoModelForCausalLM.from_pretrained(name)
    assert plain.config.rope_parameters["rope_type"] == rows["transformers"].method == "default"
    for runtime, window in (("transformers", None), ("vLLM", WINDOW), ("llama.cpp", WINDOW)):
        assert (rows[runtime].scales, rows[runtime].window) == ((1.0,), window)
        assert any("ignores e2llm.json: past 64 tokens" in note for note in rows[runtime].notes)
    engine = Engine.load(name)
    served = {engine.plan(tokens - 1, max_new_tokens=1).scale for tokens in range(2, 8 * WINDOW + 1)}
    assert served <= set(rows["e2llm"].scales) and rows["e2llm"].window == 8 * WINDOW
    assert engine.plan(8 * WINDOW - 1, max_new_tokens=1).warnings == ()
    assert engine.plan(8 * WINDOW, max_new_tokens=1).warnings
    scaling = make_scaling(CheckpointInfo.load(name), WINDOW, {})
    plugin = rows["vLLM with e2llm's plugin"]
    assert (plugin.scales, plugin.window, plugin.method) == (scaling.scales, scaling.max_window, scaling.method)
    assert plugin.scales == rows["e2llm"].scales


@pytest.mark.parametrize("method", ["yarn", "linear"])
def test_llama_cpp_is_told_what_our_file_says(tmp_path: Path, method: str) -> None:
    from gguf import GGUFReader

    from e2llm.llamacpp.gguf_model import read_gguf

    name, _ = save_checkpoint(tmp_path / "model", method=method, bpe=True)
    export(name, tmp_path / "hf", to="hf", window=4 * WINDOW, verify=False)
    export(name, tmp_path / "fixed", to="gguf", window=4 * WINDOW, verify=False)
    fields = GGUFReader(next((tmp_path / "fixed").glob("*.gguf"))).fields
    row = rows_of(tmp_path / "hf")["llama.cpp"]
    assert row.method == fields["llama.rope.scaling.type"].contents()
    assert row.scales == (fields["llama.rope.scaling.factor"].contents(),)
    assert row.window == WINDOW < fields["llama.context_length"].contents(), "its converter knows no export's window"
    export(name, tmp_path / "open", to="gguf", verify=False)
    opened = read_gguf(next((tmp_path / "open").glob("*.gguf")))
    over = rows_of(name)["e2llm over llama.cpp"]
    assert (over.method, over.window) == (opened.method, opened.native_window * opened.max_scale)
    assert over.scales == (1.0, 2.0, 4.0, 8.0)
    refused = rows_of(tmp_path / "hf")["e2llm over llama.cpp"]
    assert refused.scales == () and "export is served from the .gguf" in refused.notes[0]
    with pytest.raises(ValueError, match="an export already"):
        export(str(tmp_path / "hf"), tmp_path / "again", to="gguf")


def test_groups_are_read_over_llama_cpp_and_by_the_vllm_plugin_too(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model", info=checkpoint_info("self_extend", neighbours=22), bpe=True)
    rows = rows_of(name)
    for runtime in ("e2llm", "e2llm over llama.cpp", "vLLM with e2llm's plugin"):
        assert (rows[runtime].method, rows[runtime].window) == ("self_extend", 8 * WINDOW)
        assert rows[runtime].scales == (1.0, 2.0, 4.0, 8.0)
    assert rows["llama.cpp"].scales == rows["vLLM"].scales == (1.0,)
    CheckpointInfo.save(checkpoint_info("self_extend", neighbours=1), name)
    assert "needs at least 2" in rows_of(name)["e2llm over llama.cpp"].notes[0]


@pytest.mark.parametrize(("kind", "scaled_twice"), [("yarn", False), ("linear", True)])
def test_double_scaling_is_refused_by_what_refuses_it(tmp_path: Path, kind: str, scaled_twice: bool) -> None:
    name, _ = save_checkpoint(tmp_path / "model", info=checkpoint_info(kind))
    file = tmp_path / "model" / "config.json"
    raw = json.loads(file.read_text())
    raw["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    file.write_text(json.dumps(raw))
    rows = rows_of(name)
    assert rows["transformers"].scales == rows["vLLM"].scales == (4.0,) and rows["vLLM"].window == 4 * WINDOW
    assert rows["vLLM with e2llm's plugin"].scales == ()
    assert "would scale them twice" in rows["vLLM with e2llm's plugin"].notes[0]
    assert any("scaled twice" in text for text in warnings_of(raw, CheckpointInfo.load(tmp_path / "model")))
    if scaled_twice:  # linear composes with linear, and does
        model: Any = load_model(name)[0]
        extension = Engine(model, None).extension
        extension.set_scale(2.0)
        assert rows["e2llm"].scales == (1.0, 2.0, 4.0, 8.0)
        assert rows["e2llm"].notes == ("on top of the config's own linear by 4",)
        assert frequencies(extension.rope, "linear", 2.0).inv_freq[0] == pytest.approx(1 / 8)
        return
    with pytest.raises(ValueError, match="already scales") as refusal:
        load_model(name)
    assert rows["e2llm"].scales == () and rows["e2llm"].notes == (str(refusal.value),)


def test_types_that_runtimes_read_differently() -> None:
    dynamic = rows_with(rope_type="dynamic", factor=2.0)
    assert "grows with the length" in dynamic["transformers"].notes[0]
    assert any("static" in note for note in dynamic["vLLM"].notes) and dynamic["vLLM"].window == 2 * WINDOW
    assert dynamic["llama.cpp"].scales == (1.0,) and any("no word for" in note for note in dynamic["llama.cpp"].notes)
    assert dynamic["e2llm"].method == "yarn"
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    longrope = rows_with(rope_type="longrope", factor=4.0, original_max_position_embeddings=32, **factors)
    assert longrope["transformers"].scales == longrope["vLLM"].scales == (1.0, 4.0)
    assert "switches at 32 tokens" in longrope["transformers"].notes[0] and longrope["e2llm"].method == "longrope"
    own = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    published = rows_with(rope_type="llama3", factor=4.0, **own)
    assert published["vLLM"].window == published["e2llm"].window == WINDOW, "its length is not multiplied"
    assert published["e2llm"].scales == (1.0,) and "e2llm calls that scale 1" in published["transformers"].notes[0]
    local = rows_with(checkpoint_info(), "gemma3_text")
    assert local["e2llm"].scales == (1.0, 2.0, 4.0, 8.0)
    assert "GGUF is written for" in local["e2llm over llama.cpp"].notes[0]


REFUSED: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"rope_type": "mine", "factor": 4.0}, "'mine': not known to transformers, which has default, linear", "to vLLM"),
    ({"type": "ntk", "factor": 4.0}, "'ntk': not known to transformers", "to llama.cpp"),
    ({"type": "linear", "factor": "8"}, "'linear': factor = '8' is no number", "'8', which is no number"),
)
"""What a foreign config says of its rotary embedding, what transformers' row says, one warning."""


@pytest.mark.parametrize(("rope", "reason", "warning"), REFUSED)
def test_what_transformers_cannot_compute_is_planned_and_told(
    rope: dict[str, Any], reason: str, warning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes do not depend on it, and the one who asks is told before a runtime fails."""
    name, _ = save_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    (tmp_path / "model" / "e2llm.json").unlink()
    raw = json.loads(file.read_text())
    sizes = shape_of(read_config(name)[0])
    del raw["rope_parameters"]
    file.write_text(json.dumps(raw | {"rope_theta": 1e4, "rope_scaling": rope}))
    with pytest.raises((KeyError, TypeError)):
        AutoModelForCausalLM.from_pretrained(name)
    assert shape_of(read_config(name)[0]) == sizes
    assert main(["plan", name, "--gpu", "h100", "--set", "data.window=64", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["runtime"]: row for row in facts["runtimes"]}
    for runtime in ("transformers", "e2llm", "e2llm over llama.cpp"):
        assert rows[runtime]["scales"] == [] and reason in rows[runtime]["notes"][0]
    factor = rope["factor"] if isinstance(rope["factor"], float) else 1.0
    assert rows["vLLM"]["scales"] == ([] if rope.get("rope_type") == "mine" else [factor])
    assert any(warning in text for text in facts["warnings"])


def test_a_factor_without_a_method_scales_nothing() -> None:
    rows = rows_with(factor=8.0)
    assert rows["transformers"].scales == rows["vLLM"].scales == rows["llama.cpp"].scales == (1.0,)
    assert rows["vLLM"].window == WINDOW


def test_models_without_a_rotary_embedding_are_refused_by_ours() -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=64)
    rows = {row.runtime: row for row in applied(config, None, "model")}
    assert rows["e2llm"].scales == () and "absolute positions" in rows["e2llm"].notes[0]
    assert rows["vLLM"] == Applied("vLLM", "none", (1.0,), 64) and rows["transformers"].notes == ()


def test_the_command_shows_the_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    assert main(["plan", name, "--gpu", "h100", "--set", "data.window=64"]) == 0
    told = capsys.readouterr().out
    config, _ = read_config(name)
    expected = table(applied(config, CheckpointInfo.load(name), name))
    assert "\n".join(expected) in told
    assert main(["plan", name, "--gpu", "h100", "--set", "data.window=64", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["training"]["fits"] and facts["training"]["step"]["tokens_per_second"] > 0
    assert [row["window"] for row in facts["serving"]] == [64, 128, 256, 512]
    assert {row["runtime"]: (row["scales"], row["window"]) for row in facts["runtimes"]} == {
        "transformers": ([1.0], None),
        "vLLM": ([1.0], 64),
        "vLLM with e2llm's plugin": ([1.0, 2.0, 4.0, 8.0], 512),
        "llama.cpp": ([1.0], 64),
        "e2llm": ([1.0, 2.0, 4.0, 8.0], 512),
        "e2llm over llama.cpp": ([1.0, 2.0, 4.0, 8.0], 512),
    }
    assert "1, 2, 4, 8" in told and facts["warnings"] == []
