"""The page: what it says, that it stands alone, that nothing from a Record becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import sample_records

from e2llm.records import Record, make_row
from e2llm.report import render_page, save_figures, write_report
from e2llm.report.headline import headline
from e2llm.report.series import all_rows

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Outline(HTMLParser):
    """Open tags in order, ids, links and text; fails on a tag closed out of turn."""

    def __init__(self, page: str):
        super().__init__()
        self.stack, self.ids, self.tags, self.attributes, self.text = [], [], [], [], []
        self.feed(page)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return render_page([sample_records.study(), sample_records.training()])


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


def test_stands_alone(page, outline):
    assert not {"script", "img", "iframe", "object", "embed"} & set(outline.tags)
    loads = [
        value
        for _, attrs in outline.attributes
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith("#") or value == "data:," for value in loads)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_structure(outline):
    for tag in ("header", "nav", "main", "footer", "h1"):
        assert outline.tags.count(tag) == 1
    assert len(set(outline.ids)) == len(outline.ids)
    links = {attrs["href"][1:] for tag, attrs in outline.attributes if tag == "a"}
    assert links <= set(outline.ids)
    references = [attrs[name] for _, attrs in outline.attributes for name in ("aria-labelledby",) if name in attrs]
    assert {word for reference in references for word in reference.split()} <= set(outline.ids)
    assert all("scope" in attrs for tag, attrs in outline.attributes if tag == "th")
    assert outline.tags.count("caption") == outline.tags.count("table")
    assert all(attrs.get("role") == "img" for tag, attrs in outline.attributes if tag == "svg")
    sections = [attrs["id"] for tag, attrs in outline.attributes if tag == "section"]
    assert sections == ["rescaled", "perplexity", "scales", "retrieval", "training", "cost", "run", "files"]


def test_says_what_was_measured(outline):
    text = " ".join(" ".join(outline.text).split())
    assert "At 32,768 tokens, perplexity 244 to → 3.84" in text
    assert "train.learning_rate 0.0002" in text
    assert "1 × Example GPU" in text
    assert re.search(r"run tokens/s recommended 113,000", text)


def test_sections_without_rows_are_left_out():
    found = Outline(render_page([sample_records.quickstart()]))
    sections = [attrs["id"] for tag, attrs in found.attributes if tag == "section"]
    assert sections == ["perplexity", "retrieval", "run", "files"]
    empty = Outline(render_page([Record("evaluate", {}, [], [], {})]))
    assert [attrs["id"] for tag, attrs in empty.attributes if tag == "section"] == ["run", "files"]


EVIL = "</td></svg><script>alert(1)</script>\"'&"


def test_nothing_from_a_record_becomes_markup():
    labels = {
        "checkpoint": EVIL,
        "method": EVIL,
        "corpus": EVIL,
        "protocol": EVIL,
        "base_model": EVIL,
        "native_window": 512,
    }
    rows = [
        make_row("perplexity", 3.0 + scale, "ratio", 9, window=window, scale=scale, **labels)
        for window in (512, 1024)
        for scale in (1.0, 2.0)
    ]
    depths = (0.0, 0.5)
    rows += [
        make_row("retrieval", 0.5, "share", 9, window=window, scale=1.0, depth=depth, task=EVIL, **labels)
        for window in (512, 1024)
        for depth in depths
    ]
    rows += [make_row("loss", 1.0, "nats", 9, step=step, checkpoint=EVIL, split=EVIL) for step in (1, 2)]
    rows.append(make_row("speed", 1.0, EVIL, 9, **{EVIL: EVIL}))
    evil = Record(EVIL, {EVIL: {EVIL: [EVIL]}}, rows, [], {EVIL: EVIL, "gpu": EVIL, "torch": EVIL})
    page = render_page([evil])
    assert "<script" not in page
    assert "alert(1)" in page
    Outline(page)  # every tag closes in turn


def test_write_report(tmp_path):
    path = sample_records.quickstart().save(tmp_path / "results.json")
    out = write_report([path], tmp_path / "runs" / "report.html")
    assert out.read_text().startswith("<!doctype html>")
    assert [child.name for child in out.parent.iterdir()] == ["report.html"]
    assert str(tmp_path) not in out.read_text()
    with pytest.raises(ValueError, match="at least one Record"):
        write_report([], tmp_path / "x.html")
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json"):
        write_report([path], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def _headline(*records):
    return headline(all_rows(records), len(records))


@pytest.mark.parametrize("dark", [False, True])
def test_every_figure_of_the_page_is_saved(tmp_path, dark):
    records = [sample_records.study(), sample_records.training()]
    files = save_figures(records, tmp_path / "new", dark=dark)
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    page = render_page(records)
    names = {path.stem for path in files}
    assert {path.suffix for path in files} == {".svg", ".png"} and len(files) == 2 * len(names)
    assert len(names) == page.count("<figure>") == 4 and all(f'id="{name}-760-title"' in page for name in names)
    assert all("var(" not in path.read_text() for path in files if path.suffix == ".svg")
    row = make_row("perplexity", 2.0, "ratio", 1, checkpoint="a", method="yarn", window=512)
    with pytest.raises(ValueError, match="nothing to draw"):
        save_figures([Record("evaluate", {}, [row], [], {})], tmp_path)


def test_headlines():
    quick = _headline(sample_records.quickstart())
    assert quick.sentence == "At 8,192 tokens, perplexity 176 → 80.1"
    assert quick.tiles == [
        ("16×", "the native window: 512, measured to 8k"),
        ("82.4 → 82.8", "perplexity at 512, the native window"),
        ("0.00 → 0.60", "key–value retrieval at 8k, share of 50 prompts"),
    ]
    rows = [make_row("loss", value, "nats", 1, step=step) for value, step in ((2.5, 10), (1.0625, 850), (2.0, 100))]
    rows.append(make_row("loss", 9.0, "nats", 1, step=900, split="held_out"))
    assert _headline(Record("train", {}, rows, [], {})).sentence == "Training loss 2.500 → 1.062 at step 850"
    row = make_row("perplexity", 4.0, "ratio", 1, window=4096, checkpoint="base", method="none")
    assert _headline(Record("evaluate", {}, [row], [], {})).sentence == "Perplexity 4.00 at 4,096 tokens"
    row = make_row("speed", 4.0, "tokens/s", 1)
    assert _headline(Record("benchmark", {}, [row], [], {})).sentence == "1 measurement in one file"


def test_headline_of_tasks_alone():
    """The base at its longest window beside the checkpoint that the report is about, whatever came out."""
    about = {"suite": "longbench", "base_model": "tiny", "method": "yarn", "average": "plain"}
    values = [("base", 8192, 0.2), ("base", 4096, 0.1), ("plain", 32768, 0.3), ("recommended", 16384, 0.15)]
    rows = [
        make_row("average", value + more, "share", 40, checkpoint=name, window=window, scale=1.0, tasks=tasks, **about)
        for name, window, value in values
        for tasks, more in (("en14", 0.5), ("all18", 0.0))
    ]
    found = _headline(Record("evaluate", {}, rows, [], {}))
    assert found.sentence == "LongBench 20.0 → 15.0"
    assert found.detail == "Base · yarn at 8k to recommended · yarn at 16k, mean over all 18 tasks, in percent."
    alone = _headline(Record("evaluate", {}, rows[:1], [], {}))
    assert alone.sentence == "LongBench 70.0" and alone.detail.startswith("Base · yarn at 8k, mean over 14 EN tasks")


def test_headline_does_not_hide_a_loss():
    rows = [
        make_row("perplexity", value, "ratio", 1, window=4096, checkpoint=name, method="none")
        for name, value in (("base", 4.0), ("extended", 9.0))
    ]
    assert _headline(Record("evaluate", {}, rows, [], {})).sentence == "At 4,096 tokens, perplexity 4.00 → 9.00"


def test_headline_takes_the_base_that_was_measured_on_the_same_documents():
    def rows(checkpoint, method, values, documents):
        facts = {"corpus": "c", "protocol": "whole", "documents": documents, "native_window": 1024}
        return [
            make_row("perplexity", v, "ratio", 1, window=w, checkpoint=checkpoint, method=method, scale=1.0, **facts)
            for w, v in values.items()
        ]

    near, far = {1024: 5.0, 2048: 9.0}, {1024: 5.0, 2048: 9.0, 4096: 30.0}
    trained = Record("study_final", {}, rows("recommended", "yarn", {1024: 4.0, 4096: 3.5}, 8), [], {})
    other = Record("evaluate", {"documents": ["b"]}, rows("base", "yarn", near, 2), [], {})
    same = Record("study_final", {}, rows("base-yarn", "yarn", far, 8), [], {})
    assert _headline(other, trained, same).sentence == "At 4,096 tokens, perplexity 30.0 → 3.50"


def test_names_of_files_break_at_signs_and_their_kinds_not_at_all(tmp_path):
    path = sample_records.training().save(tmp_path / "a_long_name.json")
    page = render_page([Record.load(path)])
    assert '<th scope="row">a_<wbr>long_<wbr>name.json</th><td class="whole">train</td>' in page


def test_rows_without_a_section_of_their_own_show_their_interval():
    rows = [make_row("ratio_to_floor", 0.5, "ratio", 3, base_model="m", low=0.4, high=0.6)]
    rows.append(make_row("ratio_to_floor", 0.7, "ratio", 1, base_model="n"))
    page = render_page([Record("evaluate_speed", {}, rows, [], {})])
    assert '<td class="number">0.50 ratio</td><td class="number">0.40–0.60</td><td class="number">3</td>' in page
    assert '<td class="number">0.70 ratio</td><td class="number">–</td><td class="number">1</td>' in page
