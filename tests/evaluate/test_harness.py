"""The harness' model class: at scale 1 it is its own `hf` model to the last digit; otherwise a scale a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model
from harness_tasks import NAMES, write_tasks
from texts import character_tokenizer

from e2llm.hf import install
from e2llm.infer import Engine

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    return dict(TaskManager(include_path=folder, include_defaults=False).load(list(NAMES))["tasks"])


def engine(method: str = "yarn", max_scale: float = 8.0) -> Engine:
    model = tiny_model("llama")
    install(model, method=method)
    return Engine(model, character_tokenizer(), max_scale=max_scale)


def requests_of(task: Any) -> list[Any]:
    task.build_all_requests(rank=0, world_size=1)
    return list(task.instances)


def answers(model: Any, requests: Sequence[Any]) -> list[Any]:
    return list(getattr(model, requests[0].request_type)(requests, disable_tqdm=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scale_1_equals_the_hf_model_to_the_last_digit(tasks: dict[str, Any], name: str, batch_size: int) -> None:
    from lm_eval.models.huggingface import HFLM

    from e2llm.evaluate.harness import E2LM

    requests = requests_of(tasks[name])
    plain = HFLM(tiny_model("llama"), tokenizer=character_tokenizer(), backend="causal", batch_size=batch_size)
    ours = E2LM(engine(), scale=1, batch_size=batch_size)
    assert ours.max_length == plain.max_length == WINDOW
    assert answers(ours, requests) == answers(plain, requests)


def test_each_request_has_the_scale_of_its_own_length(tasks: dict[str, Any]) -> None:
    """Batched answers equal those of single requests at the scale that serving would choose for them."""
    from e2llm.evaluate.harness import E2LM

    requests = requests_of(tasks["local_choice"])
    ours = E2LM(engine(), batch_size=4)
    together = answers(ours, requests)
    assert len(ours.requests_by_scale) >= 2 and ours.requests_by_scale.total() == len(requests)
    assert ours.max_length == 8 * WINDOW
    model = ours.engine
    for request, (found, _) in zip(requests, together, strict=True):
        context, continuation = (model.tokenizer(part).input_ids for part in request.args)
        ids = torch.tensor([context + continuation])
        scale = model.plan(len(ids[0]) - 1 - 1, max_new_tokens=1).scale
        with model.at_scale(scale):
            logits = model.model(ids[:, :-1]).logits[0].log_softmax(-1)
        expected = sum(float(logits[i - 1, ids[0, i]]) for i in range(len(context), len(ids[0])))
        assert found == pytest.approx(expected, abs=1e-4)


def test_generation_equals_the_engine(tasks: dict[str, Any]) -> None:
    from e2llm.evaluate.harness import E2LM

    requests = requests_of(tasks["local_answer"])
    ours = E2LM(engine(), batch_size=1)
    for request, text in zip(requests, answers(ours, requests), strict=True):
        completion = ours.engine.generate(request.args[0], max_new_tokens=12, stop="z")
        assert text == completion.text
    assert len(ours.requests_by_scale) >= 2


def test_rolling_windows_have_their_own_scales(tasks: dict[str, Any]) -> None:
    from e2llm.evaluate.harness import E2LM

    requests = requests_of(tasks["local_text"])
    ours = E2LM(engine(max_scale=2.0), batch_size=4)
    chosen = answers(ours, requests)
    assert set(ours.requests_by_scale) == {1.0, 2.0} and ours.requests_by_scale.total() > len(requests)
    fixed = answers(E2LM(engine(max_scale=2.0), scale=2, batch_size=4), requests)
    short = [i for i, request in enumerate(requests) if len(request.args[0]) <= WINDOW]
    assert short and all(chosen[i] != fixed[i] for i in short)


def test_the_scale_before_is_put_back_and_bad_ones_are_refused(tasks: dict[str, Any]) -> None:
    from lm_eval.api.registry import get_model

    from e2llm.evaluate.harness import E2LM

    assert get_model("e2llm") is E2LM
    model = engine()
    model.extension.set_scale(4.0)
    answers(E2LM(model), requests_of(tasks["local_choice"]))
    assert model.extension.scale == 4.0
    with pytest.raises(ValueError, match=r"scale = 0\.5: use a finite number"):
        E2LM(engine(), scale=0.5)
    with pytest.raises(ValueError, match="method none has no scale but 1"):
        E2LM(engine(method="none"), scale=2)


@pytest.mark.parametrize("name", NAMES)
def test_cut_requests_are_those_that_the_harness_complains_about(
    tasks: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The harness logs each request that it shortens; windows of rolling requests are never cut."""
    from e2llm.evaluate.harness import E2LM

    requests = requests_of(tasks[name])
    ours = E2LM(engine(), scale=1)
    caplog.clear()
    answers(ours, requests)
    complaints = [one for one in caplog.records if "exceeds model" in one.message or "Left truncation" in one.message]
    assert ours.requests_cut == len(complaints)
    assert bool(complaints) == (name != "local_text")
    assert len(complaints) < len(requests)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_self_extend_reads_each_request_at_its_scale(tasks: dict[str, Any], batch_size: int) -> None:
    """In batches too, where the harness pads: behind what it scores, before what it lets a model write."""
    from e2llm.evaluate.harness import E2LM

    requests = requests_of(tasks["local_choice"])
    ours = E2LM(engine("self_extend"), batch_size=batch_size)
    found = answers(ours, requests)
    assert ours.requests_by_scale.total() == len(requests) and len(ours.requests_by_scale) >= 3
    assert ours.requests_cut == 0
    other = engine("self_extend")
    for request, (value, _) in zip(requests, found, strict=True):
        context, continuation = (other.tokenizer(part).input_ids for part in request.args)
        ids = torch.tensor([context + continuation])
        scale = next(s for s in (1, 2, 4, 8) if s * WINDOW >= len(ids[0]) - 1)
        with other.at_scale(scale):
            logits = other.model(ids[:, :-1]).logits[0].log_softmax(-1)
        expected = sum(float(logits[i - 1, ids[0, i]]) for i in range(len(context), len(ids[0])))
        assert value == pytest.approx(expected, abs=1e-4)
    requests = requests_of(tasks["local_answer"])
    texts = answers(E2LM(engine("self_extend"), batch_size=batch_size), requests)
    for request, text in zip(requests, texts, strict=True):
        ids = other.tokenizer(request.args[0]).input_ids
        assert text == other.complete(ids, other.plan(len(ids), max_new_tokens=12), stops=("z",)).text
