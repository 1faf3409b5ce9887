"""`python -m e2llm.export.vllm_probe`: mean loss of a token list in vLLM, in a process of its own.

Flows in on standard input: `{"model", "max_model_len", "hf_overrides", "dtype", "ids"}` as JSON. Flows out: the last
line of standard output, `{"nats": …}`. vLLM binds memory, starts threads and may end its process by abort; none of that
may happen to the one that exports.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def mean_nats(asked: dict[str, Any]) -> float:
    """Nats a token of `ids`, the first left out."""
    from vllm import LLM, SamplingParams

    ids = asked.pop("ids")
    llm = LLM(enforce_eager=True, **asked)
    answer = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0))[0]
    scored = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
    return float(-sum(found[token].logprob for token, found in scored) / (len(ids) - 1))


if __name__ == "__main__":
    print(json.dumps({"nats": mean_nats(json.load(sys.stdin))}), flush=True)
    os._exit(0)
