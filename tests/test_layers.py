"""Who may import whom, for every module: dependencies run one way, and what needs no torch does not load it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import e2llm

PACKAGE = Path(e2llm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# part -> the parts (or single modules) of e2llm that it may import; itself and `version` always.
ALLOWED = {
    "version": set(),
    "positions": set(),
    "config_sections": set(),
    "config_distributed": set(),
    "config": {
        *("config_distributed", "config_sections"),
        *("positions.scales", "positions.placement", "positions.attention"),
    },
    "records": set(),
    "intervals": set(),
    "hf": {"positions"},
    "data": {"config_sections"},
    "train": {"config", "config_distributed", "config_sections", "records", "positions", "hf", "data", "plan"},
    "infer": {"config", "positions", "hf"},
    "evaluate": {"config", "records", "intervals", "positions", "hf", "infer", "engine"},
    "report": {"records", "intervals"},
    "api": {"config", "positions", "hf", "infer"},
    "engine": {"positions", "hf", "infer"},
    "generate": {"engine", "infer", "hf"},
    "interpolate": {"hf", "train"},
    "chat": {"engine", "infer", "hf", "llamacpp"},
    "server": {"engine", "infer", "hf", "positions", "llamacpp", "vllm_plugin"},
    "vllm_plugin": {"engine", "positions", "hf", "infer"},
    "export": {"positions", "hf", "infer", "records"},
    "llamacpp": {"engine", "export", "hf", "infer", "positions"},
    "axolotl_plugin": {"api", "config", "hf", "positions"},
    "plan": {"config", "positions", "hf", "infer", "export", "vllm_plugin"},
    "benchmark": {
        *("config", "config_sections", "data", "engine", "evaluate", "hf", "infer", "intervals", "llamacpp"),
        *("records", "train"),
    },
    "quickstart": {"config", "records", "positions", "hf", "data", "train", "infer", "evaluate", "report", "smollm2"},
    "smollm2": set(),
}
ANYTHING_INSIDE_FUNCTIONS = {"cli", "__init__", "__main__"}
PUBLIC_SUBMODULES = {("train", "trainer_utils")}
TORCH_FREE = [
    *("e2llm", "e2llm.cli", "e2llm.config", "e2llm.intervals", "e2llm.records", "e2llm.report", "e2llm.version"),
    *("e2llm.positions.scales", "e2llm.positions.placement", "e2llm.positions.choose", "e2llm.positions.coverage"),
    *("e2llm.positions.rope", "e2llm.positions.oracle", "e2llm.positions.attention"),
    *("e2llm.server", "e2llm.server.command", "e2llm.chat.command", "e2llm.generate", "e2llm.interpolate"),
    *("e2llm.vllm_plugin.scaling",),
    *("e2llm.benchmark.train", "e2llm.benchmark.train_command"),
]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, whether it runs at import) of every import in a file, names from packages included."""
    tree = ast.parse(path.read_text(), str(path))
    later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    later += [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    inside = {id(n) for block in later for n in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write e2llm.… in full"
            # `from e2llm.positions import scales` imports a module as well as a name
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [(str(name), id(node) not in inside) for name in names]
    return found


def inner(name: str) -> str | None:
    """The module's name below e2llm, "" for e2llm itself, None for others."""
    if name == "e2llm":
        return ""
    return name.removeprefix("e2llm.") if name.startswith("e2llm.") else None


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED.keys() | ANYTHING_INSIDE_FUNCTIONS, f"{part} is new: say in ALLOWED what it may import"
    for name, at_top in imports_of(path):
        target = inner(name)
        if target is None or not is_module(target):
            continue
        assert target or part == "__init__", f"{path}: import the module that is meant, not e2llm itself"
        if target.split(".")[0] in {part, "version"}:
            continue
        if part in ANYTHING_INSIDE_FUNCTIONS:  # a command, or the public names: a stage is imported when it is used
            assert not at_top, f"{path}: import {name} inside the function that needs it"
            continue
        allowed = any(target == a or target.startswith(f"{a}.") or a.startswith(f"{target}.") for a in ALLOWED[part])
        assert allowed, f"{path}: {part} may not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_transformers_internals_stay_in_hf(path: Path) -> None:
    """Elsewhere only `from transformers import …`, the public names; in `positions`, config and records none at all."""
    part = part_of(path)
    for name, _ in imports_of(path):
        top, _, below = name.partition(".")
        if top != "transformers" or part == "hf" or (part, below.split(".")[0]) in PUBLIC_SUBMODULES:
            continue
        assert part not in {"positions", "config", "records", "report", "version"}, f"{path}: knows no {name}"
        assert below == "" or below[0].isupper(), f"{path}: {name} is transformers' own affair; put it in e2llm.hf"


def test_the_rule_can_fail(tmp_path: Path) -> None:
    code = "from e2llm.positions import scales\ndef f():\n    import transformers.masking_utils\n"
    (tmp_path / "bad.py").write_text(code)
    assert imports_of(tmp_path / "bad.py") == [
        ("e2llm.positions", True),
        ("e2llm.positions.scales", True),
        ("transformers.masking_utils", False),
    ]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_no_torch_where_none_is_needed(name: str) -> None:
    if not is_module(inner(name) or "."):
        pytest.skip(f"{name} is not written yet")
    heavy = ["torch", "transformers", "datasets", "peft"]
    code = f"import sys, {name}; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.strip() == "", found.stderr
