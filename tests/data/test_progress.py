"""The bar is drawn on a terminal's stderr and nowhere else."""

import pytest

from e2llm.data.progress import progress_bar


@pytest.mark.parametrize(
    ("enabled", "environment", "drawn"),
    [
        (True, {"FORCE_COLOR": "1", "TERM": "xterm"}, True),
        (False, {"FORCE_COLOR": "1", "TERM": "xterm"}, False),
        (True, {}, False),
    ],
)
def test_bar(capsys, monkeypatch, enabled, environment, drawn):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with progress_bar("tokenizing x", 10, enabled=enabled) as advance:
        advance(10, 12345)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("12,345 tokens" in err) == drawn
    assert drawn or err == ""
