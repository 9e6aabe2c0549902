"""The report of runs next to the paper's figures: report.md, report.json and charts."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from matplotlib.figure import Figure
from tabulate import tabulate

import fpn_plugin
from fpn_plugin.errors import UserError
from fpn_plugin.visualization.palette import CATEGORY_COLORS

from .runs import PARTS, Outcome, RunFolder, code_files, code_version
from .tables import TABLES, Row, Table

__all__ = ["Summary", "mean_with_spread", "read_runs", "summarize", "write_report"]

_MINI = (
    "**These are runs on the mini dataset: 256 px drawings, ResNet-18 of a quarter of the paper's "
    "width, a few minutes each. They are not COCO results. Compare the differences between rows "
    "with the paper's, never the figures themselves.**"
)
_PAPER = "Runs on COCO, trained on train2017 and evaluated on val2017 (trainval35k and minival)."
_OURS, _THEIRS = CATEGORY_COLORS[:2]


@dataclass(frozen=True)
class Summary:
    """A row over its seeds: mean of each metric, and its standard deviation (0 for one seed)."""

    seeds: list[int]
    mean: dict[str, float]
    spread: dict[str, float]
    groups: dict[str, float]
    groups_spread: dict[str, float]
    losses: list[float]
    seconds_per_iteration: float
    seconds_per_image: float


def summarize(outcomes: dict[int, Outcome], metrics: dict[str, str]) -> Summary:
    """Summarizes the outcomes of a row's seeds.

    Args:
        outcomes: by seed; at least one.
        metrics: the paper's column to the key in an outcome's metrics.
    """
    every = list(outcomes.values())

    def spread(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    columns = {name: [o.metrics[key] for o in every] for name, key in metrics.items()}
    groups = {name: [o.groups[name] for o in every] for name in every[0].groups}
    return Summary(
        seeds=sorted(outcomes),
        mean={name: statistics.mean(values) for name, values in columns.items()},
        spread={name: spread(values) for name, values in columns.items()},
        groups={name: statistics.mean(values) for name, values in groups.items()},
        groups_spread={name: spread(values) for name, values in groups.items()},
        # Empty if a seed has none.
        losses=[statistics.mean(part) for part in zip(*(o.losses for o in every), strict=False)],
        seconds_per_iteration=statistics.median(o.seconds_per_iteration for o in every),
        seconds_per_image=statistics.median(o.seconds_per_image for o in every),
    )


def read_runs(report: Path, folders: Iterable[RunFolder]) -> dict[RunFolder, Outcome]:
    """Outcomes of runs in an earlier report, for example of another machine.

    Args:
        report: a report.json.
        folders: the runs to look for.

    Raises:
        UserError: it is no report, or one of its runs was made by another config or other code.
    """
    try:
        recorded = json.loads(report.read_text())["runs"]
        known = {(entry["run"], entry["seed"], entry["scale"]): entry for entry in recorded}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report} is no report.json of this command: {error}") from error
    found = {}
    for folder in folders:
        entry = known.get((folder.run.name, folder.seed, folder.scale))
        if entry is None:
            continue
        outcome = Outcome(**entry["outcome"])
        differs = folder.differs(outcome.made_by)
        if differs:
            raise UserError(
                f"{report}: {folder.run.name} seed {folder.seed} was made by {differs}; runs are "
                "never mixed"
            )
        found[folder] = outcome
    return found


def write_report(
    tables: dict[int, list[Row]], outcomes: dict[RunFolder, Outcome], folder: Path
) -> Path:
    """Writes the report of rows.

    Args:
        tables: the rows to show, by table.
        outcomes: results of finished runs.
        folder: gets report.md, report.json and table<N>.png; its name is the scale.

    Returns:
        The path of report.md.
    """
    facts = _facts(folder.name)
    parts = [f"# The paper's tables at {folder.name} scale", _MINI, _how_made(facts)]
    if folder.name != "mini":
        parts[1] = _PAPER
    by_run: dict[str, dict[int, Outcome]] = {}
    for run, outcome in outcomes.items():
        by_run.setdefault(run.run.name, {})[run.seed] = outcome
    content: dict[str, object] = {"made": facts, "tables": {}}
    for number, rows in tables.items():
        table = TABLES[number]
        summaries = {
            row.key: summarize(by_run[row.run], table.metrics) for row in rows if row.run in by_run
        }
        parts += _section(table, rows, summaries)
        if summaries:
            _chart(table, rows, summaries, folder.name, folder / f"table{number}.png")
            parts.append(f"![Table {number}](table{number}.png)")
        content["tables"][str(number)] = {
            row.key: {
                "title": row.title,
                "run": row.run,
                "published": row.published,
                "here": asdict(summaries[row.key]) if row.key in summaries else None,
            }
            for row in rows
        }
    content["runs"] = [
        {
            "run": run.run.name,
            "seed": run.seed,
            "scale": run.scale,
            "outcome": asdict(outcome),
        }
        for run, outcome in outcomes.items()
    ]
    (folder / "report.json").write_text(json.dumps(content, indent=1))
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def _facts(scale: str) -> dict[str, str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "scale": scale,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": f"{gpus} x {torch.cuda.get_device_name(0)}"
        if gpus
        else f"{os.cpu_count()} CPU cores",
    }


def _commit() -> str:
    """The checkout's commit, with "+" if the code that trains has changed since; else ""."""
    root = Path(fpn_plugin.__file__).parent
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        read = [*map(str, code_files()), "../configs"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *read])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if changed.returncode else "")


