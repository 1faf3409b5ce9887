"""`e2llm evaluate` on every GPU of this machine: the command starts itself once for each, through torch's launcher.

Flows in: how many GPUs are asked for, the command line. Flows out: the exit status of the processes, or the word that
this process measures alone. What the processes share is `ranks`' affair.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def num_processes(gpus: int | None, device: str | None, environment: Mapping[str, str], visible: int) -> int:
    """Processes to start; 1: this one measures. `gpus` None means all of the `visible` ones; on a CPU one process
    unless more are asked for.

    Raises ValueError for a number that cannot be had: not positive, more than there are, with a device by number, or
    another one than a launcher has started.
    """
    if gpus is not None and gpus < 1:
        raise ValueError(f"gpus = {gpus}: use at least 1")
    if "WORLD_SIZE" in environment:
        started = int(environment["WORLD_SIZE"])
        if gpus not in (None, started):
            raise ValueError(f"gpus = {gpus}: a launcher has started {started} processes; leave --gpus out")
        return 1
    if device == "cpu":
        return gpus or 1
    if device not in (None, "cuda"):
        if gpus not in (None, 1):
            raise ValueError(f"gpus = {gpus}: device = {device!r} names one; leave --device out")
        return 1
    if gpus is not None and gpus > max(1, visible):
        raise ValueError(
            f"gpus = {gpus}: {visible} are visible; use fewer (processes on the CPU: --device cpu), or look at "
            "CUDA_VISIBLE_DEVICES"
        )
    return gpus or max(1, visible)


def visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def launch(processes: int, argv: Sequence[str]) -> int:
    """Run `e2llm` with `argv` in so many processes; the first one's output is shown, another's errors where it alone
    failed. Returns the exit status of the first one that failed, 0 when none did; raises KeyboardInterrupt when
    Ctrl-C has ended them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As torchrun does where nothing is said, but with all cores: processes else take all of them each.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.disable(logging.ERROR)  # the launcher's own account of a failure; the process has said what was wrong
    with tempfile.TemporaryDirectory(prefix="e2llm-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="e2llm",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, processes), Std.ALL)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "e2llm", *argv)
        except ChildFailedError as error:
            first = error.get_first_failure()[0]
            failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
            if failed.get(0) != failed[first] or not failed[first]:
                print(_errors(Path(folder), first), end="", file=sys.stderr)
            status = failed[first]
            return 128 - status if status < 0 else status
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            return 128 + int(error.sigval)
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _errors(folder: Path, rank: int) -> str:
    """What a process wrote to standard error."""
    return "".join(file.read_text(errors="replace") for file in folder.glob(f"**/{rank}/stderr.log"))
