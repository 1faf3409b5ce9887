"""The command line: quick help, one-line errors, and that each command reaches its stage."""

from __future__ import annotations

import subprocess
import sys

import pytest

from e2llm.cli import build_parser, main


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from e2llm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    # The half second is watched by what is imported: a busy machine's clock must not gate a test.


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "report", "coverage", "recipes", "quickstart"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "papr"], "did you mean 'paper'"),
        (["train", "paper"], "model.name = ''"),
        (["train", "paper", "--model", "x/y"], "data.sources = []"),
        (["train", "paper", "--set", "train.stps=1"], "did you mean train.steps"),
        (["generate", "./nowhere", "--prompt", "a"], "model = './nowhere': no such file or folder"),
        (["generate", "m", "--prompt", "a", "--prompt-file", "b"], "give either --prompt"),
        (["evaluate", "m", "--suite", "ruler"], "corpora = {}: give at least one"),
        (["evaluate", "m", "--suite", "choice"], "corpora = {}: give at least one"),
        (["evaluate", "m", "--qa", "qa_3=x"], "qa = ['qa_3']: name qa_1 or qa_2"),
        (["evaluate", "m", "--method", "yarn", "--neighbours", "9"], "with method = 'self_extend' only"),
        (["generate", "m", "--prompt-file", "nowhere.txt"], "prompt-file = 'nowhere.txt': no such file"),
        (["report", "a.json"], "name a page with --out"),
        (["recipes", "--show", "nope"], "recipe = 'nope'"),
        (["coverage", "nope"], "recipe = 'nope'"),
    ],
)
def test_a_users_error_is_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_traceback_on_demand() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        main(["--traceback", "train", "papr"])


def test_recipes_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "recommended" in capsys.readouterr().out
    assert main(["recipes", "--show", "paper"]) == 0
    assert 'kind = "paper"' in capsys.readouterr().out


@pytest.mark.parametrize(("text", "tokens"), [("4096", 4096), ("4k", 4096), ("128K", 131072), ("1M", 1048576)])
def test_windows_are_tokens(text: str, tokens: int) -> None:
    arguments = build_parser().parse_args(["evaluate", "m", "--windows", text])
    assert arguments.windows == [tokens]
