"""Requests against transformers' own generate(), chunked against whole prefill, and what a request may not ask."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import WINDOW, tiny_model, token_ids
from texts import character_tokenizer

from e2llm.hf import get_extension, install
from e2llm.infer import (
    Completion,
    Engine,
    ScaleWarning,
    hidden_chunks,
    plan_request,
    prefill_chunk_tokens,
    sample_token,
)

NO_END = {"eos_token_id": None}


def make_engine(model_type: str = "llama", *, max_scale: float = 8.0, **options: Any) -> Engine:
    model = tiny_model(model_type, **NO_END)
    model.generation_config.eos_token_id = None
    install(model, method="yarn")
    return Engine(model, None, max_scale=max_scale, **options)


def plan(prompt: int, **options: Any) -> Any:
    return plan_request(prompt, native_window=1000, **({"max_scale": 20.0} | options))


def test_scale_comes_from_prompt_and_new_tokens() -> None:
    assert plan(900, max_new_tokens=100).scale == 1
    assert plan(901, max_new_tokens=100).scale == 2
    assert plan(17_000, max_new_tokens=1).scale == 20
    assert plan(2400, max_new_tokens=100, policy="exact").scale == 2.5


def test_open_request_stops_at_its_own_window_and_never_takes_the_largest() -> None:
    assert (plan(100).scale, plan(100).max_new_tokens) == (2, 1024)  # 1124 tokens
    near_end = plan(19_500)
    assert (near_end.scale, near_end.window, near_end.max_new_tokens, near_end.warnings) == (20, 20_000, 500, ())
    untrained = plan(900, max_scale=1.0)
    assert (untrained.scale, untrained.max_new_tokens) == (1, 100)


def test_beyond_the_trained_range_is_served_with_a_warning() -> None:
    beyond = plan(20_000)
    assert beyond.scale == 32 and beyond.max_new_tokens == 1024 and len(beyond.warnings) == 1
    assert "trained" in plan(10, max_new_tokens=5, scale=21).warnings[0]
    assert "past the window" in plan(1000, max_new_tokens=1, scale=1).warnings[0]
    assert plan(1000, max_new_tokens=1, scale=2).warnings == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": 0}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"scale": 0.5}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"prompt": 1000, "scale": 1}, "no room"),
        ({"policy": "largest", "prompt": 5}, "policy"),
    ],
)
def test_impossible_requests_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan(**({"prompt": 10} | options))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_greedy_equals_transformers_generate(model_type: str, scale: float) -> None:
    engine = make_engine(model_type)
    prompt = token_ids(1, 100)
    done = engine.generate(prompt[0].tolist(), max_new_tokens=12, scale=4.0) if scale > 1 else None
    if done is None:
        prompt = prompt[:, :40]
        done = engine.generate(prompt[0].tolist(), max_new_tokens=12)
    engine.extension.set_scale(scale)
    expected = engine.model.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert done.scale == scale
    assert done.token_ids == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_chunked_prefill_equals_one_pass(model_type: str) -> None:
    engine = make_engine(model_type)
    ids = token_ids(2, 150)
    with engine.at_scale(4.0):
        whole = engine.model.base_model(ids, use_cache=False).last_hidden_state
        pieces = list(hidden_chunks(engine.model, ids, 64))
    assert [piece.shape[1] for piece in pieces] == [64, 64, 22]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-4)
    prompt = ids[0].tolist()
    expected = engine.generate(prompt, max_new_tokens=8)
    engine.chunk_tokens = 64
    assert engine.generate(prompt, max_new_tokens=8).token_ids == expected.token_ids


def test_scale_changes_the_logits_and_is_put_back() -> None:
    engine = make_engine()
    engine.extension.set_scale(2.0)
    engine.model.train()
    ids = token_ids(1, 100)
    seen = []
    for scale in (1.0, 8.0):
        with engine.at_scale(scale):
            assert not torch.is_grad_enabled() and not engine.model.training
            seen.append(engine.model(ids).logits)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    engine.generate([5] * 30, max_new_tokens=3)
    assert engine.extension.scale == 2.0 and engine.model.training
    with pytest.raises(RuntimeError), engine.at_scale(4.0):
        raise RuntimeError
    assert engine.extension.scale == 2.0


def test_warning_of_an_untrained_model_reaches_the_caller() -> None:
    engine = make_engine(max_scale=1.0)
    with pytest.warns(ScaleWarning, match="largest that training drew"):
        engine.generate([5] * WINDOW, max_new_tokens=1)


def test_end_of_text_and_stop_strings_end_a_request() -> None:
    tokenizer = character_tokenizer()
    model = tiny_model("llama", **NO_END)
    model.generation_config.eos_token_id = None
    engine = Engine(model, tokenizer, max_scale=8.0)
    assert get_extension(model) is engine.extension  # wrapped on the way
    whole = engine.generate("What is", max_new_tokens=20)
    assert whole.finish_reason == "length" and len(whole.token_ids) == 20 and whole.prompt_tokens == 7
    assert whole.text == tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    assert whole.peak_bytes is None and whole.seconds > 0
    stop = whole.text[3:6]
    cut = engine.generate("What is", max_new_tokens=20, stop=stop)
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    model.generation_config.eos_token_id = [2, whole.token_ids[4]]
    ended = engine.generate("What is", max_new_tokens=20)
    first = whole.token_ids.index(whole.token_ids[4])
    assert ended.finish_reason == "stop" and ended.token_ids == whole.token_ids[: first + 1]


def test_sampling_is_seeded_and_top_p_limits_it() -> None:
    engine = make_engine()

    def draw(seed: int, **options: Any) -> Completion:
        return engine.generate([5, 6, 7], max_new_tokens=16, temperature=1.5, seed=seed, **options)

    assert draw(1).token_ids == draw(1).token_ids != draw(2).token_ids
    greedy = engine.generate([5, 6, 7], max_new_tokens=16)
    for top_p in (1e-6, 5e-324):
        assert draw(3, top_p=top_p).token_ids == greedy.token_ids


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    generator = torch.Generator().manual_seed(0)
    drawn = [int(sample_token(logits, temperature=1.0, top_p=0.7, generator=generator)) for _ in range(300)]
    assert set(drawn) == {1, 3}
    assert 0.55 < drawn.count(1) / 300 < 0.78  # 0.5 / 0.75


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop": ["a"]},
        {"stop": [""]},
    ],
)
def test_bad_sampling_settings_name_themselves(options: dict[str, Any]) -> None:
    name = "tokenizer" if options == {"stop": ["a"]} else next(iter(options))
    with pytest.raises(ValueError, match=f"^{name} ="):
        make_engine().generate([1], max_new_tokens=1, **options)


def test_no_prompt_builds_a_square_mask_or_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    masks, logits = [], []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        masks.append(options["attn_mask"])
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    engine.model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.shape[1]))
    engine.generate(token_ids(1, 200)[0].tolist(), max_new_tokens=2)
    assert masks and all(mask is None for mask in masks)
    assert logits == [1, 1]


def test_chunks_shrink_where_a_mask_is_needed() -> None:
    llama, gemma = tiny_model("llama"), tiny_model("gemma3_text")
    assert prefill_chunk_tokens(llama, 16_384) == 16_384
    assert prefill_chunk_tokens(llama, 20_000) == 8192
    assert prefill_chunk_tokens(gemma, 16_384) == 8192
    assert prefill_chunk_tokens(llama, 1_000_000) == 1073
    assert prefill_chunk_tokens(llama, 100, 64) == 64


def test_models_with_a_running_state_are_read_in_one_pass() -> None:
    hybrid = tiny_model("lfm2", layer_types=["conv", "full_attention"])
    assert prefill_chunk_tokens(hybrid, 100_000) == 100_000
    with pytest.raises(ValueError, match="chunk_tokens = 64: model type 'lfm2'"):
        Engine(hybrid, None, chunk_tokens=64)


@pytest.mark.gpu
def test_cuda_chunks_peak_memory_and_seeded_draws() -> None:
    model = tiny_model("llama", **NO_END).cuda()
    model.generation_config.eos_token_id = None
    engine = Engine(model, None, max_scale=8.0)
    prompt = token_ids(1, 300)[0].tolist()
    whole = engine.generate(prompt, max_new_tokens=8)
    engine.chunk_tokens = 64
    assert engine.generate(prompt, max_new_tokens=8).token_ids == whole.token_ids
    assert whole.peak_bytes is not None and whole.peak_bytes > 0
    drawn = [engine.generate(prompt, max_new_tokens=8, temperature=1.0, seed=s).token_ids for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_warning_inside_the_trained_range() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_engine().generate([5] * 200, max_new_tokens=1).scale == 4
