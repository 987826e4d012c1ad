"""Colours of a report, light and dark. They can be distinguished with any colour vision; the markers differ too."""

from __future__ import annotations

from thanos import registry

INK = "#1f2328"
MUTED = "#5f6872"
GRID = "#dfe3e8"
PAPER = "#ffffff"

# The registry's colours are Okabe and Ito's palette (2008), darkened where its contrast on white is below 3:1.
STYLES: dict[str, tuple[str, str]] = {row.name: (row.colour, row.marker) for row in registry.METHODS}
"""Method of this package → colour and marker."""

KINDS: dict[str, tuple[str, str]] = {
    "dense": ("#1f2328", "o"),
    "sparse": ("#8a6d00", "v<>"),
    "packed": ("#d1490c", "s"),
    "shrunk": ("#008a63", "^"),
    "int8": ("#0072b2", "D"),
    "int4": ("#a4518a", "P"),
}
"""Kind of model in a comparison → colour and markers. The colours are those of the registry, and of the text.

A comparison often has more than two sparse models, and most fill styles of a small triangle look alike. So these models have
several markers.
"""

OTHERS: tuple[tuple[str, str], ...] = (("#6b4f3a", "<"), ("#56606b", "P"), ("#3d5a99", "X"))
"""Styles for methods without their own, assigned in order."""

DARK: dict[str, str] = {
    INK: "#e8eaed",
    MUTED: "#a3adb8",
    GRID: "#333a42",
    PAPER: "#14171a",
    **{row.colour: row.dark_colour for row in registry.METHODS},
    "#6b4f3a": "#cfae94",
    "#56606b": "#b4bec8",
    "#3d5a99": "#9db8f2",
}
"""Colour in the light theme → its counterpart in the dark theme."""


def style_of(method: str, known: list[str]) -> tuple[str, str]:
    """Return colour and markers of a method. ``known`` lists the figure's methods that have no style of their own."""
    style = own_style(method)
    return OTHERS[known.index(method) % len(OTHERS)] if style is None else style


def own_style(method: str) -> tuple[str, str] | None:
    """Return colour and markers of a kind, or from a method's registry row; None if the row has none."""
    if method in KINDS:
        return KINDS[method]
    row = registry.find_method(method)
    return None if row is None or not (row.colour and row.marker) else (row.colour, row.marker)


def dark_rules() -> str:
    """Return CSS that recolours an SVG by the colours written in its ``style`` attributes.

    The selectors name no ancestors, since these do not match elements that ``<use>`` shows. Programs without CSS media queries
    show the light colours.
    """
    rules = []
    own = {row.colour: row.dark_colour for row in registry.methods() if row.colour and row.dark_colour}
    for light, dark in (DARK | own).items():
        for name in ("fill", "stroke"):
            rules.append(f'[style*="{name}: {light}"]{{{name}:{dark} !important}}')
    return "".join(rules)