def _how_made(facts: dict[str, str]) -> str:
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    return (
        f"Made on {facts['date']}{commit} (code {facts['code']}) with fpn_plugin "
        f"{fpn_plugin.__version__}, Python {facts['python']}, torch {facts['torch']}, torchvision "
        f"{facts['torchvision']}, on {facts['device']}. In parentheses: the difference to the row "
        "that the table compares with, (c) in Tables 1 to 3. ±: standard deviation over seeds."
    )


def _section(table: Table, rows: Sequence[Row], summaries: dict[str, Summary]) -> list[str]:
    parts = [f"## Table {table.number}. {table.title}"]
    if table.note:
        parts.append(table.note)
    body = []
    for row in rows:
        here = summaries.get(row.key)
        cells = [row.title, ",".join(map(str, here.seeds)) if here else "-"]
        for name in table.metrics:
            cells += [_cell(name, row, summaries), _published_cell(name, row, table)]
        cells += [
            f"{here.seconds_per_iteration:.2f}" if here else "-",
            f"{here.seconds_per_image:.3f}" if here else "-",
        ]
        body.append(cells)
    headers = ["row", "seeds"]
    for name in table.metrics:
        headers += [name, f"{name} paper"]
    headers += ["s/iteration", "s/image"]
    parts.append(_markdown(body, headers))
    groups = next((list(s.groups) for s in summaries.values() if s.groups), [])
    if groups:
        what = "AR1k" if table.task == "box_proposals" else "AP"
        body = [
            [row.title, *(_cell(group, row, summaries, groups=True) for group in groups)]
            for row in rows
            if row.key in summaries
        ]
        parts.append(f"{what} of each group of categories:")
        parts.append(_markdown(body, ["row", *groups]))
    logged = [row for row in rows if row.key in summaries and summaries[row.key].losses]
    if logged:
        parts.append("Total loss, mean over each eighth of the training:")
        body = [[row.title, *(f"{x:.3f}" for x in summaries[row.key].losses)] for row in logged]
        headers = ["row", *(f"{part}/{PARTS}" for part in range(1, PARTS + 1))]
        parts.append(_markdown(body, headers))
    words = _in_words(table, rows, summaries)
    return [*parts, words] if words else parts


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def mean_with_spread(mean: float, spread: float, count: int) -> str:
    """A mean over seeds and, if there are several, their standard deviation: ``"40.5 ± 0.7"``."""
    return f"{mean:.1f} ± {spread:.1f}" if count > 1 else f"{mean:.1f}"


def _difference(row: Row, value: float, reference: float | None) -> str:
    if reference is None or row.against in (None, row.key):
        return ""
    return f" ({value - reference:+.1f})"


