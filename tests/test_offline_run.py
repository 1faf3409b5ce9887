"""benchmarks/offline_run.sh and the files of benchmarks/jobs: jobs that outlast the command that starts them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from scripts_of import load_script

from e2llm.cli import build_parser

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
JOBS = sorted((BENCHMARKS / "jobs").glob("*.txt"))


def run(work: Path, *words: str, code: int = 0, **more: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "WORK": str(work), "PATH": path, **more}
    done = subprocess.run(
        [str(BENCHMARKS / "offline_run.sh"), *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_jobs_go_on_after_the_command_that_started_them(tmp_path: Path) -> None:
    work, out, jobs = tmp_path / "work", tmp_path / "out", tmp_path / "jobs.txt"
    (work / "site").mkdir(parents=True)  # packages are here already
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"part{number}").write_bytes(b"ab"[number : number + 1])
        run(work, "receive", str(folder))
    jobs.write_text(
        'first: cat "$WORK"/received/pieces/part* > "$RECORDS/all.json"; sleep 5\n'
        "second after first: test -d src/e2llm && test -n {left}\n"
        "third: exit 3\n"
    )
    again = tmp_path / "again.txt"
    again.write_text(jobs.read_text().splitlines()[0] + "\n# a remark\n")
    run(work, "start", "60", str(jobs), str(again))
    assert "jobs are running" in run(work, "start", "60", str(jobs), code=1)
    said = run(work, "wait", "0", str(out))  # at once: what there is
    assert "not finished" not in said
    said = run(work, "wait", "60", str(out))
    assert "not finished: third (3)" in said
    with tarfile.open(out / "records.tgz") as tar:
        file = tar.extractfile("records/all.json")
        assert file is not None and file.read() == b"ab"
        assert {"logs/second.log", "lanes.log"} <= set(tar.getnames())


@pytest.mark.parametrize(("share", "said"), [("1", "<>"), ("2", "<--shared-gpu>")])
def test_what_trains_on_a_shared_gpu_is_told(tmp_path: Path, share: str, said: str) -> None:
    jobs = tmp_path / "jobs.txt"
    (tmp_path / "work" / "site").mkdir(parents=True)
    rounds = 20 if share == "2" else 0  # only the other job, at the same time, lets it end before that
    wait = f"for i in $(seq {rounds}); do sleep 0.2; test -e there && exit 0; done; exit {share != '1':d}"
    jobs.write_text(f'train: echo "<$SHARED>" > "$RECORDS/shared.json"; {wait}\nother: touch there\n')
    run(tmp_path / "work", "start", "60", str(jobs), SHARE=share, LANES="1")
    assert "not finished: nothing" in run(tmp_path / "work", "wait", "30", str(tmp_path / "out"))
    assert (tmp_path / "work" / "records" / "shared.json").read_text().strip() == said


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_files_of_jobs(file: Path) -> None:
    """Every script, option, plan and run that they name is there."""
    lanes: Any = load_script(BENCHMARKS / "lanes.py")
    for job in lanes.read_jobs(file.read_text(encoding="utf-8")):
        scripts = re.findall(r"benchmarks/(\w+\.py)([^&]*)", job.command)
        ours = re.findall(r"-m e2llm ([^&]*)", job.command)
        assert scripts or ours or "-m pytest" in job.command, job
        for tested in re.findall(r"tests/[\w/]+\.py", job.command):
            assert (BENCHMARKS.parent / tested).is_file(), (job.name, tested)
        for words in ours:
            build_parser().parse_args(shlex.split(words.replace("{left}", "60")))
        for script, options in scripts:
            source = (BENCHMARKS / script).read_text(encoding="utf-8")
            for option in re.findall(r"(?<= )--[\w-]+", options):
                assert f'"{option}"' in source, (job.name, option)
        for plan, names in re.findall(r"--plan benchmarks/(\w+\.toml)(?: --only ([\w. -]+?)(?= --|$))?", job.command):
            text = (BENCHMARKS / plan).read_text(encoding="utf-8")
            assert [name for name in names.split() if f'name = "{name}"' not in text] == [], job
    assert JOBS
