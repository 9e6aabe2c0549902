"""Colours that colour-blind readers can distinguish, the same in every picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from matplotlib.colors import to_rgb

__all__ = [
    "BLUE",
    "CATEGORY_COLORS",
    "GRAY",
    "GREEN",
    "INK",
    "ORANGE",
    "PURPLE",
    "VERMILION",
    "category_colors",
    "level_color",
    "level_title",
    "text_color",
]

# Okabe and Ito's palette.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, _SKY, _YELLOW = "#E69F00", "#56B4E9", "#F0E442"
CATEGORY_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, _SKY, _YELLOW)
_LEVEL_COLORS = {2: ORANGE, 3: _SKY, 4: GREEN, 5: PURPLE, 6: VERMILION, 7: BLUE}
INK, GRAY = "#222222", "#999999"


def category_colors(names: Sequence[str], own: Mapping[str, str]) -> list[str]:
    """The colour of each class: its own if it has one, else the next of the palette."""
    places = enumerate(names)
    return [own.get(name, CATEGORY_COLORS[i % len(CATEGORY_COLORS)]) for i, name in places]


def level_color(level: int | str | None) -> str:
    """The colour that stands for a pyramid level in every picture, as "#RRGGBB".

    Args:
        level: its number, or a name that ends in it: "p4", "res4".
    """
    if isinstance(level, str):
        number = re.search(r"\d+$", level)
        level = int(number.group()) if number else None
    return _LEVEL_COLORS.get(level, _YELLOW)


def text_color(ground: str) -> str:
    """Black or white, whichever has the higher contrast with a ground (WCAG 2.2)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(ground)]
    red, green, blue = linear
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def level_title(name: str) -> str:
    """The title of a level: P4 for "p4", C4 for "res4", other names as they are."""
    number = re.fullmatch(r"(p|res)(\d+)", name)
    if number is None:
        return name
    return ("P" if number.group(1) == "p" else "C") + number.group(2)
