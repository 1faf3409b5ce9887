"""Colours of figures and page, once for light and once for dark, and their CSS names.

Flows in: nothing. Flows out: `LIGHT`, `DARK` and the CSS properties that let a figure follow the reader's choice.
Hues are told apart with any of the common colour-vision deficiencies, and lines also differ by dash and marker
(tests/report/test_palette.py holds the contrasts).
"""

from __future__ import annotations

from dataclasses import dataclass

HEAT_LEVELS = 12
NUM_STEPS = 11


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Hex colours, all different from each other: figures are recoloured by replacing one hex with one CSS name.

    `hues` tell kinds apart, `greys` the baselines; `heat` goes from nothing to much, `steps` orders lines by a number.
    """

    paper: str
    panel: str
    ink: str
    muted: str
    rule: str
    on_heat: str
    hues: tuple[str, ...]
    greys: tuple[str, ...]
    heat: tuple[str, ...]
    steps: tuple[str, ...]

    def names(self) -> dict[str, str]:
        """CSS custom property -> hex colour."""
        named = {
            f"--{name.replace('_', '-')}": getattr(self, name)
            for name in ("paper", "panel", "ink", "muted", "rule", "on_heat")
        }
        for group in ("hues", "greys", "heat", "steps"):
            named |= {f"--{group}-{index}": colour for index, colour in enumerate(getattr(self, group))}
        return named

    def css(self) -> str:
        return "".join(f"{name}:{colour};" for name, colour in self.names().items())

    def heat_level(self, share: float) -> int:
        """0 … 1 -> index into `heat`."""
        return min(HEAT_LEVELS - 1, max(0, int(share * HEAT_LEVELS)))

    def on_level(self, level: int) -> str:
        """Colour of text upon a heat level."""
        return self.ink if level < 7 else self.on_heat


def _ramp(count: int, *stops: str) -> tuple[str, ...]:
    """`count` colours through the stops, evenly spaced, straight in sRGB."""
    points = [tuple(int(stop[i : i + 2], 16) for i in (1, 3, 5)) for stop in stops]
    colours = []
    for level in range(count):
        place = level / (count - 1) * (len(points) - 1)
        index = min(int(place), len(points) - 2)
        mix = (a + (b - a) * (place - index) for a, b in zip(points[index], points[index + 1], strict=True))
        colours.append("#" + "".join(f"{round(channel):02x}" for channel in mix))
    return tuple(colours)


LIGHT = Palette(
    paper="#fdfcfa",
    panel="#f4f2ed",
    ink="#1d1f24",
    muted="#646770",
    rule="#e3e0d8",
    on_heat="#fffffe",
    hues=("#1f5fc4", "#c4541a", "#14806a", "#a0408c", "#8a6d00", "#4b4fa8"),
    greys=("#55585f", "#73767d", "#83868d", "#8e9198", "#8a8d95"),
    heat=_ramp(HEAT_LEVELS, "#edf2f8", "#a9c6e8", "#2f68ae", "#0f2f63"),
    steps=_ramp(NUM_STEPS, "#2f9a94", "#2a6fc0", "#1b2c70"),
)

DARK = Palette(
    paper="#14161a",
    panel="#1c1f25",
    ink="#e9e7e2",
    muted="#a0a4ad",
    rule="#30343c",
    on_heat="#0b0f16",
    hues=("#78aeff", "#f4955c", "#4cc7a6", "#dd8fcd", "#d9b64a", "#a9a7f5"),
    greys=("#b9bcc3", "#9da0a8", "#8b8e96", "#7d8089", "#868992"),
    heat=_ramp(HEAT_LEVELS, "#1d2633", "#2a4674", "#355a94", "#6aa3ee", "#d3e6ff"),
    steps=_ramp(NUM_STEPS, "#4d7bd0", "#5cb8d6", "#d9fae6"),
)
