"""What a recipe cannot have of its model is told before weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tiny_run import make_base, small

import e2llm.train.run as run
import e2llm.train.unloaded as unloaded
from e2llm.config_sections import LoraSection
from e2llm.hf import load_model
from e2llm.train import train
from e2llm.train.adapters import add_adapters
from e2llm.train.unloaded import check_unloaded

LORA = ("lora.rank=4", "placement.far_weight=0")
NAMES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("placement.far_weight=1", "model.attn_implementation=eager"),
            "far_weight: attention 'eager' .* = 'sdpa', or",
        ),
        (("method=longrope",), "method = 'longrope': .* no long_factor; use 'linear' or 'yarn'"),
        (
            (*LORA, 'lora.target_modules=["q_proj", "v_porj"]'),
            f"no layer .* called 'v_porj'; its linear .* are {NAMES}",
        ),
    ],
)
def test_what_the_config_rules_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(run, "load_model", lambda *args, **options: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        train(small(base, tmp_path / "run", *overrides), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LlamaConfig", {"attention_dropout": 0.1}, "'llama' drops attention .attention_dropout = 0.1., .* 'yarn'"),
        ("Gemma2Config", {}, "'gemma2' caps its scores .attn_logit_softcapping = 50., .* recommended-yarn"),
        ("Gemma2Config", {"attn_logit_softcapping": None}, None),
    ],
)
def test_what_groups_cannot_train(base: Path, tmp_path: Path, name: str, changes: dict, message: str | None) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    config = getattr(transformers, name)(**sizes, **more, **changes)
    config.save_pretrained(tmp_path / "model")
    settings = "method=self_extend", "placement.far_weight=0", "attention.slope=0", f"model.name={tmp_path / 'model'}"
    recipe = small(base, tmp_path / "run", *settings)
    if message is None:
        check_unloaded(recipe)
        return
    with pytest.raises(ValueError, match=message):
        check_unloaded(recipe)


def test_what_can_be_had_is_not_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_unloaded(small(base, tmp_path / "run", "placement.far_weight=1", "model.attn_implementation=sdpa"))
    check_unloaded(small(base, tmp_path / "run", *LORA, 'lora.target_modules=["self_attn.q_proj", "lm_head"]'))
    check_unloaded(small(base, tmp_path / "run", *LORA, "model.attn_implementation=eager"))

    def failing(*args: object, **options: object) -> None:
        raise TypeError("code of a model's own, which wants its weights")

    monkeypatch.setattr(unloaded, "empty_model", failing)
    check_unloaded(small(base, tmp_path / "run", "method=longrope"))


def test_a_name_that_no_layer_has_is_not_passed_over(base: Path) -> None:
    model, _, _ = load_model(str(base / "model"), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=f"'v_porj'; its linear layers are {NAMES}"):
        add_adapters(model, LoraSection(rank=2, target_modules=("q_proj", "v_porj")))
