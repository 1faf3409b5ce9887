from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from model_configs import engine_config, scaling

from e2llm.vllm_plugin.refusals import (
    ROPE_TYPE,
    Hook,
    check_engine,
    check_groups,
    check_rotaries,
    check_version,
    scaled_rope_parameters,
)

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4.dev1+cpu"])
def test_known_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.3.2", "1.32.0", "dev"])
def test_unknown_versions(version: str) -> None:
    with pytest.raises(ValueError, match=rf"vLLM {version}: e2llm's plugin fits vLLM 0.32 alone"):
        check_version(version)


def test_hooks() -> None:
    owner, name, function = Hook("json.decoder", "JSONDecoder.decode", ("s",)).find()
    assert getattr(owner, name) is function
    for wrong in (
        Hook("json.decoder", "JSONDecoder.encode", ()),
        Hook("json.no_such", "f", ()),
        Hook("json.decoder", "JSONDecoder.decode", ("text",)),
    ):
        with pytest.raises(ValueError, match=r"cannot hook in; reinstall vLLM 0\.32"):
            wrong.find()


@pytest.mark.parametrize("window", [64, 100, 3, 8192])
def test_the_longest_request_is_what_vllm_multiplies(window: int) -> None:
    """vLLM takes int(max_position_embeddings * factor)."""
    found = scaled_rope_parameters(PLAIN, scaling(), window)
    assert found["rope_type"] == ROPE_TYPE and int(window * found["factor"]) == 512
    assert found["rope_theta"] == 10000.0 and PLAIN["rope_type"] == "default"


def test_local_layers_stay_as_they_are() -> None:
    nested = {"full_attention": PLAIN, "sliding_attention": PLAIN | {"rope_theta": 500.0}}
    found = scaled_rope_parameters(nested, scaling(), 64)
    assert found["full_attention"]["rope_type"] == ROPE_TYPE
    assert found["sliding_attention"] == nested["sliding_attention"]
    with pytest.raises(ValueError, match="every layer type is local"):
        scaled_rope_parameters({"sliding_attention": PLAIN}, scaling(), 64)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3", "dynamic", "longrope"])
def test_a_base_that_scales_is_refused(rope_type: str) -> None:
    scaled = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    for parameters in (scaled, {"full_attention": PLAIN, "sliding_attention": scaled}):
        with pytest.raises(ValueError, match=f"rope_type = '{rope_type}'.*would scale them twice"):
            scaled_rope_parameters(parameters, scaling(), 64)


def test_several_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="mrope_section"):
        scaled_rope_parameters(PLAIN | {"mrope_section": [8, 4, 4]}, scaling(), 64)


def test_a_plain_engine_passes_compiled_eager_and_tensor_parallel() -> None:
    for changes in ({}, {"model_config__enforce_eager": True}, {"parallel_config__tensor_parallel_size": 8}):
        check_engine(engine_config(**changes), scaling(), is_cpu=True)


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("speculative_config", object(), "speculative decoding"),
        ("kv_transfer_config", object(), "KV transfer"),
        ("parallel_config__pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config__prefill_context_parallel_size", 2, "prefill context"),
        ("parallel_config__decode_context_parallel_size", 2, "decode context"),
        ("parallel_config__enable_dbo", True, "dual batch overlap"),
        ("cache_config__kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("model_config__enable_prompt_embeds", True, "prompt embeddings"),
        ("model_config__use_mla", True, "latent attention"),
        ("model_config__is_encoder_decoder", True, "encoder-decoder"),
        ("model_config__runner_type", "pooling", "pooling"),
    ],
)
def test_engines_under_which_scales_could_be_wrong(change: str, value: Any, message: str) -> None:
    untested = scaling(settings={"allow_untested": True})
    with pytest.raises(ValueError, match=f"does not work with .*{message}"):
        check_engine(engine_config(**{change: value}), untested, is_cpu=True)


def test_groups_refuse_what_other_methods_leave_to_vllm() -> None:
    grouped = scaling("self_extend", neighbours=22, settings={"allow_untested": True})
    check_engine(engine_config(cache_config__cache_dtype="bfloat16"), grouped, is_cpu=True)
    for change, value, message in (
        ("cache_config__cache_dtype", "fp8", "kv_cache_dtype fp8"),
        ("attention_config__backend", "FLASH_ATTN", "attention backend FLASH_ATTN"),
    ):
        check_engine(engine_config(**{change: value}), scaling(), is_cpu=True)
        with pytest.raises(ValueError, match=rf"does not work with {message} \(method self_extend\): turn it off"):
            check_engine(engine_config(**{change: value}), grouped, is_cpu=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of .*'llama' are of the type 'sliding_att"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "of the type 'linear_attention'"),
        ({"sliding_window": 4096}, "sliding_window = 4096 of model type 'llama'"),
        ({"layer_types": ["full_attention"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ],
)
def test_models_whose_far_keys_cannot_be_grouped(config: dict, message: str) -> None:
    told = SimpleNamespace(model_type="llama", **config)
    check_groups(told, 0)
    with pytest.raises(ValueError, match=rf"method = 'self_extend'.*{message}.*`e2llm serve`.*recommended-yarn"):
        check_groups(told, 22)
    check_groups(SimpleNamespace(model_type="qwen3", layer_types=["full_attention"], sliding_window=512), 22)


@pytest.mark.parametrize(
    ("changes", "is_cpu", "message"),
    [
        ({"use_v2_model_runner": True}, True, "V2 model runner"),
        ({}, False, "CUDA graphs"),
        ({"model_config__enforce_eager": True}, False, "a GPU or other accelerator; start"),
    ],
)
def test_what_was_never_run_needs_the_flag_that_says_so(changes: dict, is_cpu: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"is untested with .*{message}.*allow_untested"):
        check_engine(engine_config(**changes), scaling(), is_cpu=is_cpu)
    check_engine(engine_config(**changes), scaling(settings={"allow_untested": True}), is_cpu=is_cpu)


def test_rotary_modules_of_others() -> None:
    check_rotaries([], 1, "llama", False)
    check_rotaries(["RotaryEmbedding"], 1, "olmo3", True)
    for names, ours, local in (
        ([], 0, False),
        (["RotaryEmbedding"], 0, True),
        (["RotaryEmbedding"], 1, False),
        (["YaRNScalingRotaryEmbedding"], 1, True),
    ):
        with pytest.raises(ValueError, match=r"owns|does not own"):
            check_rotaries(names, ours, "strange", local)
