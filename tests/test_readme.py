"""What the README (and the guide) tell people to type works: the Python block runs, the commands parse."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import e2llm
from e2llm.cli import build_parser
from e2llm.config import load_recipe
from e2llm.hf import get_extension

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
TINY = Path(e2llm.__file__).parent / "assets" / "tiny-512"

SUBSTITUTIONS = {
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(TINY)),
    "max_steps=1200": "max_steps=2, use_cpu=True, disable_tqdm=True",
    "65536": "4096",
}
"""The README's model, budget and window -> the embedded model, two steps, the same eight times its native window."""


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(text: str) -> list[str]:
    """Lines of shell blocks that call e2llm, joined where a line goes on."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" > ")[0] for line in lines if line.startswith("e2llm ")]


def test_the_python_block_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(README, "python")
    for written, small in SUBSTITUTIONS.items():
        assert block.count(written) == 1, f"the README no longer says {written}"
        block = block.replace(written, small)
    monkeypatch.chdir(tmp_path)
    row = [index % 1000 + 2 for index in range(64)]
    names: dict = {"windows": [{"input_ids": row, "labels": row} for _ in range(16)]}
    exec(compile(block, "README.md", "exec"), names)
    assert "Once upon a time" in capsys.readouterr().out
    info = json.loads((tmp_path / "runs" / "mine" / "model" / "e2llm.json").read_text(encoding="utf-8"))
    assert (info["method"], info["native_window"], info["training_window"]) == ("self_extend", 512, 4096)
    assert "scale=8.0" in repr(get_extension(names["model"]))
    e2llm.serve_window(names["model"], "auto")
    ids = names["tokenizer"]("x = 1\n" * 200, return_tensors="pt")
    names["model"].generate(**ids, max_new_tokens=2)
    e2llm.restore(names["model"])


@pytest.mark.parametrize("line", [*commands(README), *commands(GUIDE)])
def test_a_command_parses_and_its_settings_are_known(line: str) -> None:
    arguments = build_parser().parse_args(shlex.split(line, comments=True)[1:])
    if arguments.command in ("train", "coverage") and not arguments.recipe.endswith(".toml"):
        load_recipe(arguments.recipe, arguments.set)


def test_there_are_commands_and_a_wrong_one_would_fail() -> None:
    assert {line.split()[1] for line in commands(README)} >= {"train", "evaluate", "generate", "report", "coverage"}
    assert commands("```sh\ne2llm train \\\n  x\n```\n") == ["e2llm train    x"]
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "recommended", "--stepz", "1"])


def test_python_in_the_guide_is_python_and_its_names_exist() -> None:
    found = blocks(GUIDE, "python")
    assert found
    for block in found:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "e2llm":
                assert node.attr in e2llm.__all__, f"e2llm.{node.attr} is not public"


def test_make_targets_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    texts = README + GUIDE + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", texts, re.MULTILINE))
    assert {"quickstart", "test", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is not in the Makefile"


def test_the_tree_is_there() -> None:
    (tree,) = (block for block in blocks(README, "") if block.startswith("src/e2llm/"))
    for line in tree.splitlines():
        name = line.split()[0]
        folder = ROOT / "src" / "e2llm" if line.startswith(" ") else ROOT
        assert list(folder.glob(name)), f"the README's tree names {name}"
