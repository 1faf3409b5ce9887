"""GGUF files: keys, rows and tokens as llama.cpp reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from architectures import WINDOW
from checkpoints import TINY_512, bpe_tokenizer, checkpoint_info, save_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from e2llm.export import export
from e2llm.export.gguf_layout import llamacpp_frequencies, permute
from e2llm.export.gguf_vocabulary import SAMPLES, read_vocabulary


def fields_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata, tensors) of the one GGUF in a folder."""
    (path,) = folder.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    fields = {field.name: field.contents() for field in reader.fields.values() if field.types}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


FAMILIES = [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]


@pytest.mark.filterwarnings("ignore:tokenizer.ggml.pre:UserWarning")  # transformers gives a Qwen2 its NFC
@pytest.mark.parametrize("model_type, name", FAMILIES)
@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_families(tmp_path: Path, model_type: str, name: str, kind: str) -> None:
    checkpoint, model = save_checkpoint(tmp_path / "model", model_type, bpe=True)
    result = export(checkpoint, tmp_path / "out", to="gguf", window=200, gguf_type=kind)
    fields, tensors = fields_of(tmp_path / "out")
    assert fields["general.architecture"] == name
    assert fields[f"{name}.context_length"] == 200
    assert fields[f"{name}.rope.scaling.type"] == "yarn" and fields[f"{name}.rope.scaling.factor"] == 4
    assert fields[f"{name}.rope.scaling.original_context_length"] == WINDOW
    assert f"{name}.rope.scaling.attn_factor" not in fields, "llama.cpp's own is ours"
    expected = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"].detach().numpy()
    stored = tensors["blk.0.ffn_up.weight"]
    assert stored.tensor_type.name == kind.upper()
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.allclose(values, expected, atol=np.abs(expected).max() / 100)
    assert all(check.passed for check in result.checks if "llama.cpp" not in check.name)
    assert len([check for check in result.checks if check.passed]) >= 5


def test_rows_are_pairs_of_neighbours() -> None:
    """One head of four channels: 0 is paired with 2 and 1 with 3, so they come to stand beside each other."""
    weight = np.arange(8.0)[:, None] * np.ones((1, 3))
    assert permute(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert permute(np.arange(4.0), 1).tolist() == [0, 2, 1, 3]


@pytest.mark.filterwarnings("ignore:tokenizer.ggml.pre:UserWarning")
def test_qwen_biases_and_the_unpermuted(tmp_path: Path) -> None:
    checkpoint, model = save_checkpoint(tmp_path / "model", "qwen2", bpe=True)
    export(checkpoint, tmp_path / "out", to="gguf", scale=2, gguf_type="f32")
    _, tensors = fields_of(tmp_path / "out")
    parameters = dict(model.named_parameters())
    for theirs, ours in [("attn_q.weight", "q_proj.weight"), ("attn_k.bias", "k_proj.bias")]:
        expected = parameters[f"model.layers.1.self_attn.{ours}"].detach().numpy()
        assert np.array_equal(np.array(tensors[f"blk.1.{theirs}"].data).reshape(expected.shape), expected)


@pytest.mark.parametrize("method, slope", [("linear", 0.05), ("ntk", 0.05), ("yarn", 0.16), ("yarn", 0.0)])
def test_attention_scale(tmp_path: Path, method: str, slope: float) -> None:
    """ggml multiplies by attn_factor, and where the type is yarn by 1 + 0.1 ln(factor) too."""
    info = checkpoint_info(method, attention={"training_slope": slope})
    checkpoint, _ = save_checkpoint(tmp_path / "model", bpe=True, info=info)
    result = export(checkpoint, tmp_path / "out", to="gguf", scale=8)
    fields, _ = fields_of(tmp_path / "out")
    own = 1 + 0.1 * math.log(8) if method == "yarn" else 1.0
    assert fields["llama.rope.scaling.attn_factor"] * own == pytest.approx(1 + slope * math.log(8), rel=1e-6)
    said = [check for check in result.checks if check.name == "transformers"]
    assert [check.passed for check in said] == ([] if method == "yarn" else [None])


def test_llama3_base_takes_a_tensor_of_divisors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    }
    checkpoint, model = save_checkpoint(tmp_path / "model", method="linear", bpe=True, rope_parameters=llama3)
    with pytest.raises(ValueError, match="--to gguf for a Llama"):
        export(checkpoint, tmp_path / "hf", scale=4)
    export(checkpoint, tmp_path / "out", to="gguf", scale=4)
    fields, tensors = fields_of(tmp_path / "out")
    keys = {key.removeprefix("llama.rope."): value for key, value in fields.items()}
    found = llamacpp_frequencies(keys, np.array(tensors["rope_freqs.weight"].data)).inv_freq
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    assert torch.allclose(found, expected.double() / 4, rtol=1e-5)
    assert keys["scaling.type"] == "linear" and keys["scaling.factor"] == 4
    other, _ = save_checkpoint(tmp_path / "qwen", "qwen2", method="linear", bpe=True, rope_parameters=llama3)
    with pytest.raises(ValueError, match=r"llama\.cpp's qwen2 has no place"):
        export(other, tmp_path / "out2", to="gguf", scale=4)


