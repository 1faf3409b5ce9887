"""Generated pages say what code and Records say now, and no page names a file that is not there."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from test_layers import ALLOWED

import e2llm
from e2llm.cli import build_parser
from e2llm.config import Recipe, load_recipe, shipped_recipes, to_plain
from e2llm.positions.placement import PositionSampler
from e2llm.positions.scales import ScalesConfig
from e2llm.records import Record, make_row

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_command", ROOT / "scripts" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(docs: ModuleType) -> None:
    assert docs.outdated() == [], "run python scripts/docs.py"


def test_a_changed_figure_a_changed_record_and_a_lost_picture_are_noticed(docs: ModuleType, tmp_path: Path) -> None:
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    assert docs.outdated(tmp_path) == []
    cli = tmp_path / "docs" / "cli.md"
    cli.write_text(cli.read_text(encoding="utf-8").replace("--resume", "--restart"), encoding="utf-8")
    next((tmp_path / "docs" / "images").glob("*.svg")).unlink()
    for name in ("smollm2_paper", "study_final_paper_0"):
        record = tmp_path / "benchmarks" / "results" / f"{name}.json"
        document = json.loads(record.read_text(encoding="utf-8"))
        for row in document["rows"]:
            row["value"] *= 0.9
        record.write_text(json.dumps(document), encoding="utf-8")
    found = docs.outdated(tmp_path)
    assert {"README.md", "docs/results.md", "docs/cli.md"} < set(found)
    assert len([name for name in found if name.startswith("docs/images/")]) == 1


def test_fill_puts_text_between_markers_and_wants_them_once(docs: ModuleType) -> None:
    text = "a\n<!-- generated: x -->\nold\n<!-- end: x -->\nb\n"
    filled = docs.fill(text, "x", "| 1 |")
    assert filled == "a\n<!-- generated: x -->\n\n| 1 |\n\n<!-- end: x -->\nb\n"
    assert docs.fill(filled, "x", "| 1 |") == filled
    assert docs.fill(filled, "x", "") == "a\n<!-- generated: x -->\n<!-- end: x -->\nb\n"
    for wrong in ("nothing", text + text):
        with pytest.raises(ValueError, match="once"):
            docs.fill(wrong, "x", "")


def test_claims_follow_the_figures(docs: ModuleType) -> None:
    def record(ours: dict[int, float]) -> Record:
        labels: dict = {"base_model": "m", "corpus": "c", "protocol": "whole", "native_window": 8192}
        labels |= {"method": "yarn"}
        rows = [
            make_row("perplexity", value, "ratio", 10, checkpoint=name, window=w, scale=w / 8192, **labels)
            for name, values in (("recommended", ours), ("paper", {8192: 6.0, 131_072: 7.0}))
            for w, value in values.items()
        ]
        return Record(kind="evaluate", config={}, rows=rows, environment={})

    good = docs.docs_results.claims([record({8192: 5.0, 131_072: 4.0})])
    bad = docs.docs_results.claims([record({8192: 6.5, 131_072: 6.9})])
    assert good.count("| yes |") == 3 and "**no**" not in good
    assert "at 8k | 6.50 against 6.00 | **no** |" in bad
    assert "at 128k | 6.90 against 7.00 | yes |" in bad
    assert "below its own 8k | 6.90 against 6.50 | **no** |" in bad

    checkpoints, windows = record({8192: 5.0, 131_072: 4.0}), record({8192: 5.0, 131_072: 4.0})
    for row in checkpoints.rows:
        row["documents"] = 2 if row["checkpoint"] == "paper" else 3
    for row in windows.rows:
        row["n"] += row["window"] == 8192
    for other, count in ((checkpoints, 2), (windows, 1)):
        found = docs.docs_results.claims([other])
        assert found.count("| not measured on the same text |") == count and found.count("| yes |") == 3 - count


def test_evaluations_of_all_suites_have_a_page_of_their_own(docs: ModuleType, tmp_path: Path) -> None:
    labels: dict = {"base_model": "m", "corpus": "c", "protocol": "whole", "native_window": 64, "method": "yarn"}
    records = []
    for name, value in (("evaluate_base_grid", 6.0), ("smollm2_base", 7.0)):
        rows = [
            make_row("perplexity", value, "ratio", 10, checkpoint="base", window=w, scale=w / 64, **labels)
            for w in (64, 128)
        ]
        Record(kind="evaluate", config={}, rows=rows, environment={}).save(tmp_path / f"{name}.json")
        records.append(Record.load(tmp_path / f"{name}.json"))
    page = docs.docs_evaluation.evaluation_page(records)
    assert "| base · yarn | 6.00 | 6.00 |" in page and "7.00" not in page
    assert list(docs.docs_evaluation.image_drawings(records)) == ["evaluation-perplexity-c-whole.svg"]
    assert "evaluation-perplexity-c-whole.svg" in page
    assert docs.docs_results.measured(records) == records[1:]
    assert docs.docs_evaluation.evaluation_page(records[1:]).endswith("\nNo Record yet.\n")


def test_the_first_runs_are_told_from_the_final_comparison(docs: ModuleType, tmp_path: Path) -> None:
    labels: dict = {"base_model": "m", "corpus": "c", "protocol": "whole", "native_window": 64, "method": "yarn"}
    row = make_row("perplexity", 5.0, "ratio", 10, checkpoint="paper", window=64, scale=1.0, **labels)
    first = Record(kind="evaluate", config={}, rows=[row], environment={})
    paths = [first.save(tmp_path / name) for name in ("smollm2_paper.json", "quickstart.json")]
    found, other = ([Record.load(path)] for path in paths)
    final = Record(kind="study_final", config={}, rows=[{**row, "seed": 0}], environment={})
    assert "first, short runs" not in docs.docs_results.results_page(found)
    assert docs.docs_results.results_page([*found, final]).count("first, short runs (`smollm2_…`)") == 1
    assert "first, short runs" not in docs.docs_results.results_page([*other, final])


def test_tables_of_the_docs_are_of_the_documents_that_all_read(docs: ModuleType) -> None:
    records = [Record.load(path) for path in sorted((ROOT / "tests" / "report" / "records").glob("*.json"))]
    page = docs.docs_results.results_page(records)
    assert "\n\nOn the 8 documents that all checkpoints were measured on. Left out: napkin\\_part5.txt," in page
    assert "| target tokens | 1,048,320 | 1,048,320 | 1,048,320 |" in page


def test_keys_asked_with_an_earlier_wording_are_named(docs: ModuleType, tmp_path: Path) -> None:
    row = make_row("retrieval", 0.5, "share", 10, task="pass_key", window=8192)
    old = Record("evaluate", {}, [row], environment={}, path=tmp_path / "old.json")
    new = Record("evaluate", {"prompt": "…"}, [row], environment={}, path=tmp_path / "new.json")
    assert docs.docs_results.wording_note([new]) == []
    assert "`old.json`" in docs.docs_results.wording_note([old, new])[0]


def test_the_study_page_holds_to_its_plan(docs: ModuleType, tmp_path: Path) -> None:
    labels = {"corpus": "c", "window": 8192, "scale": 1.0}
    rows = [make_row("perplexity", 5.0, "ratio", 10, slope=0.04, **labels)]
    rows.append(make_row("retrieval", 0.5, "share", 10, task="pass_key", **labels))
    record = Record("study", {"predicted": "less", "recipe": {"name": "a"}}, rows, environment={})
    (tmp_path / "benchmarks").mkdir()
    plan = tmp_path / "benchmarks" / "study.toml"
    plan.write_text('[[runs]]\nname="a"\nset=["x=1"]\npredicted="less"\n[[runs]]\nname="b"\npredicted="more"\n')
    page = docs.docs_study.study_page(tmp_path, [record])
    assert "Set: `x=1`." in page and "| c, perplexity, slope 0.04 | 5.00 |" in page and "| c, pass key | 0.50 |" in page
    assert page.count("No conclusion yet.") == 1 and page.count("Not run yet.") == 1
    plan.write_text('[[runs]]\nname="a"\npredicted="5.0"\n')
    with pytest.raises(ValueError, match="'a' was changed after it was measured"):
        docs.docs_study.study_page(tmp_path, [record])
    plan.write_text('[[runs]]\nname="b"\npredicted="less"\n')
    baselines = tmp_path / "benchmarks" / "baselines.toml"
    baselines.write_text('[[runs]]\nname="a"\npredicted="less"\n[[runs]]\nname="d"\npredicted="more"\n')
    page = docs.docs_study.study_page(tmp_path, [record])
    assert "| `a` | 1 | 5.00 | 1.00 | 0.50 |" in page.split("## Baselines")[1].split("### a")[0]
    assert "Predicted: less." in page and "| c, pass key | 0.50 |" in page.split("### a")[1].split("### d")[0]
    assert page.split("### d")[1].strip().endswith("Not run yet.")
    (tmp_path / "benchmarks" / "tiny.toml").write_text('[[runs]]\nname="t.1"\npredicted="less"\n')
    asked = '[[runs]]\nname="b"\npredicted="less"\n[[questions]]\nasked="Why?"\nruns=["a", "b"]\ntiny=["t.1"]\n'
    plan.write_text(f'{asked}answer="So"\n')
    page = docs.docs_study.study_page(tmp_path, [record])
    assert "| Why? | [a](#a), *[b](#b)* | *[t.1](study-tiny.md#t1)* | So |" in page
    plan.write_text(f'{asked.replace("t.1", "u")}answer="So"\n')
    with pytest.raises(ValueError, match=r"'Why\?' names \['u'\]"):
        docs.docs_study.study_page(tmp_path, [record])
    plan.write_text('[[runs]]\nname="b"\npredicted="less"\n')
    baselines.unlink()
    with pytest.raises(ValueError, match=r"no run named \['a'\]"):
        docs.docs_study.study_page(tmp_path, [record])


def test_distances_of_a_table_are_those_of_the_placements(docs: ModuleType) -> None:
    """Counted over all pairs of a few draws; random positions are as a whole window is, in closed form."""
    distances = docs.docs_study.docs_distances
    sampler = PositionSampler(
        native_window=8192,
        training_window=4096,
        scales=ScalesConfig(distribution="fixed", max_scale=16),
        placement=load_recipe("recommended").placement,
    )
    counted = np.zeros(8)
    for index in range(60):
        where = sampler.draw(5000 + index).positions[4::8]
        apart = np.abs(where[:, None] - where[None, :])
        counted += np.histogram(apart[apart > 0], np.linspace(0, 16 * 8192, 9))[0]
    assert distances.shares("recommended") == pytest.approx(counted / counted.sum(), abs=0.03)
    served = [(15 - 2 * i) / 64 for i in range(8)]
    assert distances.shares("randpos") == pytest.approx(served, abs=0.003)
    assert distances.shares("paper")[0] == 1.0
    page = distances.distances_block()
    assert "| served | 23.4 % | 20.3 % |" in page and "| `paper` | 100.0 % | 0 |" in page


def test_serving_tables_hold_what_records_say(docs: ModuleType, tmp_path: Path) -> None:
    labels: dict = {"base_model": "m", "engine": "e2llm", "mix": "mixed", "window": 2048, "requests": 8}
    rows = [
        make_row("output_tokens_per_second", 1234.5, "tokens/s", 3, **labels),
        make_row("ratio_to_single", 0.987, "ratio", 3, **labels),
    ]
    serve = Record("serve", {"dtype": "bfloat16"}, rows, environment={"gpu": "G"}, path=tmp_path / "serve_x.json")
    pair: dict = {"base_model": "m", "window": 1024, "from_scale": 1.0, "to_scale": 2.0}
    units = {"nats_per_token": "nats", "kl_nats": "nats", "seconds": "s"}
    found = {"read_again": (3.0, 0.0, 10.0), "turned": (3.1, 0.02, 0.5), "left": (4.0, 0.9, 1.0)}
    rows = [
        make_row(metric, value, unit, 2, keys=way, **pair)
        for way, values in found.items()
        for (metric, unit), value in zip(units.items(), values, strict=True)
    ]
    turned = Record("rerotate", {"dtype": "float32"}, rows, environment={"cpu": "C"}, path=tmp_path / "r.json")
    text = "\n".join(docs.docs_results.serving_blocks([serve, turned]))
    assert "| e2llm | mixed | 8 × 2k | 1,234/s | 0.987 |" in text and "m, bfloat16, G (`serve_x`)" in text
    assert "| 1k | 1 → 2 | 3.000 | 3.100 | 4.000 | 0.0200 | 0.9000 | 95.0% |" in text
    assert docs.docs_results.serving_blocks([]) == []


def test_reading_against_the_peak(docs: ModuleType, tmp_path: Path) -> None:
    reading = docs.docs_results.reading_blocks
    assert reading([]) == []
    common = {"base_model": "smollm2-135m", "window": 32768, "protocol": "sliding", "stride": 256}
    rows = [
        make_row(metric, value * factor, unit, 3, **common, compile=how)
        for how, factor in (("none", 1.0), ("layers", 2.0))
        for metric, value, unit in (
            ("tokens_per_second", 1234.0, "tokens/s"),
            ("model_flops_utilization", 0.21, "share"),
            ("ratio_to_floor", 0.4, "ratio"),
        )
    ]
    config = {"stride": 256, "dtype": "bfloat16", "peak_flops": 989e12}
    found = "\n".join(reading([Record("evaluate_speed", config, rows, environment={"gpu": "G"})]))
    assert "| smollm2-135m | 32k | as they are | 1,234 | – | 21.0% | 0.40 | – |" in found
    assert "40% of the peak for smollm2-135m at 32k is reached: 42.0%." in found
    found = "\n".join(reading([Record("evaluate_speed", config, rows[:3], environment={"gpu": "G"})]))
    assert "is not reached: 21.0%." in found


def test_answers_by_the_tokens_of_a_step(docs: ModuleType) -> None:
    answers = docs.docs_results.answer_blocks
    assert answers([]) == []
    rows = []
    for chunk, speed in ((32768, 900.0), (131072, 1234.0)):
        labels = {"base_model": "m", "protocol": "answers", "window": 65536, "batch_size": 8, "chunk_tokens": chunk}
        rows.append(make_row("tokens_per_second", speed, "tokens/s", 1, **labels))
        rows.append(make_row("ratio_to_reading", 0.5, "ratio", 1, **labels))
    config = {"new_tokens": 40, "prompts": 8, "dtype": "bfloat16", "rounds": 1}
    record = Record("answer_speed", config, rows, environment={"gpu": "G"})
    found = "\n".join(answers([record]))
    assert "| m | 64k | 8 | 32k | 900 | – | 0.50 |" in found and "| m | 64k | 8 | 128k | 1,234 | – | 0.50 |" in found
    assert "on G, bfloat16, one round" in found
    assert docs.docs_results.measured([record]) == [], "no table of another page holds it"


def test_every_public_name_command_option_recipe_and_key_is_on_its_page() -> None:
    names = ("api", "cli", "recipes")
    api, cli, recipes = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in names)
    for name in set(e2llm.__all__) - {"__version__"}:
        assert f"### e2llm.{name}\n" in api
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    parsers = dict(commands)
    for name, parser in commands.items():
        inner = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parsers |= {f"{name} {word}": one for choices in inner for word, one in choices.items()}
    assert "benchmark train" in parsers
    for name, parser in parsers.items():
        section = re.split(r"\n##+ ", cli.split(f"# e2llm {name}\n")[1])[0]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            words = action.option_strings or [action.dest]
            both = isinstance(action, argparse.BooleanOptionalAction)  # said and denied in one row
            assert action.dest == "help" or f"| `{'/'.join(words) if both else words[-1]}" in section
    for name in shipped_recipes():
        assert f"| `{name}` |" in recipes
    for section, keys in to_plain(Recipe()).items():
        for key in keys if isinstance(keys, dict) else {section: keys}:
            assert f"| `{key}` |" in recipes or key == "sources", f"{section}.{key} has no docstring"


def test_the_design_names_the_imports_that_are_enforced() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.split("## Who may import whom")[1].split("\n## ")[0]
    named: dict[str, set[str]] = {}
    for parts, allowed in re.findall(r"^\| (`.+?) \| (.+) \|$", table, re.MULTILINE):
        named |= {part: set(re.findall(r"`([\w.]+)`", allowed)) for part in re.findall(r"`([\w.]+)`", parts)}
    for part, allowed in ALLOWED.items():
        assert {name for name in named[part] if name.split(".")[0] in ALLOWED} == allowed, part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"
