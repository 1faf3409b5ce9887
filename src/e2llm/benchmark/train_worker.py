"""One contestant in a process of its own: `python -m e2llm.benchmark.train_worker SPEC.json RESULT.json`. Or one of
several, started by torchrun: the first writes the result, and one that fails says why and takes the others with it.

Flows in: a contestant and folders, as JSON. Flows out: a result, as JSON, written whole: what was measured, or that
memory ran out, or why it failed. Nothing is printed but what libraries say, and where it failed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2llm.benchmark.train_contestants import UNSLOTH_OPTIONS, Contestant
from e2llm.benchmark.train_process import FAILED, MEASURED, OUT_OF_MEMORY
from e2llm.benchmark.unsloth_model import import_unsloth
from e2llm.records import environment_snapshot, write_atomic

if TYPE_CHECKING:
    from e2llm.benchmark.trainers import Run

LONGEST_GAPS = 12
"""Of the profiled steps, kept."""


def main(arguments: list[str]) -> None:
    """Run the contestant that the first file describes; write the second."""
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    one = Contestant(**{**spec["contestant"], "settings": tuple(spec["contestant"]["settings"])})
    work = Path(spec["work"])
    try:
        result = _result(one, _run(one, work))
    except Exception as error:
        traceback.print_exc()  # the log of its parent keeps it; the result has one line
        status = OUT_OF_MEMORY if _is_out_of_memory(error) else FAILED
        result = {"status": status, "why": _said(error), "environment": environment_snapshot()}
    failed = result["status"] != MEASURED
    if failed or int(os.environ.get("RANK", 0)) == 0:
        write_atomic(Path(arguments[1]), json.dumps(result))
    sys.stderr.flush()
    # torchrun ends the others where one ends by an error.
    code = 1 if failed and one.gpus > 1 else 0
    os._exit(code)  # loader processes and compilers' pools may take seconds to end, or not end: the parent ends them


def _run(one: Contestant, work: Path) -> Run:
    """The contestant's run; what must come before transformers comes first."""
    if one.trainer in UNSLOTH_OPTIONS:
        import_unsloth(work)
    from e2llm.benchmark.trainers import run_contestant, write_text

    return run_contestant(one, write_text(work / "text"), work)


def _result(one: Contestant, run: Run) -> dict[str, Any]:
    import torch

    from e2llm.benchmark.kernels import gaps, kernel_times

    seconds = run.clock.seconds()
    if len(seconds) < one.steps:
        raise RuntimeError(f"{len(seconds)} steps of {one.steps} were measured: training ended early")
    on_gpu = torch.cuda.is_available()
    # ru_maxrss counts KiB on Linux. The allocator's peak is of the whole run, compiling included.
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = _largest(peak)
    return {
        "status": MEASURED,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "warm_after_seconds": run.clock.warm_after,
        "trained": run.trained,
        "frozen": run.frozen,
        "device": "cuda" if on_gpu else "cpu",
        "settings": run.settings,
        "environment": environment_snapshot(),
        "kernels": [dataclasses.asdict(k) for k in kernel_times(run.profiler, one.profile)] if run.profiler else [],
        "gaps": [dataclasses.asdict(gap) for gap in gaps(run.profiler)[:LONGEST_GAPS]] if run.profiler else [],
    }


def _largest(value: int) -> int:
    """Over all processes of the contestant, which meet here: none has left before the slowest is done."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    import torch

    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where compiled code or cuBLAS says it in words of its own."""
    while error is not None:
        if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
            return True
        error = error.__cause__
    return False


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


if __name__ == "__main__":
    main(sys.argv[1:])
