"""The one file that knows llama.cpp's C interface (llama-cpp-python): weights, contexts, a pass over packed tokens.

Flows in: a GGUF file, `ContextRope`s, token ids, moves of keys. Flows out: logits. Weights are mapped from the file, so
that further handles on it (for another multiplier of cos and sin, see `export.gguf_context`) share its pages in memory.
Not thread-safe: one thread at a time uses a file's weights and contexts.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from e2llm.export.gguf_context import ATTN_FACTOR_KEY, SCALING_TYPES, ContextRope
from e2llm.positions.frames import Move

# N = rows of logits that are asked for, V = vocabulary size

KV_TYPES = {"f32": (0, 4), "f16": (1, 2)}
"""Type of keys and values -> (enum ggml_type, bytes)."""
UBATCH_TOKENS = 512
_FLOAT_OVERRIDE = 1
_MOST_SEQUENCES = 256


class LlamaCppError(RuntimeError):
    """llama.cpp said no; what it printed is in the message."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that are computed in one pass."""

    sequence: int
    start: int
    """Position of the first one."""
    tokens: Sequence[int]
    wanted: bool
    """Whether the logits after the last one are asked for."""


class _Log:
    """Keeps llama.cpp's last lines instead of printing them."""

    def __init__(self, library: Any) -> None:
        self.lines: list[str] = []

        def keep(level: int, text: bytes, _: Any) -> None:
            self.lines = [*self.lines[-7:], text.decode(errors="replace").strip()]

        self._callback = library.llama_log_callback(keep)  # ctypes keeps no reference of its own
        library.llama_log_set(self._callback, ctypes.c_void_p(0))

    def last(self) -> str:
        return "; ".join(line for line in self.lines[-3:] if line) or "no reason given"


_log: _Log | None = None


def load_library() -> Any:
    """llama_cpp. Raises ValueError with the install line where it is not there, or too old or too new."""
    global _log
    try:
        import llama_cpp
    except ImportError as error:
        raise ValueError(
            "engine = 'llamacpp': llama-cpp-python is not installed: pip install 'e2llm[llamacpp]' (it is built from "
            "source: a C++ compiler and a few minutes)"
        ) from error
    needed = {"kv_unified", "yarn_orig_ctx", "n_outputs_max", "rope_scaling_type", "flash_attn_type"}
    missing = needed - {name for name, _ in llama_cpp.llama_context_params._fields_}
    missing |= {"load_mode", "use_extra_bufts"} - {name for name, _ in llama_cpp.llama_model_params._fields_}
    if missing:
        raise ValueError(
            f"llama-cpp-python {llama_cpp.__version__} has no {', '.join(sorted(missing))} in its parameters: "
            "pip install 'e2llm[llamacpp]' brings one that has"
        )
    if _log is None:
        llama_cpp.llama_backend_init()
        _log = _Log(llama_cpp)
    return llama_cpp


