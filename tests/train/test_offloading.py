"""Runs whose frozen base waits elsewhere end as runs whose base does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_base, small, weights

from e2llm.hf import load_model
from e2llm.train import run, train, train_loaded

LORA = ("lora.rank=4", "train.gradient_checkpointing=true", "train.save_every=3", "train.evaluate_every=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(small(base, tmp_path_factory.mktemp("runs") / "plain", *LORA), quiet=True)


def losses(result: Any) -> list[float]:
    return [row["value"] for row in result.record.rows if row["metric"] == "loss"]


def same_run(a: Any, b: Any) -> None:
    assert losses(a) == losses(b) and len(losses(a)) > 6
    for part, file in (("adapter", "adapter_model.safetensors"), ("model", "model.safetensors")):
        first, second = (load_file(result.folder / part / file) for result in (a, b))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_the_run_is_the_same_to_the_last_bit(
    base: Path, plain: Any, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(small(base, tmp_path / "run", *LORA, f"model.offload={place}"))
    same_run(plain, result)
    assert weights(result.model_folder).keys() == weights(plain.model_folder).keys()
    assert not (result.folder / "offload").exists()
    told = " ".join(capsys.readouterr().err.split())
    assert "GB of frozen weights wait in" in told and "every batch reads them twice" in told


def test_it_resumes(base: Path, plain: Any, tmp_path: Path) -> None:
    recipe = small(base, tmp_path / "run", *LORA, "model.offload=disk")
    train(recipe, quiet=True)
    for left in ("checkpoint-6",):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / left)
    (tmp_path / "run" / "offload").mkdir()
    (tmp_path / "run" / "offload" / "0.left-by-a-crash.dat").write_text("")
    same_run(plain, train(recipe, resume=True, quiet=True))
    assert not (tmp_path / "run" / "offload").exists()


def test_files_go_when_training_fails(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend((tmp_path / "run" / "offload").glob("*.dat"))
        raise RuntimeError("stop")

    monkeypatch.setattr("e2llm.train.trainer.PlacingTrainer.compute_loss", fail)
    with pytest.raises(RuntimeError, match="stop"):
        train(small(base, tmp_path / "run", *LORA, "model.offload=disk"), quiet=True)
    assert len(seen) == 14 and not (tmp_path / "run" / "offload").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lora.rank=0",), "only a frozen base .* set lora.rank.* for all weights use .* distributed.cpu_offload"),
        (("train.gradient_checkpointing=false",), "gradient_checkpointing = true"),
        (("model.quantization=nf4", "model.dtype=bfloat16"), "4-bit weights"),
        (("train.compile=layers",), "train.compile = none"),
        (("train.distill=0.5",), "second base in memory"),
        (("distributed.strategy=ddp",), "one process"),
    ],
)
def test_what_cannot_be_offloaded(base: Path, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"model.offload = 'cpu': .*{message}"):
        small(base, tmp_path, *LORA, "model.offload=cpu", *overrides)


def test_a_full_disk_is_told_before_weights_are_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(run, "load_model", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"model\.offload = 'disk': the base has .* GB of room"):
        train(small(base, tmp_path / "run", *LORA, "model.offload=disk"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_loaded_model_is_not_offloaded(base: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(str(base / "model"), device="cpu", method="yarn")
    recipe = small(base, tmp_path / "run", *LORA, "model.offload=cpu", "method=yarn", "attention={}")
    with pytest.raises(ValueError, match=r"model.offload = 'cpu': the model is loaded already; use train\(\)"):
        train_loaded(recipe, model, tokenizer, None)  # type: ignore[arg-type]
