"""Bases of every kind under FSDP2: the first process alone reads weights, and the run is that of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_checkpoint
from peft import LoraConfig, get_peft_model
from processes import torchrun
from safetensors.torch import load_file, save_file
from tiny_run import make_base, small, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from e2llm.config import load_recipe, to_toml
from e2llm.export import export
from e2llm.train import train

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")

# float32 sums in another order; GPUs also choose other kernels, and Adam divides by small numbers
LOSS, WEIGHT = (1e-4, 1e-4) if torch.cuda.is_available() else (1e-5, 1e-6)
STEPS = ("train.steps=2", "train.batch_size=2", "distributed.global_batch=4", "train.logits_tokens=16")
LORA = ("lora.rank=4", "train.learning_rate=1e-2")

CODE = '''
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class SkewedConfig(LlamaConfig):
    model_type = "skewed_llama"


class SkewedNorm(LlamaRMSNorm):
    """Two buffers: one is saved with the weights, one follows from the size."""

    def __init__(self, size):
        super().__init__(size)
        self.register_buffer("gain", torch.ones(size))
        self.register_buffer("skew", torch.linspace(-0.1, 0.1, size), persistent=False)

    def forward(self, hidden):
        return super().forward(hidden) * self.gain + self.skew


class SkewedModel(LlamaModel):
    config_class = SkewedConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm = SkewedNorm(config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SkewedNorm):
            init.copy_(module.skew, torch.linspace(-0.1, 0.1, len(module.skew)))


class SkewedLlama(LlamaForCausalLM):
    config_class = SkewedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = SkewedModel(config)
        self.post_init()
'''


def _plain(folder: Path) -> Path:
    return make_base(folder) / "model"


def _untied(folder: Path) -> Path:
    return make_base(folder, tie_word_embeddings=False) / "model"


def _gguf(folder: Path) -> Path:
    name, _ = save_checkpoint(make_base(folder) / "hf", bpe=True)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.bos_token = tokenizer.eos_token  # older transformers read no GGUF without one
    tokenizer.save_pretrained(name)
    made = export(name, folder / "gguf", scale=1.0, to="gguf", gguf_type="f32", verify=False)
    return next(made.folder.glob("*.gguf"))


def _routers(folder: Path) -> Path:
    """A mixture of experts whose routers have a bias among the buffers."""
    name, _ = save_checkpoint(make_base(folder) / "hf", "deepseek_v3", bpe=True)
    file = Path(name) / "model.safetensors"
    biases = {k: torch.linspace(0, 0.1, len(w)) for k, w in load_file(file).items() if "e_score_correction" in k}
    assert biases
    save_file(load_file(file) | biases, file, {"format": "pt"})
    return Path(name)


def _adapter(folder: Path) -> Path:
    base: Any = make_base(folder) / "model"
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def _remote(folder: Path) -> Path:
    """Code of its own, with a buffer among the weights and one that is in no file."""
    base = make_base(folder) / "model"
    (base / "modeling_skewed.py").write_text(CODE)
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "modeling_skewed.SkewedConfig", "AutoModelForCausalLM": "modeling_skewed.SkewedLlama"}
    config |= {"model_type": "skewed_llama", "architectures": ["SkewedLlama"], "auto_map": names}
    (base / "config.json").write_text(json.dumps(config))
    gain = {"model.norm.gain": torch.linspace(0.5, 1.5, config["hidden_size"])}
    save_file(weights(base) | gain, base / "model.safetensors", {"format": "pt"})
    return base


BASES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "bfloat16": (_plain, (*LORA, "model.dtype=bfloat16", "train.precision=bfloat16")),
    "embeddings": (_untied, (*LORA, "lora.train_embeddings=true", "model.dtype=bfloat16", "train.precision=bfloat16")),
    "untied": (_untied, ("model.dtype=auto",)),
    "gguf": (_gguf, ()),
    "routers": (_routers, ()),
    "adapter": (_adapter, ()),
    "remote": (_remote, ("model.trust_remote_code=true",)),
}


def written(folder: Path, name: str, output: str, *more: str) -> str:
    """A recipe file for base `name`, made if it is not there yet."""
    make, own = BASES[name]
    place = folder / name
    known = place / "base.txt"
    if not known.is_file():
        place.mkdir()
        known.write_text(str(make(place)))
    file = place / f"{output}.toml"
    given = (f"model.name={known.read_text()}", *STEPS, *own, *more)
    file.write_text(to_toml(small(place, place / output, *given)))
    return str(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each base trained by two processes and by one."""
    folder = tmp_path_factory.mktemp("bases")
    for name in BASES:
        train(load_recipe(written(folder, name, "one")), quiet=True)
    torchrun(2, *(written(folder, name, "two", "distributed.strategy=fsdp2") for name in BASES))
    return folder


def logged(run: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def check_same(name: str, one: Path, two: Path) -> None:
    low = "train.precision=bfloat16" in BASES[name][1]
    for key in ("loss", "grad_norm"):
        found, expected = logged(two, key), logged(one, key)
        assert len(expected) >= 2
        assert found == pytest.approx(expected, rel=1e-2 if low else LOSS), key
    files = ("adapter/adapter_model.safetensors", "model/model.safetensors")
    for file in files if BASES[name][1][:2] == LORA else files[1:]:
        ours, theirs = load_file(two / file), load_file(one / file)
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            assert ours[key].dtype == weight.dtype
            assert float((ours[key] - weight).abs().max()) < (2e-2 if low else WEIGHT), f"{file}: {key}"


@pytest.mark.parametrize("name", BASES)
def test_the_run_is_that_of_one_process(runs: Path, name: str) -> None:
    check_same(name, runs / name / "one", runs / name / "two")


@pytest.mark.parametrize("name", BASES)
def test_the_other_process_never_holds_the_weights(runs: Path, name: str) -> None:
    first, other = (json.loads((runs / name / f"two.loaded{rank}.json").read_text()) for rank in (0, 1))
    whole = first["read"]
    assert 100 * other["read"] < whole and 4 * other["allocated"] < whole
    added = {row["unsharded"] - row["read"] for row in (first, other)}  # adapters, which both make
    assert len(added) == 1 and (added == {0}) == (BASES[name][1][:2] != LORA)
    assert first["buffers"] and first["buffers"] == other["buffers"]
    assert {"model.norm.gain", "model.norm.skew"} <= first["buffers"].keys() or name != "remote"


@pytest.mark.slow
@pytest.mark.skipif(0 < torch.cuda.device_count() < 4, reason="four processes need four GPUs, or none")
@pytest.mark.parametrize("name", ["untied", "remote"])
def test_copies_of_shards_and_another_number_of_processes(tmp_path: Path, name: str) -> None:
    more = ("train.steps=4", "train.save_every=2", "train.batch_size=1")
    train(load_recipe(written(tmp_path, name, "one", *more)), quiet=True)
    torchrun(4, written(tmp_path, name, "copies", *more, "distributed.strategy=fsdp2", "distributed.shard=2"))
    stopped = written(tmp_path, name, "stopped", *more, "distributed.strategy=fsdp2")
    torchrun(4, f"{stopped}:2")
    torchrun(2, stopped)
    for output in ("copies", "stopped"):
        check_same(name, tmp_path / name / "one", tmp_path / name / output)
