"""Pass-key prompts: exact length, reproducible, the key where it should be; answers judged strictly."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import pytest
from architectures import tiny_model
from texts import character_tokenizer, random_documents
from transformers import AutoTokenizer

from e2llm.data.synthetic import GENERATORS, plant
from e2llm.data.synthetic_codes import plant_codes
from e2llm.evaluate.documents import Document
from e2llm.evaluate.retrieval import make_prompts, prompt_maker, prompt_template, retrieval, share_by_depth
from e2llm.evaluate.tasks import PASS_KEY, TASKS, UUID_KV, Task
from e2llm.infer import Completion, Engine
from e2llm.quickstart import TINY

TOKENIZER = character_tokenizer()


def prompts(window: int = 600, count: int = 20, seed: int = 0, **options: Any) -> list[Any]:
    documents = random_documents(3, 900)
    return make_prompts(TOKENIZER, documents, window=window, num_prompts=count, seed=seed, **options)


@pytest.mark.parametrize("window", [400, 600, 1000])
def test_prompt_and_answer_fill_the_window(window: int) -> None:
    for prompt in prompts(window):
        assert len(prompt.token_ids) + prompt.answer_tokens == window
        assert prompt.answer_tokens == len(" 12345") + 2


def test_prompts_depend_on_seed_window_and_index_only() -> None:
    assert prompts(count=20)[:7] == prompts(count=7)
    assert prompts() == prompts()
    assert prompts(seed=1)[0].expected != prompts(seed=0)[0].expected
    assert len({prompt.expected for prompt in prompts()}) == 20


def test_prompts_over_the_whole_text_stay_what_they_are() -> None:
    """Figures of different days are of the same questions. The digest is of the day before parts could be asked."""
    made = [
        (p.depth, p.depth_bin, p.expected, p.document, p.token_ids, p.answer_tokens,
         [(span.start, span.stop) for span in p.spans])
        for task in TASKS.values()
        for p in prompts(window=900, count=200, seed=7, task=task)
    ]  # fmt: skip
    assert hashlib.sha256(repr(made).encode()).hexdigest()[:16] == "f298618f5fcd312d"


@pytest.mark.parametrize("part", [(0.0, 0.125), (0.25, 1.0)])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_fact_may_be_asked_for_in_a_part_of_the_text(part: tuple[float, float], task: Task) -> None:
    make = prompt_maker(TOKENIZER, random_documents(3, 900), window=900, seed=0, task=task, depths=part)
    low, high = part
    for index, usual in enumerate(prompts(window=900, task=task)):
        prompt = make(index)
        assert low + (high - low) * (index % 10) / 10 <= prompt.depth <= low + (high - low) * (index % 10 + 1) / 10
        assert abs(prompt.depth - prompt.depth_bin) <= 0.05 + 1e-9 and prompt.depth_bin * 10 % 1 == pytest.approx(0.5)
        same = ("expected", "document", "answer_tokens", "window")
        assert all(getattr(prompt, name) == getattr(usual, name) for name in same), "nothing else changes"
        filler = KV.sub("", TOKENIZER.decode(prompt.token_ids).removeprefix(task.introduction))
        filler = re.sub(r"\n\nThe pass key is \d{5}.*is the pass key\.\n\n", "", filler)
        total = filler.index("\n\nWhat is the pass key?" if task is PASS_KEY else '\n\nKey: "')
        before = TOKENIZER.decode(prompt.token_ids[: prompt.spans[0].start]).removeprefix(task.introduction)
        opened = before.rindex("\n\n")  # where the asked fact begins
        assert len(KV.sub("", before[:opened])) / total == pytest.approx(prompt.depth, abs=0.51 / total)


def test_key_stands_once_at_its_depth_in_the_documents_own_text() -> None:
    sources = {document.name: TOKENIZER.decode(document.tokens) for document in random_documents(3, 900)}
    for prompt in prompts():
        text = TOKENIZER.decode(prompt.token_ids)
        statement = f"\n\nThe pass key is {prompt.expected}. Remember it. {prompt.expected} is the pass key.\n\n"
        assert text.count(statement) == 1 and text.endswith("\n\nWhat is the pass key? The pass key is")
        start = text.index("there.\n\n") + len("there.\n\n")
        end = text.index("\n\nWhat is the pass key?")
        before, after = text[start:end].split(statement)
        assert before + after in sources[prompt.document]
        assert len(before) / len(before + after) == pytest.approx(prompt.depth, abs=0.51 / len(before + after))
        assert prompt.depth_bin - 0.05 <= prompt.depth < prompt.depth_bin + 0.05
    assert sorted({prompt.depth_bin for prompt in prompts()}) == pytest.approx([0.05 + i / 10 for i in range(10)])
    assert {prompt.document for prompt in prompts()} == set(sources)


def test_the_question_is_announced_before_the_text() -> None:
    """A model that only continues text cannot know otherwise that one sentence of it will be asked for."""
    announced = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information there.\n\n"
    )
    for prompt in prompts(count=3):
        text = TOKENIZER.decode(prompt.token_ids)
        assert text.startswith(announced) and text.count(announced) == 1


def test_the_template_is_the_prompt_without_text_and_key() -> None:
    prompt = prompts(count=1)[0]
    before, between, after = prompt_template(chat=False).format(text="\x00", value=prompt.expected).split("\x00")
    text = TOKENIZER.decode(prompt.token_ids)
    assert text.startswith(before) and text.endswith(after) and text.count(between) == 1
    assert len(prompt.token_ids) == len(before + between + after) + sum(map(len, _filler(text, before, between, after)))
    assert prompt_template(chat=True) != prompt_template(chat=False)


def _filler(text: str, before: str, between: str, after: str) -> list[str]:
    return text.removeprefix(before).removesuffix(after).split(between)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12345", True),
        ("12345. Remember", True),
        (" 123456", False),
        (" 1234", False),
        (" the 12345", False),
        ("", False),
    ],
)
def test_answer_is_judged_by_its_first_five_digits(answer: str, right: bool) -> None:
    assert PASS_KEY.is_correct(answer, "12345") is right


def test_results_follow_what_the_engine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that reads the key, in the deep half of the text only."""
    engine = Engine(tiny_model("llama"), TOKENIZER)

    def read(self: Engine, token_ids: Any, plan: Any) -> Completion:
        text = TOKENIZER.decode(list(token_ids))
        found = re.search(r"The pass key is (\d{5})\.", text)
        assert found is not None and len(token_ids) + plan.max_new_tokens == 600 and plan.scale == 4.0
        answer = f" {found[1]}" if found.start() > 300 else " 00000"
        return Completion([], answer, "length", plan.scale, plan.window, len(token_ids), 0.0, None)

    monkeypatch.setattr(Engine, "complete", read)
    read_tokens: list[int] = []
    found = retrieval(
        engine, random_documents(2, 700), window=600, scale=4.0, indices=range(30), progress=read_tokens.append
    )
    shares = share_by_depth(found)
    assert sum(read_tokens) == 30 * 600
    assert [n for _, n in shares.values()] == [3] * 10
    assert shares[0.05] == (0.0, 3) and shares[0.95] == (1.0, 3)


