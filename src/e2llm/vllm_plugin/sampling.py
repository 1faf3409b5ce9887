"""From our `Sampling` to vLLM's `SamplingParams`, and from its outputs to ours. Needs vLLM."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from e2llm.engine.request import Admission, FinishReason, Output, Request, TokenLogprob
from e2llm.vllm_plugin.admission import BEYOND_KEY, SCALE_KEY

_SEEDS = 2**64


def sampling_params(request: Request, admission: Admission) -> Any:
    """vLLM's parameters of an admitted request: pieces of text as they come, at the scale that was admitted."""
    asked = request.sampling
    return SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        # vLLM reads -1 as no seed, and takes none below 0 over its wire: the same 64 bits, unsigned.
        seed=None if asked.seed is None else asked.seed % _SEEDS,
        stop=list(asked.stop),
        max_tokens=admission.max_new_tokens,
        logprobs=asked.logprobs,
        ignore_eos=asked.ignore_eos,
        output_kind=RequestOutputKind.DELTA,
        extra_args={SCALE_KEY: admission.scale, BEYOND_KEY: request.beyond_trained},
    )


def output_of(found: Any, asked_logprobs: int | None) -> Output:
    """Our output of vLLM's `CompletionOutput`, a delta."""
    tokens = tuple(found.token_ids)
    logprobs: tuple[TokenLogprob, ...] = ()
    if asked_logprobs is not None:
        pairs = zip(tokens, found.logprobs or (), strict=True)
        logprobs = tuple(_logprob(token, alternatives, asked_logprobs) for token, alternatives in pairs)
    reasons: dict[str | None, FinishReason | None] = {None: None, "stop": "stop", "length": "length"}
    if found.finish_reason in reasons:
        return Output(found.text, tokens, logprobs, reasons[found.finish_reason])
    if found.finish_reason == "abort":
        return Output(found.text, tokens, logprobs, "cancelled")
    return Output(found.text, tokens, logprobs, "error", f"vLLM ended the request: {found.finish_reason}")


def _logprob(token: int, alternatives: dict[int, Any], count: int) -> TokenLogprob:
    """vLLM adds the token's own entry to the `count` most probable ones."""
    ranked = sorted(alternatives.items(), key=lambda pair: -pair[1].logprob)[:count]
    return TokenLogprob(token, alternatives[token].logprob, tuple((other, one.logprob) for other, one in ranked))
