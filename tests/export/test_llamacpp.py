"""Exported files in llama.cpp itself: the same tokens and the same greedy text as transformers at the same scale."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY_512, bpe_tokenizer, checkpoint_info, save_checkpoint

from e2llm.export import export
from e2llm.export.runtimes import open_llamacpp

pytestmark = pytest.mark.slow
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PROMPT = "def parse(self, text):\n    for line in text.split('\\n'):\n        "


def static_model(scaling: dict[str, Any]) -> Any:
    """The embedded base with transformers' own static scaling, told by hand."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(TINY_512))
    config.rope_parameters = {**config.rope_parameters, **scaling}
    return AutoModelForCausalLM.from_pretrained(str(TINY_512), config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "method, scale, scaling",
    [
        ("yarn", 1, {}),
        ("yarn", 4, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
        ("linear", 4, {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_greedy_text(tmp_path: Path, method: str, scale: float, scaling: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scales never trained, and no cutting that fits
        result = export(str(TINY_512), tmp_path / "out", to="gguf", scale=scale, method=method, gguf_type="f32")
    ran = [check for check in result.checks if "perplexity in llama.cpp" in check.name]
    assert [check.passed for check in ran] == [True]
    (path,) = (tmp_path / "out").glob("*.gguf")
    tokenizer = bpe_tokenizer()
    prompt = tokenizer(PROMPT * 3).input_ids
    generated = static_model(scaling).generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False)
    model = open_llamacpp(path, 512)
    assert model.tokenize((PROMPT * 3).encode(), add_bos=False) == prompt
    found: list[int] = []
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if token == 0 or len(found) == 48:
            break
    model.close()
    assert found == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("method, slope", [("yarn", 0.16), ("linear", 0.07), ("ntk", 0.0)])
def test_families_and_slopes(tmp_path: Path, model_type: str, method: str, slope: float) -> None:
    info = checkpoint_info(method, attention={"training_slope": slope})
    name, _ = save_checkpoint(tmp_path / "model", model_type, bpe=True, info=info)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="tokenizer.ggml.pre")
        result = export(name, tmp_path / "out", to="gguf", scale=4, gguf_type="f32")
    ran = [check for check in result.checks if "in llama.cpp (" in check.name]
    composes = model_type == "qwen2"  # its tokenizer in transformers; llama.cpp's does not
    assert [check.passed for check in ran] == [None if composes else True, True], ran


def test_llama3_divisors(tmp_path: Path) -> None:
    llama3 = {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    }
    name, _ = save_checkpoint(tmp_path / "model", method="linear", bpe=True, rope_parameters=llama3)
    result = export(name, tmp_path / "out", to="gguf", scale=4, gguf_type="f32")
    assert any(check.passed and "perplexity in llama.cpp" in check.name for check in result.checks)


def test_a_wrong_scale_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file's own checks blinded, llama.cpp's numbers still tell."""
    from e2llm.export import gguf_file

    original = gguf_file.rope_keys

    def broken(*arguments: Any) -> Any:
        keys, divisors = original(*arguments)
        return keys | {"scaling.attn_factor": 1 + 0.1 * math.log(4)}, divisors

    monkeypatch.setattr(gguf_file, "rope_keys", broken)
    monkeypatch.setattr(gguf_file, "read_back", lambda *arguments: [])
    name, _ = save_checkpoint(tmp_path / "model", bpe=True)
    with pytest.raises(ValueError, match=r"export is wrong: logits and perplexity in llama\.cpp"):
        export(name, tmp_path / "out", to="gguf", scale=4, gguf_type="f32")
