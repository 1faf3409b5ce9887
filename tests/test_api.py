"""The five-line use: extend a loaded model, train it with a trainer that knows nothing of us, save it, serve it."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_model, token_ids
from texts import character_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

import e2llm
from e2llm.config import load_recipe
from e2llm.hf import get_extension
from e2llm.infer import ScaleWarning
from e2llm.positions.attention import AttentionConfig

ROWS, TOKENS = 4, 32
IDS = token_ids(1, 40)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def yarn(model: nn.Module, factor: float, **more: float) -> nn.Module:
    """transformers' own static scaling of the same weights."""
    return statically_scaled(model, rope_type="yarn", factor=factor, original_max_position_embeddings=WINDOW, **more)


@pytest.fixture
def model() -> nn.Module:
    found = tiny_model("llama")
    found.generation_config.eos_token_id = None  # random weights do not stop by chance
    return found


@pytest.fixture
def extended(model: nn.Module) -> nn.Module:
    e2llm.extend(model, max_scale=16, training_window=TOKENS)
    return model


def scales_of_generate(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Replace the class's generate() by one that notes (scale, max_new_tokens) of each call."""
    seen: list[tuple[Any, Any]] = []

    def generate(self: nn.Module, *_: Any, **kwargs: Any) -> nn.Module:
        seen.append((get_extension(self).scale, kwargs.get("max_new_tokens")))
        return self

    monkeypatch.setattr(type(model), "generate", generate)
    return seen


def train(model: nn.Module, folder: Path, steps: int = 2) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in token_ids(steps * 2, TOKENS)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()


def test_end_to_end(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copy.deepcopy(model.state_dict())
    extension = e2llm.extend(model, max_scale=16, training_window=TOKENS, seed=3)
    placed: list[np.ndarray] = []
    place = type(extension).place

    def note(self: Any, placements: Any) -> None:
        placed.extend(p.positions for p in placements)
        place(self, placements)

    monkeypatch.setattr(type(extension), "place", note)
    train(model, tmp_path / "trainer")
    expected = [extension.sampler.draw(index).positions for index in range(ROWS)]
    assert [p.tolist() for p in placed] == [p.tolist() for p in expected], "every row of both steps was drawn"
    assert any(p[-1] >= WINDOW for p in placed), "beyond the native window"
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())

    folder = e2llm.save(model, character_tokenizer(), tmp_path / "out", base_model="tiny", checkpoint="mine")
    e2llm.serve_window(model, 4 * WINDOW)
    assert not model.training and extension.scale == 4.0
    torch.testing.assert_close(
        logits(model), logits(yarn(model, 4.0, attention_factor=0.02 * math.log(4.0) + 1.0)), rtol=0, atol=1e-5
    )
    again, tokenizer = e2llm.load(str(folder), device="cpu")
    e2llm.serve_window(again, 4 * WINDOW)
    assert torch.equal(logits(again), logits(model)) and tokenizer("a")["input_ids"] == [97]


def test_what_is_left_out_is_the_recommended_recipes(model: nn.Module, tmp_path: Path) -> None:
    recommended = load_recipe("recommended-yarn")
    extension = e2llm.extend(model)
    assert (extension.sampler.scales, extension.sampler.placement) == (recommended.scales, recommended.placement)
    assert extension.attention == recommended.attention and extension.max_scale == recommended.scales.max_scale
    info = e2llm.hf.CheckpointInfo.load(e2llm.save(model, None, tmp_path / "out"))
    assert info.attention_config() == recommended.attention
    e2llm.restore(model)
    linear = e2llm.extend(model, method="linear", max_scale=4)
    assert linear.attention == AttentionConfig(), "slopes belong to the recommended method"
    assert (linear.sampler.scales.distribution, linear.max_scale) == ("uniform_integers", 4)
    e2llm.restore(model)
    own = AttentionConfig(training_slope=0.2)
    assert e2llm.extend(model, attention=own).attention == own


def test_training_sees_the_draws(model: nn.Module) -> None:
    """The same batch twice: two draws, two losses; and placed by hand, the same losses."""
    other = tiny_model("llama")
    extension, by_hand = e2llm.extend(model, training_window=TOKENS), e2llm.extend(other, training_window=TOKENS)
    sampler, by_hand.sampler = by_hand.sampler, None
    ids = token_ids(2, TOKENS)
    drawn = [logits(model.train(), ids) for _ in range(2)]
    assert not torch.equal(*drawn) and extension.sampler == sampler
    for step, found in enumerate(drawn):
        by_hand.place([sampler.draw(2 * step + row) for row in range(2)])
        assert torch.equal(logits(other.train(), ids), found)


@pytest.mark.parametrize(
    ("window", "scale"), [(1, 1.0), (WINDOW, 1.0), (WINDOW + 1, 2.0), (8 * WINDOW, 8.0), (16 * WINDOW, 16.0)]
)
def test_a_window_sets_its_scale(extended: nn.Module, window: int, scale: float) -> None:
    e2llm.serve_window(extended.train(), window)
    assert get_extension(extended).scale == scale and not extended.training
    if scale == 1:
        assert torch.equal(logits(extended), logits(tiny_model("llama")))


def test_a_window_beyond_training_warns(extended: nn.Module) -> None:
    with pytest.warns(ScaleWarning, match="scale 32 .* above 16") as found:
        e2llm.serve_window(extended, 16 * WINDOW + 1)
    assert found[0].filename == __file__ and get_extension(extended).scale == 32.0


@pytest.mark.parametrize(("window", "message"), [(0, "num_tokens = 0"), ("all", "window = 'all': give tokens")])
def test_windows_that_are_none(extended: nn.Module, window: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        e2llm.serve_window(extended, window)


def test_auto_generates_at_the_scale_of_the_request(extended: nn.Module) -> None:
    e2llm.serve_window(extended, "auto")
    prompt = token_ids(2, 3 * WINDOW)
    static = yarn(extended, 4.0)
    static.generation_config.eos_token_id = None
    mask = torch.ones_like(prompt)
    ours = extended.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, static.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False))
    assert get_extension(extended).scale == 4.0
    short = prompt[:, :10]
    extended.generate(short, attention_mask=mask[:, :10], max_new_tokens=5, do_sample=False)
    assert get_extension(extended).scale == 1.0


