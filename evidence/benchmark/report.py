"""benchmark.json, benchmark.md and charts."""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch
import torchvision
from matplotlib.figure import Figure
from tabulate import tabulate

import fpn_plugin
from fpn_plugin.visualization.palette import CATEGORY_COLORS

from .timing import Comparison

__all__ = ["LEAST_PAIRS", "UNITS", "environment", "one_line", "spread", "write_report"]

_OURS, _THEIRS = CATEGORY_COLORS[:2]

LEAST_PAIRS = 7
"""A comparison of fewer pairs is a trial."""


@dataclass(frozen=True)
class Unit:
    """The unit of times in the report."""

    name: str
    symbol: str
    of_a_second: int
    digits: int

    def spread(self, seconds: list[float]) -> str:
        """Median, least and greatest."""
        return spread([each * self.of_a_second for each in seconds], self.digits)


UNITS = {"cpu": Unit("seconds", "s", 1, 3), "cuda": Unit("ms", "ms", 1000, 2)}
"""By device."""


def environment(device: str, size: tuple[int, int], pairs: int) -> dict[str, str]:
    """The machine and versions that the figures depend on."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device}, {processor}",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "image": f"{size[1]} x {size[0]} px",
        "pairs": str(pairs) if pairs >= LEAST_PAIRS else f"{pairs}, a trial: below {LEAST_PAIRS}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "fpn_plugin": fpn_plugin.__version__,
    }


def write_report(
    folder: Path, content: dict[str, Any], comparisons: dict[str, list[Comparison]]
) -> Path:
    """Writes the results so far. It is called after each measurement.

    Args:
        folder: benchmark.json, benchmark.md and a chart of each scaling are written to it.
        content: by part: environment, differences, first_calls, bare_convolutions, profile,
            memory, accuracy, agreement, scaling; on a GPU also counted, graphs, graph_calls,
            trained_calls, failed, and differences and agreement without TF32.
        comparisons: by part (comparisons, steps, training), in the order of the report.

    Returns:
        The path of benchmark.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timed = {
        part: [{**vars(each), "ratio": each.ratio, "ratios": each.ratios} for each in of_part]
        for part, of_part in comparisons.items()
    }
    (folder / "benchmark.json").write_text(json.dumps({**content, **timed}, indent=1))
    parts = ["# Benchmark\n", one_line(content["environment"])]
    device = content["environment"].get("device", "cpu").split(",")[0]
    unit = UNITS[device]
    if device == "cuda":
        table = _aims_table(content.get("counted", []), comparisons, unit)
        parts.append(f"## Aims\n\n{table}")
    if any(comparisons.values()):
        parts.append("Both sides in turn; medians, least and greatest in parentheses.\n")
    for part, title in _COMPARING.items():
        if comparisons.get(part):
            parts.append(f"## {title}\n\n{_comparison_table(comparisons[part], unit)}")
    for name, title in _TITLES.items():
        if content.get(name):
            parts.append(f"## {title}\n\n{_table(content[name])}\n")
    for name, title in _LISTS.items():
        if content.get(name):
            table = tabulate(content[name].items(), tablefmt="github", floatfmt=".1f")
            parts.append(f"## {title}\n\n{table}\n")
    if content.get("profile"):
        total = sum(content["profile"].values())
        rows = [[name, ms, 100 * ms / total] for name, ms in content["profile"].items()]
        table = tabulate(rows, ["operator", "ms", "%"], tablefmt="github", floatfmt=".1f")
        parts.append(f"## Where one image's time goes, optimised float32\n\n{table}\n")
    if content.get("scaling"):
        parts.append("## How the cost grows\n\nSeconds a call, medians of three.\n")
    for what, points in content.get("scaling", {}).items():
        picture = _chart(folder, what, points)
        rows = [
            [value, p["stock"], p["optimised"], p["stock"] / p["optimised"]]
            for value, p in points.items()
        ]
        headers = [what, "stock (s)", "optimised (s)", "ratio"]
        parts.append(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".2f"))
        parts.append(f"\n![{what}]({picture.name})\n")
    path = folder / "benchmark.md"
    path.write_text("\n".join(parts))
    return path


