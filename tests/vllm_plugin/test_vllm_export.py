"""An exported folder read back by vLLM itself, and a difference that is noticed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm


def test_an_export_is_verified_in_vllm(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "e2llm", "export", str(checkpoint("yarn")), "--window", "4k", "--to", "vllm"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verified: perplexity in vLLM" in done.stderr
    assert "not verified" not in done.stderr


def test_another_perplexity_is_no_proof(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from e2llm.cli import main
    from e2llm.export import runtimes
    from e2llm.export.verify import Probe

    seen: list[tuple[object, ...]] = []
    original = runtimes.check_vllm

    def noted(*arguments: object) -> object:
        seen.append(arguments)
        return original(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "check_vllm", noted)
        arguments = ["export", str(checkpoint("linear")), "--window", "2k", "--to", "vllm", "--device", "cpu"]
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    _, plan, config, probe = seen[0]
    assert isinstance(probe, Probe)
    folder, apart = tmp_path / "out", dataclasses.replace(probe, nats=probe.nats + 0.05)
    assert original(folder, plan, config, apart).passed is False  # type: ignore[arg-type]
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_type"] == "linear"
