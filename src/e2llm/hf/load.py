"""Load models and tokenizers (HF folder, adapter folder, hub name, GGUF file), and save a checkpoint as a plain HF
folder."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import PickleError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.extended import extend_as_told
from e2llm.hf.extension import get_extension
from e2llm.hf.packages import check_attention
from e2llm.hf.read_once import as_first, read_once
from e2llm.hf.rotary import unwrap
from e2llm.positions.attention import AttentionConfig

DType = Literal["float32", "bfloat16", "float16", "auto"]
ADAPTER_CONFIG = "adapter_config.json"
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, SafetensorError, PickleError),
    ImportError,  # of a package that this model or its tokenizer needs
)


def _gguf_arguments(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(f"model = {str(path)!r}: to read GGUF, pip install 'e2llm[gguf]'") from error
    from transformers import GgufConfig

    return str(path.parent), {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


def _check_unscaled(path: Path) -> None:
    """Raise ValueError for a GGUF with rope scaling: transformers reads its weights and drops the scaling silently."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for name, field in fields.items():
        if name.endswith(".rope.scaling.type") and field.contents() != "none":
            factor = fields.get(name.replace(".type", ".factor"))
            raise ValueError(
                f"model = {str(path)!r}: its frequencies are scaled ({field.contents()}, factor "
                f"{factor.contents() if factor else 'unknown'}), which transformers would drop; load the checkpoint "
                "that it was made from"
            )


def _check_name(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        backup = _backup(path)
        if backup.is_dir():
            raise ValueError(
                f"model = {name!r}: a save was cut off; the older checkpoint is {str(backup)!r}, "
                f"rename it to {path.name!r}"
            )
        if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf"):
            raise ValueError(f"model = {name!r}: no such file or folder")
    elif path.is_dir() and not (path / "config.json").is_file() and not is_adapter(path):
        raise ValueError(f"model = {name!r}: the folder holds no config.json; give a Hugging Face model folder")
    return path


def is_adapter(path: Path) -> bool:
    """Whether a folder holds adapters that belong to another model, and no whole weights."""
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    # Some trainers (axolotl) leave the base's config.json beside an adapter.
    whole = any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    return not ((path / "config.json").is_file() and whole)


def _base_of_adapter(path: Path) -> str:
    """Name of the model that the adapter in folder `path` belongs to, checked to be there where it is a path."""
    file = path / ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not an adapter's config ({error})") from error
    if not base or not isinstance(base, str):
        raise ValueError(f"{file}: base_model_name_or_path = {base!r}: name the model that the adapter belongs to")
    try:
        found = _check_name(base)
    except ValueError as error:
        raise ValueError(f"{file}: base_model_name_or_path: {error}") from error
    if found.is_dir() and is_adapter(found):
        raise ValueError(f"{file}: base_model_name_or_path = {base!r}: an adapter itself; merge that one first")
    return base


@contextlib.contextmanager
def _reading(name: str, path: Path, part: str = "") -> Iterator[None]:
    """What transformers and safetensors raise for what cannot be found or read, as the ValueError of a name to mend."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        whole = str(error).strip()
        # An OSError goes on with advice for other cases; a ValueError says what to do.
        reason = whole.split("\n")[0] if isinstance(error, OSError) else " ".join(whole.split())[:600]
        missing = isinstance(error, OSError) and not path.exists()
        what = "neither a local file or folder nor reachable on the hub" if missing else f"{part}cannot be read"
        raise ValueError(f"model = {name!r}: {what} ({reason})") from error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder (an adapter's own, or its base's), hub name or GGUF file."""
    from transformers import AutoTokenizer

    path = _check_name(name)
    if path.is_dir() and is_adapter(path) and not (path / "tokenizer_config.json").is_file():
        return load_tokenizer(_base_of_adapter(path), trust_remote_code=trust_remote_code)
    with _reading(name, path, "its tokenizer "):
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
    quantization: Literal["none", "nf4"] = "none",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    method: str | None = None,
    native_window: int | None = None,
    attention: AttentionConfig | None = None,
    neighbours: int | None = None,
    once: bool = False,
) -> tuple[nn.Module, Any, CheckpointInfo | None]:
    """Model in evaluation mode, tokenizer, and what e2llm.json says (None for a model that is not ours).

    The rotary module is wrapped with `method`, or the checkpoint's own, or for a foreign model `yarn` where it can be
    and `linear` where the base already scales. attention None: the checkpoint's own slopes with its own method, else
    the method's; neighbours None: likewise (`install`). dtype None: bfloat16 on a GPU, float32 on a CPU. quantization
    nf4: linear layers other than the output layer become 4-bit normal floats, double quantized, that compute in dtype;
    needs bitsandbytes.
    once: of a process group, the first process alone reads weights (`hf.read_once`); the others hold none, on the host.
    A folder with a PEFT adapter is merged into the base that its config names, e2llm.json read from either. Raises
    ValueError for what is no model, here or on the hub, and for an attention whose package is missing.
    """
    path = _check_name(name)
    check_attention(attn_implementation)
    base = _base_of_adapter(path) if path.is_dir() and is_adapter(path) else None
    device = _device(device)
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    arguments: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if quantization != "none":
        if once:
            raise ValueError(f"quantization = {quantization!r}: 4-bit weights cannot be sharded; use once = False")
        arguments |= _quantized(name, base, dtype, device)

    def read() -> Any:
        model = _read_weights(base or name, arguments)
        if base is not None:
            model = _merged(model, path)
        return _kept_trainable(model) if quantization != "none" else model.to(device)

    model = (read_once(read, lambda: _build_empty(base or name, arguments)) if once else read()).eval()
    info = load_info(name)
    extend = functools.partial(
        extend_as_told,
        model,
        name,
        info,
        method=method,
        native_window=native_window,
        attention=attention,
        neighbours=neighbours,
    )
    if once:  # who has no weights cannot try how a model pairs channels
        extension, grouping = as_first(extend, lambda found: found.grouping)
        extension.grouping = grouping
    else:
        extend()
    return model, load_tokenizer(name, trust_remote_code=trust_remote_code), info


