"""Tensor parallelism: two processes that compute each layer together give the run of one, its checkpoints go on under
any number, and what cannot be cut is refused before weights are read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import placement_key, seen_file, torchrun
from tiny_run import WINDOW, logged, make_base, small, weights, write
from transformers import AutoConfig, AutoModelForCausalLM

import e2llm.train.run as run_module
from e2llm.config import load_recipe
from e2llm.hf.tensor_parallel import check_shares
from e2llm.positions.placement import PositionSampler
from e2llm.train import train
from e2llm.train.distributed import Processes, check

processes = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")

# float32 sums in another order; GPUs also choose other kernels, and Adam divides by small numbers
LOSS, WEIGHT = (1e-4, 1e-4) if torch.cuda.is_available() else (1e-5, 1e-6)
HEADS: dict[str, object] = {"num_attention_heads": 4, "num_key_value_heads": 2}
BATCH = (
    *("train.batch_size=2", "distributed.global_batch=4", "train.save_every=3", "train.evaluate_every=3"),
    "train.evaluate_windows=5",  # the last batch is short
    *("train.logits_tokens=16", "train.max_grad_norm=0.05", "train.gradient_checkpointing=true"),
    *("placement.far_weight=0.5", "train.interpolation=0.5"),
)
TENSOR = ("distributed.strategy=fsdp2", "distributed.tensor_parallel=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), **HEADS)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process; two; two that were stopped at step 3 and went on."""
    folder = tmp_path_factory.mktemp("runs")
    train(small(base, folder / "one", *BATCH), quiet=True)
    two, stopped = (write(base, folder, name, *BATCH, *TENSOR) for name in ("two", "stopped"))
    torchrun(2, two, f"{stopped}:3", stopped)
    return folder


def check_same_run(found: Path, expected: Path) -> None:
    for key, times in (("loss", 6), ("grad_norm", 6), ("eval_loss_scale_1", 2), ("eval_loss_scale_4", 2)):
        ours, theirs = logged(found, key), logged(expected, key)
        assert ours.keys() == theirs.keys() and len(theirs) == times
        for step, value in theirs.items():
            assert abs(ours[step] - value) < LOSS, f"{found.name}: {key} at step {step}"
    for folder in ("model", "best"):
        cut, whole = weights(found / folder), weights(expected / folder)
        assert cut.keys() == whole.keys()
        for key, weight in whole.items():
            assert float((cut[key] - weight).abs().max()) < WEIGHT, f"{found.name}: {key}"


@processes
@pytest.mark.parametrize("name", ["two", "stopped"])
def test_the_run_is_that_of_one_process(runs: Path, name: str) -> None:
    check_same_run(runs / name, runs / "one")


@processes
def test_both_processes_see_the_samples_of_one(base: Path, runs: Path) -> None:
    recipe = small(base, runs / "two", *BATCH)
    sampler = PositionSampler(
        native_window=64, training_window=WINDOW, scales=recipe.scales, placement=recipe.placement, seed=recipe.seed
    )
    for rank in (0, 1):
        rows = [json.loads(line) for line in seen_file(runs / "two.toml", rank).read_text().splitlines()]
        arrived = [key for row in rows for key in row["placements"]]
        assert arrived == [placement_key(sampler.draw(index)) for index in range(6 * 4)]


@processes
def test_each_process_holds_half_of_the_layers(base: Path, runs: Path) -> None:
    whole = {name: weight.numel() for name, weight in weights(base / "model").items()}
    cut = sum(size for name, size in whole.items() if "proj" in name)
    for rank in (0, 1):
        row = json.loads(seen_file(runs / "two.toml", rank).read_text().splitlines()[0])
        assert row["numbers_held"] == sum(whole.values()) - cut // 2
        loaded = json.loads((runs / f"two.loaded{rank}.json").read_text())
        assert loaded["read"] >= 4 * sum(whole.values()) if rank == 0 else loaded["read"] < sum(whole.values())