class Weights:
    """A GGUF file, mapped. `gpu_layers`: layers that go to a GPU, where the library was built for one."""

    def __init__(self, path: Path, architecture: str, *, gpu_layers: int = 0) -> None:
        self._library = load_library()
        self.path, self.architecture, self._gpu_layers = path, architecture, gpu_layers
        self._handles: dict[float | None, Any] = {}
        self._users: Counter[float | None] = Counter()
        """Contexts of each handle: one that nobody uses is closed, or callers who name scales would fill the memory."""
        first = self._handle(None)
        self._vocabulary = self._library.llama_model_get_vocab(first)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))

    def _handle(self, attn_factor: float | None) -> Any:
        """The model as loaded with this multiplier (None: the file's own)."""
        if attn_factor not in self._handles:
            library = self._library
            params = library.llama_model_default_params()
            params.n_gpu_layers = self._gpu_layers
            params.load_mode = library.llama_load_mode_from_str(b"mmap")
            # Rearranged copies of the weights would be one a handle, and for q8_0 they crashed (docs/decisions.md).
            params.use_extra_bufts = False
            if attn_factor is not None:
                overrides = (library.llama_model_kv_override * 2)()  # an empty key ends them
                overrides[0].tag = _FLOAT_OVERRIDE
                overrides[0].key = ATTN_FACTOR_KEY.format(self.architecture).encode()
                overrides[0].value.val_f64 = attn_factor
                params.kv_overrides = overrides
            made = library.llama_model_load_from_file(str(self.path).encode(), params)
            if not made:
                raise ValueError(f"model = {str(self.path)!r}: llama.cpp cannot read it ({_said()})")
            self._handles[attn_factor] = made
        return self._handles[attn_factor]

    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text by the file's metadata."""
        is_end = self._library.llama_vocab_is_eog
        return frozenset(token for token in range(self.vocabulary) if is_end(self._vocabulary, token))

    def context(
        self, rope: ContextRope, size: int, *, sequences: int, batch_tokens: int, kv_type: str, threads: int
    ) -> Context:
        """Keys and values for `size` tokens of at most `sequences` texts, read with `rope`. Raises LlamaCppError."""
        library = self._library
        params = library.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = size, min(sequences, _MOST_SEQUENCES), True
        params.n_batch = min(batch_tokens, size)
        params.n_ubatch = min(UBATCH_TOKENS, params.n_batch)
        params.n_outputs_max, params.n_outputs_max_per_seq = sequences, 1
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv_type][0]
        if kv_type == "f32":  # the fused kernel rounds on the way: 1e-3 in a logit where this is 1e-6
            params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        if rope.scaling is not None:
            params.rope_scaling_type = SCALING_TYPES[rope.scaling]
            params.rope_freq_base, params.rope_freq_scale = rope.freq_base, rope.freq_scale
            params.yarn_attn_factor, params.yarn_orig_ctx = rope.attn_factor, rope.original_window
        factor = rope.model_attn_factor
        made = library.llama_init_from_model(self._handle(factor), params)
        self._users[factor] += 1
        if not made:
            self._release(factor)
            raise LlamaCppError(f"a context of {size} tokens could not be made ({_said()})")
        return Context(library, made, self.vocabulary, int(params.n_batch), lambda: self._release(factor))

    def _release(self, factor: float | None) -> None:
        self._users[factor] -= 1
        if factor is not None and not self._users[factor]:
            self._library.llama_model_free(self._handles.pop(factor))

    def close(self) -> None:
        """Once its contexts are."""
        for handle in self._handles.values():
            self._library.llama_model_free(handle)
        self._handles.clear()


class Context:
    """Keys and values of several texts at one scale."""

    def __init__(
        self, library: Any, pointer: Any, vocabulary: int, batch_tokens: int, closed: Callable[[], None]
    ) -> None:
        self._library, self._pointer, self._vocabulary, self._closed = library, pointer, vocabulary, closed
        self.batch_tokens = batch_tokens
        """Most tokens of one pass."""
        self.size = int(library.llama_n_ctx(pointer))
        self._batch = library.llama_batch_init(batch_tokens, 0, 1)

    def compute(self, pieces: Sequence[Piece]) -> npt.NDArray[np.float32]:
        """Logits (N, V) after the pieces that want them, in order. Raises LlamaCppError; what the pieces' sequences
        hold may then be anything."""
        batch, place, wanted = self._batch, 0, []
        for piece in pieces:
            for offset, token in enumerate(piece.tokens):
                batch.token[place], batch.pos[place] = token, piece.start + offset
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, piece.sequence
                batch.logits[place] = False
                place += 1
            if piece.wanted:
                batch.logits[place - 1] = True
                wanted.append(place - 1)
        batch.n_tokens = place
        code = self._library.llama_decode(self._pointer, batch)
        if code != 0:
            raise LlamaCppError(f"llama_decode returned {code} ({_said()})")
        logits = np.empty((len(wanted), self._vocabulary), dtype=np.float32)
        for row, index in enumerate(wanted):
            found = self._library.llama_get_logits_ith(self._pointer, index)
            logits[row] = np.ctypeslib.as_array(found, shape=(self._vocabulary,))
        return logits

    @property
    def can_move(self) -> bool:
        """Whether llama.cpp can turn this model's cached keys to other positions."""
        return bool(self._library.llama_memory_can_shift(self._library.llama_get_memory(self._pointer)))

    def move(self, sequence: int, moves: Sequence[Move]) -> None:
        """Move keys of a text. What follows for the keys is computed with the next pass, of all moves until then at
        once. (Dividing positions, which groups would also be, turns keys the wrong way in llama.cpp.)"""
        memory = self._library.llama_get_memory(self._pointer)
        for move in moves:
            self._library.llama_memory_seq_add(memory, sequence, move.first, move.last, move.by)

    def forget(self, sequence: int) -> None:
        """Free the cells of a text."""
        memory = self._library.llama_get_memory(self._pointer)
        self._library.llama_memory_seq_rm(memory, sequence, -1, -1)

    def close(self) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._pointer)
        self._closed()


def _said() -> str:
    return "no reason given" if _log is None else _log.last()
