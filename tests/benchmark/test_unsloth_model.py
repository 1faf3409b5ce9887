"""unsloth as a contestant: what it is given, the folder it reads, who is imported first; its run where it is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2llm.benchmark.model_folder import model_folder
from e2llm.benchmark.shapes import quick_model, shape_of
from e2llm.benchmark.train_contestants import UNSLOTH_OPTIONS, Contestant
from e2llm.benchmark.train_process import run_in_process
from e2llm.benchmark.unsloth_model import adapter_arguments, load_arguments, precision
from e2llm.config_sections import LoraSection
from e2llm.train.adapters import add_adapters

installed = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="pip install unsloth")


def one_of(trainer: str = "unsloth", shape: str = "tiny-lora", **more: Any) -> Contestant:
    sizes = {"window": 64, "batch_size": 2, "steps": 2, "warmup": 1, "block": 1}
    return Contestant(trainer=trainer, shape=shape, **{**sizes, **more})


def test_its_adapters_are_where_ours_are() -> None:
    given = adapter_arguments(one_of())
    model = add_adapters(quick_model(shape_of("tiny-lora"), dtype="float32"), LoraSection(rank=4))
    ours = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_modules() if ".lora_A" in name}
    assert ours == set(given["target_modules"]) and len(given["target_modules"]) == len(ours)
    config: Any = model.peft_config["default"]  # type: ignore[operator,index]
    assert (given["r"], given["lora_alpha"]) == (config.r, config.lora_alpha) == (4, 32)
    assert (given["lora_dropout"], given["bias"]) == (config.lora_dropout, config.bias) == (0, "none")


def test_whole_weights_and_adapters_are_told_apart() -> None:
    assert load_arguments(one_of())["full_finetuning"] is False
    assert load_arguments(one_of(shape="tiny", window=128)) == {
        "max_seq_length": 128,
        "load_in_4bit": False,
        "full_finetuning": True,
        "use_gradient_checkpointing": False,
    }
    assert precision(one_of()) == precision(one_of("unsloth-float32", "tiny")) == {"bf16": True}
    assert precision(one_of(shape="tiny")) == {"bf16": False}, "weights of bfloat16 need no autocast"
    assert load_arguments(one_of("unsloth-float32", "tiny"))["float32_mixed_precision"] is True
    with pytest.raises(ValueError, match="'unsloth-float32': full fine-tuning only, and tiny-lora has adapters"):
        load_arguments(one_of("unsloth-float32"))


def test_activations_are_recomputed_where_that_is_asked_for_alone() -> None:
    for checkpointing, expected in ((False, False), (True, "unsloth")):
        one = one_of(checkpointing=checkpointing)
        for given in (load_arguments(one), adapter_arguments(one)):
            assert given["use_gradient_checkpointing"] == expected


def test_its_folder_holds_random_weights_and_is_written_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from e2llm.benchmark.trainers import TOKENIZER

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    shape = shape_of("tiny-lora")
    left_over = tmp_path / "models" / f"{shape.hidden_size}-{shape.num_hidden_layers}-{shape.vocab_size}.partial"
    left_over.mkdir(parents=True)
    (left_over / "config.json").write_text("{}")
    folder = model_folder(shape, tmp_path, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = quick_model(shape, dtype="bfloat16").state_dict()
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in expected.items())
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert not left_over.exists()
    written = (folder / "config.json").stat().st_mtime_ns
    assert model_folder(shape_of("tiny-qlora"), tmp_path, tokenizer) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("trainer", sorted(UNSLOTH_OPTIONS))
def test_without_the_package_nothing_starts(trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = run_in_process(one_of(trainer), work=tmp_path / "work", time_limit=60)
    assert found == {"status": "failed", "why": f"trainer = {trainer!r} needs a package: pip install unsloth"}
    assert not (tmp_path / "work").exists()


def test_it_is_imported_before_transformers_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of its name, found before an installed one, says what it saw when it was imported."""
    site = tmp_path / "site"
    (site / "unsloth-1.dist-info").mkdir(parents=True)
    (site / "unsloth-1.dist-info" / "METADATA").write_text("Name: unsloth\nVersion: 1\n")
    (site / "unsloth").mkdir()
    (site / "unsloth" / "__init__.py").write_text(
        "import json, os, sys\n"
        "names = ('UNSLOTH_DISABLE_STATISTICS', 'HF_HUB_OFFLINE', 'UNSLOTH_COMPILE_LOCATION')\n"
        "seen = {name: os.environ.get(name) for name in names}\n"
        "seen['loaded'] = [name for name in ('torch', 'transformers', 'peft', 'trl') if name in sys.modules]\n"
        "open(os.environ['SEEN'], 'w').write(json.dumps(seen))\n"
        "raise RuntimeError('seen enough')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.syspath_prepend(str(site))  # this process looks for the package too, before it starts one
    work = tmp_path / "work"
    found = run_in_process(one_of(), work=work, time_limit=60)
    assert (found["status"], found["why"]) == ("failed", "RuntimeError: seen enough")
    assert found["environment"]["e2llm"], "a Record of failures alone says where it was made"
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": str(work / "run" / "unsloth"),
        "loaded": [],
    }


@installed
@pytest.mark.parametrize("shape", ["tiny-lora", "tiny"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_the_weights_that_transformers_trainer_does(shape: str, checkpointing: bool, tmp_path: Path) -> None:
    found = {
        name: run_in_process(one_of(name, shape, checkpointing=checkpointing), work=tmp_path, time_limit=300)
        for name in ("unsloth", "hf")
    }
    assert [one["status"] for one in found.values()] == ["measured"] * 2, found
    assert len(found["unsloth"]["seconds"]) == 2
    for name in ("trained", "frozen"):
        assert found["unsloth"][name] == found["hf"][name]
    settings = found["unsloth"]["settings"]
    assert settings["unsloth"]["version"] == importlib.metadata.version("unsloth")
    assert settings["optim"] == found["hf"]["settings"]["optim"] and ("adapters" in settings["unsloth"]) == (
        shape == "tiny-lora"
    )
