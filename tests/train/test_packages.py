"""Packages that are missing are told, with the line to install, before weights are read."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_base, small
from transformers import AutoModelForCausalLM

import e2llm.hf.packages as packages
import e2llm.train.run as run
from e2llm.cli import main
from e2llm.config import to_toml
from e2llm.hf import load_model
from e2llm.hf.packages import check_attention
from e2llm.train import train
from e2llm.train.packages import check_packages

FLAT = ("attention.slope=0", "attention.training_slope=0")
SPLIT = ("model.dtype=bfloat16", "train.optimizer=adamw_split", "train.precision=bfloat16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with none of these packages; weights must not be read."""
    find, version = importlib.util.find_spec, importlib.metadata.version

    def lacking(name: str) -> str:
        if name.startswith("flash"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "triton" else find(name, *of))
    monkeypatch.setattr(importlib.metadata, "version", lacking)
    monkeypatch.setattr(packages, "is_kernels_available", lambda: False)
    monkeypatch.setattr(run, "load_model", lambda *args, **options: pytest.fail("weights were read"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("weights"))
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("flash_attention_2", "pip install flash-attn --no-build-isolation"),
        ("flash_attention_3", r"github.com/Dao-AILab/flash-attention/.*pip install 'transformers\[kernels\]'"),
        ("flash_attention_4", "pip install flash-attn-4"),
        ("kernels-community/flash-attn2", r"pip install 'transformers\[kernels\]'"),
    ],
)
@pytest.mark.usefixtures("bare")
def test_an_attention_without_its_package(base: Path, tmp_path: Path, name: str, line: str) -> None:
    with pytest.raises(ValueError, match=f"attn_implementation = '{name}': .* not installed.*{line}"):
        train(small(base, tmp_path / "run", f"model.attn_implementation={name}"), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=line):
        load_model(str(base / "model"), device="cpu", attn_implementation=name)


def test_what_is_installed_is_not_refused(bare: pytest.MonkeyPatch) -> None:
    for name in (None, "sdpa", "eager", "flex_attention", "a_registered_one"):
        check_attention(name)
    bare.setattr(importlib.metadata, "version", lambda name: {"flash-attn": "2.8.3"}[name])
    check_attention("flash_attention_2")
    bare.setattr(packages, "is_kernels_available", lambda: True)
    check_attention("kernels-community/flash-attn2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SPLIT, "train.optimizer = 'adamw_split': .* Triton, .*pip install triton, or use adamw"),
        (("method=self_extend", *FLAT), "method = 'self_extend': .* Triton, .*pip install triton, or use another"),
        (("train.compile=layers",), "train.compile = 'layers': .* Triton, .*pip install triton, or use .* = none"),
        (("model.attn_implementation=flex_attention",), "attn_implementation = 'flex_attention': .*pip install triton"),
    ],
)
def test_triton_is_asked_for_on_a_gpu(
    base: Path, tmp_path: Path, bare: pytest.MonkeyPatch, settings: tuple[str, ...], message: str
) -> None:
    recipe = small(base, tmp_path / "run", *settings)
    if "flex" not in message:
        check_packages(recipe)  # a CPU needs none
    bare.setattr(torch.cuda, "is_available", lambda: True)
    bare.setattr(run, "check_memory", lambda *given: None)
    with pytest.raises(ValueError, match=message):
        train(recipe, quiet=True)
    assert not (tmp_path / "run").exists()
    bare.setattr(importlib.util, "find_spec", lambda name: object())
    check_packages(recipe)


@pytest.mark.usefixtures("bare")
def test_a_compiler_is_asked_for_on_a_cpu(base: Path, tmp_path: Path) -> None:
    recipe = small(base, tmp_path / "run", "train.compile=layers")
    if not torch.cuda.is_available():
        # torch's own way: what pytest puts back would hide the setting from whoever compiles later
        missing = {"cpp.cxx": (None, "no-such-compiler")}
        refused = pytest.raises(ValueError, match=r"train.compile = 'layers': .* apt-get install g\+\+\), .* = none")
        with torch._inductor.config.patch(missing), refused:
            train(recipe, quiet=True)
        assert not (tmp_path / "run").exists()
        with torch._inductor.config.patch(missing):
            check_packages(small(base, tmp_path / "run"))
    with torch._inductor.config.patch({"cpp.cxx": "sh"}):  # any program
        assert packages.has_cpp_compiler()


@pytest.mark.usefixtures("bare")
def test_flex_attention_is_trained_on_a_gpu(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.attn_implementation = 'flex_attention': .* for GPUs alone; use sdpa"):
        train(small(base, tmp_path / "run", "model.attn_implementation=flex_attention"), quiet=True)


def test_what_transformers_misses_is_one_line_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code of a model, or a kernel that cannot be fetched: an ImportError from inside."""

    def failing(*args: Any, **options: Any) -> None:
        raise ImportError("This model needs einops: pip install einops")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", failing)
    (tmp_path / "recipe.toml").write_text(to_toml(small(base, tmp_path / "run")))
    assert main(["train", str(tmp_path / "recipe.toml")]) == 2
    told = capsys.readouterr().err
    assert "cannot be read (This model needs einops: pip install einops)" in told and "Traceback" not in told
