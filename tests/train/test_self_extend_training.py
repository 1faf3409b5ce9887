"""Training in groups: the method reaches the steps in every way of training, its checkpoint says how it is read, and
what cannot read it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import make_base, small
from transformers import AutoConfig, AutoModelForCausalLM

import e2llm
from e2llm.config import load_recipe
from e2llm.export import export
from e2llm.export.open_gguf import check_open
from e2llm.export.plan import make_open_plan
from e2llm.hf import CheckpointInfo, get_extension, load_model
from e2llm.infer import Engine
from e2llm.positions.placement import PlacementConfig
from e2llm.train import train
from e2llm.vllm_plugin.scaling import make_scaling

GROUPED = (
    *("method=self_extend", "attention.slope=0", "attention.training_slope=0", "placement.max_jumps=3"),
    *("scales.max_scale=8", "scales.values=[1,4,8]", "scales.weights=[1,1,1]", "placement.far_weight=1"),
)
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "recomputed": ("train.gradient_checkpointing=true",),
    "whole logits": ("train.logits_tokens=0",),
    "adapters": ("lora.rank=4",),
    "distilled": ("train.distill=0.5",),
    "compiled": ("train.compile=layers",),
    "autocast": ("train.precision=bfloat16",),
    "compiled autocast": ("train.compile=layers", "train.precision=bfloat16"),
    "documents": ("data.document_mask=true",),
    "documents, compiled and recomputed": (
        *("data.document_mask=true", "train.compile=layers", "train.gradient_checkpointing=true"),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(small(base, folder, *GROUPED), quiet=True)
    return folder


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
@pytest.mark.parametrize("way", WAYS)
def test_groups_reach_the_steps_and_the_checkpoint(way: str, base: Path, trained: Path, tmp_path: Path) -> None:
    result = train(small(base, tmp_path / "run", *GROUPED, *WAYS[way]), quiet=True)
    assert result.model_folder is not None
    info = CheckpointInfo.load(result.model_folder)
    assert info is not None and (info.method, info.neighbours, info.max_scale) == ("self_extend", 16, 8)
    assert "e2llm_self_extend" not in (result.model_folder / "config.json").read_text()
    found = losses(tmp_path / "run")
    if way in ("recomputed", "whole logits", "compiled"):  # the same arithmetic
        assert found == pytest.approx(losses(trained), abs=2e-4)
    ungrouped = tuple("method=none" if one == "method=self_extend" else one for one in GROUPED)
    train(small(base, tmp_path / "other", *ungrouped, *WAYS[way]), quiet=True)
    other = losses(tmp_path / "other")  # the same windows at the same places
    assert found[0] != other[0] and found[0] == pytest.approx(other[0], abs=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
@pytest.mark.parametrize("way", ["plain", "recomputed", "compiled"])
def test_models_with_local_layers(way: str, tmp_path: Path) -> None:
    base = make_base(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 0}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **sizes, **heads, **kinds)
    AutoModelForCausalLM.from_config(config).save_pretrained(base / "model")
    found = {}
    for method in ("self_extend", "none"):
        run = tuple(f"method={method}" if one.startswith("method") else one for one in GROUPED)
        train(small(base, tmp_path / method, *run, *WAYS[way]), quiet=True)
        found[method] = losses(tmp_path / method)
    assert found["self_extend"][0] != found["none"][0] == pytest.approx(found["self_extend"][0], abs=0.1)
    engine = Engine.load(str(tmp_path / "self_extend" / "model"))
    assert engine.generate("w1 w2 w3 " * 50, max_new_tokens=4).scale == 8


def test_the_checkpoint_is_read_as_it_was_trained(trained: Path) -> None:
    model, tokenizer, info = load_model(str(trained / "model"))
    extension = get_extension(model)
    assert extension is not None and extension.grouping is not None and extension.neighbours == 16
    engine = Engine(model, tokenizer, info=info)
    prompt = "w1 w2 w3 " * 50
    found = engine.generate(prompt, max_new_tokens=8)
    assert found.scale == 8 and len(found.token_ids) == 8
    ids = torch.tensor([tokenizer(prompt).input_ids])
    logits = {}
    for scale in (1, 4, 8):
        with engine.at_scale(scale):
            logits[scale] = model(ids).logits
    assert all((logits[a] - logits[b]).abs().max() > 1e-5 for a, b in ((1, 4), (4, 8), (1, 8)))


def test_neighbours_of_a_recipe(base: Path, tmp_path: Path) -> None:
    result = train(small(base, tmp_path / "run", *GROUPED, "neighbours=9", "train.steps=1"), quiet=True)
    model, _, info = load_model(str(result.model_folder))
    extension = get_extension(model)
    assert info is not None and extension is not None and info.neighbours == extension.neighbours == 9
    with pytest.raises(ValueError, match="neighbours = 64: use at least 1 and less than the native window"):
        train(small(base, tmp_path / "other", *GROUPED, "neighbours=64"), quiet=True)
    assert not (tmp_path / "other").exists()


def test_other_trainers_draw_groups_too(base: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(str(base / "model"), method="none")
    e2llm.restore(model)
    extension = e2llm.extend(
        model,
        method="self_extend",
        training_window=48,
        placement=PlacementConfig(kind="jumps", far_weight=1.0, leading_tokens=4),
        max_scale=8,
        neighbours=9,
    )
    model.train()
    ids = torch.randint(0, 300, (4, 48), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        extension.start_at(0)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append(out.loss.item())
    assert found[0] == found[1]
    e2llm.save(model, tokenizer, tmp_path / "saved")
    info = CheckpointInfo.load(tmp_path / "saved")
    assert info is not None and (info.method, info.neighbours) == ("self_extend", 9)
    e2llm.restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert model(input_ids=ids, labels=ids).loss.item() != found[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("neighbours=-1", "neighbours = -1: use tokens, or 0"),
        ("method=yarn neighbours=8", "neighbours = 8: only method self_extend has them, not yarn"),
        ("model.attn_implementation=eager", "method = 'self_extend': brings its own attention"),
    ],
)
def test_recipes_that_cannot_be(more: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("recommended", [*GROUPED, *more.split(" ")])


def test_other_runtimes_are_refused_beyond_the_native_window(trained: Path, tmp_path: Path) -> None:
    folder = str(trained / "model")
    with pytest.raises(ValueError, match="scale = 4: method self_extend reads far tokens by an attention"):
        export(folder, tmp_path / "hf", window=256)
    assert not (tmp_path / "hf").exists()
    export(folder, tmp_path / "hf", scale=1.0)
    check_open(make_open_plan(Engine.load(folder)))  # llama.cpp moves keys
    assert make_scaling(CheckpointInfo.load(folder), 64, {}).neighbours == 16  # vLLM's plugin brings that attention