@processes
def test_the_folder_at_the_end_loads_without_us(runs: Path) -> None:
    ours, theirs = (AutoModelForCausalLM.from_pretrained(runs / name / "model") for name in ("two", "one"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(0 < torch.cuda.device_count() < 4, reason="four processes need four GPUs, or none")
def test_groups_beside_each_other_and_checkpoints_of_and_for_plain_fsdp2(base: Path, runs: Path) -> None:
    four, from_groups = (write(base, runs, name, *BATCH, *TENSOR) for name in ("four", "from-groups"))
    to_groups = write(base, runs, "to-groups", *BATCH, TENSOR[0])
    torchrun(4, four, f"{from_groups}:3")
    torchrun(2, f"{to_groups}:3")
    write(base, runs, "from-groups", *BATCH, TENSOR[0])
    write(base, runs, "to-groups", *BATCH, *TENSOR)
    torchrun(2, from_groups, to_groups)
    for name in ("four", "from-groups", "to-groups"):
        check_same_run(runs / name, runs / "one")


@pytest.mark.slow
@processes
def test_groups_with_half_of_the_heads_each(base: Path, tmp_path: Path) -> None:
    grouped = (*BATCH, "method=self_extend", "attention.slope=0", "placement.max_jumps=3")
    train(small(base, tmp_path / "one", *grouped), quiet=True)
    torchrun(2, write(base, tmp_path, "two", *grouped, *TENSOR))
    check_same_run(tmp_path / "two", tmp_path / "one")


CONFIG: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 8},
    **{"max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": None, "tie_word_embeddings": True, **HEADS},
}


def of_type(folder: Path, kind: str) -> Path:
    """A base of another model type: biases and norms random, as zeros and ones would hide how they are cut."""
    base = make_base(folder)
    torch.manual_seed(0)
    extra: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
        "mistral": {"sliding_window": None},
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **CONFIG, **extra.get(kind, {})))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(base / "model")
    return base


FAMILIES = ("llama", "qwen3", "gemma3_text", "granite", "cohere", "mistral")


@processes
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile itself
def test_families_and_arithmetic(tmp_path: Path) -> None:
    steps = ("train.steps=2", "train.save_every=0", "train.evaluate_every=0")
    extra = {
        "llama": ("train.compile=layers", "train.gradient_checkpointing=false"),
        "mistral": ("train.precision=bfloat16",),
    }
    files = []
    for kind in FAMILIES:
        (tmp_path / kind).mkdir()
        base, more = of_type(tmp_path / kind, kind), (*steps, *extra.get(kind, ()))
        train(small(base, tmp_path / kind / "one", *BATCH, *more), quiet=True)
        files.append(write(base, tmp_path / kind, "two", *BATCH, *more, *TENSOR))
    torchrun(2, *files)
    for kind in FAMILIES:
        low = kind == "mistral"
        for key in ("loss", "grad_norm"):
            ours, theirs = (logged(tmp_path / kind / name, key) for name in ("two", "one"))
            assert len(theirs) == 2
            assert ours == pytest.approx(theirs, rel=1e-2 if low else LOSS), f"{kind}: {key}"


CODE = '''
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class SkewedConfig(LlamaConfig):
    model_type = "skewed_llama"


class SkewedLlama(LlamaForCausalLM):
    """Its down projections weigh channels by their number: a share of them is not what the whole has there."""
    config_class = SkewedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, given: (given[0] * torch.linspace(0.5, 1.5, given[0].shape[-1]).to(given[0].device),))
'''


@processes
def test_a_model_that_computes_something_else_when_cut_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, **HEADS)
    (base / "model" / "modeling_skewed.py").write_text(CODE)
    config = json.loads((base / "model" / "config.json").read_text())
    names = {"AutoConfig": "modeling_skewed.SkewedConfig", "AutoModelForCausalLM": "modeling_skewed.SkewedLlama"}
    config |= {"model_type": "skewed_llama", "architectures": ["SkewedLlama"], "auto_map": names}
    (base / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="cut by its plan it computes something else"):
        torchrun(2, write(base, tmp_path, "skewed", *BATCH, "model.trust_remote_code=true", *TENSOR))


