"""The plugin in axolotl itself: the scales arrive in its batches, packed or not, with adapters, and after a resume."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import e2llm
from e2llm.hf import CheckpointInfo, load_model
from e2llm.positions.frequencies import frequencies
from e2llm.positions.placement import PlacementConfig, PositionSampler
from e2llm.positions.scales import ScalesConfig

HERE = Path(__file__).parent
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"
WINDOW = 64
STEP = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def axolotl() -> None:
    pytest.importorskip("axolotl")


def run(folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Axolotl on the example's configuration, made small."""
    folder.mkdir(exist_ok=True)
    lines = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = yaml.safe_load((HERE.parent / "examples" / "axolotl.yaml").read_text())
    config["datasets"][0]["path"] = str(folder / "text.jsonl")
    config |= {
        "base_model": str(TINY),
        "sequence_len": WINDOW,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "warmup_steps": 1,
        "bf16": False,
        "dataset_num_proc": 1,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {
        "AXOLOTL_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(e2llm.__file__).parent.parent),
    }
    command = [sys.executable, str(HERE / "axolotl_run.py"), str(folder / "config.yaml"), str(folder / "seen.pt")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def seen_by(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    done = run(folder, **changes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seen: list[dict[str, Any]] = torch.load(folder / "seen.pt")
    return seen


def documents(row: dict[str, Any]) -> list[list[int]]:
    """Lengths, row by row, where the ids that axolotl passed start again at 0."""
    batch, window = row["cos"].shape[:2]
    if row["position_ids"] is None:
        return [[window]] * batch
    found = []
    for ids in row["position_ids"].tolist():
        starts = [place for place, position in enumerate(ids) if position == 0]
        found.append([end - start for start, end in zip(starts, [*starts[1:], window], strict=True)])
    return found


def check(seen: list[dict[str, Any]], seed: int = 0) -> tuple[set[float], int]:
    """Every document stands where the sampler puts the sample of its number: (scales met, documents)."""
    extension = e2llm.extend(AutoModelForCausalLM.from_pretrained(TINY))  # reads the base's frequencies
    sampler = PositionSampler(
        native_window=512,
        training_window=WINDOW,
        scales=ScalesConfig(max_scale=16),
        placement=PlacementConfig(kind="jumps"),
        seed=seed,
    )
    scales, total = set(), 0
    for row in seen:
        number = row["step"] * STEP
        for cos, lengths in zip(row["cos"], documents(row), strict=True):
            start = 0
            for length in lengths:
                draw = sampler.draw_document(number, length)
                table = frequencies(extension.rope, "yarn", draw.scale, extension.attention.training_slope)
                angles = torch.from_numpy(draw.positions)[:, None].float() * table.inv_freq
                expected = angles.cos() * table.attention_scale
                found = cos[start : start + length, : expected.shape[1]]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
                scales.add(draw.scale)
                start, number, total = start + length, number + 1, total + 1
    return scales, total


@pytest.mark.parametrize("changes", [{"sample_packing": False}, {"multipack_real_batches": True}, {}], ids=str)
def test_scales_arrive(tmp_path: Path, changes: dict[str, Any]) -> None:
    seen = seen_by(tmp_path, **changes)
    assert [row["step"] for row in seen] == [0, 1, 2]
    scales, total = check(seen)
    assert len(scales) > 2
    if changes.get("sample_packing") is False:
        assert total == 6
    else:
        assert total > 9, "several documents a row"
    info = CheckpointInfo.load(tmp_path / "out")
    assert info is not None
    assert (info.native_window, info.training_window, info.max_scale, info.steps) == (512, WINDOW, 16, 3)
    assert (info.base_model, info.checkpoint, info.method) == ("tiny-512", "axolotl", "yarn")
    trained, before = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "out", TINY))
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_adapters_and_options(tmp_path: Path) -> None:
    section = {"placement": {"kind": "jumps"}, "scales": {"max_scale": 16}, "seed": 5}
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "learning_rate": 0.1}
    lora |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}  # they are for GPUs
    seen = seen_by(tmp_path, e2llm=section, **lora)
    check(seen, seed=5)
    with pytest.raises(AssertionError):
        check(seen, seed=4)
    model, _, info = load_model(str(tmp_path / "out"), device="cpu")
    assert info is not None and info.seed == 5
    before = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], before[name]), "the adapter was merged in"


def test_a_resumed_run_draws_by_the_number_of_its_steps(tmp_path: Path) -> None:
    seen_by(tmp_path, max_steps=4, save_steps=2)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = seen_by(tmp_path, max_steps=4, save_steps=2, resume_from_checkpoint=str(checkpoint))
    assert [row["step"] for row in resumed] == [2, 3]
    check(resumed)
    info = CheckpointInfo.load(checkpoint)
    assert info is not None and info.steps == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methd": "yarn"}, "methd"),
        ({"max_scale": 0.5}, "greater than or equal to 1"),
        ({"placement": {"kindd": "jumps"}}, "unknown key placement.kindd; did you mean placement.kind"),
        ({"scales": {"max_scale": 8}, "max_scale": 16}, "say it in e2llm.scales"),
        ({"max_scale": 2.5}, "uniform_integers needs an integer"),
    ],
)
def test_sections_that_are_refused(section: dict[str, Any], message: str) -> None:
    from pydantic import ValidationError

    args = importlib.import_module("e2llm.axolotl_plugin").Args
    with pytest.raises(ValidationError, match=message):
        args(e2llm=section)


@pytest.mark.parametrize("given", [{"rl": "dpo"}, {"context_parallel_size": 2}])
def test_settings_that_cannot_go_with_it(given: dict[str, Any]) -> None:
    args = importlib.import_module("e2llm.axolotl_plugin").Args
    with pytest.raises(ValueError, match="leave it out with e2llm's plugin"):
        args(**given)
    assert args(context_parallel_size=1).e2llm.method == "yarn"


def test_axolotl_itself_refuses_a_wrong_section(tmp_path: Path) -> None:
    done = run(tmp_path, e2llm={"methd": "yarn"})
    assert done.returncode != 0 and "methd" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists(), "before a model is loaded"
