"""Proof that an exported folder is what the engine serves: loaded by transformers alone, compared with the engine.

Flows in: the engine at the exported scale, the folder. Flows out: `Check`s, printed and kept; a difference raises
ValueError with its numbers. Knows nothing of other runtimes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e2llm.export.folder import ADAPTER_FOLDER
from e2llm.export.plan import ExportPlan
from e2llm.hf.rotary import find_rotary_owner, read_rope
from e2llm.infer import Engine

# T = tokens, V = vocabulary size

LOGITS_BYTES = 2**29
"""Most bytes of float32 logits that the long probe may take."""
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference of a logit, as a share of the largest logit. The tables are equal to the last bit; attention
kernels and the order of sums are not."""
NATS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}
"""Largest difference of the mean nats a token."""


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, whether it was, and what came out."""

    name: str
    passed: bool | None
    """None: not run; the detail says why."""
    detail: str

    def line(self) -> str:
        """For a terminal and for the model card."""
        return (
            f"{ {True: 'verified', False: 'DIFFERS', None: 'not verified'}[self.passed] }: {self.name}: {self.detail}"
        )


@dataclass(frozen=True)
class Probe:
    """What the engine answers at the exported scale; every runtime is compared with it."""

    short: list[int]
    long: list[int]
    short_logits: torch.Tensor
    """(T, V) float32, CPU."""
    long_logits: torch.Tensor
    """(V,) float32, CPU: after the last token."""
    nats: float
    """Mean over the long probe's tokens after the first."""
    dtype: torch.dtype


def require(check: Check) -> Check:
    """The check, or ValueError where it failed."""
    if check.passed is False:
        raise ValueError(f"export is wrong: {check.name}: {check.detail}")
    return check


def probe_tokens(tokenizer: Any, vocabulary: int, window: int, native_window: int, text: str | None) -> list[int]:
    """Token ids of `text` (None: a file of Python's own library), longer than the native window where that is cheap.

    A model without a tokenizer gets pseudo-random ids.
    """
    cheap = max(128, min(2048, LOGITS_BYTES // (4 * vocabulary)))
    count = max(2, min(window, cheap, max(512, 2 * native_window)))
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()
    text = Path(str(argparse.__file__)).read_text(encoding="utf-8") if text is None else text
    ids: list[int] = tokenizer(text[: 16 * count]).input_ids[:count]
    if len(ids) < 2 or max(ids) >= vocabulary:
        raise ValueError(f"verify_text: {len(ids)} tokens below {vocabulary}; give at least two of this vocabulary")
    return ids


def _answer(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) float32 on the CPU, no cache."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    logits: torch.Tensor = out.logits[0].float().cpu()
    return logits


def mean_nats(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """Mean negative log probability of ids[1:] under logits (T, V) of `ids`."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(list(ids[1:]))))


def ask_engine(engine: Engine, plan: ExportPlan, ids: list[int]) -> Probe:
    """The engine's answers at the plan's scale."""
    short = ids[:32]
    with engine.at_scale(plan.scale):
        short_logits, long_logits = _answer(engine.model, short), _answer(engine.model, ids)
    return Probe(short, ids, short_logits, long_logits[-1], mean_nats(long_logits, ids), engine.model.dtype)


def load_plain(folder: Path, engine_model: Any, *, trust_remote_code: bool = False) -> Any:
    """The folder as anybody loads it, in the engine's dtype and device and with its attention kernel."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=engine_model.dtype,
        attn_implementation=engine_model.config._attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    if (folder / ADAPTER_FOLDER).is_dir():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder / ADAPTER_FOLDER))
    return model.to(engine_model.device).eval()


def check_frequencies(model: Any, plan: ExportPlan) -> Check:
    """Frequencies and attention scale of a plainly loaded model against those that the engine serves with."""
    rotary: Any = find_rotary_owner(model).rotary_emb
    config = model.config.get_text_config()
    worst, scales = 0.0, []
    for layer_type, expected in plan.frequencies().items():
        found = read_rope(rotary, config, layer_type, plan.native_window)
        values = torch.tensor(found.inv_freq)
        if values.shape != expected.inv_freq.shape:
            return Check("frequencies", False, f"{values.numel()} of them, expected {expected.inv_freq.numel()}")
        apart = (values / expected.inv_freq - 1).abs().max().item()
        worst = max(worst, apart)
        scales.append((found.attention_scale, expected.attention_scale))
    scale_apart = max(abs(found - expected) for found, expected in scales)
    passed = worst <= 1e-6 and scale_apart <= 1e-6
    found_scale, expected_scale = scales[0]
    detail = (
        f"inv_freq differ by at most {worst:.1e} of their value, attention scale {found_scale:.6f} "
        f"(expected {expected_scale:.6f})"
    )
    return Check("frequencies in transformers", passed, detail)


def compare(
    name: str, probe: Probe, short: torch.Tensor, last: torch.Tensor, nats: float, tolerance: float, nats_apart: float
) -> Check:
    """Logits (T, V) of the short probe, those after the long one (V,), and its mean nats, against the engine's."""
    vocabulary = probe.long_logits.shape[-1]
    short, last = short[:, :vocabulary], last[:vocabulary]
    largest = max(probe.short_logits.abs().max().item(), probe.long_logits.abs().max().item())
    apart = max((short - probe.short_logits).abs().max().item(), (last - probe.long_logits).abs().max().item())
    passed = apart <= tolerance * largest and abs(nats - probe.nats) <= nats_apart
    detail = (
        f"logits of {len(probe.short)} and {len(probe.long)} tokens differ by at most {apart:.2e} of {largest:.1f} "
        f"(allowed {tolerance * largest:.2e}); perplexity {math.exp(min(nats, 700)):.4f}, the engine's "
        f"{math.exp(min(probe.nats, 700)):.4f}"
    )
    return Check(name, passed and math.isfinite(apart), detail)


def check_transformers(model: Any, probe: Probe, *, merged: bool = False) -> Check:
    """Logits and perplexity of the plainly loaded folder. `merged`: its weights went through their stored dtype."""
    kind = torch.bfloat16 if merged else probe.dtype
    short, long = _answer(model, probe.short), _answer(model, probe.long)
    nats = mean_nats(long, probe.long)
    return compare(
        "logits and perplexity in transformers", probe, short, long[-1], nats, TOLERANCE[kind], NATS_TOLERANCE[kind]
    )
