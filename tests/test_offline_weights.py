"""benchmarks/offline_weights.py: trained weights come back bit for bit, from a fraction of their size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "offline_weights.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


def folder(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(f'{{"of": "{path.name}"}}')
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(400, 300, generator=draw) * 0.02 for name in ("model.b", "model.a")}
    return folder(tmp_path / "base", {name: value.bfloat16() for name, value in weights.items()})


def trained(base: Path, path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    first = load_file(base / "model.safetensors")
    moved = {
        name: (value + 2e-5 * torch.randn(value.shape, generator=draw)).bfloat16() for name, value in first.items()
    }
    # Every kind of value there is: other signs, zeros of both signs, the ends of the range, no numbers.
    odd = torch.tensor([-0.0, 0.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan"), 1e-40]).bfloat16()
    moved["model.a"][0, :8] = odd
    moved["model.b"][1] = -moved["model.b"][1]
    return folder(path, moved)


def bits(path: Path) -> dict[str, torch.Tensor]:
    return {name: value.view(torch.int16) for name, value in load_file(path / "model.safetensors").items()}


def test_weights_come_back_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "trained")
    packed = run("pack", "--model", model, "--base", base, "--out", tmp_path / "pieces", "--sizes", "30k", "20k")
    assert packed.returncode == 0, packed.stderr
    pieces = sorted((tmp_path / "pieces").iterdir())
    total = sum(piece.stat().st_size for piece in pieces)
    assert len(pieces) > 2 and total < (model / "model.safetensors").stat().st_size / 3
    found = run("unpack", "--pieces", tmp_path / "pieces", "--base", base, "--out", tmp_path / "found")
    assert found.returncode == 0, found.stderr
    expected, got = bits(model), bits(tmp_path / "found")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert (tmp_path / "found" / "config.json").read_text() == '{"of": "trained"}'


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    model, other = trained(base, tmp_path / "trained"), trained(base, tmp_path / "other")
    assert run("pack", "--model", model, "--base", base, "--out", tmp_path / "pieces").returncode == 0
    found = run("unpack", "--pieces", tmp_path / "pieces", "--base", other, "--out", tmp_path / "found")
    assert found.returncode == 1 and "made of other weights" in found.stderr
    assert not (tmp_path / "found").exists()


def test_float32_weights_are_rounded_where_asked(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "trained")
    exact = {name: value.float() for name, value in load_file(model / "model.safetensors").items()}
    save_file({name: value * (1 + 2**-10) for name, value in exact.items()}, model / "model.safetensors")
    found = run("pack", "--model", model, "--base", base, "--out", tmp_path / "p", "--round")
    assert found.returncode == 0, found.stderr
    assert run("unpack", "--pieces", tmp_path / "p", "--base", base, "--out", tmp_path / "found").returncode == 0
    for name, value in load_file(tmp_path / "found" / "model.safetensors").items():
        expected = (exact[name] * (1 + 2**-10)).bfloat16()
        assert torch.equal(value.view(torch.int16), expected.view(torch.int16)), name


@pytest.mark.parametrize("kind", ["missing piece", "float32", "other tensors", "no file"])
def test_what_cannot_be_packed_or_unpacked_is_named(base: Path, tmp_path: Path, kind: str) -> None:
    model = trained(base, tmp_path / "trained")
    weights = load_file(model / "model.safetensors")
    if kind == "missing piece":
        assert run("pack", "--model", model, "--base", base, "--out", tmp_path / "p", "--sizes", "30k").returncode == 0
        (tmp_path / "p" / "part1").unlink()
        found = run("unpack", "--pieces", tmp_path / "p", "--base", base, "--out", tmp_path / "found")
        assert found.returncode == 1 and "all from part0 on are needed" in found.stderr
        return
    if kind == "float32":
        save_file({name: value.float() for name, value in weights.items()}, model / "model.safetensors")
    elif kind == "other tensors":
        save_file({"model.a": weights["model.a"]}, model / "model.safetensors")
    else:
        (model / "model.safetensors").unlink()
    found = run("pack", "--model", model, "--base", base, "--out", tmp_path / "p")
    told = {
        "float32": "weights must be bfloat16",
        "other tensors": "not those of base",
        "no file": "no model.safetensors",
    }
    assert found.returncode == 1 and told[kind] in found.stderr
