"""One thread for torch, as in the tests of models, and a folder to work in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: conversions are kept below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
