"""Only what the assistant says carries loss, and a template that hides where that is gets refused."""

import numpy as np
import pytest
from conftest import CHATML, make_tokenizer

from e2llm.data.chat import encode_chats
from e2llm.data.sources import Chat

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "be blue"},
    {"role": "user", "content": "the river sees"},
    {"role": "assistant", "content": "a green tree \u00e9"},
    {"role": "user", "content": "the river sees"},
    {"role": "assistant", "content": "light"},
]


def learned(tokenizer, messages):
    """The text of the tokens with loss, spans joined by |."""
    ((ids, loss),) = encode_chats(tokenizer, [Chat(messages, "x.jsonl:1", 1)])
    spans = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(loss)) + 1)
    return "|".join(tokenizer.decode([ids[i] for i in span]) for span in spans if loss[span[0]])


def test_prefix_method_takes_the_turn_and_its_end(tokenizer):
    assert learned(tokenizer, TURNS) == "a green tree \u00e9<|im_end|>\n|light<|im_end|>\n"


def test_template_marks_are_followed_to_the_letter():
    assert learned(make_tokenizer(template=MARKED), TURNS) == "a green tree \u00e9<|im_end|>|light<|im_end|>"


def test_template_without_generation_prompt():
    tokenizer = make_tokenizer(template=INST, bos_token="<s>")
    assert learned(tokenizer, TURNS[1:]) == " a green tree \u00e9<|endoftext|>| light<|endoftext|>"


def test_ids_are_those_of_the_template(tokenizer):
    ((ids, _),) = encode_chats(tokenizer, [Chat(TURNS, "x", 1)])
    assert ids == tokenizer.apply_chat_template(TURNS, return_dict=False)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_chats_without_an_answer_are_refused(template):
    with pytest.raises(ValueError, match=r"x\.jsonl:1: no assistant token"):
        learned(make_tokenizer(template=template), TURNS[:2])


def test_no_template(tokenizer):
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .* no chat template"):
        learned(make_tokenizer(template=None), TURNS)


def test_template_that_rewrites_earlier_turns_is_refused():
    last_only = CHATML.replace("{{ m['content'] }}", "{% if loop.last %}<think>{% endif %}{{ m['content'] }}")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*messages\[:3\] differently.*generation"):
        learned(make_tokenizer(template=last_only), TURNS)


def test_template_that_raises():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the chat template refuses this chat: roles must alternate"):
        learned(make_tokenizer(template=strict), TURNS)


def test_assistant_first_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the assistant speaks first"):
        learned(tokenizer, TURNS[2:])
