"""The only importer of transformers internals: find a model's rotary module, read it, wrap it, load and save models."""

from e2llm.hf.checkpoint import CheckpointInfo, current_versions
from e2llm.hf.extension import Extension, get_extension
from e2llm.hf.far_attention import attend_far, attend_plainly, attending_far
from e2llm.hf.install import install
from e2llm.hf.load import enable_activation_checkpointing, load_model, load_tokenizer, save_model

__all__ = [
    "CheckpointInfo",
    "Extension",
    "attend_far",
    "attend_plainly",
    "attending_far",
    "current_versions",
    "enable_activation_checkpointing",
    "get_extension",
    "install",
    "load_model",
    "load_tokenizer",
    "save_model",
]