def load_info(name: str) -> CheckpointInfo | None:
    """e2llm.json of a folder (of an adapter, its own or its base's) or beside a GGUF file; None where there is none.
    Raises ValueError for what is no model."""
    path = _check_name(name)
    if not path.exists():
        return None
    info = CheckpointInfo.load(path.parent if path.suffix == ".gguf" else path)
    if info is None and path.is_dir() and is_adapter(path):
        base = Path(_base_of_adapter(path)).expanduser()
        info = CheckpointInfo.load(base) if base.is_dir() else None
    return info


def _quantized(name: str, base: str | None, dtype: str, device: torch.device) -> dict[str, Any]:
    """Arguments that make 4-bit weights while they are read, straight onto `device`. Raises ValueError."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("model.quantization = 'nf4': bitsandbytes is not installed: pip install 'e2llm[qlora]'")
    if base is not None:
        raise ValueError(
            f"model.quantization = 'nf4': {name!r} is an adapter, which 4-bit weights cannot take in; merge it into "
            "whole weights first"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _kept_trainable(model: Any) -> Any:
    """Keep bitsandbytes from packing 4-bit weights anew at an evaluation, as it does on CPUs that know bfloat16: the
    packed ones have no backward pass, and a step after it would train on wrong gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _device(wanted: str | torch.device | None) -> torch.device:
    """The device, checked to be there. Raises ValueError."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device = {str(wanted)!r}: no such device; use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device = {str(wanted)!r}: GPUs here: {torch.cuda.device_count()}; use one of them, or cpu")
    return device


def _read_weights(name: str, arguments: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    path = _check_name(name)
    source = str(path) if path.exists() else name
    if path.suffix == ".gguf":
        source, extra = _gguf_arguments(path)
        _check_unscaled(path)
        arguments = arguments | extra
    with _reading(name, path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **arguments)
    model, told = loaded
    if lacking := sorted(told["missing_keys"]):  # transformers would make them up at random, and only warn
        raise ValueError(f"model = {name!r}: weights are missing from its files ({len(lacking)}, such as {lacking[0]})")
    return model


def _build_empty(name: str, arguments: dict[str, Any]) -> Any:
    """The model that the config says, by the same arguments as `_read_weights`."""
    from transformers import AutoModelForCausalLM

    # Where the type is to be the file's: the config's; what each weight's is, the first process says.
    given = {key: value for key, value in arguments.items() if (key, value) != ("dtype", "auto")}
    config = load_config(name, trust_remote_code=arguments["trust_remote_code"])
    return AutoModelForCausalLM.from_config(config, **given)


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """transformers' config of a folder (of an adapter, its base's), hub name or GGUF file; no weights are read. Raises
    ValueError."""
    from transformers import AutoConfig

    path = _check_name(name)
    source, extra = config_source(name)
    with _reading(name, path):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **extra)


def config_source(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a model's config: folder or hub name, and an argument for a GGUF file in it. Of an
    adapter's folder its base's. Raises ValueError."""
    path = _check_name(name)
    if path.is_dir() and is_adapter(path):
        return config_source(_base_of_adapter(path))
    if path.suffix != ".gguf":
        return str(path) if path.exists() else name, {}
    folder, extra = _gguf_arguments(path)
    _check_unscaled(path)
    return folder, {"gguf_file": extra["gguf_file"]}


def _merged(model: nn.Module, adapter: Path) -> Any:
    """`model` with the adapter in its weights. Raises ValueError for adapters that are no change of weights."""
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, str(adapter))  # type: ignore[arg-type]
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"model = {str(adapter)!r}: the adapter does not fit its base: {error}") from error
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type
        raise ValueError(f"model = {str(adapter)!r}: an adapter of type {kind} cannot be merged; use one such as LoRA")
    return adapted.merge_and_unload().requires_grad_(True)  # PEFT had frozen the base


def enable_activation_checkpointing(model: Any, *, early_stop: bool = True) -> None:
    """Recompute each layer's activations in the backward pass, under the name this transformers version has for it.

    early_stop: the second computation ends with the last activation that is needed; hooks after it do not run then.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False} | ({} if early_stop else {"early_stop": False}))


def load_whole_models_again() -> None:
    """After a DeepSpeed run, whose settings transformers keeps: under ZeRO-3 each model loaded would be partitioned."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def save_model(model: nn.Module, tokenizer: Any, folder: str | Path, info: CheckpointInfo) -> Path:
    """Write a plain HF folder (weights, config, tokenizer) with e2llm.json beside; whole or not at all.

    The config stays the base's own: max_position_embeddings keeps the native window and no rope scaling is written,
    so that nobody scales twice. While a folder is replaced, the older one is `<folder>.old` until the new one stands in
    its place; what a save that was cut off left behind is put right by the next one. Raises ValueError for a model
    with PEFT adapters that are not merged.
    """
    target = Path(folder)
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        raise ValueError(
            f"model = {type(model).__name__}: its adapters are not part of its weights yet; "
            "save what its merge_and_unload() returns"
        )
    staging, backup = target.with_name(target.name + ".partial"), _backup(target)
    if not target.exists() and backup.exists():  # cut off between the two renames below
        backup.rename(target)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    inner: Any = unwrap(model)
    extended = get_extension(model) is not None
    assert not (extended and any("rotary_emb" in key for key in inner.state_dict())), "rotary tables are not saved"
    inner.save_pretrained(staging)
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    info.save(staging)
    replace_folder(staging, target)
    return target


def replace_folder(staging: Path, target: Path) -> None:
    """Put folder `staging` in the place of `target`; where that fails, `target` is as it was."""
    backup = _backup(target)
    if backup.exists():  # of a save that was cut off after the new folder stood
        shutil.rmtree(backup)
    if not target.exists():
        staging.rename(target)
        return
    target.rename(backup)
    try:
        staging.rename(target)
    except BaseException:
        backup.rename(target)
        raise
    shutil.rmtree(backup)


def _backup(target: Path) -> Path:
    return target.with_name(target.name + ".old")
