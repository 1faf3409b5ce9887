"""Chats -> token ids and which of them carry loss, through the tokenizer's own chat template.

Flows in: `Chat`s. Flows out: ids and a loss flag per token; only what the assistant says carries loss.
A template with `{% generation %}` marks says itself which tokens those are. For the others, the assistant's turn k is
what render(messages[:k+1]) adds to render(messages[:k], add_generation_prompt=True); both must be prefixes of the whole
chat, or the chat is refused (some templates rewrite earlier turns).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from e2llm.data.sources import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chats(tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> list[tuple[list[int], np.ndarray]]:
    """Per chat: token ids (T) and loss flags (T,) uint8. Special tokens are those that the template writes."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{chats[0].place}: the data holds chats and the tokenizer has no chat template: "
            "set tokenizer.chat_template (instruct models bring one), or train on a text column"
        )
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        encoded = [_by_marks(tokenizer, chat) for chat in chats]
    else:
        encoded = _by_prefixes(tokenizer, chats)
    for chat, (_, loss) in zip(chats, encoded, strict=True):
        if not loss.any():
            raise ValueError(f"{chat.place}: no assistant token in this chat, so nothing to learn from: remove the row")
    return encoded


def _by_marks(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[list[int], np.ndarray]:
    out = _apply(
        tokenizer,
        chat.messages,
        chat.place,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return out["input_ids"], np.asarray(out["assistant_masks"], dtype=np.uint8)


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> list[tuple[list[int], np.ndarray]]:
    texts = [_apply(tokenizer, chat.messages, chat.place, tokenize=False) for chat in chats]
    out = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encoded = []
    for chat, text, ids, offsets in zip(chats, texts, out["input_ids"], out["offset_mapping"], strict=True):
        starts, stops = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        loss = np.zeros(len(ids), dtype=np.uint8)
        for start, stop in _assistant_spans(tokenizer, chat, text):
            # Overlap, not containment: a first word whose token begins with the prompt's last space is still an answer.
            loss[(stops > start) & (starts < stop)] = 1
        encoded.append((ids, loss))
    return encoded


def _assistant_spans(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str) -> list[tuple[int, int]]:
    """(start, stop) in characters of `text` of every assistant turn, with the marks that end the turn."""
    spans = []
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise ValueError(f"{chat.place}: the assistant speaks first: begin the chat with a user or system message")
        before = _apply(tokenizer, chat.messages[:turn], chat.place, tokenize=False, add_generation_prompt=True)
        after = _apply(tokenizer, chat.messages[: turn + 1], chat.place, tokenize=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{chat.place}: the chat template renders messages[:{turn + 1}] differently once more messages "
                "follow, so the assistant's tokens cannot be told apart: put {% generation %} marks in the template, "
                "or use one-turn chats"
            )
        spans.append((len(before), len(after)))
    return spans


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], place: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (TemplateError, TypeError, KeyError) as error:  # raise_exception of a template; content it cannot print
        raise ValueError(f"{place}: the chat template refuses this chat: {error}") from None