STEP = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import AdamW
from e2llm.train.optimizers import AdamWByMesh

dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp")), dist.get_rank()
torch.manual_seed(0)
values, gradients = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
places = [(mesh, [Replicate(), Shard(0)]), (mesh, [Replicate(), Replicate()]), (mesh["dp_shard"], [Shard(0)])]
ours, theirs = [], []
for value, gradient, place in zip(values, gradients, places):
    ours.append(torch.nn.Parameter(DTensor.from_local(value[rank].clone(), *place, run_check=False)))
    ours[-1].grad = DTensor.from_local(gradient[rank].clone(), *place, run_check=False)
    theirs.append(torch.nn.Parameter(value.clone()))
    theirs[-1].grad = gradient.clone()
AdamWByMesh(ours, lr=0.1, fused=True).step()
AdamW(theirs, lr=0.1).step()
for number, (found, expected) in enumerate(zip(ours, theirs)):
    of = rank if number == 0 else 0  # copies that had drifted apart are the first process's
    torch.testing.assert_close(found.to_local(), expected[of])
dist.destroy_process_group()
"""


def test_copies_of_whole_weights_are_equal_after_a_step(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(STEP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(tmp_path / "step.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "sizes", "shares", "message"),
    [
        ("llama", {"num_key_value_heads": 1}, 2, r"= 2: does not divide the model's num_key_value_heads = 1"),
        ("llama", {"num_attention_heads": 2}, 4, "= 4: does not divide the model's num_attention_heads = 2; use a div"),
        ("llama", {"intermediate_size": 65}, 2, "intermediate_size = 65"),
        ("phi3", {"pad_token_id": 0}, 2, r"'phi3' cuts in ways .*colwise_gather_output.*; use .*parallel = 1"),
        ("mixtral", {}, 2, "'mixtral' cuts in ways that are not offered here"),
        ("gpt2", {"n_head": 4}, 2, "no plan to cut model type 'gpt2'"),
    ],
)
def test_models_that_cannot_be_cut(kind: str, sizes: dict[str, Any], shares: int, message: str) -> None:
    given = {} if kind == "gpt2" else CONFIG
    with pytest.raises(ValueError, match=message):
        check_shares(AutoConfig.for_model(kind, **(given | sizes)), shares)


def test_the_model_is_checked_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_model", lambda *args, **options: pytest.fail("weights were loaded"))
    monkeypatch.setattr(run_module.distributed, "start", lambda recipe: Processes(world=2, local_world=2))
    base = make_base(tmp_path, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match="does not divide the model's num_key_value_heads = 1"):
        train(small(base, tmp_path / "run", *TENSOR), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("distributed.tensor_parallel=0",), "tensor_parallel = 0: use 1"),
        (("distributed.tensor_parallel=2",), "tensor_parallel = 2: says nothing to strategy 'none'; .* 'fsdp2'"),
        (("distributed.strategy=ddp", TENSOR[1]), "tensor_parallel = 2: says nothing to strategy 'ddp'"),
        ((*TENSOR, "distributed.shard=2"), r"tensor_parallel = 2: not offered with distributed.shard = 2"),
        ((*TENSOR, "distributed.cpu_offload=true"), r"not offered with distributed.cpu_offload = true"),
        ((*TENSOR, "lora.rank=4"), r"tensor_parallel = 2: trains all weights, and lora.rank = 4"),
    ],
)
def test_sections_that_contradict_themselves(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("recommended-yarn", overrides)


def test_groups_of_processes_are_counted_as_one() -> None:
    given = load_recipe("recommended-yarn", [*TENSOR, "train.batch_size=2", "distributed.global_batch=8"])
    assert given.accumulation(2) == 4 and given.accumulation(8) == 1
    with pytest.raises(ValueError, match=r"batch_size x groups of 2 processes .* = 2 x 3"):
        given.accumulation(6)
    with pytest.raises(ValueError, match=r"tensor_parallel = 2: does not divide the 3 processes of a machine.* 1, 3"):
        check(given, Processes(world=6, local_world=3, launched=True), 3, {})
