"""What a recipe asks for and this machine lacks, told with the line that mends it before weights are read."""

from __future__ import annotations

import importlib.metadata

import torch

from e2llm.config import Recipe
from e2llm.hf.packages import check_attention, has_cpp_compiler, has_triton


def check_packages(recipe: Recipe) -> None:
    """Raise ValueError for a tracker, an attention or, on a GPU, kernels whose package is not installed, for an
    attention that only a GPU trains, and for compiled layers on a CPU without a compiler."""
    for tracker in recipe.train.trackers:
        try:
            importlib.metadata.version(tracker)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(
                f"train.trackers = {list(recipe.train.trackers)!r}: {tracker} is not installed: "
                f"pip install 'e2llm[{tracker}]'"
            ) from error
    attention = recipe.model.attn_implementation
    check_attention(attention)
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise ValueError(
            f"model.attn_implementation = {attention!r}: PyTorch has its backward pass for GPUs alone; use sdpa here"
        )
    if recipe.train.compile == "layers" and not (torch.cuda.is_available() or has_cpp_compiler()):
        raise ValueError(
            "train.compile = 'layers': on a CPU torch.compile writes C++, and no compiler of it is here: install one "
            "(g++; apt-get install g++), name it in CXX, or use train.compile = none, which is slower"
        )
    if not torch.cuda.is_available() or has_triton():
        return
    if recipe.method == "self_extend":
        raise ValueError(
            "method = 'self_extend': on a GPU its training attention is a kernel in Triton, which is not installed: "
            "pip install triton, or use another method"
        )
    if recipe.train.optimizer == "adamw_split":
        raise ValueError(
            "train.optimizer = 'adamw_split': on a GPU it is a kernel in Triton, which is not installed: pip install "
            "triton, or use adamw with model.dtype = float32"
        )
    if recipe.train.compile == "layers":
        raise ValueError(
            "train.compile = 'layers': on a GPU torch.compile writes Triton, which is not installed: pip install "
            "triton, or use train.compile = none, which is slower"
        )
