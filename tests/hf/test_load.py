"""Checkpoint folders: they load without us, come back the same with us, and are whole or not there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_config, tiny_model, token_ids, with_rope
from texts import character_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from e2llm.hf import CheckpointInfo, get_extension, install, load_model, load_tokenizer, save_model
from e2llm.hf.rotary import unwrap
from e2llm.positions.attention import AttentionConfig
from e2llm.positions.choose import Step

IDS = token_ids(2, 40)
INFO = CheckpointInfo(
    method="yarn", native_window=512, training_window=256, max_scale=16.0, placement={"kind": "jumps"}
)
"""Its native window is not the tiny config's 64: the checkpoint's own word must decide."""


@torch.no_grad()
def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    return model(IDS.to(next(model.parameters()).device), **inputs).logits


@pytest.fixture
def extended() -> nn.Module:
    model = tiny_model("llama")
    install(model, method="yarn").set_scale(4.0)
    return model


@pytest.fixture
def folder(extended: nn.Module, tmp_path: Path) -> Path:
    return save_model(extended, character_tokenizer(), tmp_path / "run" / "best", INFO)


def test_the_folder_is_plain_transformers(extended: nn.Module, folder: Path) -> None:
    get_extension(extended).set_scale(None)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(plain), logits(extended))
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == WINDOW, "native, so that nobody scales twice"
    assert config["rope_parameters"]["rope_type"] == "default" and "factor" not in config["rope_parameters"]
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [97, 98, 99]
    assert [p.name for p in folder.parent.iterdir()] == ["best"], "nothing stays beside it"


def test_load_model_reads_it_back(extended: nn.Module, folder: Path) -> None:
    model, tokenizer, info = load_model(str(folder), device="cpu")
    assert info == INFO and not model.training and tokenizer("a")["input_ids"] == [97]
    extension = get_extension(model)
    assert (extension.method, extension.native_window, extension.max_scale) == ("yarn", 512, 16.0)
    assert extension.scale is None and extension.sampler is None
    extension.set_scale(4.0)
    expected = statically_scaled(extended, rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
    assert torch.equal(logits(model), logits(expected))


def test_tables_are_right_after_from_pretrained(folder: Path) -> None:
    """transformers builds models on the meta device first; frequencies must be read after that (trap 15)."""
    model, _, _ = load_model(str(folder), device="cpu")
    fresh = tiny_model("llama").model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inner.inv_freq, fresh)
    assert get_extension(model).rope.inv_freq == tuple(fresh.tolist())


def test_a_foreign_model_gets_what_fits_it(tmp_path: Path) -> None:
    base = tiny_config("llama")
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for rope, method in (
        ({}, "yarn"),
        ({**llama3, "original_max_position_embeddings": 32}, "linear"),
        ({"rope_type": "linear", "factor": 2.0}, "linear"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, "linear"),
        ({**longrope, "original_max_position_embeddings": 32}, "longrope"),
    ):
        model = tiny_model("llama", rope_parameters=with_rope(base, **rope).rope_parameters)
        expected = logits(model)
        where = tmp_path / f"{rope.get('rope_type')}"
        model.save_pretrained(where)
        character_tokenizer().save_pretrained(where)
        loaded, _, info = load_model(str(where), device="cpu")
        assert info is None and get_extension(loaded).method == method
        assert torch.equal(logits(loaded), expected)


def test_arguments(folder: Path) -> None:
    model, _, _ = load_model(
        str(folder), dtype="bfloat16", device="cpu", attn_implementation="eager", method="linear", native_window=100
    )
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    extension = get_extension(model)
    assert (extension.method, extension.native_window) == ("linear", 100)
    assert model.model.rotary_emb.inner.inv_freq.dtype == torch.float32
    extension.set_scale(2.0)
    assert torch.isfinite(logits(model)).all()


def test_saving_again_replaces(extended: nn.Module, folder: Path) -> None:
    with torch.no_grad():
        extended.lm_head.weight.mul_(2)
    (folder / "stale.txt").write_text("of the older checkpoint")
    save_model(extended, None, folder, INFO)
    assert not (folder / "stale.txt").exists() and [p.name for p in folder.parent.iterdir()] == ["best"]
    get_extension(extended).set_scale(None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), logits(extended))


@pytest.mark.parametrize("where", ["weights", "info"])
def test_an_interrupted_save_leaves_the_old_folder(
    extended: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(extended), "save_pretrained", fail) if where == "weights" else patch.setattr(
            CheckpointInfo, "save", fail
        )
        with pytest.raises(OSError, match="disk full"):
            save_model(extended, None, folder, INFO)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    save_model(extended, None, folder, INFO)
    assert [p.name for p in folder.parent.iterdir()] == ["best"], "the next save clears what the broken one left"


def test_a_failed_last_rename_leaves_a_folder(
    extended: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="disk gone"):
        save_model(extended, None, folder, INFO)
    assert (folder / "config.json").is_file()
    monkeypatch.undo()
    save_model(extended, None, folder, INFO)
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_a_save_that_was_killed_between_the_renames(extended: nn.Module, folder: Path) -> None:
    """What is left then: the older folder as .old, the newer as .partial, nothing by the name itself."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    folder.rename(folder.with_name("best.old"))
    folder.with_name("best.partial").mkdir()
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"a save was cut off; the older checkpoint is '.*best\.old'.*rename"):
            load(str(folder))

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(extended), "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(extended, None, folder, INFO)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "the next save puts it back first"
    save_model(extended, None, folder, INFO)
    assert [p.name for p in folder.parent.iterdir()] == ["best"]


