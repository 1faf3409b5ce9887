"""Load models and tokenizers (HF folder, hub name, GGUF file), and save a checkpoint as a plain HF folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.extension import get_extension, install
from e2llm.hf.rotary import unwrap

DType = Literal["float32", "bfloat16", "float16", "auto"]


def _gguf_arguments(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(f"model = {str(path)!r}: reading GGUF needs one more package: pip install 'e2llm[gguf]'") from error
    from transformers import GgufConfig

    return str(path.parent), {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


def _check_name(name: str) -> Path:
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf")
    if looks_local and not path.expanduser().exists():
        raise ValueError(f"model = {name!r}: no such file or folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model = {name!r}: the folder holds no config.json; give a Hugging Face model folder")
    return path.expanduser()


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, hub name or GGUF file."""
    from transformers import AutoTokenizer

    path = _check_name(name)
    if path.suffix == ".gguf":
        folder, extra = _gguf_arguments(path)
        extra.pop("quantization_config")
        return AutoTokenizer.from_pretrained(folder, **extra)
    return AutoTokenizer.from_pretrained(str(path) if path.exists() else name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    *,
    dtype: DType | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    method: str | None = None,
    native_window: int | None = None,
) -> tuple[nn.Module, Any, CheckpointInfo | None]:
    """Model in evaluation mode, tokenizer, and what e2llm.json says (None for a model that is not ours).

    The rotary module is wrapped with `method`, or the checkpoint's own, or for a foreign model `yarn` where it can be
    and `linear` where the base already scales. dtype None: bfloat16 on a GPU, float32 on a CPU.
    A LoRA adapter folder that we saved is merged into its base. Raises ValueError for paths that are not models.
    """
    from transformers import AutoModelForCausalLM

    path = _check_name(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    source = str(path) if path.exists() else name
    if path.suffix == ".gguf":
        source, extra = _gguf_arguments(path)
        arguments |= extra
    model = AutoModelForCausalLM.from_pretrained(source, **arguments)
    model = model.to(device).eval()
    info = CheckpointInfo.load(path) if path.is_dir() else None
    window = native_window or (info.native_window if info else None)
    if method is None and info is None:
        _install_default(model, window)
    else:
        assert method is not None or info is not None
        extension = install(model, method=method or (info.method if info else "yarn"), native_window=window)
        extension.max_scale = info.max_scale if info else 1.0
    return model, load_tokenizer(name, trust_remote_code=trust_remote_code), info


def _install_default(model: nn.Module, native_window: int | None) -> None:
    """yarn where the base is unscaled, its own longrope factors where it has them, else linear, which composes."""
    for method in ("yarn", "longrope"):
        try:
            install(model, method=method, native_window=native_window)
            return
        except ValueError:
            continue
    install(model, method="linear", native_window=native_window)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass, under the name this transformers version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def save_model(model: nn.Module, tokenizer: Any, folder: str | Path, info: CheckpointInfo) -> Path:
    """Write a plain HF folder (weights, config, tokenizer) with e2llm.json beside; whole or not at all.

    The config stays the base's own: max_position_embeddings keeps the native window and no rope scaling is written,
    so that nobody scales twice. PEFT adapters must be merged before (see train).
    """
    target = Path(folder)
    staging = target.with_name(target.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    inner = unwrap(model)
    extension = get_extension(model)
    assert extension is None or not any("rotary_emb" in key for key in inner.state_dict()), "rotary tables are not saved"
    inner.save_pretrained(staging)
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    info.save(staging)
    if target.exists():
        backup = target.with_name(target.name + ".old")
        if backup.exists():
            shutil.rmtree(backup)
        target.rename(backup)
        staging.rename(target)
        shutil.rmtree(backup)
    else:
        staging.rename(target)
    return target
