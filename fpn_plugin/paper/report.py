"""The report of runs next to the paper's figures: report.md, report.json and charts."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from matplotlib.figure import Figure
from tabulate import tabulate

import fpn_plugin
from fpn_plugin.errors import UserError
from fpn_plugin.visualization.palette import CATEGORY_COLORS

from .costs import COSTS
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
    costs: dict[str, float]


def summarize(outcomes: dict[int, Outcome], metrics: dict[str, str]) -> Summary:
    """Summarizes the outcomes of a row's seeds.

    Args:
        outcomes: by seed; at least one.
        metrics: the paper's column to the key in an outcome's metrics.
    """
    every = list(outcomes.values())
    spread = statistics.stdev if len(every) > 1 else lambda _: 0.0
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
        costs={name: statistics.median(o.costs[name] for o in every) for name in every[0].costs},
    )


def read_runs(report: Path, folders: Iterable[RunFolder]) -> dict[RunFolder, Outcome]:
    """Outcomes of runs in an earlier report, for example of another machine.

    Args:
        report: a report.json.
        folders: the runs to look for.

    Raises:
        UserError: the file is not a report, or another config or other code made one of the runs.
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
        found[folder] = Outcome(**entry["outcome"])
        if differs := folder.differs(found[folder].made_by):
            raise UserError(
                f"{report}: {folder.run.name} seed {folder.seed} was made by {differs}; runs are "
                "never mixed"
            )
    return found


def write_report(
    tables: dict[int | str, list[Row]], outcomes: dict[RunFolder, Outcome], folder: Path
) -> Path:
    """Writes the report of rows.

    Args:
        tables: the rows to show, by table.
        outcomes: results of finished runs.
        folder: gets report.md, report.json and table<N>.png or figure<N>.png; its name is the
            scale.

    Returns:
        The path of report.md.
    """
    facts = _facts(folder.name)
    parts = [f"# The paper's tables at {folder.name} scale"]
    parts += [_MINI if folder.name == "mini" else _PAPER, _how_made(facts)]
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
            picture = folder / f"{table.name.lower().replace(' ', '')}.png"
            if table.costs:
                _chart_over_seconds(table, rows, summaries, folder.name, picture)
            else:
                _chart(table, rows, summaries, folder.name, picture)
            parts.append(f"![{table.name}]({picture.name})")
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
        {"run": run.run.name, "seed": run.seed, "scale": run.scale, "outcome": asdict(outcome)}
        for run, outcome in outcomes.items()
    ]
    (folder / "report.json").write_text(json.dumps(content, indent=1))
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def _facts(scale: str) -> dict[str, str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else f"{os.cpu_count()} CPU cores"
    return {
        "scale": scale,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "code": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": device,
    }


def _commit() -> str:
    """The checkout's commit, with "+" if the code that trains has changed since; else ""."""
    git = ["git", "-C", str(Path(fpn_plugin.__file__).parent)]
    head_of = [*git, "rev-parse", "--short=12", "HEAD"]
    try:
        head = subprocess.run(head_of, capture_output=True, text=True, check=True)
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
        "that the table compares with, (c) in Tables 1 to 3, 5 x 5 in Table 6 and (d) in Figure 1. "
        "±: standard deviation over seeds."
    )


def _section(table: Table, rows: Sequence[Row], summaries: dict[str, Summary]) -> list[str]:
    parts = [f"## {table.name}. {table.title}", *filter(None, [table.note])]
    body, published = [], any(row.published for row in table.rows)
    costs = COSTS if table.costs else ()
    for row in rows:
        here = summaries.get(row.key)
        cells = [row.title, ",".join(map(str, here.seeds)) if here else "-"]
        for name in table.metrics:
            cells += [_cell(name, row, summaries)]
            cells += [_published_cell(name, row, table)] if published else []
        cells += [f"{here.seconds_per_iteration:.2f}" if here else "-"]
        cells += [f"{here.seconds_per_image:.3f}" if here else "-"]
        body.append([*cells, *(f"{here.costs[c]:.1f}" if here else "-" for c in costs)])
    columns = [c for n in table.metrics for c in ([n, f"{n} paper"] if published else [n])]
    parts.append(_markdown(body, ["row", "seeds", *columns, "s/iteration", "s/image", *costs]))
    shown = [row for row in rows if row.key in summaries]
    groups = next((list(s.groups) for s in summaries.values() if s.groups), [])
    if groups:
        what = "AR1k" if table.task == "box_proposals" else "AP"
        body = [[row.title, *(_cell(g, row, summaries, "groups") for g in groups)] for row in shown]
        parts += [f"{what} of each group of categories:", _markdown(body, ["row", *groups])]
    losses = {row.title: summaries[row.key].losses for row in shown}
    body = [[title, *(f"{x:.3f}" for x in of_row)] for title, of_row in losses.items() if of_row]
    if body:
        headers = ["row", *(f"{part}/{PARTS}" for part in range(1, PARTS + 1))]
        parts += ["Total loss, mean over each eighth of the training:", _markdown(body, headers)]
    return [*parts, *_in_words(table, shown, summaries)]


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def mean_with_spread(mean: float, spread: float, count: int) -> str:
    """A mean over seeds and, if there are several, their standard deviation: ``"40.5 ± 0.7"``."""
    return f"{mean:.1f} ± {spread:.1f}" if count > 1 else f"{mean:.1f}"


