"""What a GGUF file says of its model, and how it is to be served: frequencies, window, method, end tokens, tokenizer.

Flows in: a .gguf file and what stands beside it. Flows out: a `GgufModel`. Nothing is loaded into llama.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e2llm.export.folder import PROVENANCE
from e2llm.export.gguf_context import METHODS, context_rope
from e2llm.export.gguf_layout import ARCHITECTURES, ROPE_FACTORS
from e2llm.hf import CheckpointInfo
from e2llm.hf.load import load_tokenizer
from e2llm.positions.choose import Schedule, ladder, parse_schedule
from e2llm.positions.frames import Frames, check_movable, usual_frames
from e2llm.positions.groups import group_of_scale
from e2llm.positions.rope import Rope


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """Everything that serving a file follows from."""

    path: Path
    architecture: str
    """llama.cpp's name of the family."""
    rope: Rope
    method: str
    """Frequency method; none for a file whose frequencies are scaled already."""
    slope: float | None
    """Of the attention scale; None: the method's own."""
    neighbours: int
    """Method self_extend: tokens that keep their distance; 0 with any other."""
    native_window: int
    max_scale: float
    schedule: Schedule
    info: CheckpointInfo | None
    kv_values: int
    """Numbers that a token's keys and values take, over all layers."""
    stored_as_float32: bool
    notes: tuple[str, ...] = ()
    """What was assumed, for whoever starts the engine."""

    def frames(self, scale: float) -> Frames | None:
        """How keys of a text at `scale` are moved; None where each stands at its own place."""
        if self.method != "self_extend":
            return None
        group = group_of_scale(scale, self.native_window, self.neighbours)
        return None if group == 1 else usual_frames(group, self.neighbours)


def read_gguf(path: Path) -> GgufModel:
    """Raises ValueError for a file that cannot be read, and for families that llama.cpp may run otherwise than we."""
    fields, divisors = _read_fields(path)
    architecture = str(fields.get("general.architecture"))
    if architecture not in {known.name for known in ARCHITECTURES.values()}:
        names = ", ".join(sorted({known.name for known in ARCHITECTURES.values()}))
        raise ValueError(
            f"model = {str(path)!r}: architecture {architecture!r}: this engine serves {names}, whose frequencies it "
            "knows; use --engine e2llm"
        )
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    window = int(own["context_length"])
    info = CheckpointInfo.load(path.parent)
    scaled = _fixed_scale(path, own)
    notes: list[str] = []
    if scaled:
        info = None
        notes.append(f"{path.name}: its frequencies are scaled already ({scaled}): every request is read as they are")
    rope = _rope(own, divisors, info.native_window if info else window)
    method, slope = "none", None
    if info is not None:
        method, slope = info.method, info.attention_config().serving()
    elif not scaled:
        method = "yarn" if rope.rope_type == "default" else "linear"
        notes.append(
            f"no e2llm.json beside {path.name}: assuming method {method}, native window {window} (the file's) and no "
            "training beyond it"
        )
    max_scale = info.max_scale if info else 1.0
    schedule = parse_schedule(info.schedule) if info else ()
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: llama.cpp is told {', '.join(METHODS)}; use --engine e2llm")
    if info is not None and method == "self_extend":
        check_movable(info.neighbours)
    for scale in {*ladder(max_scale), *(step.scale for step in schedule)}:
        context_rope(rope, method, scale, slope)
    head = int(own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"])
    value = int(own.get("attention.value_length") or head)
    kv_heads = int(own.get("attention.head_count_kv") or own["attention.head_count"])
    return GgufModel(
        path=path,
        architecture=architecture,
        rope=rope,
        method=method,
        slope=slope,
        neighbours=info.neighbours if info else 0,
        native_window=info.native_window if info else window,
        max_scale=max_scale,
        schedule=schedule,
        info=info,
        kv_values=int(own["block_count"]) * kv_heads * (head + value),
        stored_as_float32=fields.get("general.file_type") == 0,
        notes=tuple(notes),
    )


def _read_fields(path: Path) -> tuple[dict[str, Any], Any]:
    """Metadata but for the vocabulary, and the divisors of the frequencies where the file has them."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError("engine = 'llamacpp': gguf is not installed: pip install 'e2llm[llamacpp]'") from error
    if not path.is_file():
        raise ValueError(f"model = {str(path)!r}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"model = {str(path)!r}: not a GGUF file that can be read ({error})") from error
    named = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    tensor = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    return {n: f.contents() for n, f in named.items() if f.types}, None if tensor is None else np.array(tensor.data)


def _fixed_scale(path: Path, own: dict[str, Any]) -> str:
    """What scales the file's frequencies; empty where nothing does."""
    kind = own.get("rope.scaling.type", "none")
    if kind != "none":
        return f"{kind}, factor {own.get('rope.scaling.factor', 1.0):g}"
    export = path.parent / PROVENANCE
    if not export.is_file():
        return ""
    told = json.loads(export.read_text(encoding="utf-8"))
    if told.get("open_scales") or told.get("scale", 1) == 1:
        return ""
    return f"exported at scale {told['scale']:g} with {told.get('method')}"


def _rope(own: dict[str, Any], divisors: Any, native_window: int) -> Rope:
    head = int(own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"])
    dim, base = int(own.get("rope.dimension_count") or head), float(own.get("rope.freq_base", 10000.0))
    own_frequencies = 1.0 / base ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    if divisors is not None:
        own_frequencies = own_frequencies / divisors
    return Rope(
        rotary_dim=dim,
        base=base,
        native_window=native_window,
        inv_freq=tuple(own_frequencies.astype(np.float32).tolist()),
        attention_scale=float(own.get("rope.scaling.attn_factor", 1.0)),
        rope_type="default" if divisors is None else "divided",
    )


def read_tokenizer(path: Path) -> Any:
    """The transformers tokenizer beside the file, or the one that transformers makes of the file's vocabulary."""
    from transformers import AutoTokenizer

    if (path.parent / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(str(path.parent))
    return load_tokenizer(str(path))


def configured_ends(path: Path, tokenizer: Any) -> frozenset[int] | None:
    """End-of-text tokens of the generation config beside the file, or of its tokenizer; None where there is neither."""
    from transformers import GenerationConfig

    if (path.parent / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(str(path.parent)).eos_token_id
        found = tokenizer.eos_token_id if found is None else found
        ends = found if isinstance(found, (list, tuple)) else [found]
        return frozenset(int(token) for token in ends if token is not None)
    return None
