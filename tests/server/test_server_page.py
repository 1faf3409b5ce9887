"""The page in headless Chromium, on a base model and with a chat template: asks, streams, stops, explains itself."""

from __future__ import annotations

import time

import pytest
from browser import BROWSER, Tab

from e2llm.positions.choose import Step
from e2llm.server.page import FILES, POLICY

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: install chromium")

DOCUMENT = "The river ran past the mill and the old house stood by the water. " * 40
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    made = Tab(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def page(tab, serve):
    """page(**settings): the page opened; nothing may have gone wrong by the end of the test."""
    tab.complaints.clear()

    def open_page(width=1100, dark=False, wait=True, **settings):
        served = serve(**settings)
        tab.open(f"{served.url}/", width=width, dark=dark)
        if wait:
            tab.wait("document.getElementById('ladder').children.length > 1")
        return tab

    yield open_page
    assert tab.complaints == []
    tab.open("about:blank")


def fill(tab, name, text):
    tab.evaluate(f"document.getElementById('{name}').closest('details')?.setAttribute('open', '')")
    tab.evaluate(f"document.getElementById('{name}').focus()")
    tab.evaluate(f"document.getElementById('{name}').select?.()")
    tab.type(text)


def text(tab, selector):
    return tab.evaluate(f"document.querySelector({selector!r}).textContent")


def figures(tab):
    return {
        name: text(tab, f"[data-figure={name}]") for name in ("prompt", "window", "scale", "first", "tokens", "speed")
    }


def ask_and_wait(tab):
    tab.evaluate("document.getElementById('form').requestSubmit()")
    tab.wait("document.querySelector('.text[aria-busy=false]')")


def test_a_base_model_continues_and_says_at_which_scale(base, engine, page):
    expected = base.generate(DOCUMENT + "\nThe mill", max_new_tokens=12)
    tab = page()
    assert "no chat template" in text(tab, "#question-hint") and text(tab, "#ask") == "Continue"
    fill(tab, "document", DOCUMENT)
    fill(tab, "question", "The mill")
    fill(tab, "max-tokens", "12")
    tab.wait("document.querySelector('#ladder .chosen')?.dataset.scale === '2'")
    planned = f"{expected.prompt_tokens:,} tokens + up to 12 new → window 1,024, scale 2"
    tab.wait(f"document.getElementById('plan-text').textContent === {planned!r}")
    ask_and_wait(tab)
    assert text(tab, ".text") == expected.text
    found = figures(tab)
    assert (found["window"], found["scale"], found["tokens"]) == ("1,024", "2", "12")
    assert found["prompt"] == f"{expected.prompt_tokens:,}" and "ms" in found["first"] and float(found["speed"]) > 0
    assert text(tab, "#status").startswith("Answer complete: 12 tokens in ")


def test_the_ladder_of_a_calibrated_schedule(engine, page, monkeypatch):
    """Two windows of one scale, and one that is no power of two: each has its bar, as the server says."""
    schedule = (Step(700, 1.0), Step(2000, 3.0), Step(4096, 3.0))
    monkeypatch.setattr(engine, "schedule", schedule)
    tab = page()
    bars = "[...document.querySelectorAll('#ladder li')].map(i => i.dataset.window + ' ' + i.dataset.scale).join()"
    assert tab.evaluate(bars) == "700 1,2000 3,4096 3,8192 16"
    options = "[...document.getElementById('scale').options].map(o => o.textContent).join('|')"
    assert tab.evaluate(options) == "by length|1 (700 tokens)|3 (4k tokens)|16 (8k tokens)"
    fill(tab, "document", DOCUMENT)
    fill(tab, "max-tokens", "600")
    tab.wait("document.querySelector('#ladder .chosen')?.dataset.window === '2000'")
    assert text(tab, "#plan-text").endswith("window 2,000, scale 3")


def test_a_model_with_a_template_is_asked(base, engine, page, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", TEMPLATE)
    expected = base.generate(f"user: {DOCUMENT}\n\nWho ran?\nassistant:", max_new_tokens=8)
    tab = page()
    assert text(tab, "#ask") == "Ask" and text(tab, "#question-label") == "Question"
    ask = "document.getElementById('form').requestSubmit()"
    tab.evaluate(ask)
    assert text(tab, "#status") == "Write a question first."
    fill(tab, "document", DOCUMENT)
    fill(tab, "max-tokens", "8")
    fill(tab, "question", "Who ran?")
    tab.key("Enter", 13, modifiers=2)  # Ctrl
    tab.wait("document.querySelector('.text[aria-busy=false]')")
    assert text(tab, ".text") == expected.text and text(tab, ".asked") == "Who ran?"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_frees_the_engine(engine, page, how):
    engine.before_step = lambda: time.sleep(0.02)
    tab = page()
    fill(tab, "document", "def add(a, b):")
    tab.evaluate("document.getElementById('form').requestSubmit()")
    tab.wait("document.querySelector('.text')?.textContent.length > 5")
    assert tab.evaluate("document.querySelector('.text').getAttribute('aria-busy')") == "true"
    assert engine.stats().running == 1
    if how == "button":
        tab.evaluate("document.getElementById('stop').click()")
    else:
        tab.key("Escape", 27)
    tab.wait("document.getElementById('status').textContent === 'Stopped.'")
    tab.wait("!document.getElementById('ask').disabled && document.getElementById('stop').disabled")
    end = time.monotonic() + 5
    while engine.stats().running:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_errors_are_told_in_words(page, tab):
    page()
    fill(tab, "document", DOCUMENT * 20)
    tab.wait("document.getElementById('plan-text').textContent.includes('more than the 8,192 tokens')")
    ask_and_wait(tab)
    assert "8192" in text(tab, ".notice") and text(tab, "#status") == "No answer."
    tab.complaints.clear()  # the browser's own line about status 400


def test_a_key_is_asked_for(page, tab):
    page(wait=False, api_keys=("long-enough",))
    tab.wait("!document.getElementById('key-field').hidden")
    fill(tab, "key", "long-enough")
    tab.evaluate("document.getElementById('key').blur()")
    tab.wait("document.getElementById('ladder').children.length === 5")
    fill(tab, "document", "def add(a, b):")
    fill(tab, "max-tokens", "3")
    ask_and_wait(tab)
    assert figures(tab)["tokens"] == "3"
    tab.complaints.clear()  # status 401


def test_a_file_can_be_dropped(page, tab):
    page()
    tab.evaluate("""(() => {
        const data = new DataTransfer();
        data.items.add(new File(['Grüße aus der Datei'], 'letter.txt'));
        document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }));
    })()""")
    tab.wait("document.getElementById('document').value === 'Grüße aus der Datei'")
    tab.evaluate("""(() => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array([0xff, 0xfe, 0x00])], 'picture.png'));
        document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }));
    })()""")
    tab.wait("document.getElementById('status').textContent === 'picture.png is not a text in UTF-8.'")
    assert tab.evaluate("document.getElementById('document').value") == "Grüße aus der Datei"


CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const written = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll('body *')]
    .filter((e) => e.checkVisibility() && !e.disabled && written(e))
    .map((e) => [light(parse(getComputedStyle(e).color)), light(behind(e)), e.outerHTML.slice(0, 60)])
    .map(([a, b, html]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), html])
    .filter(([ratio]) => ratio < 4.5);
})()"""
UNLABELLED = """[...document.querySelectorAll('input, textarea, select, button')]
  .filter((e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map((e) => e.id)"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_readable_by_everybody(page, tab, dark, width):
    page(width=width, dark=dark)
    fill(tab, "document", "def add(a, b):")
    fill(tab, "max-tokens", "5")
    ask_and_wait(tab)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = "[...document.querySelectorAll('.figures dd')].every((e) => e.scrollWidth <= e.clientWidth)"
    assert tab.evaluate(wide)
    assert tab.evaluate(CONTRAST) == []
    assert tab.evaluate(UNLABELLED) == []
    paper = "rgb(20, 22, 26)" if dark else "rgb(253, 252, 250)"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == paper


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page, tab):
    page()
    tab.evaluate("document.activeElement.blur()")
    reached, outlined = [], True
    for _ in range(9):
        tab.key("Tab", 9)
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
        shown = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        # The file input itself cannot be seen: its label is outlined.
        outlined &= reached[-1] == "file" or tab.evaluate(shown)
        if reached[-1] == "file":
            outlined &= tab.evaluate(
                "getComputedStyle(document.querySelector('label[for=file]')).outlineStyle !== 'none'"
            )
    assert reached == ["A", "file", "clear", "document", "question", "SUMMARY", "ask", "A", "A"]
    assert outlined
    assert tab.evaluate("document.querySelector('[role=status]').getAttribute('aria-live')") == "polite"


def test_nothing_comes_from_elsewhere(serve):
    with serve().client() as client:
        for path, (_, media_type) in FILES.items():
            answer = client.get(path)
            assert answer.status_code == 200 and answer.headers["content-type"].startswith(media_type)
            assert answer.headers["content-security-policy"] == POLICY
            without_namespace = answer.text.replace("http://www.w3.org/2000/svg", "")
            assert "//" not in without_namespace.replace("// ", "") or path == "/page.js"
            assert "http" not in without_namespace
