"""Tables: the right value in the right cell, the best in bold, counts at the foot."""

from __future__ import annotations

import pytest
import sample_records

from e2llm.records import Record, make_row
from e2llm.report import perplexity_table, results_markdown, retrieval_table
from e2llm.report.series import all_rows, sections, series_of
from e2llm.report.tables import scale_table, window_table


def test_perplexity_table_by_hand():
    """What counted another number of tokens is marked and not the best of its column."""
    rows = [
        make_row("perplexity", value, "ratio", n, checkpoint=name, method=method, window=window, scale=1.0)
        for name, method, window, value, n in (
            ("base", "none", 512, 82.44, 100),
            ("base", "none", 8192, 1760.0, 100),
            ("extended", "yarn", 512, 82.8, 100),
            ("extended", "yarn", 8192, 9.994, 120),
            ("extended", "yarn", 131072, 4.375, 7000),
        )
    ]
    assert perplexity_table([Record("evaluate", {}, rows, [], {})]) == (
        "| checkpoint · method | 512 | 8k | 128k |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| base · none | **82.4** | 1,760† | – |\n"
        "| extended · yarn | 82.8 | 9.99 | 4.38 |\n"
        "| target tokens | 100 | 100–120 | 7,000 |\n"
        "\n† base · none: on documents that the Record holds no values of, perhaps others; not to be compared with "
        "values of another mark or none.\n"
    )


def test_each_cell_is_at_the_serving_scale():
    table = perplexity_table([sample_records.study()], corpus="mathematics", protocol="whole")
    assert "| recommended · yarn | 5.18 | 4.51 | **4.26** | **3.84** | **3.77** | **4.38** |" in table
    assert "| base · none | 6.98 | 5.97 | 17.8 | 244 | – | – |" in table


def test_retrieval_bolds_the_highest_and_not_a_tie_of_all():
    table = retrieval_table([sample_records.quickstart()])
    assert "| extended · yarn | 0.98 (0.90–1.00) | **0.94** (0.84–0.98) | **0.60** (0.46–0.72) |" in table
    assert "| base · none | 0.98 (0.90–1.00) | 0.02 (0.00–0.10) | 0.00 (0.00–0.07) |" in table


def test_answers_written_without_an_interval_get_wilson_s():
    """Ends of 9 of 10: Wilson's (1927), from statsmodels' proportion_confint(9, 10, method="wilson")."""
    labels = {"base_model": "b", "checkpoint": "base", "method": "yarn", "task": "pass_key", "scale": 1.0}
    rows = [make_row("retrieval", 0.9, "share", 10, window=512, **labels)]
    rows += [make_row("retrieval", v, "share", 5, window=1024, depth=d, **labels) for d, v in ((0.0, 1.0), (0.5, 0.8))]
    rows.append(make_row("retrieval", 0.85, "share", 10, window=2048, **labels))  # graded, no share of ten answers
    rows.append(make_row("retrieval", 0.9, "share", 10, window=4096, low=0.5, high=0.95, **labels))  # its own
    (section,) = sections(all_rows([Record("evaluate", {}, rows, [], {})]), "retrieval")
    found = series_of(section)[0].points
    for window in (512, 1024):  # of single depths: their answers together
        assert (found[window]["low"], found[window]["high"]) == pytest.approx((0.59585, 0.98212), abs=1e-5)
    assert "low" not in found[2048] and found[4096]["low"] == 0.5


def test_section_has_to_be_chosen():
    records = [sample_records.study(), sample_records.study("novels")]
    with pytest.raises(ValueError, match=r"several corpus.*mathematics.*novels"):
        perplexity_table(records)
    with pytest.raises(ValueError, match="Records hold none"):
        perplexity_table(records, corpus="law")
    with pytest.raises(ValueError, match="window"):
        perplexity_table(records, window=4096)


