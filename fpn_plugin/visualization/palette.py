"""Colours that colour-blind readers tell apart, the same in every picture."""

from __future__ import annotations

import re

__all__ = ["CATEGORY_COLORS", "INK", "level_color", "level_title"]

# Okabe and Ito's palette.
_LEVEL_COLORS = {
    2: "#E69F00",
    3: "#56B4E9",
    4: "#009E73",
    5: "#CC79A7",
    6: "#D55E00",
    7: "#0072B2",
}
_PLAIN_COLOR = "#F0E442"
CATEGORY_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
INK = "#222222"


def level_color(level: int | str | None) -> str:
    """The colour that stands for a pyramid level in every picture, as "#RRGGBB".

    Args:
        level: its number, or a name that ends in it: "p4", "res4".
    """
    if isinstance(level, str):
        number = re.search(r"\d+$", level)
        level = int(number.group()) if number else None
    return _PLAIN_COLOR if level is None else _LEVEL_COLORS.get(level, _PLAIN_COLOR)


def level_title(name: str) -> str:
    """How a level is written: P4 for "p4", C4 for "res4", other names as they are."""
    number = re.fullmatch(r"(p|res)(\d+)", name)
    if number is None:
        return name
    return ("P" if number.group(1) == "p" else "C") + number.group(2)
