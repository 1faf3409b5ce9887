"""A sample becomes token ids that fit a window exactly, through a chat template where one is meant.

Flows in: a `Sample`, a tokenizer, the most tokens that the prompt may have. Flows out: a `Prompt`. A prompt that fits
is tokenized as one text. One that does not is cut in tokens: the body loses its middle or its end, everything around it
stays whole. LongBench's script decodes the two ends and tokenizes them again, which can change their length; here the
ids stay, so the length is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from e2llm.evaluate.retrieval import begin_of_text
from e2llm.evaluate.samples import Sample
from e2llm.evaluate.writable import check_writes, encode

_BODY = "\x00body\x00"


@dataclass(frozen=True)
class Prompt:
    """Token ids of one question."""

    token_ids: tuple[int, ...]
    cut_tokens: int
    """Tokens of the body that were left out."""
    through_template: bool


class Prompter:
    """Makes prompts for one tokenizer. `chat`: use the template where a sample is meant for one; ValueError where the
    tokenizer has none."""

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "chat = True: these tasks are asked through a chat template and this tokenizer has none; "
                "--no-chat asks them as plain text"
            )
        first = begin_of_text(tokenizer)
        self.tokenizer, self.chat, self.opening = tokenizer, chat, [] if first is None else [first]

    def prompt(self, sample: Sample, most_tokens: int) -> Prompt:
        """The prompt in at most `most_tokens`. ValueError where not even the text around the body fits, or where the
        tokenizer cannot write the text."""
        through_template = self.chat and sample.chat
        start, end = self._frame(sample, through_template)
        opening = [] if through_template else self.opening
        whole = encode(self.tokenizer, start + sample.body + end)
        # A template adds nothing that could be lost; what is checked is the task's own text.
        check_writes(self.tokenizer, start + sample.body + end, whole)
        if len(opening) + len(whole) <= most_tokens:
            return Prompt((*opening, *whole), 0, through_template)
        head, body, tail = (encode(self.tokenizer, part) for part in (start, sample.body, end))
        head = [*opening, *head]
        room = most_tokens - len(head) - len(tail)
        if room < 1:
            raise ValueError(
                f"the question and what stands around it take {len(head) + len(tail)} tokens, the prompt may have "
                f"{most_tokens}: use a larger window"
            )
        kept = _kept(body, room, sample.cut)
        return Prompt((*head, *kept, *tail), len(body) - len(kept), through_template)

    def _frame(self, sample: Sample, through_template: bool) -> tuple[str, str]:
        """Text before and after the body."""
        if not through_template:
            system = f"{sample.system}\n\n" if sample.system else ""
            return system + sample.before, sample.after + sample.answer_start
        messages = [{"role": "system", "content": sample.system}] if sample.system else []
        messages.append({"role": "user", "content": sample.before + _BODY + sample.after})
        text = self._templated(messages)
        start, slot, end = text.partition(_BODY)
        if not slot:
            raise ValueError("the chat template does not write the user's message as it is; --no-chat asks plainly")
        return start, end + sample.answer_start

    def _templated(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError:
            if len(messages) == 1:
                raise
        # A template without a system role: its text opens the user's message, as transformers' own templates do.
        system, user = messages
        return self._templated([{"role": "user", "content": system["content"] + user["content"]}])


def _kept(body: list[int], room: int, cut: str) -> list[int]:
    """At most `room` ids: the beginning, or both ends (the beginning gets the odd one)."""
    if len(body) <= room:  # apart, the pieces may be shorter than the whole text's ids
        return body
    if cut == "end":
        return body[:room]
    if cut == "beginning":
        return body[len(body) - room :]
    half = room // 2
    return body[: room - half] + body[len(body) - half :]
