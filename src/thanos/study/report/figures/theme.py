"""Colours of a report, light and dark: told apart by people with any colour vision, and by their markers in print."""

from __future__ import annotations

INK = "#1f2328"
MUTED = "#5f6872"
GRID = "#dfe3e8"
PAPER = "#ffffff"

# Okabe and Ito's palette (2008), darkened where its contrast on white is below 3:1.
STYLES: dict[str, tuple[str, str]] = {
    "thanos": ("#d1490c", "o"),
    "sparsegpt": ("#0072b2", "s"),
    "wanda": ("#008a63", "^"),
    "magnitude": ("#a4518a", "D"),
}
"""Method → colour and marker."""

OTHERS: tuple[tuple[str, str], ...] = (("#8a6d00", "v"), ("#56606b", "P"), ("#3d5a99", "X"))
"""For methods of other versions, in turn."""

DARK: dict[str, str] = {
    INK: "#e8eaed",
    MUTED: "#a3adb8",
    GRID: "#333a42",
    PAPER: "#14171a",
    "#d1490c": "#ff8a4c",
    "#0072b2": "#62b8f0",
    "#008a63": "#3fcf9f",
    "#a4518a": "#e59fcd",
    "#8a6d00": "#e3c04f",
    "#56606b": "#b4bec8",
    "#3d5a99": "#9db8f2",
}
"""Colour in the light theme → the same in the dark one."""


def style_of(method: str, known: list[str]) -> tuple[str, str]:
    """Return colour and marker of a method; ``known`` lists those of the figure that :data:`STYLES` lacks."""
    if method in STYLES:
        return STYLES[method]
    return OTHERS[known.index(method) % len(OTHERS)]


def dark_rules() -> str:
    """Return CSS that recolours an SVG by the colours written in its ``style`` attributes.

    The selectors name no ancestors, since those do not reach what ``<use>`` shows. Programs that know no
    CSS media queries keep the light colours, since those stay in the file.
    """
    rules = []
    for light, dark in DARK.items():
        for name in ("fill", "stroke"):
            rules.append(f'[style*="{name}: {light}"]{{{name}:{dark} !important}}')
    return "".join(rules)
