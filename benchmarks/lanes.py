"""Commands of a file, one on each GPU at a time, until all are done or the time is up.

    python benchmarks/lanes.py jobs.txt --gpus 4 [--share 2] --until 540 --logs logs [--done DIR]

A line of the file is `NAME [alone] [after NAME …]: COMMAND`; it begins when a GPU is free and those that it comes after
are done, in the file's order. With --share a GPU takes several jobs at once, whose gaps the others fill (loading,
compiling, prompts being written); a job that is `alone` has its GPU to itself, so that its speed says something.
{left} in a command is the time it has, in seconds. Each runs in a shell with CUDA_VISIBLE_DEVICES set and writes
NAME.log. At the end of the time what still runs is interrupted, and killed some seconds later. What comes after a
command that failed is not run. --done remembers those that ended well in a folder, so that the same call goes on with
the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 20.0
"""Seconds between the interrupt and the kill."""
_LINE = re.compile(r"(?P<name>[\w.-]+)(?P<alone> alone)?(?: after (?P<after>[\w. -]+))?: (?P<command>.+)")


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    after: tuple[str, ...]
    command: str
    alone: bool = False


def read_jobs(text: str) -> list[Job]:
    """Jobs in their order; blank lines and lines that begin with # are skipped. Raises ValueError, naming the line."""
    found: dict[str, Job] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"line {number} = {line!r}: write NAME: COMMAND, or NAME [alone] after NAME: COMMAND")
        after = tuple((match["after"] or "").split())
        unknown = [name for name in after if name not in found]
        if unknown or match["name"] in found:
            what = f"{unknown} stand below it or nowhere" if unknown else "its name is taken"
            raise ValueError(f"line {number}, job {match['name']!r}: {what}")
        found[match["name"]] = Job(match["name"], after, match["command"], bool(match["alone"]))
    return list(found.values())


def run(
    jobs: Sequence[Job], gpus: Sequence[int], until: float, logs: Path, done: Path | None = None, share: int = 1
) -> dict[str, int | None]:
    """Name -> exit status; None for what was not begun. At most `share` jobs are on a GPU at once."""
    end = time.monotonic() + until
    for folder in filter(None, (logs, done)):
        folder.mkdir(parents=True, exist_ok=True)
    before = {job.name for job in jobs if done is not None and (done / job.name).exists()}
    found: dict[str, int | None] = {job.name: 0 if job.name in before else None for job in jobs}
    waiting = [job for job in jobs if job.name not in before]
    alone = {job.name: job.alone for job in jobs}
    running = dict[str, tuple[subprocess.Popen[bytes], int, float]]()
    free = dict.fromkeys(gpus, share)
    try:
        while (waiting or running) and time.monotonic() < end:
            ready = [job for job in waiting if all(found[name] == 0 for name in job.after)]
            # whoever comes first in the file waits for its place: jobs that need less would keep it from one alone
            gpu = _place(ready[0], free, share) if ready else None
            if gpu is not None:
                job = ready[0]
                waiting.remove(job)
                free[gpu] -= share if job.alone else 1
                running[job.name] = (_started(job, gpu, end - time.monotonic(), logs), gpu, time.monotonic())
                continue
            if not running:
                break  # what is left comes after something that failed
            time.sleep(0.1)
            for name, (process, at, begin) in list(running.items()):
                if process.poll() is not None:
                    found[name] = process.returncode
                    if done is not None and process.returncode == 0:
                        (done / name).touch()
                    print(f"[{time.monotonic() - begin:.0f} s] {name}: {process.returncode}", flush=True)
                    del running[name]
                    free[at] += share if alone[name] else 1
    finally:
        found |= _stopped({name: process for name, (process, _, _) in running.items()})
    return found


def _place(job: Job, free: dict[int, int], share: int) -> int | None:
    """The GPU with most room, the first of equals; None where the job has to wait."""
    gpu = max(free, key=lambda number: free[number])
    return gpu if free[gpu] >= (share if job.alone else 1) else None


def _heed_interrupts() -> None:
    """Whoever was started in the background, as by nohup, passes on that interrupts are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _started(job: Job, gpu: int, left: float, logs: Path) -> subprocess.Popen[bytes]:
    command = job.command.replace("{left}", str(int(left)))
    with (logs / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen(
            ["bash", "-c", command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)},
            start_new_session=True,  # so that a signal reaches what the shell has started
            preexec_fn=_heed_interrupts,
        )


def _stopped(running: dict[str, subprocess.Popen[bytes]]) -> dict[str, int]:
    for process in running.values():
        os.killpg(process.pid, signal.SIGINT)
    end = time.monotonic() + GRACE
    for name, process in running.items():
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print(f"stopped {name}: {process.returncode}", flush=True)
    return {name: process.returncode or 1 for name, process in running.items()}


def main() -> int:
    """1 where something failed, was stopped or did not begin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--gpus", type=int, default=1, help="GPUs 0, 1, … (1)")
    parser.add_argument("--share", type=int, default=1, metavar="N", help="jobs at once on a GPU (1)")
    parser.add_argument("--until", type=float, default=float("inf"), metavar="SECONDS", help="all ends then")
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--done", type=Path, metavar="DIR", help="what ended well is noted there and not run again")
    args = parser.parse_args()
    try:
        jobs = read_jobs(args.jobs.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"lanes.py: {args.jobs}: {error}") from error
    if args.share < 1:
        raise SystemExit(f"lanes.py: --share = {args.share}: a GPU takes at least 1 job")
    found = run(jobs, range(args.gpus), args.until, args.logs, args.done, args.share)
    unfinished = {name: code for name, code in found.items() if code != 0}
    print(
        "not finished:",
        ", ".join(f"{n} ({'not begun' if c is None else c})" for n, c in unfinished.items()) or "nothing",
    )
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
