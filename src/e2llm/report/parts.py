"""A section of the page and a figure in it, as HTML."""

from __future__ import annotations

import html
from dataclasses import dataclass

from e2llm.report.canvas import NARROW, Drawing


@dataclass(frozen=True)
class Part:
    """A section of the page: its anchor, heading and HTML; left out where the HTML is empty."""

    anchor: str
    title: str
    body: str


def figure_html(drawing: Drawing | None) -> str:
    """The drawing in both widths, of which the page shows one."""
    if drawing is None:
        return ""
    return (
        f'<figure><div class="wide">{drawing.svg()}</div><div class="narrow">{drawing.svg(NARROW)}</div>'
        f"<figcaption>{html.escape(drawing.title)}.</figcaption></figure>"
    )


def heading_html(text: str) -> str:
    return f"<h3>{html.escape(text)}</h3>" if text else ""


def quiet_html(text: str) -> str:
    return f'<p class="quiet">{html.escape(text)}</p>'