def test_adapters_that_are_not_merged_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge"):
        save_model(model, None, tmp_path / "lora", INFO)
    with pytest.raises(ValueError, match="merge"):
        save_model(unwrap(model), None, tmp_path / "lora", INFO)
    assert not list(tmp_path.iterdir()), "refused before any work"
    save_model(model.merge_and_unload(), None, tmp_path / "lora", INFO)


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Folder with a LoRA adapter on `folder`'s model, and the logits that the two give."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


def test_an_adapter_is_merged_into_its_base(adapter: tuple[Path, torch.Tensor], folder: Path) -> None:
    where, expected = adapter
    assert not (where / "config.json").exists()
    model, tokenizer, info = load_model(str(where), device="cpu")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-4)
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(folder).eval())).abs().max() > 0.01
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(folder)) and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters()), "all of it can be trained"
    assert info == INFO and get_extension(model).native_window == 512, "its base's note, where it has none"
    assert tokenizer("abc")["input_ids"] == [97, 98, 99], "its base's tokenizer"
    CheckpointInfo(method="linear", native_window=128, training_window=64, max_scale=2.0).save(where)
    assert get_extension(load_model(str(where), device="cpu")[0]).method == "linear", "its own note comes first"
    (where / "config.json").write_text((folder / "config.json").read_text())  # as axolotl leaves it
    torch.testing.assert_close(logits(load_model(str(where), device="cpu")[0]), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "base_model_name_or_path = None: name the model"),
        ("./gone", r"base_model_name_or_path: model = '\./gone': no such file"),
        ("self", "base_model_name_or_path = .*: an adapter itself"),
    ],
)
def test_an_adapter_without_its_base(adapter: tuple[Path, torch.Tensor], base: str | None, message: str) -> None:
    file = adapter[0] / "adapter_config.json"
    name = str(adapter[0]) if base == "self" else base
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        load_model(str(adapter[0]), device="cpu")


def test_an_adapter_of_another_model(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=32).save_pretrained(tmp_path / "other")
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match="does not fit its base"):
        load_model(str(adapter[0]), device="cpu")


@pytest.mark.parametrize("name", ["no-such/model", "runs/paper/model"])
def test_a_name_that_is_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path without ./ goes to the hub as a name; out of reach, it must be said that it is no folder either."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in (lambda n: load_model(n, device="cpu"), load_tokenizer):
        with pytest.raises(ValueError, match=rf"model = '{name}': neither a local file or folder nor reachable"):
            load(name)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read \(.*safetensors"):
        load_model(str(folder), device="cpu")


def test_errors_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model = '\./nowhere': no such file or folder"):
        load_model("./nowhere")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


def test_a_broken_note_is_an_error(folder: Path) -> None:
    (folder / "e2llm.json").write_text("{")
    with pytest.raises(ValueError, match=r"e2llm\.json: not an e2llm\.json"):
        load_model(str(folder), device="cpu")


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="'gpt2' has learned"):
        load_model(str(tmp_path / "gpt2"), device="cpu")


def test_remote_code_is_off_unless_asked_for(tmp_path: Path) -> None:
    """A folder whose config names code of its own: refused before that code is imported."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}})
    )
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_unwrap() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    assert unwrap(model) is model
    assert unwrap(torch.compile(model)) is model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert unwrap(adapted) is model and unwrap(torch.compile(adapted)) is model


def test_slopes_and_schedule_travel_with_their_method(tmp_path: Path) -> None:
    schedule = [{"window": WINDOW, "scale": 1.0}, {"window": 4 * WINDOW, "scale": 3.0}]
    info = dataclasses.replace(INFO, attention={"training_slope": 0.0, "slope": 0.04}, schedule=schedule)
    folder = save_model(tiny_model("llama"), None, tmp_path / "model", info)
    character_tokenizer().save_pretrained(folder)
    own = load_model(str(folder), device="cpu")[0]
    assert get_extension(own).attention == AttentionConfig(training_slope=0.0, slope=0.04)
    assert get_extension(own).schedule == (Step(WINDOW, 1.0), Step(4 * WINDOW, 3.0))
    other = get_extension(load_model(str(folder), device="cpu", method="linear")[0])
    assert (other.attention, other.schedule) == (AttentionConfig(), ())
    given = AttentionConfig(slope=0.5)
    assert get_extension(load_model(str(folder), device="cpu", attention=given)[0]).attention == given
