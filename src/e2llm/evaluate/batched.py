"""Many prompts of like length at once, through the serving engine: greedy answers, in the order of the prompts.

Flows in: the engine that evaluates, prompts, one scale. Flows out: answers as text, one by one as they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from e2llm.engine import BatchEngine, Request
from e2llm.infer import Engine


def batched_answers(
    engine: Engine, prompts: Sequence[Sequence[int]], *, window: int, scale: float, answer_tokens: int, batch: int
) -> Iterator[str]:
    """Answers to `prompts`, `batch` of them at a time, each with prompt and answer within `window` tokens.

    The model has its own attention again when the iterator ends or is closed. Raises ValueError for a model that the
    serving engine refuses (`engine.BatchEngine`).
    """
    page = 16
    with BatchEngine(
        engine.model,
        engine.tokenizer,
        max_scale=max(scale, engine.max_scale),
        max_running=batch,
        kv_tokens=batch * (window + page),
        page_tokens=page,
        prefix_cache=False,
    ) as serving:
        streams = [
            serving.submit(
                Request(prompt_ids=tuple(prompt), max_new_tokens=answer_tokens, scale=float(scale), beyond_trained=True)
            )
            for prompt in prompts
        ]
        for stream in streams:
            outputs = list(stream)
            if outputs[-1].finish_reason == "error":
                raise RuntimeError(f"batch of {batch} prompts of {window} tokens: {outputs[-1].error}")
            tokens = [token for output in outputs for token in output.token_ids]
            yield engine.tokenizer.decode(tokens, skip_special_tokens=True)
