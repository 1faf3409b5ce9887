"""What clients are sent, as types: mypy checks the code that builds them, /openapi.json is made of them."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

Finish = Literal["stop", "length"]


class ScaleInfo(TypedDict):
    """At which scale and window an answer ran."""

    scale: float
    window: int
    warnings: list[str]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    e2llm: NotRequired[ScaleInfo]


class Completion(TypedDict):
    """Also the form of a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    e2llm: NotRequired[ScaleInfo]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class Chat(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    e2llm: ScaleInfo


class WindowInfo(TypedDict):
    """Requests of up to `window` tokens, prompt and new, are read at `scale`."""

    window: int
    scale: float


class ModelInfo(TypedDict):
    """What the page and other clients need to know of the model."""

    engine: str
    native_window: int
    max_scale: float
    max_window: int
    windows: list[WindowInfo]
    chat: bool


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    e2llm: ModelInfo


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    """Counts of a prompt and the plan it would get; scale and window are null where it would be refused."""

    count: int
    max_model_len: int
    max_new_tokens: int | None
    scale: float | None
    window: int | None
    fits: bool
    warnings: list[str]


class Health(TypedDict):
    status: Literal["ok"]
    model: str
    engine: str
    running: int
    waiting: int


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorFields
