"""What lies beside the weights: command lines, Modelfiles, and the command itself."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from architectures import WINDOW
from checkpoints import checkpoint_info, save_checkpoint

from e2llm.export import command, export
from e2llm.export.ollama import modelfile


def overrides_of(line: str) -> dict[str, Any]:
    words = shlex.split(line)
    return json.loads(words[words.index("--hf-overrides") + 1]) if "--hf-overrides" in words else {}


def vllm_line(tmp_path: Path, model_type: str = "llama", method: str = "yarn", window: int = 256, **info: Any) -> str:
    name, _ = save_checkpoint(tmp_path / "model", model_type, info=checkpoint_info(method, **info))
    return export(name, tmp_path / "out", to="vllm", window=window, verify=False).commands["vLLM"]


def test_vllm_linear_needs_nothing(tmp_path: Path) -> None:
    line = vllm_line(tmp_path, method="linear", window=200)
    assert line == "vllm serve out --max-model-len 200"
    factor = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]["factor"]
    assert isinstance(factor, float), "vLLM refuses a whole number"
    script = tmp_path / "out/vllm_command.sh"
    assert "exec vllm serve . --max-model-len 200" in script.read_text() and script.stat().st_mode & 0o111


def test_vllm_linear_past_scale_times_native_window(tmp_path: Path) -> None:
    line = vllm_line(tmp_path, method="linear", window=250, schedule=[{"window": 250, "scale": 2.0}])
    assert overrides_of(line) == {"max_position_embeddings": 125}


@pytest.mark.parametrize("method", ["yarn", "ntk", "none"])
def test_vllm_is_told_the_longest_position(tmp_path: Path, method: str) -> None:
    assert overrides_of(vllm_line(tmp_path, method=method, window=200)) == {"max_position_embeddings": 4 * WINDOW}


def test_vllm_slope_in_both_spellings(tmp_path: Path) -> None:
    found = overrides_of(vllm_line(tmp_path, attention={"training_slope": 0.16}))["rope_parameters"]
    factor = found.pop("attn_factor") * (1 + 0.1 * 1.3862943611)
    assert factor == pytest.approx(found["attention_factor"]) == pytest.approx(1 + 0.16 * 1.3862943611)
    assert found == json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"], "theta and all repeated"


def test_vllm_slope_by_layer_type(tmp_path: Path) -> None:
    found = overrides_of(vllm_line(tmp_path, "gemma3_text", attention={"training_slope": 0.16}))["rope_parameters"]
    assert "attn_factor" in found["full_attention"] and found["full_attention"]["rope_theta"] == 1e6
    assert found["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_vllm_is_not_verified_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2llm.export.runtimes.installed_version", lambda *names: None)
    name, _ = save_checkpoint(tmp_path / "model")
    result = export(name, tmp_path / "out", to="vllm", scale=4)
    assert result.checks[-1].passed is None and "not verified in vLLM: not installed" in result.checks[-1].line()


CHATML = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"


def test_modelfile_forms() -> None:
    plain = modelfile("x.gguf", 4096, None)
    assert plain.startswith("FROM ./x.gguf\nPARAMETER num_ctx 4096\n") and 'TEMPLATE """{{ .Prompt }}"""' in plain
    chat = modelfile("x.gguf", 4096, CHATML)
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>" in chat and 'PARAMETER stop "<|im_end|>"' in chat
    llama3 = modelfile("x.gguf", 4096, "<|start_header_id|>{{ role }}<|end_header_id|>\n\n{{ content }}<|eot_id|>")
    assert "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n" in llama3
    other = modelfile("x.gguf", 4096, "{{ messages }}\n[END]")
    assert not any(line.startswith("TEMPLATE") for line in other.splitlines()) and "#   [END]" in other


def test_ollama_folder(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model", bpe=True)
    result = export(name, tmp_path / "out", to="ollama", window=256, gguf_type="q8_0", verify=False)
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert f"FROM ./{path.name}\nPARAMETER num_ctx 256" in (tmp_path / "out/Modelfile").read_text()
    assert next(iter(result.commands.values())).startswith("ollama create ")


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    assert parse("m", "--out", "o", "--window", "64k").window == 65536
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 50)
    arguments = parse(name, "--out", str(tmp_path / "out"), "--scale", "16", "--to", "vllm", "--verify-text", str(text))
    assert command.run(arguments) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "out")
    assert "warning: scale 16 lies outside" in err and "scale 16, window 1024, method yarn" in err
    assert "verified: logits" in err and "vllm serve out --max-model-len 1024 --hf-overrides" in err
    with pytest.raises(ValueError, match="verify-text = 'nowhere': no such file"):
        command.run(parse(name, "--out", "o", "--verify-text", "nowhere"))
    with pytest.raises(SystemExit):
        parse("m", "--out", "o", "--window", "many")


def test_command_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, e2llm.export.command; sys.exit(str({'torch', 'transformers'} & sys.modules.keys() or ''))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.strip() == ""
