"""The plan's arithmetic against real models, and its warnings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model, token_ids
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import e2llm
from e2llm.benchmark.shapes import SHAPES
from e2llm.cli import main
from e2llm.config import Recipe, load_recipe
from e2llm.hf import CheckpointInfo
from e2llm.plan.checks import warnings_of
from e2llm.plan.facts import serving_facts
from e2llm.plan.memory import RECOMPUTED, layer_bytes, trained_parameters, training_memory, training_peak
from e2llm.plan.shape import cache_bytes, shape_of
from e2llm.plan.speed import GPUS, Work, flops_per_token, work_of
from e2llm.plan.step import copied_bytes, step_of

TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"


def recipe(*overrides: str) -> Recipe:
    return load_recipe("recommended-yarn", overrides)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox", "qwen3_moe"])
def test_sizes_are_the_models(family: str) -> None:
    shape, model = shape_of(tiny_config(family)), tiny_model(family)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.num_layers == 2 and shape.native_window == 64
    with torch.no_grad():
        cache = model(input_ids=token_ids(1, 40), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_bytes(shape, 40) == 2 * held
    seeing_all = [not window for window in shape.sliding_windows] or [True, True]
    assert cache_bytes(shape, 40, method="self_extend") == held * (2 + sum(seeing_all) / 2)
    assert bool(shape.num_experts) == (family == "qwen3_moe")


def test_a_sliding_window_bounds_its_layers_cache() -> None:
    shape = shape_of(tiny_config("gemma3_text", sliding_window=16))
    one = 2 * shape.num_key_channels * 2
    assert cache_bytes(shape, 1000) == one * (16 + 1000)


def test_far_keys_are_kept_beside_keys() -> None:
    shape = shape_of(tiny_config("llama"))
    plain, grouped = (serving_facts(shape, recipe(f"method={method}"), None) for method in ("yarn", "self_extend"))
    assert plain
    for one, other in zip(plain, grouped, strict=True):
        assert 3 * one["cache_bytes"] == 2 * other["cache_bytes"]


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")])
def test_trained_numbers_of_adapters_are_pefts(targets: tuple[str, ...]) -> None:
    given = recipe("lora.rank=4", f"lora.target_modules={json.dumps(list(targets))}")
    adapted = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, target_modules=list(targets) or "all-linear", task_type="CAUSAL_LM")
    )
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained_parameters(shape_of(tiny_config("llama")), given) == expected


def test_operations_are_those_that_torch_counts() -> None:
    """Full attention is counted by torch, half of it by convention here; tied embeddings are the output's product."""
    model = tiny_model("llama", attn_implementation="eager", tie_word_embeddings=True)
    shape, tokens = shape_of(model.config), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=token_ids(1, tokens), use_cache=False)
    attention = 6 * shape.num_layers * shape.num_query_channels * tokens
    counted = 3 * counter.get_total_flops() / tokens
    assert flops_per_token(shape, recipe(f"data.window={tokens}")) == pytest.approx(counted - attention, rel=0.01)


@pytest.mark.parametrize(("dtype", "rank"), [("bfloat16", 0), ("float32", 0), ("bfloat16", 2)])
def test_a_layer_that_is_not_compiled_keeps_what_torch_saves(dtype: str, rank: int) -> None:
    """Beyond the count: a norm's inverse root and attention's sum of exponentials, and what adapters of few ranks make
    in between. Copies of float32 weights are made once for all tokens."""
    saved, tokens, shape = [], 64, shape_of(tiny_config("llama"))
    for layers in (1, 2):
        model: Any = tiny_model("llama", num_hidden_layers=layers, attn_implementation="sdpa").to(getattr(torch, dtype))
        if rank:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor, own: Any = own, seen: Any = seen) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address returns
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=token_ids(1, tokens), use_cache=False)
        saved.append(sum(storage.nbytes() for storage in seen.values()))
    optimizer = "adamw_split" if dtype == "bfloat16" and not rank else "adamw"
    given = [f"model.dtype={dtype}", f"lora.rank={rank}", f"train.optimizer={optimizer}", "placement.far_weight=0"]
    counted = layer_bytes(shape, recipe(*given, "train.compile=none"))
    copied = trained_parameters(shape, recipe(*given)) if rank else 0
    copied += sum(a * b for _, a, b in shape.linear_sizes) if dtype == "float32" else 0
    found = (saved[1] - saved[0] - 2 * copied / shape.num_layers) / tokens
    assert counted <= found <= counted + 4 * (2 + shape.num_heads) + 2 * 7 * 2 * rank


