"""benchmarks/lanes.py: one command a GPU at a time, after those it waits for, stopped when the time is up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from scripts_of import load_script

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lanes.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


def test_jobs_share_the_gpus_in_order(script: Any, tmp_path: Path) -> None:
    mark = 'echo "$CUDA_VISIBLE_DEVICES start {n}" >> {file}; sleep 0.4; echo "$CUDA_VISIBLE_DEVICES end {n}" >> {file}'
    file = tmp_path / "marks"
    text = "\n".join(f"job{n}: " + mark.format(n=n, file=file) for n in range(4)) + "\n# a remark\n"
    found = script.run(script.read_jobs(text), [0, 1], 60.0, tmp_path / "logs")
    assert found == {f"job{n}": 0 for n in range(4)}
    by_gpu: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        gpu, what = line.split(" ", 1)
        by_gpu.setdefault(gpu, []).append(what)
    assert sorted(by_gpu) == ["0", "1"]
    for marks in by_gpu.values():  # never two at once on one
        assert len(marks) == 4
        assert all(a.replace("start", "end") == b for a, b in zip(marks[::2], marks[1::2], strict=True))


def test_a_gpu_that_is_shared_takes_two_and_one_that_is_alone_waits_for_it(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "marks"
    mark = f"echo start {{n}} >> {file}; sleep {{t}}; echo end {{n}} >> {file}"
    lines = [("a", 0.8), ("b", 0.3), ("c alone", 0.3), ("d", 0.1), ("e", 0.1)]
    text = "\n".join(f"{name}: " + mark.format(n=name[0], t=t) for name, t in lines)
    found = script.run(script.read_jobs(text), [0], 60.0, tmp_path / "logs", share=2)
    assert found == dict.fromkeys("abcde", 0)
    marks = file.read_text().splitlines()
    assert sorted(marks[:2]) == ["start a", "start b"]  # both at once
    assert marks[2:6] == ["end b", "end a", "start c", "end c"]  # none beside it, none before it
    assert sorted(marks[6:8]) == ["start d", "start e"]


def test_a_job_waits_for_others_and_is_not_run_after_a_failure(script: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = f"make: sleep 0.3; touch {made}\nuse after make: test -e {made}\nbad: exit 3\nnever after bad make: true"
    found = script.run(script.read_jobs(text), [0, 1, 2], 60.0, tmp_path / "logs")
    assert found == {"make": 0, "use": 0, "bad": 3, "never": None}


def test_what_ended_well_is_not_run_again(script: Any, tmp_path: Path) -> None:
    file, ready = tmp_path / "marks", tmp_path / "ready"
    text = f"first: echo first >> {file}\nsecond after first: test -e {ready} && echo second >> {file}"
    jobs = script.read_jobs(text)
    assert script.run(jobs, [0], 60.0, tmp_path / "logs", tmp_path / "done") == {"first": 0, "second": 1}
    ready.touch()
    assert script.run(jobs, [0], 60.0, tmp_path / "logs", tmp_path / "done") == {"first": 0, "second": 0}
    assert file.read_text().split() == ["first", "second"]


def test_at_the_end_of_the_time_a_job_is_interrupted_and_saves(script: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    text = f"long: echo {{left}}; trap 'touch {saved}; exit 130' INT; sleep 30 & wait\nlater: true"
    begin = time.monotonic()
    found = script.run(script.read_jobs(text), [0], 1.0, tmp_path / "logs")
    assert time.monotonic() - begin < 10
    assert found == {"long": 130, "later": None} and saved.exists()
    assert (tmp_path / "logs" / "long.log").read_text().strip() in ("0", "1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just a command", "line 1 = 'just a command': write NAME: COMMAND"),
        ("a: true\n\na: false", "line 3, job 'a': its name is taken"),
        ("a after b: true\nb: true", r"line 1, job 'a': \['b'\] stand below it or nowhere"),
    ],
)
def test_lines_that_say_nothing_are_refused(script: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.read_jobs(text)