_COMPARING = {
    "comparisons": "Inference",
    "steps": "The gain of each step",
    "training": "Training, and inference after it",
}
_TITLES = {
    "differences": "Detections, stock against optimised float32",
    "differences_without_tf32": "The same without TF32 in cuDNN and cuBLAS",
    "accuracy": "AP on mini_val of a trained mini model (not COCO)",
    "agreement": "Detections of that model on mini_val, optimised float32 against the original",
    "agreement_without_tf32": "The same without TF32 in cuDNN and cuBLAS",
    "first_calls": "The first call of an optimised copy, and making it (seconds)",
    "bare_convolutions": "The model, and its convolutions and products called one by one (seconds)",
    "memory": "Peak memory (MiB)",
}


_LISTS = {
    "graphs": "Memory that a CUDA graph adds (MiB)",
    "graph_calls": "Calls of the optimised copies, by how they ran",
    "trained_calls": "Calls of the trained model's copy, by how they ran",
    "failed": "Not measured",
}


def one_line(values: dict[str, str]) -> str:
    """The environment, for people."""
    return ", ".join(f"{key}: {value}" for key, value in values.items()) + ".\n"


def _table(values: dict[str, Any]) -> str:
    return tabulate(
        [list(values.values())], headers=list(values), tablefmt="github", floatfmt=".4g"
    )


def spread(values: list[float], digits: int) -> str:
    """Median, least and greatest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _aims_table(
    counted: list[dict[str, Any]], comparisons: dict[str, list[Comparison]], unit: Unit
) -> str:
    """Measurements with an aim, and whether they meet it."""
    rows = []
    for each in itertools.chain(*comparisons.values()):
        if each.met is not None:
            medians = map(statistics.median, (each.baseline_seconds, each.seconds))
            times = (f"{median * unit.of_a_second:.2f} {unit.symbol}" for median in medians)
            met = "yes" if each.met else "no"
            aim = _aim(each, unit)
            rows.append([each.name, each.baseline, *times, f"{each.ratio:.2f}", aim, met])
    for each in counted:
        met = "yes" if each["plugin"] <= each["aim"] else "no"
        figures = [f"{each[key]:.4g}" for key in ("stock", "plugin", "aim")]
        rows.append([each["name"], "stock Detectron2", *figures[:2], "-", f"<= {figures[2]}", met])
    headers = ["what", "against", "its", "plugin's", "times faster", "aim", "met"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True) + "\n"


def _aim(comparison: Comparison, unit: Unit) -> str:
    if comparison.target is None:
        return "-"
    limit = comparison.limit
    at_most = "" if limit is None else f", <= {limit * unit.of_a_second:g} {unit.symbol}"
    return f">= {comparison.target}{at_most}"


def _comparison_table(comparisons: list[Comparison], unit: Unit) -> str:
    rows = []
    for each in comparisons:
        times = map(unit.spread, (each.baseline_seconds, each.seconds))
        rows.append([each.name, each.baseline, *times, spread(each.ratios, 2), _aim(each, unit)])
    headers = ["what", "against", f"its {unit.name}", f"plugin's {unit.name}", "times faster"]
    headers.append("aim")
    return tabulate(rows, headers=headers, tablefmt="github") + "\n"


def _chart(folder: Path, what: str, points: dict[int, dict[str, float]]) -> Path:
    figure = Figure(figsize=(6, 4), dpi=140, layout="constrained")
    axes = figure.subplots()
    values = [int(value) for value in points]
    for name, color, marker in (("stock", _THEIRS, "s"), ("optimised", _OURS, "o")):
        seconds = [point[name] for point in points.values()]
        axes.plot(values, seconds, color=color, marker=marker, lw=2, label=name)
    axes.set_xlabel({"image side": "image side (px)"}.get(what, what))
    axes.set_ylabel("seconds a call")
    axes.set_ylim(bottom=0)
    axes.set_xticks(values)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / f"{what.replace(' ', '_')}.png"
    figure.savefig(path)
    return path