def test_a_model_answers_greedily_at_the_scale_asked_for() -> None:
    model = tiny_model("llama")
    engine = Engine(model, TOKENIZER)  # untrained: a scale asked for on purpose does not warn
    documents = random_documents(1, 500)
    result = retrieval(engine, documents, window=400, scale=8.0, indices=[3])[0]
    prompt = make_prompts(TOKENIZER, documents, window=400, num_prompts=4, seed=0)[3]
    assert result.answer == engine_generate(engine, prompt) and result.scale == 8.0
    assert result.prompt == prompt.without_tokens() and result.prompt.prompt_tokens == len(prompt.token_ids)


def engine_generate(engine: Engine, prompt: Any) -> str:
    import torch

    ids = torch.tensor([prompt.token_ids])
    engine.extension.set_scale(8.0)
    out = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.answer_tokens, do_sample=False
    )
    return TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_chat_template_goes_around_the_question() -> None:
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match="chat template"):
        prompts(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompt = make_prompts(tokenizer, random_documents(1, 900), window=500, num_prompts=1, seed=0, chat=True)[0]
    text = tokenizer.decode(prompt.token_ids)
    assert text.startswith("[user]There is an important info")
    assert text.endswith("\nWhat is the pass key?[end][assistant]The pass key is")
    assert len(prompt.token_ids) + prompt.answer_tokens == 500


def test_too_small_windows_and_too_short_documents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"window = 100: .* already takes"):
        prompts(100)
    with pytest.raises(ValueError, match="the longest has 900"):
        prompts(4000)
    with pytest.raises(ValueError, match="num_prompts = 0"):
        prompts(count=0)
    with pytest.raises(ValueError, match="longest has 0"):
        make_prompts(TOKENIZER, [Document("a", np.zeros(0, np.int32))], window=600, num_prompts=1, seed=0)