def test_sharding_divides_what_it_shards() -> None:
    shape = shape_of(tiny_config("llama"))
    kept = "train.gradient_accumulation=2"  # gradients are there from the first batch on
    one = training_memory(shape, recipe(kept))
    assert one["weights"] == one["gradients"] == 4 * shape.num_parameters and one["optimizer"] == 2 * one["weights"]
    whole = training_memory(shape, recipe("distributed.strategy=ddp"), 8)
    assert whole["weights"] == one["weights"]
    shards = training_memory(shape, recipe(kept, "distributed.strategy=fsdp2"), 8)
    assert all(shards[part] == one[part] / 8 for part in ("weights", "gradients", "optimizer"))
    hybrid = training_memory(shape, recipe("distributed.strategy=fsdp2", "distributed.shard=2"), 8)
    assert hybrid["weights"] == one["weights"] / 2
    second = training_memory(shape, recipe("distributed.strategy=deepspeed"), 8)
    assert (second["weights"], second["optimizer"]) == (one["weights"], one["optimizer"] / 8)


@pytest.mark.parametrize(
    ("window", "moment"),
    [("8192", "at the first layer's backward pass"), ("131072", "at the last layer's backward pass")],
)
def test_gradients_take_the_place_of_what_layers_kept(window: str, moment: str) -> None:
    """Each of the 32 layers of the 7B shape gives up a window's hidden states for a gradient of 0.4 GB: a short
    window's are less, a long one's more. Either way less is held than both together."""
    shape = shape_of(SHAPES["llama-2-7b"].config())
    long = ("train.compile=layers", f"data.window={window}", "train.gradient_checkpointing=true", "train.batch_size=1")
    long += ("placement.far_weight=0",)
    split = recipe(*long, "model.dtype=bfloat16", "train.optimizer=adamw_split")
    found, parts = training_peak(shape, split)
    assert found == moment
    gradients, inputs = 2 * shape.num_parameters, 32 * 4096 * 2 * int(window)  # of the layers, in bfloat16
    again = RECOMPUTED * layer_bytes(shape, split) * int(window)
    beside = parts["gradients"] + parts["activations"] + parts["logits"] - again
    assert max(gradients, inputs) <= beside < max(gradients, inputs) + 0.3e9  # the output layer's gradient is 0.26 GB
    found, parts = training_peak(shape, recipe(*long, "train.gradient_accumulation=2"))
    assert parts["gradients"] == 4 * shape.num_parameters and parts["activations"] > inputs, "they outlive a batch"


def test_memory_and_speed_follow_the_recipe() -> None:
    shape = shape_of(tiny_config("llama", num_hidden_layers=4))
    one, two = (training_memory(shape, recipe(f"train.batch_size={n}")) for n in (1, 2))
    assert two["activations"] == 2 * one["activations"]
    saving = training_memory(shape, recipe("train.batch_size=1", "train.gradient_checkpointing=true"))
    assert saving["activations"] < one["activations"]
    settings = ((f"train.logits_tokens={n}", "data.planted_weight=1") for n in (1024, 0))
    pieces, whole = (training_memory(shape, recipe(*given))["logits"] for given in settings)
    assert pieces < whole / 16
    once, weighed = (recipe(f"placement.far_weight={weight}") for weight in (0, 1))  # 16 channels a head, 32 more
    heads = shape.num_query_channels // 16 + shape.num_key_channels // 16
    of_far = shape.num_query_channels + 2 * 32 * heads  # the answer with and without them; queries, keys, values
    assert layer_bytes(shape, weighed) - layer_bytes(shape, once) == 2 * of_far
    h100 = GPUS["h100"]
    fast, slow = (step_of(shape, made, h100) for made in (once, weighed))
    assert fast is not None and slow is not None and fast.tokens_per_second > slow.tokens_per_second
    plain, compiled = (step_of(shape, recipe(f"train.compile={c}"), h100) for c in ("none", "layers"))
    assert plain is not None and compiled is not None
    assert compiled.tokens_per_second > 1.5 * plain.tokens_per_second
    assert step_of(shape, recipe("train.precision=float32"), h100) is None
    assert step_of(shape_of(tiny_config("qwen3_moe")), recipe(), h100) is None