def _difference(row: Row, value: float, reference: float | None) -> str:
    if reference is None or row.against in (None, row.key):
        return ""
    return f" ({value - reference:+.1f})"


def _cell(name: str, row: Row, summaries: dict[str, Summary], of: str = "mean") -> str:
    """Mean, spread and difference of a metric or, ``of`` "groups", of a group of categories."""
    here, reference = summaries.get(row.key), summaries.get(row.against or "")
    if here is None:
        return "-"
    value = getattr(here, of)[name]
    spread = (here.spread if of == "mean" else here.groups_spread)[name]
    text = mean_with_spread(value, spread, len(here.seeds))
    return text + _difference(row, value, reference and getattr(reference, of)[name])


def _published_cell(name: str, row: Row, table: Table) -> str:
    if name not in row.published:
        return "-"
    published = {other.key: other.published.get(name) for other in table.rows}
    value = row.published[name]
    return f"{value:.1f}" + _difference(row, value, published.get(row.against))


def _in_words(table: Table, rows: Sequence[Row], summaries: dict[str, Summary]) -> Iterator[str]:
    """Whether pairs of rows have the paper's order by the main metric."""
    paper = {row.key: row.published[table.main] for row in rows if table.main in row.published}
    if len(paper) < 2:
        return
    here = {key: summaries[key].mean[table.main] for key in paper}
    others = []
    pairs = list(itertools.combinations(sorted(paper, key=paper.__getitem__, reverse=True), 2))
    for first, second in pairs:
        gap = here[second] - here[first]
        if gap < 0 and paper[first] > paper[second]:
            continue
        noise = math.hypot(*(summaries[key].spread[table.main] for key in (first, second)))
        within = f", less than the seeds' spread of {noise:.1f}" if abs(gap) < noise else ""
        others.append(f"{first} over {second} in the paper, here {gap:+.1f} the other way{within}")

    def order(figures: dict[str, float]) -> str:
        ranked = sorted(figures.items(), key=lambda item: -item[1])
        return " > ".join(f"{key} {value:.1f}" for key, value in ranked)

    yield (
        f"By {table.main}, here: {order(here)}. Paper: {order(paper)}. {len(pairs) - len(others)} "
        f"of {len(pairs)} pairs of rows have the paper's order."
        + (f" The others: {'; '.join(others)}." if others else "")
    )


def _chart(
    table: Table, rows: Sequence[Row], summaries: dict[str, Summary], scale: str, path: Path
) -> None:
    """Draws every metric of every row, this run's next to the paper's, each on its own axis."""
    shown = [row for row in rows if row.key in summaries or row.published]
    size = (2.2 + 2.3 * len(table.metrics), 1.6 + 0.5 * len(shown))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    all_axes = figure.subplots(1, len(table.metrics), sharey=True, squeeze=False)[0]
    for axes, name in zip(all_axes, table.metrics, strict=True):
        here = [(i, summaries[r.key]) for i, r in enumerate(shown) if r.key in summaries]
        axes.errorbar(
            [s.mean[name] for _, s in here], [i - 0.13 for i, _ in here],
            xerr=[s.spread[name] for _, s in here], fmt="o", color=_OURS, capsize=3,
            label=f"this run, {scale}",
        )  # fmt: skip
        paper = [(r.published[name], i + 0.13) for i, r in enumerate(shown) if name in r.published]
        values, places = [value for value, _ in paper], [place for _, place in paper]
        axes.plot(values, places, "D", color=_THEIRS, mfc="none", label="paper, COCO")
        axes.set_title(name, fontsize=11)
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.12)
    all_axes[0].set_yticks(range(len(shown)), [row.title for row in shown])
    all_axes[0].invert_yaxis()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"{table.name}. {table.title}", fontsize=12)
    figure.savefig(path)


def _chart_over_seconds(
    table: Table, rows: Sequence[Row], summaries: dict[str, Summary], scale: str, path: Path
) -> None:
    """Draws the main metric of every row over its seconds an image."""
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    for row, color in zip(rows, CATEGORY_COLORS, strict=False):
        if here := summaries.get(row.key):
            axes.errorbar(
                [here.seconds_per_image], [here.mean[table.main]],
                yerr=[here.spread[table.main]], fmt="o", color=color, capsize=3, label=row.title,
            )  # fmt: skip
    axes.set(xlabel=f"seconds an image, {scale}", ylabel=table.main)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(f"{table.name}. {table.title}", fontsize=12)
    figure.savefig(path)
