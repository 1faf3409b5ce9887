"""A broken export is caught by its verification, whatever broke it, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import checkpoint_info, save_checkpoint

from e2llm.export import export, folder, gguf_file

THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}


def break_config(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    original = folder.scaled_config

    def broken(*arguments: Any) -> dict[str, Any]:
        result = original(*arguments)
        change(result)
        return result

    monkeypatch.setattr(folder, "scaled_config", broken)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config["rope_parameters"].update(factor=2.0), r"inv_freq differ by at most [1-9]"),
        (lambda config: config["rope_parameters"].update(factor=16.0), r"inv_freq differ by at most [0-9.]+e-01"),
        (lambda config: config["rope_parameters"].pop("rope_theta"), r"inv_freq differ by at most [0-9.]+e"),
        (
            lambda config: config["rope_parameters"].pop("attention_factor"),
            r"attention scale 1\.1386.*expected 1\.2218",
        ),
        (lambda config: config["rope_parameters"].update(original_max_position_embeddings=256), "inv_freq differ"),
        (lambda config: config.update(rms_norm_eps=0.5), r"logits of 32 and 128 tokens differ .*perplexity"),
    ],
)
def test_broken_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    info = checkpoint_info(attention={"training_slope": 0.1, "slope": 0.16})
    name, _ = save_checkpoint(tmp_path / "model", info=info, **THETA)
    export(name, tmp_path / "whole", scale=4)
    break_config(monkeypatch, change)
    with pytest.raises(ValueError, match=r"export is wrong: .*" + message):
        export(name, tmp_path / "out", window=128, scale=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole"]
    result = export(name, tmp_path / "out", window=128, scale=4, verify=False)
    assert [check.passed for check in result.checks] == [None]


def test_a_replaced_export_survives_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    export(name, tmp_path / "out", scale=4)
    before = (tmp_path / "out/config.json").read_bytes()
    break_config(monkeypatch, lambda config: config["rope_parameters"].update(factor=3.0))
    with pytest.raises(ValueError, match="export is wrong"):
        export(name, tmp_path / "out", scale=2)
    assert (tmp_path / "out/config.json").read_bytes() == before


def test_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = save_checkpoint(tmp_path / "model")
    other, _ = save_checkpoint(tmp_path / "other", seed=1)
    link = folder._link
    monkeypatch.setattr(folder, "_link", lambda source, target, patterns: link(Path(other), target, patterns))
    with pytest.raises(ValueError, match=r"logits and perplexity in transformers.*differ"):
        export(name, tmp_path / "out", scale=4)


def gguf_export(tmp_path: Path, **options: Any) -> Any:
    name, _ = save_checkpoint(tmp_path / "model", bpe=True, **THETA)
    return export(name, tmp_path / "out", **({"to": "gguf", "scale": 4, "gguf_type": "f16"} | options))


def test_rows_in_the_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "permute", lambda weight, heads: weight)
    with pytest.raises(ValueError, match=r"tensors of the GGUF: blk\.0\.attn_[qk]\.weight differs by"):
        gguf_export(tmp_path)
    assert not (tmp_path / "out").exists()


def test_wrong_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    permute = gguf_file.permute
    monkeypatch.setattr(gguf_file, "permute", lambda weight, heads: permute(weight, 4))
    with pytest.raises(ValueError, match=r"tensors of the GGUF: blk\.0\.attn_k\.weight differs by"):
        gguf_export(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scaling.factor": 2.0}, "inv_freq differ by at most"),
        ({"freq_base": 10000.0}, "inv_freq differ by at most"),
        ({"scaling.attn_factor": 1.1386}, r"attention scale 1\.2964.*expected 1\.1386"),
        ({"scaling.type": "linear"}, "inv_freq differ"),
        ({"scaling.factor": None}, r"llama\.rope\.scaling\.factor missing"),
    ],
)
def test_wrong_rope_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    original = gguf_file.rope_keys

    def broken(*arguments: Any) -> Any:
        keys, divisors = original(*arguments)
        changed = keys | {key: value for key, value in change.items() if value is not None}
        return {k: v for k, v in changed.items() if k not in change or change[k] is not None}, divisors

    monkeypatch.setattr(gguf_file, "rope_keys", broken)
    with pytest.raises(ValueError, match=r"export is wrong: frequencies in the GGUF.*" + message):
        gguf_export(tmp_path)


def test_a_cell_that_flips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gguf_file._prepared

    def broken(name: str, *arguments: Any) -> Any:
        values = original(name, *arguments)
        if name == "blk.1.ffn_up.weight":
            values = values.copy()
            values[3, 5] += 0.5 * np.abs(values).max()
        return values

    monkeypatch.setattr(gguf_file, "_prepared", broken)
    for kind in ("q8_0", "bf16"):
        with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight differs by .* times its rounding"):
            gguf_export(tmp_path, gguf_type=kind)


def test_wrong_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gguf_file._add_vocabulary
    import dataclasses

    monkeypatch.setattr(
        gguf_file,
        "_add_vocabulary",
        lambda writer, found: original(writer, dataclasses.replace(found, merges=found.merges[:-1])),
    )
    with pytest.raises(ValueError, match=r"metadata of the GGUF: tokenizer\.ggml\.merges"):
        gguf_export(tmp_path)
