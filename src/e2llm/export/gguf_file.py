"""Write and read back a GGUF file of a model at one fixed scale.

Flows in: a plain Hugging Face folder (weights as safetensors), its config and tokenizer, an `ExportPlan`. Flows out:
one .gguf file, written a tensor at a time, and the `Check`s of its tensors and metadata.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2llm.export.gguf_layout import (
    ROPE_FACTORS,
    Architecture,
    Array,
    find_architecture,
    head_dim,
    heads_of,
    llamacpp_frequencies,
    model_keys,
    permute,
    permuted_row,
    rope_keys,
    tensor_names,
)
from e2llm.export.gguf_vocabulary import Vocabulary
from e2llm.export.plan import ExportPlan
from e2llm.export.verify import Check

TYPES = ("bf16", "f16", "f32", "q8_0")
"""Storage of the matrices; vectors are float32."""
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_ALLOWED = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 127}
"""Largest rounding of a stored value: for F16 and BF16 of the value, for Q8_0 of its block's largest."""
_BLOCK = 32
"""Values of a Q8_0 block."""


def check_type(name: str) -> None:
    """Raise ValueError for a type that is not written, or where the package that writes is not there."""
    if name not in TYPES:
        raise ValueError(f"gguf_type = {name!r}: choose one of {', '.join(TYPES)}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("to = 'gguf': to write GGUF, pip install 'e2llm[gguf]'")


def _tensors(folder: Path, name_of: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(llama.cpp's name, tensor as stored) of every weight, one in memory at a time."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():
                if name.endswith("rotary_emb.inv_freq"):  # very old checkpoints; follows from the config
                    continue
                target = name_of(name)
                if target is None:
                    raise ValueError(f"{path.name}: tensor {name!r}: llama.cpp's family has none; use --to hf")
                yield target, file.get_tensor(name)


def _stored_as(name: str, shape: tuple[int, ...], kind: str) -> Any:
    from gguf import GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % _BLOCK:  # its rows cannot be cut into blocks
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind.upper()]


def _prepared(name: str, tensor: torch.Tensor, config: Any, architecture: Architecture) -> Array:
    values: Array = tensor.to(torch.float32).numpy()
    heads = heads_of(name, config) if architecture.permuted else None
    return permute(values, heads) if heads is not None else values


def write(
    path: Path, folder: Path, config: Any, plan: ExportPlan, vocabulary: Vocabulary, *, kind: str, name: str
) -> None:
    """Write `folder`'s model to `path`. Raises ValueError for a model that llama.cpp's family does not hold."""
    import gguf

    architecture = find_architecture(config, plan.window)
    keys, divisors = rope_keys(plan, architecture)
    name_of = tensor_names(architecture, int(config.num_hidden_layers))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_name(name)
    writer.add_description(f"e2llm: {plan.method}, scale {plan.scale:g}, window {plan.window}")
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[kind]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    prefixed = {f"{architecture.name}.rope.{key}": value for key, value in keys.items()}
    prefixed |= {f"{architecture.name}.{k}": v for k, v in model_keys(config, plan, len(vocabulary.tokens)).items()}
    for key, value in prefixed.items():
        _add(writer, key, value)
    _add_vocabulary(writer, vocabulary)

    def wanted() -> Iterator[tuple[str, torch.Tensor]]:
        if divisors is not None:
            yield ROPE_FACTORS, torch.from_numpy(divisors)
        for target, tensor in _tensors(folder, name_of):
            if not (tied and target == "output.weight"):
                yield target, tensor

    for target, tensor in wanted():
        shape = tuple(tensor.shape)
        stored = _stored_as(target, shape, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        nbytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(target, shape, np.dtype(np.float32), nbytes, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, tensor in wanted():
        values = _prepared(target, tensor, config, architecture)
        writer.write_tensor_data(gguf.quants.quantize(values, _stored_as(target, values.shape, kind)))
    writer.close()


def _add(writer: Any, key: str, value: str | int | float) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def read_back(path: Path, folder: Path, config: Any, plan: ExportPlan, vocabulary: Vocabulary) -> list[Check]:
    """Compare a file with the folder that it was made from and the plan: metadata, frequencies, tokens, tensors."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {field.name: field.contents() for field in reader.fields.values() if field.types}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = find_architecture(config, plan.window)
    return [
        _check_rope(fields, tensors, architecture, plan),
        _check_metadata(fields, architecture, config, plan, vocabulary),
        _check_tensors(tensors, folder, config, architecture),
    ]


def context_length(path: Path) -> int:
    """What a file says of its longest text, tokens."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    return int(fields[f"{fields['general.architecture'].contents()}.context_length"].contents())


def _check_rope(fields: dict[str, Any], tensors: dict[str, Any], architecture: Architecture, plan: ExportPlan) -> Check:
    name = "frequencies in the GGUF"
    prefix = f"{architecture.name}.rope."
    keys = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    missing = {"dimension_count", "freq_base", "scaling.type"} - keys.keys()
    if keys.get("scaling.type") in ("yarn", "linear"):
        missing |= {"scaling.factor"} - keys.keys()
    if missing:
        return Check(name, False, f"{', '.join(sorted(prefix + key for key in missing))} missing")
    divisors = np.array(tensors[ROPE_FACTORS].data) if ROPE_FACTORS in tensors else None
    found, expected = llamacpp_frequencies(keys, divisors), plan.frequencies()[None]
    apart = (found.inv_freq / expected.inv_freq.double() - 1).abs().max().item()
    scale_apart = abs(found.attention_scale - expected.attention_scale)
    detail = (
        f"inv_freq differ by at most {apart:.1e} of their value, attention scale {found.attention_scale:.6f} "
        f"(expected {expected.attention_scale:.6f})"
    )
    return Check(name, apart <= 1e-5 and scale_apart <= 1e-5, detail)


def _check_metadata(
    fields: dict[str, Any], architecture: Architecture, config: Any, plan: ExportPlan, vocabulary: Vocabulary
) -> Check:
    size = len(vocabulary.tokens)
    expected = {f"{architecture.name}.{key}": value for key, value in model_keys(config, plan, size).items()}
    expected |= {
        "general.architecture": architecture.name,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.kinds,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.add_bos_token": vocabulary.adds_bos,
    }
    expected |= {f"tokenizer.ggml.{key}_token_id": token for key, token in vocabulary.special.items()}
    if vocabulary.chat_template:
        expected["tokenizer.chat_template"] = vocabulary.chat_template
    for key, value in expected.items():
        found = fields.get(key)
        same = found is not None and (np.isclose(found, value, rtol=1e-6) if type(value) is float else found == value)
        if not same:
            return Check("metadata of the GGUF", False, f"{key} = {str(found)[:80]}, expected {str(value)[:80]}")
    return Check("metadata of the GGUF", True, f"{len(expected)} keys, {len(vocabulary.tokens)} tokens read back")


def _check_tensors(tensors: dict[str, Any], folder: Path, config: Any, architecture: Architecture) -> Check:
    """Every tensor dequantised, rows put back one by one by the definition of the order, against the safetensors."""
    import gguf

    name_of = tensor_names(architecture, int(config.num_hidden_layers))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    seen, worst = {ROPE_FACTORS} & tensors.keys(), 0.0
    for name, tensor in _tensors(folder, name_of):
        if tied and name == "output.weight":
            continue
        if name not in tensors:
            return Check("tensors of the GGUF", False, f"{name} is missing")
        stored = tensors[name]
        values: Array = gguf.quants.dequantize(stored.data, stored.tensor_type)
        expected: Array = tensor.to(torch.float32).numpy()
        if architecture.permuted and heads_of(name, config) is not None:
            expected = expected[[permuted_row(row, head_dim(config)) for row in range(len(expected))]]
        if values.shape != expected.shape:
            return Check("tensors of the GGUF", False, f"{name} is {values.shape}, expected {expected.shape}")
        worst = max(worst, share := _rounding(values, expected, stored.tensor_type.name))
        if share > 1.01:
            apart = float(np.abs(values - expected).max())
            return Check("tensors of the GGUF", False, f"{name} differs by {apart:.3g}, {share:.3g} times its rounding")
        seen.add(name)
    if tensors.keys() - seen:
        return Check("tensors of the GGUF", False, f"{', '.join(sorted(tensors.keys() - seen))}: not the model's")
    return Check("tensors of the GGUF", True, f"{len(seen)} read back, each within its type's rounding")


def _rounding(values: Array, expected: Array, kind: str) -> float:
    """Largest difference as a share of what storing as `kind` may round."""
    apart = np.abs(values - expected)
    if kind == "F32":
        return float("inf") if apart.any() else 0.0
    if kind == "Q8_0":
        blocks = expected.reshape(-1, _BLOCK)
        # half a step of the block, and its step is itself stored as float16
        limit = np.abs(blocks).max(axis=1, keepdims=True) * (_ALLOWED[kind] * 0.5 + 2.0**-10)
        apart = apart.reshape(blocks.shape)
    else:
        limit = np.abs(expected) * _ALLOWED[kind]
    return float((apart / np.maximum(limit, 1e-7)).max())


def installed_version(*packages: str) -> str | None:
    """Version of the first of `packages` that is installed."""
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
