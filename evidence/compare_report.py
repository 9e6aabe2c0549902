"""The report of trainings with a config and with the fitted one: report.md, .json and a chart."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from tabulate import tabulate

from fpn_plugin.fitting import Recommendation
from fpn_plugin.paper.report import mean_with_spread
from fpn_plugin.visualization.palette import CATEGORY_COLORS

__all__ = ["Compared", "write_comparison"]

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "ARs", "ARm", "ARl")
_COLORS = dict(zip(("fitted", "default"), CATEGORY_COLORS, strict=False))
_MARKERS = {"default": "D", "fitted": "o"}


@dataclass
class Compared:
    """The comparison on one dataset.

    Attributes:
        name: of the dataset.
        recommendations: of fitting the config to it.
        runs: metrics by seed, for "default" and "fitted".
    """

    name: str
    recommendations: list[Recommendation]
    runs: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)

    @property
    def changes(self) -> list[str]:
        """Subjects that fitting changes."""
        return [each.subject for each in self.recommendations if not each.keep]

    def values(self, which: str, metric: str) -> list[float]:
        """A metric of every seed, in their order."""
        return [run[metric] for _, run in sorted(self.runs.get(which, {}).items())]


def write_comparison(compared: Sequence[Compared], iterations: int, folder: Path) -> Path:
    """Writes the report.

    Args:
        compared: the comparison on each dataset.
        iterations: of each training.
        folder: gets report.md, report.json and comparison.png.

    Returns:
        The path of report.md.
    """
    parts = [
        "# A pyramid as it is and fitted, trained equally long",
        "**Runs on mini datasets, a few minutes each: they say nothing about COCO.** Each "
        f"training has {iterations} iterations. ±: standard deviation over seeds. AR: of at most "
        "100 detections an image.",
        _table(compared),
        "![AP with the config as it is and fitted](comparison.png)",
        *(_in_words(each) for each in compared),
    ]
    _chart(compared).savefig(folder / "comparison.png")
    content = {"iterations": iterations, "data": [_without_nan(asdict(each)) for each in compared]}
    (folder / "report.json").write_text(json.dumps(content, indent=1))
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def _without_nan(value: Any) -> Any:
    """The same without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(compared: Sequence[Compared]) -> str:
    rows = []
    for each in compared:
        for which, runs in each.runs.items():
            cells = [each.name, which, ",".join(map(str, sorted(runs)))]
            for metric in _METRICS:
                cells.append(_cell(each.values(which, metric)))
            rows.append([*cells, f"{statistics.median(each.values(which, 's/it')):.2f}"])
        if not each.changes:
            rows.append([each.name, "fitted", "the config is kept"])
    headers = ["data", "pyramid", "seeds", *_METRICS, "s/it"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _cell(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return mean_with_spread(statistics.mean(values), spread, len(values))


def _in_words(each: Compared) -> str:
    """The gains of fitting, and what it changed."""
    if not each.changes:
        return f"**{each.name}**: the config is kept; there is nothing to compare."
    gains = []
    for metric in ("AP", "AR"):
        default, fitted = (each.values(which, metric) for which in ("default", "fitted"))
        gain = statistics.mean(fitted) - statistics.mean(default)
        text = f"{metric} {gain:+.1f}"
        if len(fitted) > 1:
            pairs = zip(default, fitted, strict=True)
            higher = sum(b > a for a, b in pairs)
            text += f" (higher with {higher} of {len(fitted)} seeds)"
        gains.append(text)
    lines = [f"**{each.name}**: {', '.join(gains)}. Fitting changes {' and '.join(each.changes)}."]
    lines += [f"- {r.subject}: {r.reason} {r.effect}" for r in each.recommendations if not r.keep]
    return "\n".join(lines)


def _chart(compared: Sequence[Compared]) -> Figure:
    with matplotlib.rc_context({"font.size": 13}):
        figure = Figure(figsize=(10, 1.8 + len(compared)), dpi=120, layout="constrained")
        all_axes = figure.subplots(1, 2, sharey=True)
        for axes, metric in zip(all_axes, ("AP", "AR"), strict=True):
            for which, shift in (("default", -0.14), ("fitted", 0.14)):
                for place, each in enumerate(compared):
                    values = each.values(which, metric)
                    if not values:
                        continue
                    at, color = place + shift, _COLORS[which]
                    axes.plot(values, [at] * len(values), ".", color=color, alpha=0.5, ms=8)
                    mean = statistics.mean(values)
                    axes.plot(
                        mean, at, _MARKERS[which], color=color, mec="black", ms=10,
                        label="as it is" if which == "default" else "fitted",
                    )  # fmt: skip
                    axes.annotate(
                        f"{mean:.1f}", (mean, at), (0, -15 if shift > 0 else 15),
                        textcoords="offset points", ha="center", va="center",
                    )  # fmt: skip
            axes.set_title(metric)
            axes.grid(axis="x", alpha=0.3)
            axes.margins(x=0.2, y=0.2)
            axes.set_xlabel("points; small marks: seeds")
        all_axes[0].set_yticks(range(len(compared)), [each.name for each in compared])
        all_axes[0].invert_yaxis()
        handles = dict(zip(*all_axes[0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure
