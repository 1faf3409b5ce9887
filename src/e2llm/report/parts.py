"""What pages and documents are put together from: a section of the page, a figure in it, a heading."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from e2llm.report.canvas import NARROW, Drawing
from e2llm.report.tables import Table


@dataclass(frozen=True)
class Heading:
    """A heading of a document of tables; level 2 is a chapter."""

    level: int
    text: str


Block = Heading | Table | str
"""Of such a document: a heading, a table, or sentences."""


@dataclass(frozen=True)
class Part:
    """A section of the page: its anchor, heading, HTML and the drawings in it; left out where the HTML is empty."""

    anchor: str
    title: str
    body: str
    drawings: tuple[Drawing, ...] = ()


def drawn(drawings: Sequence[Drawing | None]) -> tuple[Drawing, ...]:
    """Those that there was something to draw for."""
    return tuple(drawing for drawing in drawings if drawing is not None)


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
    # A number and its per cent sign stay on one line.
    return "" if not text else f'<p class="quiet">{html.escape(text.replace(" %", chr(160) + "%"))}</p>'
