"""How an answer is written down in OpenAI's two APIs, whole and in chunks.

Flows in: pieces of text, log probabilities, finish reasons. Flows out: the dictionaries of `shapes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from e2llm.engine.request import Admission, TokenLogprob
from e2llm.server import shapes
from e2llm.server.token_text import TokenText


@dataclass
class Written:
    """What has been written of one sequence."""

    index: int
    admission: Admission
    text: list[str] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    characters_of_tokens: int = 0
    """Characters of all tokens whose log probabilities were sent: the next token's offset."""
    finish: shapes.Finish | None = None


class Form(Protocol):
    """One of the two APIs."""

    id_prefix: str
    endpoint: str
    object_whole: str
    object_chunk: str

    def choice(self, written: Written, logprobs: Any) -> Any: ...

    def chunk(self, index: int, text: str, logprobs: Any, finish: shapes.Finish | None) -> Any: ...

    def opening(self, index: int) -> Any: ...

    def logprobs(self, tokens: Sequence[TokenLogprob], written: Written, texts: TokenText) -> Any: ...


class CompletionForm:
    """/v1/completions"""

    id_prefix, endpoint = "cmpl-", "completions"
    object_whole = object_chunk = "text_completion"

    def choice(self, written: Written, logprobs: shapes.CompletionLogprobs | None) -> shapes.CompletionChoice:
        return self.chunk(written.index, "".join(written.text), logprobs, written.finish)

    def chunk(
        self, index: int, text: str, logprobs: shapes.CompletionLogprobs | None, finish: shapes.Finish | None
    ) -> shapes.CompletionChoice:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> shapes.CompletionChoice:
        return self.chunk(index, "", None, None)

    def logprobs(self, tokens: Sequence[TokenLogprob], written: Written, texts: TokenText) -> shapes.CompletionLogprobs:
        """Offsets count the characters of the answer's tokens."""
        out: shapes.CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = texts(token.token_id)[0]
            out["tokens"].append(text)
            out["token_logprobs"].append(finite(token.logprob))
            # Two tokens may have the same text (halves of characters): the more probable one, which comes first, stays.
            top = {texts(i)[0]: finite(logprob) for i, logprob in reversed(token.top)}
            out["top_logprobs"].append(top | {text: finite(token.logprob)})
            out["text_offset"].append(written.characters_of_tokens)
            written.characters_of_tokens += len(text)
        return out


class ChatForm:
    """/v1/chat/completions"""

    id_prefix, endpoint = "chatcmpl-", "chat"
    object_whole, object_chunk = "chat.completion", "chat.completion.chunk"

    def choice(self, written: Written, logprobs: shapes.ChatLogprobs | None) -> shapes.ChatChoice:
        return {
            "index": written.index,
            "message": {"role": "assistant", "content": "".join(written.text), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": written.finish,
        }

    def chunk(
        self, index: int, text: str, logprobs: shapes.ChatLogprobs | None, finish: shapes.Finish | None
    ) -> dict[str, Any]:
        delta = {"content": text} if text or finish is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def logprobs(self, tokens: Sequence[TokenLogprob], written: Written, texts: TokenText) -> shapes.ChatLogprobs:
        def entry(token_id: int, logprob: float) -> shapes.TopLogprob:
            text, raw = texts(token_id)
            return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}

        content: list[shapes.ChatLogprob] = [
            {**entry(t.token_id, t.logprob), "top_logprobs": [entry(i, logprob) for i, logprob in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def finite(logprob: float) -> float:
    """JSON knows no infinity: OpenAI writes -9999.0 for a probability of zero."""
    return max(logprob, -9999.0)
