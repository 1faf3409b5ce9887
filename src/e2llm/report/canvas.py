"""A drawing and what becomes of it: inline SVG for the page, an SVG or PNG file for documents.

Flows in: a function (palette, width) -> matplotlib figure. Flows out: SVG text or a file.
All lengths are CSS pixels: a figure has 72 of them an inch, so that font sizes and lengths share one unit.
Knows nothing of Records. Touches no global matplotlib state: no pyplot, settings only inside a context.
"""

from __future__ import annotations

import html
import io
import os
import re
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2llm.records import write_atomic
from e2llm.report.palette import DARK, LIGHT, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 760
NARROW = 340
FONT = 12.5
SMALL = 11.5


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn in any palette and width. `name` is unique in a page: all ids start with it."""

    name: str
    title: str
    description: str
    draw: Callable[[Palette, int], Figure]

    def svg(self, width: int = WIDE) -> str:
        """Inline SVG whose colours are the page's CSS properties; text stays text; ids start with name and width."""
        names = {colour: f"var({name})" for name, colour in LIGHT.names().items()}
        body = _svg(self.draw(LIGHT, width), self.name)
        body = re.sub(r"#[0-9a-f]{6}\b", lambda match: names.get(match[0], match[0]), body)
        body = re.sub(r"font: (\d+ )?([\d.]+px) [^;\"]*", _inherit_font, body)  # matplotlib below 3.10
        body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
        return _finish(body, f"{self.name}-{width}", self.title, self.description)

    def save(self, path: str | os.PathLike[str], *, width: int = WIDE, dark: bool = False) -> Path:
        """Write `path` (.svg or .png, the PNG at two pixels a CSS pixel) in the light or the dark palette."""
        path, palette = Path(path), DARK if dark else LIGHT
        figure = self.draw(palette, width)
        figure.patch.set_facecolor(palette.paper)
        if path.suffix == ".svg":
            return write_atomic(path, _finish(_svg(figure, self.name), self.name, self.title, self.description) + "\n")
        if path.suffix != ".png":
            raise ValueError(f"path = {str(path)!r}: a figure is saved as .svg or .png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            figure.savefig(temporary, dpi=144, facecolor=palette.paper)
            os.replace(temporary, path)
        return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure without background, in CSS pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def new_axes(
    figure: Figure, palette: Palette, *, left: float, top: float, width: float, height: float, **options: Any
) -> Axes:
    """Axes at a place counted in pixels from the figure's left top corner: no frame, quiet ticks."""
    total_width, total_height = figure.get_size_inches() * 72
    box = (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
    axes = figure.add_axes(box, facecolor="none", **options)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(which="both", length=0, pad=7, labelsize=SMALL, labelcolor=palette.muted, color=palette.rule)
    return axes


def ruled(axes: Axes, palette: Palette) -> Axes:
    """Horizontal rules behind the data and a base line: what a line chart needs and no more."""
    axes.grid(axis="y", color=palette.rule, linewidth=1, zorder=0)
    axes.set_axisbelow(True)
    axes.spines["bottom"].set(visible=True, color=palette.rule, linewidth=1)
    return axes


def words(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    colour: str,
    *,
    size: float = FONT,
    ha: str = "left",
    **options: Any,
) -> None:
    """Text at a place counted in pixels from the left top corner; `y` is the middle of the line."""
    width, height = figure.get_size_inches() * 72
    figure.text(
        x / width, 1 - y / height, text, color=colour, fontsize=size, ha=ha, va="center", parse_math=False, **options
    )


def wrapped(text: str, width: float, *, strong: bool = False) -> list[str]:
    """Lines of a name, each at most `width` pixels wide in the widest of the fonts it may be shown in."""
    return textwrap.wrap(text, max(8, int(width / letter(strong)))) or [""]


def letter(strong: bool) -> float:
    """Pixels of a letter in the widest of the fonts a name may be shown in."""
    return 8.6 if strong else 7.7


def _svg(figure: Figure, salt: str) -> str:
    """matplotlib's SVG from <svg> to </svg>: text as text, the same bytes for the same figure."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def _inherit_font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1].strip()}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}"


def _finish(text: str, prefix: str, title: str, description: str) -> str:
    """Drop what must not stand in a page (prolog, metadata, a style for every element), prefix ids, add the words."""
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r"\n\s*", "\n", text)
    head = re.match(r"<svg[^>]*>", text)
    assert head is not None, "matplotlib writes an <svg> element"
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head[0])
    assert box is not None, "matplotlib writes a viewBox"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[0][9:-1]}" '
        f'width="{box[1]}" height="{box[2]}" role="img" aria-labelledby="{prefix}-title {prefix}-desc" '
        'style="stroke-linejoin:round;stroke-linecap:butt">\n'
        f'<title id="{prefix}-title">{html.escape(title)}</title>\n'
        f'<desc id="{prefix}-desc">{html.escape(description)}</desc>'
    )
    return opening + text[head.end() :]
