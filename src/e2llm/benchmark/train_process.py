"""Start a contestant's process, wait no longer than it may take, and end what it leaves behind.

Flows in: a `Contestant`, folders, a time limit. Flows out: the result as a dictionary with a `status`. Nothing here
loads torch: a context on the GPU would take memory from those that are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from e2llm.benchmark.train_contestants import Contestant, require_package

MEASURED, OUT_OF_MEMORY, FAILED, TOO_LONG = "measured", "out of memory", "failed", "too long"
"""What a result's `status` is."""
SOURCES = Path(__file__).resolve().parents[2]
"""Where this very e2llm is imported from; the process must not find another."""


def run_in_process(one: Contestant, *, work: Path, time_limit: float) -> dict[str, Any]:
    """The contestant's result; `failed` where it died, `too long` where it was ended after `time_limit` seconds."""
    try:
        require_package(one)  # before a process starts for it
    except ModuleNotFoundError as error:
        return {"status": FAILED, "why": str(error)}
    work.mkdir(parents=True, exist_ok=True)
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    spec, answer, log = work / "spec.json", work / "result.json", work / "log.txt"
    answer.unlink(missing_ok=True)
    given = {"contestant": dataclasses.asdict(one), "work": str(work)}
    spec.write_text(json.dumps(given), encoding="utf-8")
    command = [sys.executable, "-m", *_launcher(one), "e2llm.benchmark.train_worker", str(spec), str(answer)]
    environment = _environment(work, one.gpus)
    with log.open("w") as said:
        # A session of its own, so that its loaders and compilers can be ended with it.
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
        try:
            process.wait(timeout=time_limit)
        except subprocess.TimeoutExpired:
            why = f"took longer than {time_limit:.0f} s; it said last: {_last_words(log)}"
            return {"status": TOO_LONG, "why": why}
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            shutil.rmtree(run, ignore_errors=True)
    if not answer.is_file():
        return {"status": FAILED, "why": f"exit code {process.returncode}: {_last_words(log)}"}
    found = json.loads(answer.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _last_words(log: Path) -> str:
    """The end of what a process printed, in one line."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return " ".join(" ".join(lines[-3:]).split())[-400:] or "no word"


def _launcher(one: Contestant) -> list[str]:
    """torchrun where several processes train together."""
    if one.gpus == 1:
        return []
    return ["torch.distributed.run", "--standalone", f"--nproc-per-node={one.gpus}", "-m"]


def _environment(work: Path, gpus: int) -> dict[str, str]:
    """Sources first, as many GPUs as are asked for, no hub; compiled kernels are shared by contestants."""
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH", "")])),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    found["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:gpus])
    return found
