"""From a request's body to token ids: text, lists of text, ids, or a conversation through its chat template.

Flows in: validated bodies, the engine's tokenizer. Flows out: tuples of token ids, each at least one long. What cannot
be read raises ApiError 400. Runs in worker threads: a document of a megabyte takes a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e2llm.server.errors import ApiError, shown
from e2llm.server.schemas import Message

Ids = tuple[int, ...]

NO_TEMPLATE = (
    "This model has no chat template: it continues texts and answers no conversations. "
    "Send the text to /v1/completions, or serve a checkpoint whose tokenizer_config.json has a chat_template."
)


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def read_prompts(prompt: Any, tokenizer: Any) -> list[Ids]:
    """One tuple of ids for each prompt of a completion (`schemas.Prompt`), in order."""
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = prompt if several else [prompt]
    return [_from_text(p, tokenizer) if isinstance(p, str) else _from_ids(p, tokenizer) for p in prompts]


def _from_text(text: str, tokenizer: Any) -> Ids:
    ids = tuple(tokenizer(text).input_ids)
    if not ids:
        raise ApiError(400, "The prompt is empty: give at least one token.", code="empty_prompt", param="prompt")
    return ids


def _from_ids(ids: Sequence[int], tokenizer: Any) -> Ids:
    vocabulary = len(tokenizer)
    outside = next((token for token in ids if token >= vocabulary), None)
    if outside is not None:
        message = f"Token id {outside} is outside the vocabulary: ids are 0 to {vocabulary - 1}."
        raise ApiError(400, message, code="invalid_token_id", param="prompt")
    return tuple(ids)


def read_messages(messages: Sequence[Message], tokenizer: Any) -> Ids:
    """A conversation as the chat template writes it, up to where the assistant speaks."""
    if not has_chat_template(tokenizer):
        raise ApiError(400, NO_TEMPLATE, code="no_chat_template", param="messages")
    roles = {"developer": "system"}
    turns = [{"role": roles.get(m.role, m.role), "content": m.text()} for m in messages]
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        message = f"The model's chat template refuses these messages: {shown(str(error), 300)}"
        raise ApiError(400, message, code="chat_template_error", param="messages") from error
    # The template has written the special tokens already.
    ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise ApiError(400, "The messages come to no token at all.", code="empty_prompt", param="messages")
    return ids
