"""Packages that an attention of transformers needs, looked for before a model is read.

Flows in: the name of an attention. Flows out: nothing, or a ValueError with the line to install. transformers itself
says so only when it builds the model, by an ImportError without that line.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil

import torch
import torch._inductor.config
from transformers.utils import is_kernels_available

_FLASH = {
    "flash_attention_2": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash-attn-3", "build it from github.com/Dao-AILab/flash-attention/tree/main/hopper"),
    "flash_attention_4": ("flash-attn-4", "pip install flash-attn-4"),
}
"""Name of an attention -> its package, how to install that."""
_HUB = "pip install 'transformers[kernels]'"
"""Lets transformers fetch built kernels from the hub, these too."""


def has_triton() -> bool:
    """Whether Triton is installed, in which GPU kernels of ours and torch.compile's are written."""
    return importlib.util.find_spec("triton") is not None


def has_cpp_compiler() -> bool:
    """Whether there is a compiler of the C++ that torch.compile writes for CPUs."""
    told = torch._inductor.config.cpp.cxx
    return any(shutil.which(name) for name in ([told] if isinstance(told, str) else told) if name)


def check_attention(name: str | None) -> None:
    """Raise ValueError where attention `name` (`attn_implementation` of transformers) needs a package that is not
    installed. Whether a model has such an attention, and a device runs it, is transformers' to say."""
    if name is None:
        return
    if name in _FLASH:
        package, line = _FLASH[name]
        if not (_installed(package) or is_kernels_available()):
            raise ValueError(
                f"attn_implementation = {name!r}: {package} is not installed: {line}, or {_HUB}, which fetches a built "
                "kernel; or use sdpa"
            )
    elif "/" in name and not is_kernels_available():
        raise ValueError(f"attn_implementation = {name!r}: kernels is not installed, or too old or new: {_HUB}")
    elif name == "flex_attention" and torch.cuda.is_available() and not has_triton():
        raise ValueError(
            f"attn_implementation = {name!r}: it is compiled to Triton on a GPU, which is not installed: pip install "
            "triton, or use sdpa"
        )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
