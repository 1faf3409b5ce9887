"""Tests of Triton kernels on a machine without a GPU: in a process of their own, where Triton interprets them.

Triton decides when it is imported whether it compiles. A test file marks its kernel tests with `needs_interpreter` and
has one test that calls `run_interpreted(__file__)`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")
starts_interpreter = pytest.mark.skipif(INTERPRETED, reason="this is that process")


def run_interpreted(file: str) -> None:
    """Run the tests in `file` with interpreted kernels; some must run and all that run must pass."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
