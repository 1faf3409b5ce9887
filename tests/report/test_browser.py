"""The page in headless Chromium: no error, every figure drawn, light and dark, wide and narrow. Marked slow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import sample_records
import test_further

from e2llm.report import render_page
from e2llm.report.palette import DARK, LIGHT

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
).split()

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
    records += [test_further.attention(), sample_records.needles(), sample_records.context()]
    path.write_text(render_page(records))
    return path


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
    assert found["figures"] == found["drawn"] == 9
    assert found["overlaps"] == []
    assert not found["sideways"] and found["small"] == 0
    assert width < 1000 or found["hidden"] == []  # a wide page shows every column of every table


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