@pytest.mark.parametrize(
    ("tokens", "arguments", "scale", "new_tokens"),
    [
        (10, {"max_new_tokens": 54}, 1.0, 54),
        (10, {"max_new_tokens": 55}, 2.0, 55),
        (10, {"max_length": 65}, 2.0, None),
        (10, {"max_length": 5}, 1.0, None),
        (10, {"generation_config": GenerationConfig(max_new_tokens=200)}, 4.0, None),
        (10, {"generation_config": GenerationConfig(max_length=200)}, 4.0, None),
        (600, {"max_new_tokens": 424}, 16.0, 424),
        (10, {}, 16.0, 1014),  # 16 * 64 tokens are all that was trained
    ],
)
def test_auto_counts_prompt_and_new_tokens(
    extended: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    arguments: dict[str, Any],
    scale: float,
    new_tokens: int | None,
) -> None:
    seen = scales_of_generate(extended, monkeypatch)
    e2llm.serve_window(extended, "auto")
    for given in ({"input_ids": token_ids(2, tokens)}, {"inputs_embeds": torch.zeros(2, tokens, 64)}):
        extended.generate(**given, **arguments)
    extended.generate(token_ids(2, tokens), **arguments)
    assert seen == [(scale, new_tokens)] * 3


def test_auto_gives_1024_new_tokens_where_none_are_named(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    e2llm.extend(model, max_scale=64, training_window=TOKENS)
    model.generation_config.max_length = 64  # as checkpoints have it: no wish of this call's
    seen = scales_of_generate(model, monkeypatch)
    e2llm.serve_window(model, "auto")
    model.generate(token_ids(1, 10))
    assert seen == [(32.0, 1024)], "1034 tokens: 32 windows of 64, not the largest of 64"


def test_auto_warns_beyond_what_was_trained(extended: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scales_of_generate(extended, monkeypatch)
    e2llm.serve_window(extended, "auto")
    with pytest.warns(ScaleWarning, match="scale 32 .* above 16"):
        extended.generate(token_ids(1, 1000), max_new_tokens=25)
    with pytest.raises(ValueError, match="max_new_tokens = 0"):
        extended.generate(token_ids(1, 10), max_new_tokens=0)
    with pytest.raises(ValueError, match="without input_ids"):
        extended.generate(max_new_tokens=4)
    assert seen == [(32.0, 25)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_generates_with_itself(extended: nn.Module, monkeypatch: pytest.MonkeyPatch, copied: Any) -> None:
    e2llm.serve_window(extended, "auto")
    twin = copied(extended)
    scales_of_generate(extended, monkeypatch)
    assert twin.generate(token_ids(1, 100), max_new_tokens=20) is twin
    assert get_extension(twin).scale == 2.0 and get_extension(extended).scale is None
    e2llm.restore(twin)
    assert "generate" not in vars(twin) and get_extension(twin) is None
    assert "generate" in vars(extended) and get_extension(extended) is not None


def test_through_peft(extended: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(extended, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    e2llm.serve_window(adapted, "auto")
    adapted.generate(input_ids=token_ids(1, 100), attention_mask=torch.ones(1, 100), max_new_tokens=2, do_sample=False)
    assert get_extension(extended).scale == 2.0
    e2llm.restore(adapted)
    assert get_extension(adapted) is None and "generate" not in vars(extended)


def test_a_window_takes_auto_back(extended: nn.Module) -> None:
    e2llm.serve_window(extended, "auto")
    e2llm.serve_window(extended, 2 * WINDOW)
    assert "generate" not in vars(extended)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e2llm.serve_window(extended, "auto")
    assert get_extension(extended).scale == 2.0, "until the first request"


def test_a_base_model_without_head_has_no_generate() -> None:
    model = tiny_model("llama").model
    e2llm.extend(model, training_window=TOKENS)
    e2llm.serve_window(model, 2 * WINDOW)
    with pytest.raises(ValueError, match=r"'auto': LlamaModel has no generate\(\)"):
        e2llm.serve_window(model, "auto")


def test_restore(model: nn.Module) -> None:
    rotary, names, own = model.model.rotary_emb, dict(model.named_modules()), set(vars(model))
    before = logits(model)
    e2llm.extend(model, training_window=TOKENS)
    e2llm.serve_window(model, "auto")
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=60, do_sample=False)
    assert not torch.equal(logits(model), before)
    e2llm.restore(model)
    assert model.model.rotary_emb is rotary and dict(model.named_modules()) == names and set(vars(model)) == own
    assert torch.equal(logits(model), before) and torch.equal(logits(model.train()), before)
    for use in (e2llm.restore, lambda m: e2llm.serve_window(m, 10), lambda m: e2llm.save(m, None, "out")):
        with pytest.raises(ValueError, match=r"not extended: call e2llm\.extend"):
            use(model)


def test_save_and_load(extended: nn.Module, tmp_path: Path) -> None:
    extended.config._name_or_path = "somewhere/tiny"
    folder = e2llm.save(extended, character_tokenizer(), tmp_path / "out", checkpoint="mine")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(plain), logits(extended)), "a plain folder"
    model, _ = e2llm.load(str(folder), device="cpu")
    extension = get_extension(model)
    assert (extension.method, extension.native_window, extension.max_scale) == ("yarn", WINDOW, 16.0)
    info = e2llm.hf.CheckpointInfo.load(folder)
    assert (info.base_model, info.checkpoint, info.training_window) == ("tiny", "mine", TOKENS)
    assert info.placement["kind"] == "jumps" and info.scales["distribution"] == "uniform_integers"
    with pytest.raises(ValueError, match=r"without a sampler.*extend\(\)"):
        e2llm.save(model, None, tmp_path / "again")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "hops"}, r"placement\.kind = 'hops'"),
        ({"scales": "log"}, r"scales\.distribution = 'log'"),
        ({"max_scale": 2.5}, r"scales\.max_scale = 2\.5"),
        ({"method": "pi"}, "method = 'pi'"),
        ({"training_window": 4}, "window = 4: placement 'jumps'"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_what_cannot_be_leaves_the_model_alone(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        e2llm.extend(model, **settings)
    assert get_extension(model) is None and not model.model._forward_pre_hooks
