"""Inference: one prompt goes in, one `Completion` comes out, read at the one scale that its length asks for.

The scale is chosen from prompt + new tokens before the first forward pass and is fixed for the request, because keys
in the cache carry the rotation that they were written with. Nothing is remembered between requests: the model's own
scale is put back. Knows no file format, no HTTP and no batching. Lengths count the prompt; V = vocabulary size.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from e2llm.hf import CheckpointInfo, Extension, get_extension, install, load_model
from e2llm.hf.cache import cache_argument, cache_of
from e2llm.hf.chunks import is_windowed, needs_no_mask, without_masks
from e2llm.hf.rotary import unwrap
from e2llm.positions.choose import DEFAULT_NEW_TOKENS, Policy, Schedule, choose_scale, window_of

WHOLE_PROMPT_TOKENS = {"cuda": 131_072, "cpu": 16_384}
"""Longest prompt that is prefilled in one pass, which needs no mask (causal kernels)."""
CHUNK_TOKENS = 8192
"""Chunk of a longer prompt, and of any prompt on a model with sliding-window layers (there a whole pass builds a T ×
T mask)."""
MASK_ELEMENTS = 2**30
"""Most (query, key) pairs of one chunk's mask, where chunks need one (`hf.chunks`): there the chunk shrinks for very
long prompts."""

_WINDOWED = {"sliding_attention", "chunked_attention"}


class ScaleWarning(UserWarning):
    """The request is served outside what training drew from, or past its scale's window."""


@dataclass(frozen=True)
class Completion:
    """What one request returned."""

    token_ids: list[int]
    """New tokens, the end-of-text token included when the model wrote one."""
    text: str
    """New text without special tokens, cut before a stop string; empty when the engine has no tokenizer."""
    finish_reason: Literal["stop", "length"]
    scale: float
    window: int
    """Tokens that the scale is made for: scale × native window."""
    prompt_tokens: int
    seconds: float
    peak_bytes: int | None
    """Largest CUDA memory during the request; None on other devices."""


@dataclass(frozen=True)
class RequestPlan:
    """What is fixed when a request is admitted."""

    scale: float
    window: int
    max_new_tokens: int
    warnings: tuple[str, ...] = ()


def plan_request(
    prompt_tokens: int,
    *,
    native_window: int,
    max_scale: float,
    policy: Policy = "ladder",
    schedule: Schedule = (),
    max_new_tokens: int | None = None,
    scale: float | None = None,
) -> RequestPlan:
    """Fix scale and length of a request. `schedule`: the checkpoint's calibrated one; () for the ladder.

    Without `max_new_tokens` the request gets 1024 new tokens and stops at its scale's window: it never takes the
    largest window by default. When the prompt fits the largest trained window, the open-ended part is cut there
    rather than served outside training.
    """
    if prompt_tokens < 1:
        raise ValueError("prompt is empty: give at least one token")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: use at least 1, or None for {DEFAULT_NEW_TOKENS}")
    if scale is not None and not (math.isfinite(scale) and scale >= 1):
        raise ValueError(f"scale = {scale}: use a finite number of at least 1, or None to choose by length")
    largest = int(native_window * max_scale)
    needed = prompt_tokens + (max_new_tokens or DEFAULT_NEW_TOKENS)
    if max_new_tokens is None and prompt_tokens < largest:
        needed = min(needed, largest)
    notes: list[str] = []
    if scale is None:
        choice = choose_scale(needed, native_window, max_scale=max_scale, policy=policy, schedule=schedule)
        scale, window = choice.scale, choice.window
        notes += [choice.warning] if choice.warning else []
    else:
        window = window_of(scale, native_window, schedule)
        if scale > max_scale:
            notes.append(f"scale {scale:g} lies outside the trained range (1 to {max_scale:g})")
        if max_new_tokens is not None and needed > window:
            notes.append(f"prompt + new tokens = {needed} run past the window of scale {scale:g} ({window} tokens)")
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, window - prompt_tokens)
        if max_new_tokens < 1:
            raise ValueError(
                f"scale = {scale:g}: its window of {window} tokens has no room after a prompt of {prompt_tokens}; "
                "raise scale, leave it out, or give max_new_tokens"
            )
    return RequestPlan(scale, window, max_new_tokens, tuple(notes))


def reads_in_chunks(model: Any) -> bool:
    """Whether a prompt may be read piece by piece over a cache.

    Not where a layer carries a state that its own code starts afresh with every pass of several tokens (Mamba, linear
    attention, convolutions): there later pieces would silently forget the earlier ones.
    """
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return not getattr(unwrap(model), "_is_stateful", False) and layer_types <= {"full_attention", *_WINDOWED}