def test_scale_table_marks_served_and_best():
    (section,) = sections(all_rows([sample_records.study()]), "perplexity")
    tables = {one.label: scale_table(section, one) for one in series_of(section)}
    assert [label for label, table in tables.items() if table] == ["recommended · yarn"]
    body = dict(tables["recommended · yarn"].body)
    assert [cell.served for cell in body["1"]] == [True, True, False, False, False, False]
    assert [cell.served for cell in body["16"]] == [False] * 5 + [True]
    assert body["16"][5].best and body["16"][5].share == 0.0
    assert body["1"][5].share == 1.0  # more than twice the best
    assert "+2.0% over the best scale at 4k, scale 2, n = 262,144" == body["2"][0].note


def test_every_cell_of_a_window_by_scale_table_shows_its_interval():
    labels = {"base_model": "b", "checkpoint": "base", "method": "yarn", "native_window": 512}
    rows = [
        make_row("perplexity", 3.0 * scale, "ratio", 9, window=w, scale=scale, low=2.5, high=9.5, **labels)
        for w in (512, 1024)
        for scale in (1.0, 2.0)
    ]
    (section,) = sections(all_rows([Record("evaluate", {}, rows, [], {})]), "perplexity")
    table = scale_table(section, series_of(section)[0])
    assert table is not None and "| 2 | 6.00 (2.50–9.50) | 6.00 (2.50–9.50) |" in table.markdown()


def test_lines_of_a_table_may_end_after_signs_not_inside_words():
    row = make_row("perplexity", 2.0, "ratio", 1, checkpoint="plain_and+more", method="yarn", window=512)
    (section,) = sections(all_rows([Record("evaluate", {}, [row], [], {})]), "perplexity")
    assert ">plain_<wbr>and+<wbr>more · yarn</th>" in window_table(section).html()


def test_names_are_escaped():
    row = make_row("perplexity", 2.0, "ratio", 1, checkpoint="<b>|*x*", method="yarn", window=512)
    record = Record("evaluate", {}, [row], [], {})
    assert r"| \<b>\|\*x\* · yarn |" in perplexity_table([record])
    (section,) = sections(all_rows([record]), "perplexity")
    page = window_table(section).html()
    assert "&lt;b&gt;|*x* · yarn" in page and "<b>" not in page


def test_results_markdown(tmp_path):
    paths = [sample_records.study(c).save(tmp_path / f"smollm2_{c}.json") for c in ("mathematics", "novels")]
    text = results_markdown([Record.load(path) for path in paths])
    first = (
        "Generated by `e2llm report --markdown` from `smollm2_mathematics.json`, `smollm2_novels.json`; do not edit."
    )
    assert first in text.splitlines()
    assert "### Mathematics, whole windows, SmolLM2-135M-Instruct" in text
    assert "#### Window by scale: recommended · yarn" in text
    assert "- Example CPU, torch 2.11.0: `smollm2_mathematics`, `smollm2_novels`" in text
    assert str(tmp_path) not in text
    with pytest.raises(ValueError, match="at least one Record"):
        results_markdown([])


def test_a_table_says_at_which_scale_each_window_was_read():
    """Not on pointing alone: it is to be printed and heard. Where checkpoints differ, by checkpoint."""

    def notes(*scales):
        rows = [
            make_row("perplexity", 4.0, "ratio", 9, base_model="m", checkpoint=name, method="yarn", corpus="c",
                     protocol="whole", native_window=4096, window=window, scale=scale)
            for name, own in zip(("base", "ours"), scales, strict=False)
            for window, scale in zip((4096, 8192, 16384), own, strict=False)
        ]  # fmt: skip
        (section,) = sections(all_rows([Record("evaluate", {}, rows, [], {})]), "perplexity")
        return window_table(section).notes

    assert notes((1.0, 1.0, 1.0)) == ()
    assert notes((1.0, 2.0), (1.0, 2.0, 3.5)) == ("Scales other than 1: 2 at 8k, 3.5 at 16k.",)
    assert notes((1.0, 1.0), (1.0, 2.0, 4.0)) == ("Scales other than 1: ours · yarn: 2 at 8k, 4 at 16k.",)
    assert notes((1.0, 2.0, 4.0), (1.0, 2.0, 3.0)) == (
        "Scales other than 1: base · yarn: 2 at 8k, 4 at 16k; ours · yarn: 2 at 8k, 3 at 16k.",
    )
