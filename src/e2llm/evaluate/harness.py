"""A model class for the EleutherAI harness (`lm_eval`), registered as `e2llm`: its `hf` model, at a scale a request.

Flows in: the harness' requests. Flows out: what its `hf` model would return, each request read at the fixed scale or at
the one that its own length asks for. Requests of one scale are batched together, so a batch has one scale. Importing
this module registers the class and needs `pip install 'e2llm[lm-eval]'`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from e2llm.evaluate.run import load_engine
from e2llm.evaluate.suite_config import SuiteConfig
from e2llm.infer import Engine
from e2llm.positions.choose import choose_scale, window_of


@register_model("e2llm")
class E2LM(HFLM):  # type: ignore[misc, unused-ignore]
    """`pretrained`: a checkpoint folder, hub name, .gguf file or a loaded `Engine`. `scale`: fixed for every request;
    None: chosen from each request's length, as serving does.

    `max_length` (tokens) is the scale's window, or the largest trained window where scales are chosen. Longer requests
    lose their beginning, as with the `hf` model, and are counted. `method` and `neighbours` as in `SuiteConfig`.
    Other arguments as the harness' `hf` model's. ValueError for a scale below 1.
    """

    def __init__(
        self,
        pretrained: str | Engine,
        *,
        scale: float | None = None,
        method: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        attn_implementation: str | None = None,
        neighbours: int | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        if scale is not None and not (math.isfinite(scale) and scale >= 1):
            raise ValueError(f"scale = {scale}: use a finite number of at least 1, or None to choose by length")
        if isinstance(pretrained, Engine):
            engine = pretrained
        else:
            engine = load_engine(
                SuiteConfig(
                    suite="short",
                    model=pretrained,
                    method=method,
                    neighbours=neighbours,
                    scales=() if scale is None else (float(scale),),
                    dtype=dtype,
                    device=device,
                    attn_implementation=attn_implementation,
                )
            )
        if scale not in (None, 1) and engine.extension.method == "none":
            raise ValueError(f"scale = {scale}: method none has no scale but 1")
        self.engine = engine
        self.fixed_scale = None if scale is None else float(scale)
        self.requests_by_scale: Counter[float] = Counter()
        """Requests served, by the scale that they were read at (windows of a rolling request one by one)."""
        self.requests_cut = 0
        """Requests longer than `max_length`, which lost their beginning."""
        if max_length is None:
            native, schedule = engine.native_window, engine.extension.schedule
            window = native * engine.max_scale if scale is None else window_of(float(scale), native, schedule)
            max_length = int(window)
        # backend: a model instance is given, and a causal one is all that an Engine holds.
        options = {"backend": "causal", **options}
        super().__init__(pretrained=engine.model, tokenizer=engine.tokenizer, max_length=max_length, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # The last token is scored and not read.
        tokens = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        read = super()._loglikelihood_tokens
        return self._by_scale(
            requests, tokens, lambda group: read(group, disable_tqdm=disable_tqdm, override_bs=override_bs)
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        tokens = []
        for request in requests:
            context, arguments = request.args
            new = int(normalize_gen_kwargs(arguments, self.max_gen_toks)["max_gen_toks"])
            tokens.append(len(self.tok_encode(context)) + new)
        generate = super().generate_until
        return self._by_scale(requests, tokens, lambda group: generate(group, disable_tqdm=disable_tqdm))

    def _by_scale(
        self, requests: Sequence[Any], tokens: Sequence[int], answer: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Answers in the requests' order; those of one scale are answered together. `tokens`: what each asks to be
        read."""
        self.requests_cut += sum(asked > self.max_length for asked in tokens)
        groups: dict[float, list[int]] = defaultdict(list)
        for index, asked in enumerate(tokens):
            groups[self._scale_of(min(asked, self.max_length))].append(index)
        found: dict[int, Any] = {}
        for scale, members in sorted(groups.items()):
            self.requests_by_scale[scale] += len(members)
            with self.engine.at_scale(scale):
                answers = answer([requests[index] for index in members])
            found |= dict(zip(members, answers, strict=True))
        return [found[index] for index in range(len(requests))]

    def _scale_of(self, tokens: int) -> float:
        if self.fixed_scale is not None:
            return self.fixed_scale
        if self.engine.extension.method == "none":
            return 1.0
        return choose_scale(
            tokens,
            self.engine.native_window,
            max_scale=self.engine.max_scale,
            policy=self.engine.policy,
            schedule=self.engine.extension.schedule,
        ).scale
