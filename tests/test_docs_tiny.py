"""scripts/docs_tiny.py: the page of the study on the embedded model says what its Records and its plan say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts_of import load_script

from e2llm.records import Record, make_row

SCRIPTS = Path(__file__).parents[1] / "scripts"
PLAN = """[study]
name = "tiny"
title = "T"
intro = "Why."
[[runs]]
name = "a"
recipe = "quickstart"
set = ["x=1"]
predicted = "less"
concluded = "so"
[[runs]]
name = "a-seed-1"
recipe = "quickstart"
predicted = "as a"
[[runs]]
name = "b"
method = "yarn"
predicted = "more"
[[runs]]
name = "c"
recipe = "quickstart"
planted = 0.0
predicted = "nothing"
"""


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    return load_script(SCRIPTS / "docs_tiny.py")


def record(name: str, predicted: str, short: float, long: dict[float, float], *, study: str = "tiny") -> Record:
    labels: dict[str, Any] = {"corpus": "python", "base_model": "t"}
    rows = [make_row("perplexity", short, "ratio", 1234, window=512, scale=1.0, **labels)]
    for scale, value in long.items():
        rows.append(make_row("perplexity", value, "ratio", 1234, window=8192, scale=scale, **labels))
    keys: dict[str, Any] = {"task": "pass_key", "window": 8192, "scale": 16.0, **labels}
    rows += [make_row("retrieval", 0.5, "share", 50, **keys), make_row("retrieval", 1.0, "share", 5, depth=0.5, **keys)]
    recipe = {"name": name, "method": "yarn"} | ({} if name == "b" else {"train": {}})
    config = {"study": study, "predicted": predicted, "recipe": recipe, "dtype": "bfloat16"}
    return Record("study", config, rows, environment={"cpu": "C", "torch": "2.13.0"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "tiny.toml").write_text(PLAN)
    return tmp_path


def test_seeds_are_one_row_and_the_best_scale_is_shown(tiny: ModuleType, root: Path) -> None:
    records = [record("a", "less", 10, {16.0: 12, 20.0: 11}), record("a-seed-1", "as a", 12, {16.0: 12.0})]
    page = tiny.tiny_page(root, [*records, record("b", "more", 10, {16.0: 25})])
    assert page.startswith("# T\n") and "Why." in page
    assert "| recipe | seeds | 512 | 8k | 8k / 512 | keys 8k |" in page
    # 10 and 12; 11 (the better of two scales) and 12; 1.1 and 1.0; standard deviations by hand.
    assert "| `a` | 2 | 11.0 ± 1.41 | 11.5 ± 0.71 | 1.05 ± 0.07 | 0.50 ± 0.00 |" in page
    assert "| `b` | 1 | 10.0 | 25.0 | 2.50 | 0.50 |" in page
    assert "1,234 target tokens" in page and "50 prompts" in page and "C (torch 2.13.0, bfloat16)" in page
    assert "Nothing was trained for `b`." in page
    assert "Recipe: `quickstart`. Set: `x=1`." in page and "The base untrained, read with `yarn`." in page
    assert "Recipe: `quickstart`. Set: `planted=0.0`." in page and "Concluded: so." in page
    assert page.count("Not run yet.") == 1 and page.count("No conclusion yet.") == 2


def test_corpora_have_tables_of_their_own(tiny: ModuleType) -> None:
    found = record("a", "less", 10.0, {16.0: 9.0, 12.0: 8.0})
    perplexities = [row for row in found.rows if row["metric"] == "perplexity"]
    other = [{**row, "corpus": "novels", "value": 4 * row["value"]} for row in perplexities]
    both = Record("study", found.config, [*found.rows, *other], environment=found.environment)
    tables = tiny.summary({"a": both})
    assert tables[::2] == ["On novels:", "On python:"]
    assert "| `a` | 1 | 40.0 | 32.0 | 0.80 |" in tables[1] and "keys" not in tables[1]
    assert "| `a` | 1 | 10.0 | 8.00 | 0.80 | 0.50 |" in tables[3]
    assert tiny.summary({"a": found}) == [tables[3]]


def test_a_page_without_records_and_records_without_a_run(tiny: ModuleType, root: Path) -> None:
    assert tiny.tiny_page(root, []).count("Not run yet.") == 4
    with pytest.raises(ValueError, match=r"no run named \['z'\]"):
        tiny.tiny_page(root, [record("z", "", 10, {16.0: 12})])
    with pytest.raises(ValueError, match="'a' was changed after it was measured"):
        tiny.tiny_page(root, [record("a", "more", 10, {16.0: 12})])


def test_the_two_studies_do_not_mix(tiny: ModuleType, root: Path) -> None:
    """Runs of the same name: each page holds its own, and the goals are those of the other model."""
    ours, other = record("a", "less", 10, {16.0: 12}), record("a", "less", 3, {16.0: 4}, study="")
    page = tiny.tiny_page(root, [ours, other])
    assert "| `a` | 1 | 10.0 | 12.0 |" in page
    study, goals = load_script(SCRIPTS / "docs_study.py"), load_script(SCRIPTS / "docs_goals.py")
    (root / "benchmarks" / "study.toml").write_text('[[runs]]\nname="a"\npredicted="less"\n')
    assert "| 3.00 | 4.00 |" in study.study_page(root, [other, ours])
    assert goals._subjects([other, ours])[1]["a"].records == (other,)
