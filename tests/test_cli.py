"""The command line: quick help, one-line errors, and that each command reaches its stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from e2llm.cli import build_parser, main
from e2llm.records import Record, make_row


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
        (["evaluate", "m", "--depths", "0.5", "0.2"], "depths = [0.5, 0.2]: use two shares of the text"),
        (["evaluate", "m", "--qa", "qa_3=x"], "qa = ['qa_3']: name qa_1 or qa_2"),
        (["evaluate", "m", "--method", "yarn", "--neighbours", "9"], "with method = 'self_extend' only"),
        (["generate", "m", "--prompt-file", "nowhere.txt"], "prompt-file = 'nowhere.txt': no such file"),
        (["report", "a.json"], "name a page with --out"),
        (["report", "a.json", "--out", "a.html", "--dark"], "dark: it is for --figures"),
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


def test_report_writes_all_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        make_row("perplexity", value, "ratio", 9, checkpoint="a_b", method="yarn", corpus="x", window=window, scale=1.0)
        for window, value in ((512, 9.0), (1024, 8.0))
    ]
    record = str(Record("evaluate", {}, rows, [], {}).save(tmp_path / "a.json"))
    out = {name: str(tmp_path / "new" / name) for name in ("page.html", "t.md", "t.tex", "figures")}
    argv = ["report", record, "--out", out["page.html"], "--markdown", out["t.md"], "--latex", out["t.tex"]]
    assert main([*argv, "--figures", out["figures"], "--dark"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [out["page.html"], out["t.md"], out["t.tex"]] and len(printed) == 5
    assert all(Path(path).stat().st_size > 100 for path in printed) and Path(printed[4]).suffix == ".png"
    assert r"a\_b · yarn & 9.00 & 8.00 \\" in Path(out["t.tex"]).read_text()


@pytest.mark.parametrize(
    ("option", "name"), [("--out", "out"), ("--markdown", "markdown"), ("--latex", "latex"), ("--figures", "figures")]
)
def test_a_report_that_cannot_be_written_is_a_users_error(
    option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record("evaluate", {}, [make_row("loss", 1.0, "nats", 1)]).save(tmp_path / "a.json")
    place = tmp_path if name != "figures" else record  # a folder for a file, a file for a folder
    assert main(["report", str(record), option, str(place)]) == 2
    assert f"e2llm report: {name} = " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [record]
