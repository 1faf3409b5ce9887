"""The page in headless Chromium: no error, every figure drawn, light and dark, wide and narrow, printed, by keyboard.

Marked slow.
"""

from __future__ import annotations

import json
import re
import subprocess

import numpy as np
import pytest
import sample_records
import test_cost
import test_further
import test_native
import test_rescaled
import test_skipped
import test_task_tables
from chromium import BROWSER, FLAGS, opened

from e2llm.records import Record, make_row
from e2llm.report import render_page
from e2llm.report.palette import DARK, LIGHT

pytestmark = pytest.mark.slow

# Appended for the test only: measures what the reader would see and writes it where --dump-dom shows it.
PROBE = """<script>
const shown = (e) => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
const visible = [...document.querySelectorAll('svg')].filter(shown);
const overlaps = visible.flatMap((svg) => {
  const texts = [...svg.querySelectorAll('text')];
  const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect()]);
  const meet = (p, q) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3;
  return boxes.flatMap(([a, p], i) => boxes.slice(0, i).filter(([b, q]) => meet(p, q)).map(([b]) => a + '|' + b));
});
const out = { figures: document.querySelectorAll('figure').length, drawn: visible.length, overlaps,
  sideways: document.documentElement.scrollWidth > window.innerWidth + 1,
  hidden: [...document.querySelectorAll('.scroll')].filter((s) => shown(s) && s.scrollWidth > s.clientWidth + 1)
    .map((s) => s.getAttribute('aria-label')),
  small: visible.flatMap((s) => [...s.querySelectorAll('text')])
    .filter((t) => t.getBoundingClientRect().height < 9).length };
document.body.insertAdjacentHTML('beforeend', '<pre id="probe">' + JSON.stringify(out) + '</pre>');
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: install chromium to run the browser tests")
    path = tmp_path_factory.mktemp("page") / "report.html"
    records = [sample_records.study(), sample_records.study("novels"), sample_records.training()]
    records += [test_further.ruler(), test_further.attention(), sample_records.needles(), sample_records.context()]
    tasks = test_task_tables.longbench()
    tasks.config["skipped"] = test_skipped.SKIPPED
    short = {"suite": "short", "window": None, "harness_metric": "acc"}
    tasks.rows.append(test_task_tables.task_row("hellaswag", 0.4, "accuracy", **short))
    pairs = test_native.retrieval("uuid_kv", base=(0.5, 0.1, 0.0), ours=(0.9, 0.8, 0.7))
    records += [test_rescaled.choice(), tasks, pairs, test_cost.train(), many_windows(), uneven()]
    path.write_text(render_page(records))
    assert all(f'<section id="{part}"' in path.read_text() for part in ("tasks", "choice", "cost", "rescaled"))
    return path


def many_windows():
    """Ten windows with intervals, of a checkpoint with a very long name: the widest table and the longest label."""
    name = "recommended_with_everything_that_the_study_of_planted_facts_added"
    rows = []
    for power in range(10):
        for checkpoint in ("base", name):
            labels = {"base_model": "long", "checkpoint": checkpoint, "method": "yarn", "native_window": 512,
                      "window": 512 * 2**power, "scale": 2.0**power}  # fmt: skip
            ends = {"low": 10.11, "high": 12345.6}
            rows.append(make_row("perplexity", 12.3 + power, "ratio", 123_456, **labels, **ends, corpus="c"))
            for depth in (0.0, 0.5):
                rows.append(make_row("retrieval", 0.5, "share", 20, **labels, task="needle", depth=depth))
    return Record("evaluate", {}, rows, [], {})


def uneven():
    """Six windows of which some checkpoints read an eighth of the tokens: ranges of large numbers beneath a table."""
    rows = []
    for power in range(6):
        for checkpoint, n in (("base", 131_056), ("recommended+planted_s0", 1_048_320)):
            labels = {"base_model": "uneven", "checkpoint": checkpoint, "method": "yarn", "window": 4096 * 2**power}
            rows.append(make_row("perplexity", 12.3, "ratio", n, low=10.11, high=345.6, **labels, corpus="ranges"))
    return Record("evaluate", {}, rows, [], {})


def browse(page, tmp_path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    return done


@pytest.mark.parametrize("width", [1200, 500])
def test_figures_are_drawn_without_overlaps(page, tmp_path, width):
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE))
    dom = browse(probed, tmp_path, f"--window-size={width},1000", "--dump-dom").stdout
    found = json.loads(re.findall(r'<pre id="probe">(.*?)</pre>', dom)[-1])
    assert found["figures"] == found["drawn"] == 12
    assert found["overlaps"] == []
    assert not found["sideways"] and found["small"] == 0
    assert width < 1000 or found["hidden"] == ["c"]  # a wide page shows every column of all tables but the widest


@pytest.mark.parametrize(("scheme", "palette"), [(1, LIGHT), (0, DARK)], ids=["light", "dark"])
def test_follows_the_colour_scheme(page, tmp_path, scheme, palette):
    from matplotlib.image import imread

    shot = tmp_path / "page.png"
    browse(
        page,
        tmp_path,
        "--window-size=1200,6000",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--screenshot={shot}",
    )
    pixels = (imread(shot)[..., :3] * 255).round().astype(int)
    paper = [int(palette.paper[i : i + 2], 16) for i in (1, 3, 5)]
    accent = [int(palette.hues[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert pixels[0, 0].tolist() == paper
    assert np.mean((pixels == paper).all(-1)) > 0.6  # generous space
    assert (pixels == accent).all(-1).sum() > 500  # the main line and the best values


@pytest.fixture
def live(page, tmp_path):
    with opened(page, tmp_path) as driven:
        yield driven


# Paper of 210 mm less two margins of 18 mm, in CSS pixels.
PAPER = 658
PRINTED = """(() => {
  const box = (e) => e.getBoundingClientRect();
  const all = (which) => [...document.querySelectorAll(which)];
  const printed = (e) => !e.closest('details:not([open])');
  const out = (e) => box(e).right > innerWidth + 1 || box(e).left < -1;
  return {
    hidden: all('nav, .skip').filter((e) => box(e).height > 0).length,
    tables: all('table').filter(printed).map((t) => box(t).height > 0 && !out(t)),
    cells: all('td, th').filter((e) => printed(e) && out(e)).map((e) => e.textContent),
    clipped: all('.scroll, td, th').filter((e) => !['visible'].includes(getComputedStyle(e).overflowX)).length,
    figures: all('figure svg').filter((e) => box(e).height > 0).map((e) => !out(e)),
    sideways: document.documentElement.scrollWidth > innerWidth + 1,
    whole: all('.scroll, figure, tr').filter((e) => getComputedStyle(e).breakInside !== 'avoid').length,
    facts: all('details').map((d) => d.querySelector('h3, h4').checkVisibility()),
    paper: getComputedStyle(document.body).backgroundColor,
  };
})()"""


def test_printed_nothing_is_cut(live):
    live.size(PAPER)
    live.run("document.querySelector('details').open = true")
    live.media("print", "dark")
    found = live.run(PRINTED)
    assert found["hidden"] == 0  # nothing to click on on paper
    assert len(found["tables"]) > 20 and all(found["tables"])
    assert found["cells"] == [] and found["clipped"] == 0 and not found["sideways"]
    assert len(found["figures"]) == 12 and all(found["figures"])
    # whole configurations would be a hundred pages: the reader prints those that are open
    assert found["facts"][0] and not any(found["facts"][1:]) and len(found["facts"]) > 2
    assert found["whole"] == 0  # a page ends before a table or a figure, not in it
    assert found["paper"] == "rgb(255, 255, 255)"  # also where the reader's screen is dark


BROKEN = """[...document.querySelectorAll('table.heat tbody th')].flatMap((head) => {
  const found = [], walk = document.createTreeWalker(head, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) for (const word of walk.currentNode.data.matchAll(/[^\\s-]+/g)) {
    const range = document.createRange();
    range.setStart(walk.currentNode, word.index);
    range.setEnd(walk.currentNode, word.index + word[0].length);
    if (range.getClientRects().length > 1) found.push(word[0]);
  }
  return found;
})"""


def test_on_a_phone_no_line_ends_inside_a_kind_or_scale(live):
    live.size(390)
    assert live.run("document.querySelectorAll('table.heat tbody th').length") > 5
    assert live.run(BROKEN) == []


FOCUSED = """(() => {
  const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
  return {
    kind: e === document.body ? 'end' : e.className === 'skip' ? 'skip' : e.className === 'scroll' ? 'scroll'
      : e.tagName.toLowerCase(),
    name: e.getAttribute('aria-label') || e.getAttribute('href') || e.textContent.slice(0, 40),
    seen: style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2 && e.matches(':focus-visible'),
    inside: box.right > 0 && box.left < innerWidth && box.bottom > 0 && box.top < innerHeight,
  };
})()"""


def test_keyboard_reaches_everything_and_shows_where_it_is(live):
    live.size(500)
    live.run("document.querySelectorAll('section#retrieval details').forEach((d) => { d.open = true; })")
    stops = []
    for _ in range(200):
        live.press("Tab", 9)
        stops.append(live.run(FOCUSED))
        if stops[-1]["kind"] == "end":
            break
    stops = stops[:-1]
    assert [stop for stop in stops if not (stop["seen"] and stop["inside"])] == []
    kinds = [stop["kind"] for stop in stops]
    sections = live.run("[...document.querySelectorAll('main section')].map((e) => '#' + e.id)")
    areas = live.run("[...document.querySelectorAll('.scroll')].map((e) => e.getAttribute('aria-label'))")
    records = live.run("document.querySelectorAll('details').length")
    assert kinds[0] == "skip"
    assert [stop["name"] for stop in stops if stop["kind"] == "a"] == sections
    assert [stop["name"] for stop in stops if stop["kind"] == "scroll"] == areas and len(areas) > 20
    assert kinds.count("summary") == records


def test_the_skip_link_leads_past_the_navigation(live):
    live.press("Tab", 9)
    live.press("Enter", 13)
    assert live.run("location.hash + document.activeElement.id") == "#mainmain"
    live.press("Tab", 9)
    assert live.run("document.activeElement.closest('main') !== null")


def test_a_scroll_area_moves_by_arrow_keys(live):
    live.size(390)
    wide = "[...document.querySelectorAll('.scroll')].find((e) => e.scrollWidth > e.clientWidth + 20)"
    assert live.run(f"{wide} !== undefined")
    live.run(f"{wide}.focus()")
    live.press("ArrowRight", 39)
    live.run("new Promise((done) => setTimeout(done, 500))")  # scrolling is animated
    assert live.run(f"{wide}.scrollLeft") > 0