def prefill_chunk_tokens(model: Any, num_tokens: int, requested: int | None = None) -> int:
    """Tokens in one forward pass over `num_tokens`, such that no T × T mask is held where it can be avoided."""
    if requested is not None:
        return min(requested, num_tokens)
    if not reads_in_chunks(model):
        return num_tokens
    if not is_windowed(model) and num_tokens <= WHOLE_PROMPT_TOKENS.get(model.device.type, CHUNK_TOKENS):
        return num_tokens
    # On a CPU what is causal over a longer cache is written out as a mask by torch itself.
    if model.device.type == "cuda" and needs_no_mask(model):
        return min(CHUNK_TOKENS, num_tokens)
    return min(CHUNK_TOKENS, num_tokens, max(256, MASK_ELEMENTS // num_tokens))


def _reading(model: Any) -> contextlib.AbstractContextManager[None]:
    """The block in which a chunk of a prompt is read."""
    return without_masks(model) if needs_no_mask(model) else contextlib.nullcontext()


def hidden_chunks(model: Any, input_ids: torch.Tensor, chunk_tokens: int | None = None) -> Iterator[torch.Tensor]:
    """Last hidden states of `input_ids` (B, T), in order, as pieces (B, C, H) that together hold T positions.

    One pass from scratch when T fits a chunk; otherwise pass after pass over a key-value cache, which attends to the
    same tokens.
    """
    body: Any = unwrap(model).base_model
    length = input_ids.shape[1]
    chunk = prefill_chunk_tokens(model, length, chunk_tokens)
    if chunk == length:
        yield body(input_ids=input_ids, use_cache=False).last_hidden_state
        return
    cache = None
    for piece in input_ids.split(chunk, dim=1):
        with _reading(model):
            out = body(input_ids=piece, **cache_argument(body, cache))
        cache = cache_of(out)
        yield out.last_hidden_state


def sample_token(
    logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Next token () from logits (V,): greedy at temperature 0, else the smallest set of tokens whose probability
    reaches `top_p`."""
    if temperature == 0:
        return logits.argmax()
    probabilities, tokens = torch.softmax(logits.float() / temperature, dim=-1).sort(descending=True, stable=True)
    mass_before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(mass_before < top_p, probabilities, torch.zeros_like(probabilities))
    kept[0] = probabilities[0]  # also where top_p is too small for float32
    return tokens[torch.multinomial(kept, 1, generator=generator)].squeeze(0)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-text tokens of the generation config (one or several), and of the tokenizer where it names none."""
    configured = getattr(unwrap(model).generation_config, "eos_token_id", None)
    if configured is None and tokenizer is not None:
        configured = tokenizer.eos_token_id
    ends = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(token) for token in ends if token is not None)


class Engine:
    """Generates from one model, one request at a time, each at its own scale.

    `max_scale` is the largest scale that training drew (None: what the model's extension knows from its checkpoint; 1
    for a model that was never trained): larger ones are served with a `ScaleWarning`. A model that is not wrapped yet
    is, with `yarn`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        policy: Policy = "ladder",
        max_scale: float | None = None,
        chunk_tokens: int | None = None,
        info: CheckpointInfo | None = None,
    ) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {chunk_tokens}: use at least 1, or None to choose by length")
        if chunk_tokens is not None and not reads_in_chunks(model):
            kind = model.config.model_type
            raise ValueError(
                f"chunk_tokens = {chunk_tokens}: model type {kind!r} reads a prompt in one pass only; use None"
            )
        self.model, self.tokenizer, self.policy, self.info = model, tokenizer, policy, info
        self.chunk_tokens = chunk_tokens
        self.extension: Extension = get_extension(model) or install(model)
        self.native_window: int = self.extension.native_window
        self.max_scale = self.extension.max_scale if max_scale is None else float(max_scale)
        accepts = inspect.signature(unwrap(model).forward).parameters
        # A model that cannot be asked for the last position only returns logits of every one: keep its chunks small.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    @classmethod
    def load(
        cls,
        path: str,
        *,
        policy: Policy = "ladder",
        max_scale: float | None = None,
        chunk_tokens: int | None = None,
        **load_options: Any,
    ) -> Engine:
        """Engine over a checkpoint folder, hub name or .gguf file; `load_options` are those of `hf.load_model`."""
        model, tokenizer, info = load_model(path, **load_options)
        return cls(model, tokenizer, policy=policy, max_scale=max_scale, chunk_tokens=chunk_tokens, info=info)

    def plan(self, prompt_tokens: int, *, max_new_tokens: int | None = None, scale: float | None = None) -> RequestPlan:
        """What a request of this length would be served with; nothing runs."""
        return plan_request(
            prompt_tokens,
            native_window=self.native_window,
            max_scale=self.max_scale,
            policy=self.policy,
            schedule=self.extension.schedule,
            max_new_tokens=max_new_tokens,
            scale=scale,
        )

    @contextlib.contextmanager
    def at_scale(self, scale: float) -> Iterator[None]:
        """The model in inference mode at one scale; scale and training mode are as before afterwards."""
        before, was_training = self.extension.scale, self.model.training
        self.extension.set_scale(scale)
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.extension.set_scale(before)
            self.model.train(was_training)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        scale: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        beyond_trained: bool = True,
        on_token: Callable[[int], object] | None = None,
    ) -> Completion:
        """Complete `prompt` (text, or token ids taken as they are) until end of text, a stop string or the length
        limit.

        Past the largest trained window a `ScaleWarning` is given, or without `beyond_trained` the request is refused
        with a ValueError. `on_token` is called with every new token as soon as it is drawn.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature = {temperature}: use 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p = {top_p}: use a share above 0 and at most 1")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise ValueError("stop = '': a stop string has at least one character")
        if self.tokenizer is None and (stops or isinstance(prompt, str)):
            raise ValueError("tokenizer = None: without one a prompt is a list of token ids and stop is empty")
        prompt_ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
        plan = self.plan(len(prompt_ids), max_new_tokens=max_new_tokens, scale=scale)
        total, largest = len(prompt_ids) + plan.max_new_tokens, int(self.native_window * self.max_scale)
        if total > largest and not beyond_trained:
            raise ValueError(
                f"prompt ({len(prompt_ids)}) + new tokens ({plan.max_new_tokens}) = {total} tokens: the largest "
                f"trained window is {largest} tokens; shorten the request, or allow it (beyond_trained)"
            )
        for message in plan.warnings:
            warnings.warn(message, ScaleWarning, stacklevel=2)
        return self.complete(
            prompt_ids, plan, stops=stops, temperature=temperature, top_p=top_p, seed=seed, on_token=on_token
        )

    def complete(
        self,
        prompt_ids: Sequence[int],
        plan: RequestPlan,
        *,
        stops: tuple[str, ...] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_token: Callable[[int], object] | None = None,
    ) -> Completion:
        """Run a request as planned. `generate` checks and plans; measurements that set the scale on purpose call
        this."""
        device = self.model.device
        generator = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        with self.at_scale(plan.scale):
            tokens, text, reason = self._decode(
                list(prompt_ids), plan, stops, temperature, top_p, generator, on_token or (lambda token: None)
            )
        return Completion(
            token_ids=tokens,
            text=text,
            finish_reason=reason,
            scale=plan.scale,
            window=plan.window,
            prompt_tokens=len(prompt_ids),
            seconds=time.perf_counter() - start,
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    def _decode(
        self,
        prompt_ids: list[int],
        plan: RequestPlan,
        stops: tuple[str, ...],
        temperature: float,
        top_p: float,
        generator: torch.Generator | None,
        on_token: Callable[[int], object],
    ) -> tuple[list[int], str, Literal["stop", "length"]]:
        ends = end_tokens(self.model, self.tokenizer)
        logits, cache = self.prefill(prompt_ids)
        tokens: list[int] = []
        while True:
            tokens.append(int(sample_token(logits, temperature=temperature, top_p=top_p, generator=generator)))
            on_token(tokens[-1])
            if tokens[-1] in ends:
                return tokens, self._text(tokens), "stop"
            if stops:
                text = self._text(tokens)
                found = [place for place in map(text.find, stops) if place >= 0]
                if found:
                    return tokens, text[: min(found)], "stop"
            if len(tokens) == plan.max_new_tokens:
                return tokens, self._text(tokens), "length"
            logits, cache = self.step(tokens[-1], cache)

    def prefill(self, prompt_ids: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """Logits (V,) after the prompt, and its cache, at the scale that is set."""
        ids = torch.tensor([list(prompt_ids)], device=self.model.device)
        chunk = prefill_chunk_tokens(self.model, len(prompt_ids), self.chunk_tokens)
        if not self._last_only and reads_in_chunks(self.model):
            chunk = min(chunk, 1024)
        cache = None
        for piece in ids.split(chunk, dim=1):
            with _reading(self.model) if chunk < len(prompt_ids) else contextlib.nullcontext():
                out = self.model(input_ids=piece, **cache_argument(self.model, cache), **self._last_only)
            cache = cache_of(out)
        return out.logits[0, -1], cache

    def step(self, token: int, cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits (V,) after one more token, and the cache with its keys, at the scale that is set."""
        ids = torch.tensor([[token]], device=self.model.device)
        out = self.model(input_ids=ids, **cache_argument(self.model, cache))
        return out.logits[0, -1], cache_of(out)

    def _text(self, tokens: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)
