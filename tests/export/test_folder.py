"""Exported folders against transformers' own static scaling, which is told the scaling by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import WINDOW, statically_scaled, tiny_config, tiny_model, token_ids
from checkpoints import TINY_512, checkpoint_info, plain_logits, save_checkpoint

from e2llm.export import export
from e2llm.hf import get_extension, load_model, save_model
from e2llm.infer import Engine, ScaleWarning

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
LINEAR = {"rope_type": "linear", "factor": 4.0}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "cohere", "granite", "olmo3", "gemma3_text"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("method, static", [("yarn", YARN), ("linear", LINEAR)])
def test_equals_transformers_own_scaling(tmp_path: Path, model_type: str, method: str, static: dict[str, Any]) -> None:
    name, model = save_checkpoint(tmp_path / "model", model_type, method)
    result = export(name, tmp_path / "out", window=200)
    ids = token_ids(1, 180)
    with torch.no_grad():
        expected = statically_scaled(model, **static)(ids).logits
        unscaled = model(ids).logits
    assert torch.equal(plain_logits(tmp_path / "out", ids), expected)
    assert not torch.allclose(unscaled, expected, atol=1e-4)
    assert (result.scale, result.window, result.method) == (4.0, 200, method)
    assert all(check.passed for check in result.checks) and len(result.checks) == 3


def test_only_full_attention_is_scaled(tmp_path: Path) -> None:
    name, model = save_checkpoint(tmp_path / "model", "gemma3_text")
    export(name, tmp_path / "out", scale=2)
    found = config_of(tmp_path / "out")["rope_parameters"]
    assert found["sliding_attention"] == model.config.rope_parameters["sliding_attention"]
    assert found["full_attention"]["rope_type"] == "yarn" and found["full_attention"]["rope_theta"] == 1e6


def test_native_window_theta_and_partial_rotary_stay(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model", "gpt_neox")
    export(name, tmp_path / "out", scale=4)
    config = config_of(tmp_path / "out")
    assert config["max_position_embeddings"] == WINDOW
    assert config["rope_parameters"] == {**YARN, "rope_theta": 10000.0, "partial_rotary_factor": 0.25}


def test_written_by_transformers_4(tmp_path: Path) -> None:
    """rope_theta and rope_scaling beside each other, rotary_pct for the partial embedding."""
    name, _ = save_checkpoint(tmp_path / "model", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    path = tmp_path / "model" / "config.json"
    raw = config_of(tmp_path / "model")
    raw.pop("rope_parameters")
    path.write_text(json.dumps({**raw, "rope_theta": 5e4, "rope_scaling": None}))
    export(name, tmp_path / "out", scale=4)
    found = config_of(tmp_path / "out")
    assert found["rope_parameters"] == {**YARN, "rope_theta": 5e4} and "rope_scaling" not in found
    assert found["rope_theta"] == 5e4


def test_ntk_is_another_base(tmp_path: Path) -> None:
    name, model = save_checkpoint(tmp_path / "model", method="ntk")
    export(name, tmp_path / "out", scale=4)
    parameters = config_of(tmp_path / "out")["rope_parameters"]
    assert parameters["rope_type"] == "default" and parameters["rope_theta"] == 10000.0 * 4 ** (16 / 14)
    dynamic = statically_scaled(model, rope_type="dynamic", factor=1.0)
    ids = token_ids(1, 4 * WINDOW)  # at this length transformers' dynamic scaling has the same base
    with torch.no_grad():
        assert torch.allclose(plain_logits(tmp_path / "out", ids), dynamic(ids).logits, atol=1e-3)


@pytest.mark.parametrize("method, scale", [("none", 4.0), ("yarn", 1.0)])
def test_unscaled_stays_as_it_was(tmp_path: Path, method: str, scale: float) -> None:
    name, model = save_checkpoint(tmp_path / "model", method=method)
    export(name, tmp_path / "out", scale=scale)
    ids = token_ids(1, 100)
    assert torch.equal(plain_logits(tmp_path / "out", ids), model(ids).logits)


def test_longrope_is_fixed_to_its_long_factors(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.5 + i / 4 for i in range(8)]}
    sizes = {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors},
        "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": 4 * WINDOW,
    }
    name, model = save_checkpoint(tmp_path / "model", "phi3", "longrope", info=checkpoint_info("longrope"), **sizes)
    export(name, tmp_path / "out", scale=4)
    ids = token_ids(1, 3 * WINDOW)  # beyond the native window transformers uses the long factors itself
    with torch.no_grad():
        assert torch.allclose(plain_logits(tmp_path / "out", ids), model(ids).logits, atol=1e-4)
        assert not torch.allclose(plain_logits(tmp_path / "out", ids[:, :40]), model(ids[:, :40]).logits, atol=1e-3)


def test_slope_of_yarn_is_said(tmp_path: Path) -> None:
    info = checkpoint_info(attention={"training_slope": 0.1, "slope": 0.16})
    name, model = save_checkpoint(tmp_path / "model", info=info)
    export(name, tmp_path / "out", scale=4)
    factor = config_of(tmp_path / "out")["rope_parameters"]["attention_factor"]
    assert factor == pytest.approx(1 + 0.16 * 1.3862943611)
    ids = token_ids(1, 100)
    with torch.no_grad():
        expected = statically_scaled(model, **YARN, attention_factor=factor)(ids).logits
    assert torch.equal(plain_logits(tmp_path / "out", ids), expected)


@pytest.mark.parametrize("method", ["yarn", "linear"])
def test_config_class_that_takes_longrope_alone(tmp_path: Path, method: str) -> None:
    """Phi-3: the same frequencies as divisors. Its twin is a Llama-like family with the same rotary module."""
    info = checkpoint_info(method, attention={"training_slope": 0.07})
    name, model = save_checkpoint(tmp_path / "model", "phi3", info=info, partial_rotary_factor=0.5)
    result = export(name, tmp_path / "out", scale=4, to="vllm")
    assert config_of(tmp_path / "out")["rope_parameters"]["rope_type"] == "longrope"
    assert '"long_mscale": 1.0970' in result.commands["vLLM"]
    static = YARN if method == "yarn" else LINEAR
    rotary = type(model.model.rotary_emb)
    config = tiny_config("llama", head_dim=8)
    for key, value in static.items():
        config.rope_parameters[key] = value
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    expected, _ = ROPE_INIT_FUNCTIONS[method](config, torch.device("cpu"))
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out")).model.rotary_emb
    assert isinstance(found, rotary) and torch.allclose(found.inv_freq, expected, rtol=1e-6)
    assert found.attention_scaling == pytest.approx(1 + 0.07 * 1.3862943611)


def test_scaling_that_a_config_class_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2llm.export.rope_config.LONGROPE_ONLY", set())
    name, _ = save_checkpoint(tmp_path / "model", "phi3")
    with pytest.raises(ValueError, match=r"method = 'yarn': the config of model type 'phi3' does not take"):
        export(name, tmp_path / "out", scale=4)


def test_schedule_of_the_checkpoint(tmp_path: Path) -> None:
    """A calibrated checkpoint reads past scale times native window."""
    steps = [{"window": 100, "scale": 1.5}, {"window": 300, "scale": 4.0}]
    name, _ = save_checkpoint(tmp_path / "model", info=checkpoint_info(schedule=steps))
    result = export(name, tmp_path / "out", window=280)
    assert (result.scale, result.window) == (4.0, 280)
    assert export(name, tmp_path / "out", scale=4).window == 300
    info = load_model(str(tmp_path / "out"))[2]
    assert info is not None and (info.native_window, info.schedule) == (300, [])


@pytest.mark.parametrize("method", ["linear", "ntk"])
def test_slope_without_a_place_is_refused(tmp_path: Path, method: str) -> None:
    info = checkpoint_info(method, attention={"training_slope": 0.05})
    name, _ = save_checkpoint(tmp_path / "model", info=info)
    with pytest.raises(ValueError, match=r"attention\.slope = 0\.05.*--to gguf.*e2llm serve"):
        export(name, tmp_path / "out", scale=4)
    assert not (tmp_path / "out").exists()


def test_linear_on_a_linear_base_composes(tmp_path: Path) -> None:
    base = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    name, model = save_checkpoint(tmp_path / "model", method="linear", rope_parameters=base)
    export(name, tmp_path / "out", scale=4)
    assert config_of(tmp_path / "out")["rope_parameters"] == {**base, "factor": 8.0}
    ids = token_ids(1, 100)
    expected = statically_scaled(model, rope_type="linear", factor=8.0)(ids).logits
    assert torch.equal(plain_logits(tmp_path / "out", ids), expected)


def test_two_scalings_in_one_config_are_refused(tmp_path: Path) -> None:
    base = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    name, _ = save_checkpoint(tmp_path / "model", method="linear", rope_parameters=base)
    with pytest.raises(ValueError, match=r"rope_type is 'yarn'.*two\. Export with --scale 1"):
        export(name, tmp_path / "out", scale=4)
    export(name, tmp_path / "out", scale=1)


def test_scale_is_chosen_as_in_serving(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    engine = Engine.load(name)
    for window in (64, 65, 128, 300, 512):
        plan = engine.plan(window - 1, max_new_tokens=1)
        assert export(name, tmp_path / "out", window=window, verify=False).scale == plan.scale
    with pytest.warns(ScaleWarning, match="largest that training drew"):
        assert export(name, tmp_path / "out", window=600, verify=False).scale == 16
    with pytest.warns(ScaleWarning, match="outside the trained range"):
        export(name, tmp_path / "out", scale=20, verify=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, r"window: say which window .*--window 32k"),
        ({"window": 0}, "window = 0: use at least 1"),
        ({"scale": 0.5}, r"scale = 0\.5: use a finite number of at least 1"),
        ({"window": 500, "scale": 4}, r"window = 500: scale 4 holds 256 tokens.*--scale 8"),
        ({"scale": 4, "to": "onnx"}, r"to = 'onnx': choose one of hf, vllm, gguf, ollama"),
        ({"scale": 4, "keep_adapter": True}, "keep_adapter: .* leave it out"),
        ({"scale": 4, "to": "gguf", "gguf_type": "q2"}, "gguf_type = 'q2': choose one of bf16"),
        ({"scale": 4, "to": "gguf"}, r"tokenizer.*is not byte-level BPE.*--to hf"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        export(name, tmp_path / "out", **arguments)
    assert not list(tmp_path.glob("*out*"))


def test_weights_are_linked_and_the_checkpoint_untouched(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    export(name, tmp_path / "out", scale=4)
    assert (tmp_path / "out/model.safetensors").samefile(tmp_path / "model/model.safetensors")
    export(name, tmp_path / "out", scale=2)  # an older export is replaced
    assert config_of(tmp_path / "out")["rope_parameters"]["factor"] == 2
    assert before == {path.name: path.read_bytes() for path in Path(name).iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files in it; name a new or empty one"):
        export(name, tmp_path / "out", scale=4)
    with pytest.raises(ValueError, match="a file; name a folder"):
        export(name, tmp_path / "out/notes.txt", scale=4)


def test_our_loader_does_not_scale_twice(tmp_path: Path) -> None:
    name, model = save_checkpoint(tmp_path / "model")
    export(name, tmp_path / "out", scale=4)
    loaded, tokenizer, info = load_model(str(tmp_path / "out"), dtype="float32")
    engine = Engine(loaded, tokenizer, info=info)
    ids = token_ids(1, 250)
    plan = engine.plan(250, max_new_tokens=6)
    assert (plan.scale, plan.window, plan.warnings) == (1, 4 * WINDOW, ())
    with engine.at_scale(plan.scale):
        logits = loaded(ids).logits
    assert torch.equal(logits, statically_scaled(model, **YARN)(ids).logits)
    with pytest.raises(ValueError, match="already scales"):
        load_model(str(tmp_path / "out"), method="yarn")
    with pytest.raises(ValueError, match=r"an export already.*made from"):
        export(str(tmp_path / "out"), tmp_path / "again", scale=4)
    shutil.copytree(tmp_path / "out", tmp_path / "renamed")
    (tmp_path / "renamed/e2llm_export.json").unlink()
    with pytest.raises(ValueError, match=r"e2llm_export = .*an export already"):
        export(str(tmp_path / "renamed"), tmp_path / "again", scale=1)


def test_foreign_model_and_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    model = tiny_model("llama")
    (tmp_path / "model").mkdir()
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    from texts import character_tokenizer

    character_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.warns(ScaleWarning):
        export(str(tmp_path / "model"), tmp_path / "out", scale=4, method="linear")
    ids = token_ids(1, 100)
    assert torch.equal(plain_logits(tmp_path / "out", ids), statically_scaled(model, **LINEAR)(ids).logits)


def lora_checkpoint(tmp_path: Path) -> tuple[str, Any, Any]:
    """(adapter folder, base model, merged model)."""
    from peft import LoraConfig, get_peft_model
    from texts import character_tokenizer

    base = tiny_model("llama")
    save_model(base, character_tokenizer(), tmp_path / "base", checkpoint_info())
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    checkpoint_info().save(tmp_path / "adapter")
    return str(tmp_path / "adapter"), base, adapted.merge_and_unload().eval()


def test_adapter_merged(tmp_path: Path) -> None:
    name, base, merged = lora_checkpoint(tmp_path)
    export(name, tmp_path / "out", scale=4)
    ids = token_ids(1, 100)
    found = plain_logits(tmp_path / "out", ids)
    assert torch.allclose(found, statically_scaled(merged, **YARN)(ids).logits, atol=1e-3)
    assert not torch.allclose(found, statically_scaled(base, **YARN)(ids).logits, atol=0.1)


def test_adapter_kept(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name, base, merged = lora_checkpoint(tmp_path)
    result = export(name, tmp_path / "out", scale=4, to="vllm", keep_adapter=True)
    ids = token_ids(1, 100)
    assert torch.equal(plain_logits(tmp_path / "out", ids), statically_scaled(base, **YARN)(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "out/adapter")).eval()
    expected = statically_scaled(merged, **YARN)(ids).logits
    assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-3)
    assert "--enable-lora --max-lora-rank 8 --lora-modules adapter=out/adapter" in result.commands["vLLM"]
    assert str(tmp_path) not in (tmp_path / "out/adapter/adapter_config.json").read_text()
    with pytest.raises(ValueError, match="a GGUF holds merged weights"):
        export(name, tmp_path / "gguf", scale=4, to="gguf", keep_adapter=True)


def test_embedded_base(tmp_path: Path) -> None:
    with pytest.warns(ScaleWarning):
        result = export(str(TINY_512), tmp_path / "out", window=4096)
    assert result.scale == 8 and config_of(tmp_path / "out")["max_position_embeddings"] == 512
    assert all(check.passed for check in result.checks)


def test_a_config_has_its_mark() -> None:
    from e2llm.hf.exported import exported_window

    config = tiny_config("llama", e2llm_export={"scale": 4.0, "window": 256})
    assert exported_window(config) == 256 and exported_window(config.to_dict()) == 256
    assert exported_window(tiny_config("llama")) is None and exported_window({}) is None


def test_an_export_without_its_e2llm_json_is_not_scaled_twice(tmp_path: Path) -> None:
    """As it comes from a hub, where only the config is read."""
    source, _ = save_checkpoint(tmp_path / "model")
    folder = export(source, tmp_path / "out", scale=4.0).folder
    (folder / "e2llm.json").unlink()
    ids = token_ids(1, 100)
    model, _, info = load_model(str(folder), device="cpu")
    extension = get_extension(model)
    assert info is None and (extension.method, extension.native_window) == ("none", 4 * WINDOW)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain_logits(folder, ids))
    with pytest.raises(ValueError, match="is an export, its config is scaled to 256 tokens already"):
        load_model(str(folder), device="cpu", method="yarn")


def test_a_scaled_gguf_is_not_read_as_an_unscaled_one(tmp_path: Path) -> None:
    source, _ = save_checkpoint(tmp_path / "model", bpe=True)
    for scale, scaled in ((1.0, False), (4.0, True)):
        folder = export(source, tmp_path / f"out{scale}", scale=scale, to="gguf", gguf_type="f32").folder
        file = str(next(folder.glob("*.gguf")))
        if scaled:
            with pytest.raises(ValueError, match=r"frequencies are scaled \(yarn, factor 4\.0\), which transformers"):
                load_model(file, device="cpu")
        else:
            assert get_extension(load_model(file, device="cpu")[0]).method == "yarn"