@pytest.mark.parametrize(
    "model_type, sizes, message",
    [
        ("gemma3_text", {}, "model type 'gemma3_text': GGUF is written for llama, mistral, qwen2, qwen3"),
        ("mistral", {"sliding_window": 100}, "sliding_window = 100: .* at most 100 tokens"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_what_llamacpp_would_run_otherwise(tmp_path: Path, model_type: str, sizes: Any, message: str) -> None:
    checkpoint, _ = save_checkpoint(tmp_path / "model", model_type, bpe=True, **sizes)
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out", to="gguf", scale=4)


def test_embedded_base_says_that_no_cutting_fits(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the nearest of llama\.cpp's ways"):
        result = export(str(TINY_512), tmp_path / "out", to="gguf", scale=1)
    assert any("gives other tokens at" in note for note in result.notes)
    assert "gives other tokens at" in (tmp_path / "out/README.md").read_text()


def trained(pre: Any, **model: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the samples, cut by `pre`."""
    core = Tokenizer(models.BPE(**model))
    core.pre_tokenizer = pre
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*SAMPLES * 3, "1234567 12 123 4567 '' 's 't don't we've" * 4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def split(pattern: str) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "pre, name",
    [
        (LEVEL, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL]), "smollm"),
        (split(LLAMA3), "llama-bpe"),
        (split(LLAMA3), "smaug-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
    ],
)
def test_finds_the_cutting(pre: Any, name: str) -> None:
    """Patterns as the models' own tokenizer.json have them."""
    found = read_vocabulary(trained(pre, ignore_merges=name == "llama-bpe"), 1000)
    assert (found.pre, found.differing) == (name, 0) and found.sampled > 1000
    assert found.warning() is None and len(found.tokens) == 1000 and found.tokens[-1] == "[UNUSED999]"


def test_cutting_that_nobody_has() -> None:
    found = read_vocabulary(trained(split(r"\p{L}+|\s+|\d\d|[^\s]")), 1000)
    assert found.differing > 100 and "none fits exactly" in str(found.warning())


def test_composed_characters() -> None:
    from tokenizers import normalizers

    tokenizer = trained(LEVEL)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    found = read_vocabulary(tokenizer, 1000)
    assert 0 < found.differing < 10 and "composes characters (NFC)" in str(found.warning())
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"normalizer = .*Lowercase.*llama\.cpp's BPE has none"):
        read_vocabulary(tokenizer, 1000)


def test_kinds_of_tokens_and_special_ids() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens(["<mine>"])
    found = read_vocabulary(tokenizer, 4100)
    assert found.kinds[:2] == [3, 3] and found.kinds[4096] == 4 and found.kinds[4099] == 5
    assert found.tokens[4096] == "<mine>" and found.special == {"eos": 0, "padding": 1}
    assert not found.adds_bos and not found.adds_eos
    with pytest.raises(ValueError, match="token id 4096 lies outside the model's vocabulary of 4000"):
        read_vocabulary(tokenizer, 4000)
