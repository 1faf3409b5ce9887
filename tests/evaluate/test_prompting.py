"""Prompts fit their window to the token; what is cut is the body's middle or end and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from texts import byte_tokenizer, character_tokenizer

from e2llm.evaluate.prompting import Prompter
from e2llm.evaluate.samples import Sample


def sample(**fields: Any) -> Sample:
    body = "".join(chr(ord("a") + i % 26) for i in range(500))
    return Sample(**({"task": "t", "identity": "1", "body": body, "cut": "middle", "answers": ("x",),
                      "max_new_tokens": 8} | fields))  # fmt: skip


def text_of(prompt: Any) -> str:
    return str(byte_tokenizer().decode(prompt.token_ids))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("most", [100, 101, 256])
def test_the_middle_is_cut_to_the_exact_length(chat: bool, most: int) -> None:
    prompter = Prompter(byte_tokenizer(), chat=chat)
    found = prompter.prompt(sample(), most)
    text = text_of(found)
    assert len(found.token_ids) == most and found.through_template is chat
    start, end = ("[user]", "[/][assistant]") if chat else ("", "")
    room = most - len(start) - len(end)
    assert found.cut_tokens == 500 - room
    body = sample().body
    assert text == start + body[: room - room // 2] + body[500 - room // 2 :] + end


def test_a_prompt_that_fits_is_whole() -> None:
    found = Prompter(byte_tokenizer(), chat=True).prompt(sample(), 500 + len("[user][/][assistant]"))
    assert found.cut_tokens == 0 and text_of(found) == f"[user]{sample().body}[/][assistant]"
    assert len(found.token_ids) == 520


def test_the_beginning_is_cut() -> None:
    found = Prompter(byte_tokenizer(), chat=False).prompt(sample(cut="beginning", after=" Why?"), 40)
    assert len(found.token_ids) == 40 and found.cut_tokens == 500 - 35
    assert text_of(found) == sample().body[-35:] + " Why?"


def test_the_end_is_cut_and_the_question_stays() -> None:
    asked = sample(cut="end", system="Be brief. ", before="Document: ", after=" Why?", answer_start="\nAnswer:")
    text = text_of(Prompter(byte_tokenizer(), chat=True).prompt(asked, 200))
    assert text.startswith("[system]Be brief. [/][user]Document: abcdef") and len(text) == 200
    assert text.endswith(" Why?[/][assistant]\nAnswer:")
    plain = text_of(Prompter(byte_tokenizer(), chat=False).prompt(asked, 200))
    assert plain.startswith("Be brief. \n\nDocument: abc") and plain.endswith(" Why?\nAnswer:") and len(plain) == 200


def test_few_shot_samples_see_no_template() -> None:
    found = Prompter(byte_tokenizer(), chat=True).prompt(sample(chat=False), 100)
    assert not found.through_template and text_of(found).startswith("abc")


def test_a_template_without_system_role() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m['content'] }}>{% endfor %}"
    )
    found = Prompter(tokenizer, chat=True).prompt(sample(system="Be brief. "), 600)
    assert text_of(found) == f"<Be brief. {sample().body}>"


def test_a_beginning_of_text_stands_before_plain_prompts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = _begin_of_text()
    prompter = Prompter(tokenizer, chat=True)
    plain, chat = prompter.prompt(sample(chat=False), 100), prompter.prompt(sample(), 100)
    assert plain.token_ids[0] == tokenizer.bos_token_id and len(plain.token_ids) == 100
    assert chat.token_ids[0] != tokenizer.bos_token_id and len(chat.token_ids) == 100


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="this tokenizer has none; --no-chat"):
        Prompter(byte_tokenizer(chat=False), chat=True)
    with pytest.raises(ValueError, match=r"take 20 tokens, the prompt may have 20: use a larger window"):
        Prompter(byte_tokenizer(), chat=True).prompt(sample(), 20)
    with pytest.raises(ValueError, match="take 0 tokens, the prompt may have -4"):
        Prompter(byte_tokenizer(), chat=False).prompt(sample(), -4)


def test_a_tokenizer_that_cannot_write_the_text() -> None:
    """One that knows ASCII only: Chinese is refused, a stray symbol in a long English text is not."""
    prompter = Prompter(character_tokenizer(), chat=False)
    with pytest.raises(ValueError, match=r"cannot encode it: 100% of its characters are lost \(段"):
        prompter.prompt(sample(body="段落" * 50), 1000)
    assert len(prompter.prompt(sample(body="a" * 500 + "é"), 1000).token_ids) == 501
    assert len(Prompter(byte_tokenizer(), chat=False).prompt(sample(body="段落" * 50), 1000).token_ids) == 300


def _begin_of_text() -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
