"""The only importer of transformers internals: find a model's rotary module, read it, wrap it, load and save models."""

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.extension import Extension, get_extension, install
from e2llm.hf.load import load_model, load_tokenizer, save_model

__all__ = ["CheckpointInfo", "Extension", "get_extension", "install", "load_model", "load_tokenizer", "save_model"]