KV = re.compile(r'\n\n"([0-9a-f-]{36})": "([0-9a-f-]{36})"\n\n')


def test_uuid_pairs_are_hidden_and_one_is_asked_for() -> None:
    sources = {document.name: TOKENIZER.decode(document.tokens) for document in random_documents(3, 900)}
    orders = set()
    for prompt in prompts(window=900, task=UUID_KV):
        text = TOKENIZER.decode(prompt.token_ids)
        pairs = KV.findall(text)
        asked = re.search(r'\n\nKey: "([0-9a-f-]{36})"\nCorresponding value:$', text)
        assert len(dict(pairs)) == 3 and dict(pairs)[asked[1]] == prompt.expected and text.count(prompt.expected) == 1
        assert len(prompt.token_ids) + prompt.answer_tokens == 900 and prompt.answer_tokens == len(f' "{asked[1]}"') + 2
        orders.add([name for name, _ in pairs].index(asked[1]))
        filler = text[len(UUID_KV.introduction) : asked.start()]
        place = filler.index(f'\n\n"{asked[1]}"')
        host = KV.sub("", filler)
        assert text.startswith(UUID_KV.introduction) and host in sources[prompt.document]
        before = len(KV.sub("", filler[:place]))
        assert before / len(host) == pytest.approx(prompt.depth, abs=0.51 / len(host))
    assert orders == {0, 1, 2}, "first, between and last"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (' "0a-1"', True),
        (" 0a-1.", True),
        ('"0a-1", "', True),
        (" 0a-1b", False),
        (" 0a-12", False),
        (" the 0a-1", False),
        ("", False),
    ],
)
def test_a_uuid_answer_is_the_whole_value(answer: str, right: bool) -> None:
    assert UUID_KV.is_correct(answer, "0a-1") is right


def test_a_right_answer_of_single_characters_is_not_cut_short() -> None:
    """A tokenizer that joins letters ("ce"), as most do, and a model that writes them one by one."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    documents = random_documents(2, 900)
    shorter = 0
    for task in TASKS.values():
        for prompt in make_prompts(tokenizer, documents, window=600, num_prompts=40, seed=0, task=task):
            answer = task.answer.format(value=prompt.expected)
            spelled = [token for letter in answer for token in tokenizer(letter, add_special_tokens=False).input_ids]
            shorter += len(tokenizer(answer, add_special_tokens=False).input_ids) + 2 < len(spelled)
            assert task.is_correct(tokenizer.decode(spelled[: prompt.answer_tokens]), prompt.expected)
    assert shorter > 0, "the tokenizer joins no letters: nothing was tried"


def test_tasks_are_asked_apart() -> None:
    assert [task.name for task in TASKS.values()] == list(TASKS)
    assert {p.expected for p in prompts(900)} != {p.expected for p in prompts(900, task=UUID_KV)}
    assert prompt_template(False, UUID_KV).count("{text}") == 4 and prompt_template(False).count("{text}") == 2


def test_the_wording_is_in_no_synthetic_training_text() -> None:
    host = "\n".join(f"line {i} of an ordinary text" for i in range(30))
    makers = [*GENERATORS.values(), lambda seed, i: plant(seed, i, host), lambda seed, i: plant_codes(seed, i, host)]
    made = "\n".join(make(0, i) for make in makers for i in range(200)).lower()
    for task in TASKS.values():
        for part in (task.introduction, task.question, task.answer_start):
            words = re.sub(r"\{\w+\}", "", part).strip().lower()
            assert words and words not in made
