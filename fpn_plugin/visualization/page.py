"""An HTML page in one file: text, tables, and pictures as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tabulate import tabulate

from .palette import BLUE, INK

__all__ = ["Page"]

_STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; background: #fff; max-width: 1160px;
       margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.7em; margin-bottom: 0; }}
h2 {{ margin-top: 2em; border-bottom: 1px solid #ccc; }}
nav a {{ margin-right: 1.2em; }} a {{ color: {BLUE}; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ padding: 0.25em 0.9em; text-align: right; border-bottom: 1px solid #ddd; }}
th {{ border-bottom: 2px solid #888; }} th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }} figure {{ margin: 1em 0; }} figcaption, .note {{ color: #555; }}
"""


class Page:
    """A page, built section by section. :meth:`html` returns it.

    Args:
        title: of the page.
        subtitle: a line under the title.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title, self._subtitle = title, subtitle
        self._body: list[str] = []
        self._sections: list[str] = []

    def section(self, title: str) -> None:
        """Begins a section."""
        self._sections.append(title)
        self._body.append(f'<h2 id="s{len(self._sections)}">{escape(title)}</h2>')

    def text(self, text: str) -> None:
        """Adds a paragraph."""
        self._body.append(f'<p class="note">{escape(text)}</p>')

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Adds a table. Cells are written as they are."""
        cells = [[str(value) for value in row] for row in rows]
        self._body.append(tabulate(cells, headers, tablefmt="html", disable_numparse=True))

    def picture(self, path: Path, caption: str) -> None:
        """Copies a PNG file into the page."""
        data = base64.b64encode(path.read_bytes()).decode()
        self._body.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The page."""
        links = " ".join(
            f'<a href="#s{number}">{escape(title)}</a>'
            for number, title in enumerate(self._sections, start=1)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
            f"<h1>{escape(self._title)}</h1>\n<p>{escape(self._subtitle)}</p>\n"
            f"<nav>{links}</nav>\n" + "\n".join(self._body) + "\n</body></html>\n"
        )