def test_a_steps_optimizer_counts_once_for_all_its_tokens() -> None:
    shape, h100 = shape_of(tiny_config("llama")), GPUS["h100"]
    one, four = (step_of(shape, recipe(f"train.batch_size={n}"), h100) for n in (1, 4))
    assert one is not None and four is not None
    assert four.computing == pytest.approx(4 * one.computing) and four.optimizer == one.optimizer
    moved = 4 * shape.num_parameters * (4 + 3 + 3)  # read with two moments, written without gradients; clipped
    assert one.optimizer == pytest.approx(moved / h100.bytes_per_second)
    low = step_of(shape, recipe("model.dtype=bfloat16", "train.optimizer=adamw_split"), h100)
    assert low is not None and low.optimizer == pytest.approx(0.7 * one.optimizer)
    sharded = step_of(shape, recipe("distributed.strategy=fsdp2"), h100, 8)
    assert sharded is not None and sharded.optimizer == one.optimizer / 8


def test_sharding_copies_weights_in_and_out_of_buffers() -> None:
    shape = shape_of(tiny_config("llama"))
    weights = shape.num_parameters
    assert copied_bytes(shape, recipe("distributed.strategy=ddp"), 8) == 0
    sharded = copied_bytes(shape, recipe("distributed.strategy=fsdp2"), 8)
    assert sharded == weights * (2 * (6 / 8 + 4) + 6)
    kept = copied_bytes(shape, recipe("distributed.strategy=fsdp2", "distributed.reshard=false"), 8)
    assert sharded - kept == weights * (6 / 8 + 4)
    assert copied_bytes(shape, recipe("distributed.strategy=deepspeed"), 8) == 0
    third = copied_bytes(shape, recipe("distributed.strategy=deepspeed", "distributed.zero_stage=3"), 8)
    assert third == sharded


def test_recomputing_a_frozen_weight_is_half_of_its_work_again() -> None:
    """2 operations a weight forward, 2 backward where it is frozen, 4 where it is trained; 2 for the forward again."""
    shape = shape_of(tiny_config("llama"))

    def both(*given: str) -> list[Work]:
        return [work_of(shape, recipe(*given, f"train.gradient_checkpointing={c}")) for c in ("false", "true")]

    once, again = both()
    assert again.products == pytest.approx(once.products * 8 / 6)
    assert again.moved == pytest.approx(once.moved * 4 / 3)
    once, again = both("lora.rank=4")
    adapters = trained_parameters(shape, recipe("lora.rank=4"))
    assert again.products - once.products == 2 * (shape.num_parameters + adapters)


def test_four_bits_split_masters_and_a_teacher_are_counted() -> None:
    shape = shape_of(SHAPES["llama-2-7b"].config())
    low = ("model.dtype=bfloat16", "lora.rank=16", "train.batch_size=1", "train.gradient_checkpointing=true")
    whole, four = (training_memory(shape, recipe(*low, f"model.quantization={q}")) for q in ("none", "nf4"))
    assert whole["weights"] == pytest.approx(13.5e9, rel=0.02)
    assert four["weights"] == pytest.approx(0.516 * 6.48e9 + 2 * 0.26e9 + 4 * 40e6, rel=0.02)
    small = shape_of(SHAPES["smollm2-135m"].config())
    low = recipe("model.dtype=bfloat16", "train.optimizer=adamw_split", "train.batch_size=1", "data.window=512")
    split = training_memory(small, low)
    assert split["weights"] + split["optimizer"] == 12 * small.num_parameters
    taught = training_memory(small, recipe("train.distill=0.5"))
    assert taught["teacher"] == 2 * small.num_parameters


INFO = CheckpointInfo(method="yarn", native_window=4096, training_window=4096, max_scale=32.0)


