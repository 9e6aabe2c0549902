"""Colours that colour-blind readers can distinguish, the same in every picture."""

from __future__ import annotations

import re

__all__ = [
    "BLUE",
    "CATEGORY_COLORS",
    "GRAY",
    "GREEN",
    "INK",
    "ORANGE",
    "PURPLE",
    "VERMILION",
    "level_color",
    "level_title",
]

# Okabe and Ito's palette.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, _SKY, _YELLOW = "#E69F00", "#56B4E9", "#F0E442"
CATEGORY_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, _SKY, _YELLOW)
_LEVEL_COLORS = {2: ORANGE, 3: _SKY, 4: GREEN, 5: PURPLE, 6: VERMILION, 7: BLUE}
INK, GRAY = "#222222", "#999999"


def level_color(level: int | str | None) -> str:
    """The colour that stands for a pyramid level in every picture, as "#RRGGBB".

    Args:
        level: its number, or a name that ends in it: "p4", "res4".
    """
    if isinstance(level, str):
        number = re.search(r"\d+$", level)
        level = int(number.group()) if number else None
    return _LEVEL_COLORS.get(level, _YELLOW)


def level_title(name: str) -> str:
    """The title of a level: P4 for "p4", C4 for "res4", other names as they are."""
    number = re.fullmatch(r"(p|res)(\d+)", name)
    if number is None:
        return name
    return ("P" if number.group(1) == "p" else "C") + number.group(2)