def _cell(name: str, row: Row, summaries: dict[str, Summary], groups: bool = False) -> str:
    """Mean, spread and difference of a metric, or of a group of categories."""
    here, reference = summaries.get(row.key), summaries.get(row.against or "")
    if here is None:
        return "-"
    mean, spread = ("groups", "groups_spread") if groups else ("mean", "spread")
    value = getattr(here, mean)[name]
    text = mean_with_spread(value, getattr(here, spread)[name], len(here.seeds))
    return text + _difference(row, value, reference and getattr(reference, mean)[name])


def _published_cell(name: str, row: Row, table: Table) -> str:
    if name not in row.published:
        return "-"
    by_key = {other.key: other for other in table.rows}
    reference = by_key[row.against].published.get(name) if row.against else None
    return f"{row.published[name]:.1f}" + _difference(row, row.published[name], reference)


def _in_words(table: Table, rows: Sequence[Row], summaries: dict[str, Summary]) -> str:
    """Whether pairs of rows have the paper's order by the main metric."""
    both = [r for r in rows if r.key in summaries and table.main in r.published]
    if len(both) < 2:
        return ""
    here = {row.key: summaries[row.key].mean[table.main] for row in both}
    spread = {row.key: summaries[row.key].spread[table.main] for row in both}
    paper = {row.key: row.published[table.main] for row in both}
    agree, other = [], []
    for a, b in itertools.combinations(both, 2):
        same = (here[a.key] - here[b.key]) * (paper[a.key] - paper[b.key]) > 0
        first, second = sorted((a, b), key=lambda row: -paper[row.key])
        gap = here[second.key] - here[first.key]
        noise = (spread[a.key] ** 2 + spread[b.key] ** 2) ** 0.5
        within = f", less than the seeds' spread of {noise:.1f}" if abs(gap) < noise else ""
        if same:
            agree.append(f"{first.key} over {second.key}")
        else:
            other.append(
                f"{first.key} over {second.key} in the paper, here {gap:+.1f} the other way{within}"
            )

    def order(figures: dict[str, float]) -> str:
        ranked = sorted(figures.items(), key=lambda item: -item[1])
        return " > ".join(f"{key} {value:.1f}" for key, value in ranked)

    lines = [
        f"By {table.main}, here: {order(here)}. Paper: {order(paper)}.",
        f"{len(agree)} of {len(agree) + len(other)} pairs of rows have the paper's order.",
    ]
    if other:
        lines.append(f"The others: {'; '.join(other)}.")
    return " ".join(lines)


def _chart(
    table: Table, rows: Sequence[Row], summaries: dict[str, Summary], scale: str, path: Path
) -> None:
    """Draws every metric of every row, this run's next to the paper's, each on its own axis."""
    shown = [row for row in rows if row.key in summaries or row.published]
    places = range(len(shown))
    figure = Figure(
        figsize=(2.2 + 2.3 * len(table.metrics), 1.6 + 0.5 * len(shown)),
        dpi=130,
        layout="constrained",
    )
    all_axes = figure.subplots(1, len(table.metrics), sharey=True, squeeze=False)[0]
    for axes, name in zip(all_axes, table.metrics, strict=True):
        here = [(i, summaries[r.key]) for i, r in enumerate(shown) if r.key in summaries]
        axes.errorbar(
            [s.mean[name] for _, s in here],
            [i - 0.13 for i, _ in here],
            xerr=[s.spread[name] for _, s in here],
            fmt="o",
            color=_OURS,
            capsize=3,
            label=f"this run, {scale}",
        )
        paper = [(i, r.published[name]) for i, r in enumerate(shown) if name in r.published]
        axes.plot(
            [value for _, value in paper],
            [i + 0.13 for i, _ in paper],
            "D",
            color=_THEIRS,
            mfc="none",
            label="paper, COCO",
        )
        axes.set_title(name, fontsize=11)
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.12)
    all_axes[0].set_yticks(list(places), [row.title for row in shown])
    all_axes[0].invert_yaxis()
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(f"Table {table.number}. {table.title}", fontsize=12)
    figure.savefig(path)