@pytest.mark.parametrize(
    ("raw", "info", "found"),
    [
        ({"max_position_embeddings": 4096, "rope_theta": 1e4}, INFO, []),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None, []),
        ({"max_position_embeddings": 4096}, None, ["no rope_theta"]),
        ({"rope_theta": 1e4, "max_position_embeddings": 32768}, INFO, ["e2llm.json says the native window is 4096"]),
        (
            {"rope_theta": 1e4, "max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 8.0}},
            INFO,
            ["it would be scaled twice", "the factor is applied to it again"],
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 8.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 4096,
                },
            },
            None,
            ["extended already, from 4096: .* end at 262144"],
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            None,
            ["'dynamic' is not known to llama.cpp"],
        ),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "mine"}}, None, ["to vLLM", "to llama.cpp"]),
        ({"rope_theta": 1e4, "rope_scaling": {"factor": 8.0}}, None, ["factor 8.0 without a rope_type"]),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": "8"}}, None, ["'8', which is no number"]),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn"}}, None, ["the factor None, which is no number"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "mine", "rope_theta": 1e6}}},
            None,
            ["full_attention: .*vLLM", "full_attention: .*llama.cpp"],
        ),
    ],
)
def test_warnings(raw: dict[str, Any], info: CheckpointInfo | None, found: list[str]) -> None:
    texts = warnings_of(raw, info)
    assert len(texts) == len(found), texts
    assert all(re.search(pattern, text) for pattern, text in zip(found, texts, strict=True)), texts


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", str(TINY), "--gpu", "h100", "--set", "data.window=512"]) == 0
    told = capsys.readouterr().out
    assert "native window 512" in told and "fits" in told and "warning:" not in told
    assert "16,384      32" in told, "the largest window and its scale"
    fused = ["--set", "train.compile=layers", "--set", "data.window=512", "--gpu", "h100"]
    assert main(["plan", str(TINY), *fused]) == 0
    compiled = capsys.readouterr().out
    speed = re.search(r"([\d,]+ tokens/s), ", compiled)
    assert speed and "not compiled, a speed that rests on two runs; with" in told
    assert f"--set train.compile=layers: {speed[1]}" in told
    assert "not compiled" not in compiled
    assert main(["plan", str(TINY / "config.json"), "--gpu", "a100", "--gpus", "2"]) == 2
    told = capsys.readouterr().err
    assert "gpus = 2 with distributed.strategy = 'none': none is for one" in told and "--set distributed.str" in told
    halves = ["--set", "distributed.strategy=fsdp2", "--set", "distributed.shard=3"]
    assert main(["plan", str(TINY / "config.json"), "--gpu", "a100", "--gpus", "8", *halves]) == 2
    assert "gpus = 8: distributed.shard = 3 does not divide it; use one of 2, 4, 8" in capsys.readouterr().err
    assert main(["plan", str(TINY / "config.json"), "--gpu", "a100", *halves[:2]]) == 2
    told = capsys.readouterr().err
    assert "gpus = 1 with distributed.strategy = 'fsdp2'" in told and "say how many by --gpus" in told
    shared = ["--set", "distributed.strategy=fsdp2", "--set", "distributed.tensor_parallel=2"]
    assert main(["plan", str(TINY / "config.json"), "--gpu", "a100", "--gpus", "2", *shared]) == 2
    assert "distributed.tensor_parallel = 2: the plan does not count" in capsys.readouterr().err
    sections = ("distributed.strategy=fsdp2", "distributed.global_batch=20", "train.precision=float32")  # has no speed
    uneven = [part for section in sections for part in ("--set", section)]
    assert main(["plan", str(TINY / "config.json"), "--gpu", "a100", "--gpus", "2", *uneven]) == 2
    assert "distributed.global_batch = 20: not a multiple of" in capsys.readouterr().err
    assert main(["plan", str(TINY), "--gpu", "abacus"]) == 2
    assert "use one of h100" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), "--gpu", "h100"]) == 2
    assert "no config.json there" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert main(["plan", str(tmp_path), "--gpu", "h100"]) == 2
    assert "no causal language model" in capsys.readouterr().err


def test_an_adapter_is_planned_as_its_base(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = {}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY)}))
    CheckpointInfo(method="yarn", native_window=512, training_window=512, max_scale=4).save(tmp_path)
    for name in (TINY, tmp_path):
        assert main(["plan", str(name), "--gpu", "h100", "--json", "--set", "data.window=512"]) == 0
        told[name] = json.loads(capsys.readouterr().out)
    base, adapter = told[TINY], told[tmp_path]
    assert adapter["model"] == base["model"] and adapter["training"] == base["training"]
    assert [row["scale"] for row in adapter["serving"]] == [1, 2, 4], "what the adapter was trained for"
    assert base["warnings"] == [] and "holds an adapter: all of this is of its base" in adapter["warnings"][0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    assert main(["plan", str(tmp_path), "--gpu", "h100"]) == 2
    assert "adapter_config.json: base_model_name_or_path: model = " in capsys.readouterr().err


def test_a_gguf_file_is_planned_as_what_it_was_made_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["export", str(TINY), "--to", "gguf", "--out", str(tmp_path / "gguf")]) == 0
    capsys.readouterr()
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    told = {}
    for name in (TINY, file):
        assert main(["plan", str(name), "--gpu", "h100", "--json", "--set", "data.window=512"]) == 0
        told[name] = json.loads(capsys.readouterr().out)
    for part in ("model", "training", "warnings"):
        assert told[file][part] == told[TINY][part]
    assert main(["plan", str(tmp_path / "gone.gguf"), "--gpu", "h100"]) == 2
    assert "no config.json there" in capsys.readouterr().err
