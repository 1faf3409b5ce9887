"""What clients may send. Types are strict, unknown fields are refused by name, null means "not given".

Fields of OpenAI's that mean nothing here come in two kinds: those that could not change an answer are accepted and
ignored; those that would are accepted at their neutral value only. Lists of them stand in `IGNORED` and `_NEUTRAL`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Accepted and ignored."""
LARGEST_SCALE = 65_536.0
LARGEST_COUNT = 2**31 - 1


def _neutral(allowed: tuple[Any, ...], says: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise ValueError(f"not supported by this server; leave it out or send {says}")
        return value

    return AfterValidator(check)


def _prompt_kind(value: Any) -> Any:
    """One sentence for a prompt of the wrong type, where pydantic would list the arms of the union."""
    plain = isinstance(value, str)
    texts = isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    ids = isinstance(value, list) and bool(value) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    lists = isinstance(value, list) and bool(value) and all(isinstance(v, list) and v for v in value)
    if value in ("", [], [[]]):
        raise ValueError("the prompt is empty: give at least one token")
    if not (plain or texts or ids or lists):
        raise ValueError("give a string, a list of strings, token ids, or lists of token ids")
    return value


Zero = Annotated[float | None, _neutral((0,), "0"), Field(description="Only 0 or null.")]
TokenId = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Field(min_length=1)] | Texts | Ids | Annotated[list[Ids], Field(min_length=1)],
    BeforeValidator(_prompt_kind),
    Field(description="Text, a list of texts, token ids, or lists of token ids. Never empty."),
]
Scale = Annotated[
    float,
    Field(ge=1, le=LARGEST_SCALE, description="Extension: scale of the rotary embedding; null: chosen by length."),
]
_Anything = Field(default=None, description="Accepted and ignored.")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="Send token counts in a last chunk without choices.")
    include_obfuscation: bool | None = _Anything


class Generation(Body):
    """What both APIs share."""

    model: str | None = Field(None, description="The served model's name; null: that one.")
    temperature: float | None = Field(None, ge=0, le=100, description="Below 0.0001 greedy; null: 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Null: 1, all tokens.")
    n: int | None = Field(None, ge=1, le=LARGEST_COUNT, description="Answers for each prompt; limited by the server.")
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
        | None
    ) = Field(None, description="Up to 16 texts that end the answer; not part of it.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Answer i of n draws from seed + i.")
    stream: bool | None = Field(None, description="Server-sent events.")
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, float] | None, _neutral(({},), "{}"), Field(description="Only {} or null.")] = None

    top_k: int | None = Field(None, ge=0, le=LARGEST_COUNT, description="Extension: 0 or null keeps all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension: 0 or null keeps all.")
    scale: Scale | None = None
    beyond_trained: bool | None = Field(
        None, description="Extension: serve what is longer than any trained window, with a warning, not a refusal."
    )
    ignore_eos: bool | None = Field(None, description="Extension: write on after an end-of-text token.")

    user: Any = _Anything
    metadata: Any = _Anything
    store: Any = _Anything
    service_tier: Any = _Anything
    safety_identifier: Any = _Anything
    prompt_cache_key: Any = _Anything

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Generation):
    """Continue a text. At temperature 0 the answer depends on the prompt and the scale alone."""

    prompt: Prompt
    max_tokens: int | None = Field(
        None, ge=1, le=LARGEST_COUNT, description="New tokens; null: 1024, and never past the scale's window."
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives whose log probabilities are returned.")
    best_of: Annotated[int | None, Field(description="Only null or the value of n.")] = None
    echo: Annotated[bool | None, _neutral((False,), "false"), Field(description="Only false or null.")] = None
    suffix: Annotated[str | None, _neutral(("",), "null"), Field(description="Only null.")] = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """`developer` is read as `system`. Content is text; pictures, sound and tools are refused."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Any = _Anything
    refusal: None = None

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


_NoTools = Annotated[list[Any] | None, _neutral(([],), "[]"), Field(description="Only [] or null.")]


class ChatRequest(Generation):
    """Answer a conversation through the model's own chat template."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=LARGEST_COUNT, description="Older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=LARGEST_COUNT, description="New tokens; null: 1024, and never past the scale's window."
    )
    logprobs: bool | None = Field(None, description="Return the log probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives a token; needs logprobs.")
    response_format: Annotated[
        dict[str, Any] | None, _neutral(({"type": "text"},), '{"type": "text"}'), Field(description="Only text.")
    ] = None
    modalities: Annotated[list[str] | None, _neutral((["text"],), '["text"]'), Field(description="Only text.")] = None
    tools: _NoTools = None
    functions: _NoTools = None
    tool_choice: Annotated[Any, _neutral(("none", "auto"), '"none"'), Field(description="Only none or auto.")] = None
    parallel_tool_calls: Any = _Anything


class TokenizeRequest(Body):
    """Count a prompt's tokens and see the scale that it would be served at. Give either prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=LARGEST_COUNT)
    scale: Scale | None = None
