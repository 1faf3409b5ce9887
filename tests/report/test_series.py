"""Rows become comparable series: nothing averaged, dropped or mixed across base models, corpora and tasks."""

from __future__ import annotations

import pytest
import sample_records

from e2llm.records import Record, make_row
from e2llm.report.series import Section, all_rows, hero, over_depths, rival, sections, series_of, serving_row


def _row(window=8192, scale=1.0, value=5.0, metric="perplexity", **labels):
    labels = {"checkpoint": "paper", "method": "yarn", "native_window": 8192, **labels}
    return make_row(metric, value, "ratio", 10, window=window, scale=scale, **labels)


def _section(*rows, metric="perplexity"):
    return Section(metric, {}, [{"source": "file", **row} for row in rows])


@pytest.mark.parametrize(
    ("window", "scales", "served"),
    [
        (4096, [1, 2, 4], 1),
        (8192, [1, 2, 4], 1),
        (16384, [1, 2, 4], 2),
        (24576, [1, 2, 3, 4], 3),
        (24576, [1, 2, 4], 4),
        (65536, [1, 2, 4], 4),
        (65536, [1], 1),
    ],
)
def test_serving_row_is_the_smallest_scale_that_covers(window, scales, served):
    assert serving_row([_row(window, float(scale)) for scale in scales])["scale"] == served


@pytest.mark.parametrize(("kind", "protocol"), [("calibrate", "calibration"), ("study", "study")])
def test_what_reads_other_documents_stands_apart_from_results(kind, protocol):
    """Under the same corpus label, its values beside results would be read as theirs."""
    measured = Record("evaluate", {}, [_row(corpus="a", protocol="whole", value=6.0)], environment={})
    calibrated = Record(kind, {}, [_row(corpus="a", protocol="whole", value=3.0)], environment={})
    found = sections(all_rows([measured, calibrated]), "perplexity")
    assert [(one.labels["protocol"], [row["value"] for row in one.rows]) for one in found] == [
        ("whole", [6.0]),
        (protocol, [3.0]),
    ]
    assert calibrated.rows[0]["protocol"] == "whole", "the Record itself is as it was"


def test_sections_never_mix():
    rows = [_row(corpus="a"), _row(corpus="b"), _row(corpus="b", protocol="sliding"), _row(base_model="other")]
    assert len(sections([*rows, make_row("perplexity", 3.0, "ratio", 1)], "perplexity")) == 4


def test_seeds_become_series():
    found = series_of(_section(_row(seed=0, value=5.0), _row(seed=1, value=6.0), _row(16384, 2.0, seed=0)))
    assert [one.label for one in found] == ["paper · yarn · seed 0", "paper · yarn · seed 1"]
    assert sorted(found[0].points) == [8192, 16384]


def test_the_same_measured_twice_is_told_apart_by_file():
    found = series_of(_section(_row(source="a"), _row(source="b", value=6.0)))
    assert [one.label for one in found] == ["paper · yarn · source a", "paper · yarn · source b"]


def test_unknown_native_window_keeps_scales_apart():
    rows = [_row(native_window=None, scale=scale) for scale in (1.0, 4.0)]
    assert [one.extra for one in series_of(_section(*rows))] == ["scale 1", "scale 4"]


def test_native_window_comes_from_the_config():
    rows = [{key: value for key, value in _row(scale=s).items() if key != "native_window"} for s in (1.0, 2.0)]
    record = Record("evaluate", {"model": {"native_window": 8192}}, rows, [], {})
    assert [row["native_window"] for row in all_rows([record])] == [8192, 8192]
    assert "native_window" not in record.rows[0]


def test_over_depths_weights_by_n_and_prefers_the_saved_mean():
    parts = [
        make_row("retrieval", value, "share", n, window=1, depth=depth)
        for value, n, depth in ((1.0, 30, 0.0), (0.0, 10, 0.5))
    ]
    (mean,) = over_depths(parts)
    assert (mean["value"], mean["n"], "depth" in mean) == (0.75, 40, False)
    whole = make_row("retrieval", 0.2, "share", 40, window=1)
    assert over_depths([*parts, whole]) == [whole]


def test_hero_and_rival():
    (section,) = sections(all_rows([sample_records.study()]), "perplexity")
    found = series_of(section)
    assert [one.label for one in found][:4] == ["base · none", "base · linear", "base · ntk", "base · yarn"]
    assert hero(found).label == "recommended · yarn"
    assert rival(found).label == "base · none"
    others = [one for one in found if one.checkpoint in ("plain", "paper")]
    assert hero(others).label == "paper · linear"  # both reach 128k, 5.98 is below 8.59
    assert hero([one for one in found if one.is_base]) is None
