"""The report of a fit: report.md, report.json, fitted.yaml and charts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from fvcore.common.config import BASE_KEY
from tabulate import tabulate

from fpn_plugin.config import value_at
from fpn_plugin.data import number_of_classes
from fpn_plugin.errors import UserError

from . import charts
from .fit import Fit
from .ground_truth import LEFT_OUT
from .measures import PERCENTILES, Measures

__all__ = ["check_output", "write_config", "write_report"]

_SIZES = "Sizes are sqrt(w h), in pixels of the input:"
_POOR_RECALL = 0.5  # share of objects that an anchor overlaps by 0.5; with less no config fits
_OVERLAPS = {"mean_iou": "IoU", "recall_50": "recall 0.5", "recall_70": "recall 0.7"}


def write_report(
    fit: Fit,
    sources: Sequence[str],
    base: Path,
    opts: Sequence[str],
    folder: Path,
    registered: Sequence[str] = (),
) -> str:
    """Writes report.md, report.json, fitted.yaml and charts to a folder.

    Args:
        fit: the fit.
        sources: names of the datasets, as given.
        base: the config file that was fitted.
        opts: config keys that the command line set; fitted.yaml sets them too.
        folder: made if it does not exist.
        registered: the --dataset arguments that named datasets.

    Returns:
        The text of report.md.

    Raises:
        UserError: the folder's fitted.yaml is a base of the config.
    """
    check_output(base, folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "fitted.yaml"
    write_config(fit, base, opts, config)
    pictures = charts.draw(fit, folder)
    text = _text(fit, sources, base, _command(fit, sources, registered, config), pictures)
    (folder / "report.md").write_text(text)
    content = {
        "data": list(sources),
        "config": str(base),
        "images": len(fit.truth.shapes),
        "boxes": len(fit.truth.boxes),
        "clipped_to_image": fit.truth.clipped,
        "left_out": fit.truth.left_out,
        "short_edges": list(fit.rule.short_edges),
        "max_size": fit.rule.max_size,
        "sizes_dealt_out": fit.inputs.sampled,
        "limited_by_max_size": fit.inputs.limited,
        "objects_per_image": fit.density.as_dict(),
        "before": fit.before.as_dict(),
        "after": fit.after.as_dict(),
        "at_test_size": fit.test.as_dict(),
        "input_sizes": fit.input_sizes,
        "recommendations": [asdict(each) for each in fit.recommendations],
    }
    (folder / "report.json").write_text(json.dumps(content, indent=1))
    return text


def check_output(base: Path, folder: Path) -> None:
    """Refuses an output folder whose fitted.yaml is the config file ``base``, or a base of it.

    Raises:
        UserError: it is; names both.
    """
    path = folder / "fitted.yaml"
    if _is_based_on(base, path):
        raise UserError(
            f"{base} is based on {path}, which would be overwritten by a config based on "
            f"{base.name}: give another --output than {folder}"
        )


def write_config(fit: Fit, base: Path, opts: Iterable[str], path: Path) -> None:
    """Writes a config whose _BASE_ is the user's, with the user's options and the changes.

    Args:
        fit: the fit.
        base: the config file that was fitted.
        opts: config keys that the command line set.
        path: of the new config.
    """
    here = Path.cwd()
    base, folder = base.resolve(), path.parent.resolve()
    # A relative path, so that the folder of both can be moved; not to a packaged config.
    if base.is_relative_to(here) and folder.is_relative_to(here):
        base = Path(*[".."] * len(folder.relative_to(here).parts), base.relative_to(here))
    content: dict[str, Any] = {BASE_KEY: base.as_posix()}
    changed = [key for each in fit.recommendations for key in each.changes]
    for key in dict.fromkeys([*opts, *changed]):
        node = content
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value_at(fit.fitted, key)
    comments = [f"# {each.subject}: {each.reason} {each.effect}" for each in fit.recommendations]
    text = CfgNode(content).dump(default_flow_style=None, sort_keys=False, width=100)
    path.write_text("\n".join(["# Written by fpn-plugin fit.", *comments, text]))


def _is_based_on(config: Path, path: Path) -> bool:
    """Whether a config is a file, or has it among its bases at any depth."""
    if config.resolve() == path.resolve():
        return True
    given = yaml.safe_load(config.read_text(encoding="utf-8")).get(BASE_KEY, [])
    bases = given if isinstance(given, list) else [given]
    return any(_is_based_on(config.parent / Path(base).expanduser(), path) for base in bases)


def _text(
    fit: Fit, sources: Sequence[str], base: Path, command: str, pictures: Sequence[Path]
) -> str:
    has_regions = bool(fit.before.pyramid.roi_levels)
    where = "pooled from each level" if has_regions else "whose best anchor each level has"
    its_level = "the level that it is pooled from" if has_regions else "that of its best anchor"
    parts = [
        f"# The pyramid of {base.name} for {', '.join(sources)}",
        _counted(fit),
        "## What to change",
        _recommended(fit, command),
        "## Objects at the network's input",
        _input_text(fit),
        _sizes_table(fit),
        "## Levels and anchors",
        ("Pooled: by Eq. (1), clamped to the levels there are. " if has_regions else "")
        + "Best anchor: the level whose anchor overlaps the object most, of all its places on the "
        "grid; IoU and recall are of those objects. Cells: the shorter side of an object, in "
        f"cells of its level, which is {its_level}. Before and after what is to change.",
        _levels_table(fit),
        _octaves_table(fit),
        "## Other input sizes",
        "The config as it is, with all lengths of INPUT.MIN_SIZE and MAX_SIZE multiplied, and with "
        "only MAX_SIZE multiplied. The cost of a network's convolutions goes with the pixels. P2 "
        f"and so on: objects {where}."
        if fit.rule.resizes
        else "INPUT.MIN_SIZE_TRAIN is 0, so images stay as they are and none is measured.",
        _input_sizes_table(fit),
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _counted(fit: Fit) -> str:
    truth, density = fit.truth, fit.density.as_dict()
    left_out = ", ".join(
        f"{count} {name} ({LEFT_OUT[name]})" for name, count in truth.left_out.items() if count
    )
    return (
        f"{_count(len(truth.boxes), 'object')} in {_count(len(truth.shapes), 'image')}, "
        f"{density['images_without_objects']} of which have none; {density['mean']:.1f} in an "
        f"image that has any, at most {density['percentile_99']} in 99 of 100, {density['most']} "
        f"at most. Left out: {left_out or 'none'}. Clipped to their image: {truth.clipped}."
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _recommended(fit: Fit, command: str) -> str:
    rows = []
    for each in fit.recommendations:
        verdict = "keep" if each.keep else "change"
        rows.append(f"**{each.subject}: {verdict}.** {each.reason} {each.effect}")
        rows[-1] += " To try, not set:" if each.untried else ""
        keys = (each.changes | each.untried).items()
        rows.append("\n".join(f"- `{key}` {_short(v)}" for key, v in keys))
    return "\n\n".join(filter(None, [*rows, _concluded(fit, command)]))


def _concluded(fit: Fit, command: str) -> str:
    sentences = []
    changed = fit.changed
    recall, lost = fit.after.recall(0.5), fit.after.below_cells(2)
    if recall < _POOR_RECALL:
        sentences.append(
            f"{'Even so the' if changed else 'The'} config does not fit this data, and no change "
            f"is known to help: an anchor overlaps {recall:.0%} of objects by 0.5, and {lost:.0%} "
            "are narrower than 2 cells of their level. A larger input may (table of input sizes)."
        )
        if np.median(fit.after.size) < 1:
            sentences.append(
                "Objects are smaller than a pixel: are boxes in pixels, not in shares of 1?"
            )
    elif not changed and fit.recommendations[0].subject == "input size":  # else too few objects
        sentences.append("Nothing changes: the config fits this data as it is.")
    if changed:
        images = " (IMAGES: the folder of its images)" if ":IMAGES" in command else ""
        sentences.append(f"To train with all of it: `{command}`{images}")
        if command.endswith('DATASETS.TEST "()"'):
            sentences.append("It evaluates nothing; name data to evaluate on in DATASETS.TEST.")
    return " ".join(sentences)


def _command(fit: Fit, sources: Sequence[str], registered: Sequence[str], config: Path) -> str:
    """The command that trains the fitted config on the data that it was fitted to."""
    words = ["fpn-plugin", "train", "--config-file", str(config)]
    names = []
    for source in sources:
        path = Path(source)
        names.append(path.stem if path.is_file() else source)
        if path.is_file():  # its images are unknown
            words += ["--dataset", f"{path.stem}={source}:IMAGES"]
    for given in registered:
        words += ["--dataset", given]
    if names != list(fit.cfg.DATASETS.TRAIN):
        words += ["DATASETS.TRAIN", f"({', '.join(map(repr, names))},)"]
        key, classes = number_of_classes(fit.cfg)
        if key and fit.truth.classes is not None and len(fit.truth.classes) != classes:
            words += [key, str(len(fit.truth.classes))]
        words += ["DATASETS.TEST", "()"]  # the config's is other data
    return " ".join(f'"{word}"' if set(word) & set(" '()") else word for word in words)


def _short(value: Any) -> str:
    return json.dumps(_rounded(value)).replace('"', "'")


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _input_text(fit: Fit) -> str:
    edges = fit.rule.short_edges
    if not fit.rule.resizes:
        return f"Images stay as they are (INPUT.MIN_SIZE_TRAIN 0). {_SIZES}"
    shown = ", ".join(map(str, edges[:9]))
    how = "each image at one of them, dealt out" if fit.inputs.sampled else "each image at all"
    text = f"Shorter side of images {shown} px" + (f" ({how})" if len(edges) > 1 else "")
    text += f", longer side at most {fit.rule.max_size} px, which decides for "
    text += f"{fit.inputs.limited:.1%} of them. {_SIZES}"
    if fit.cfg.INPUT.CROP.ENABLED:
        text = "INPUT.CROP is on and is not considered. " + text
    return text


def _sizes_table(fit: Fit) -> str:
    rows = []
    named = [("training", fit.before), ("testing", fit.test)]
    for name, found in [*named, *([("training, fitted", fit.after)] if fit.resized else [])]:
        figures = found.as_dict()
        percentiles = [f"{size:.3g}" for size in figures["size_percentiles"].values()]
        shares = [f"{figures[key]:.1%}" for key in ("small", "medium", "large")]
        rows.append([name, *percentiles, *shares])
    aspects = fit.before.as_dict()["aspect_percentiles"].values()
    rows.append(["height / width", *(f"{aspect:.2g}" for aspect in aspects), "", "", ""])
    headers = ["", *(f"{p}%" for p in PERCENTILES), "below 32", "32 to 96", "96 and above"]
    return _table(rows, headers)


def _levels_table(fit: Fit) -> str:
    columns = {"pooled": "pooled"} if fit.before.pyramid.roi_levels else {}
    columns |= {"below_1_cell": "< 1 cell", "below_2_cells": "< 2 cells", "share": "best anchor"}
    columns |= _OVERLAPS
    before, after = (
        {row["level"]: row for row in found.by_level()} for found in (fit.before, fit.after)
    )
    rows = [
        [f"P{level}", *_pairs(before.get(level, {}), after.get(level, {}), columns)]
        for level in sorted({*before, *after})
    ]
    table = _table(rows, ["level", *_with_after(columns)])
    return f"{table}\n\n{_ends(fit.before)} After: {_ends(fit.after)}"


def _pairs(before: dict[str, Any], after: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """A cell for each figure before, and one after."""
    pairs = ((key, row.get(key)) for key in keys for row in (before, after))
    return [
        "-" if value is None else f"{value:.2f}" if key == "mean_iou" else f"{value:.1%}"
        for key, value in pairs
    ]


def _with_after(columns: dict[str, str]) -> list[str]:
    return [header for name in columns.values() for header in (name, "after")]


def _ends(found: Measures) -> str:
    total, roi_levels = len(found.size), found.pyramid.roi_levels
    text = ""
    if roi_levels:
        text = f"Eq. (1) puts {found.clamped_fine / total:.1%} below P{roi_levels[0]} and "
        text += f"{found.clamped_coarse / total:.1%} above P{roi_levels[-1]}. "
    text += f"Shorter side below 1 cell of its level: {found.below_cells(1):.1%}, below 2 cells: "
    return text + f"{found.below_cells(2):.1%}."


def _octaves_table(fit: Fit) -> str:
    before, after = (
        {row["from"]: row for row in found.octaves()} for found in (fit.before, fit.after)
    )
    columns = {"share": "objects", **_OVERLAPS}
    rows = [
        [f"{low:g} to {2 * low:g}", *_pairs(before.get(low, {}), after.get(low, {}), columns)]
        for low in sorted({*before, *after})
    ]
    every = (found.as_dict() | {"share": 1.0} for found in (fit.before, fit.after))
    rows.append(["all", *_pairs(*every, columns)])
    return _table(rows, ["size (px)", *_with_after(columns)])


def _input_sizes_table(fit: Fit) -> str:
    columns = {
        "limited_by_max_size": "at MAX_SIZE", "clamped_fine": "below finest",
        "clamped_coarse": "above coarsest", "below_1_cell": "< 1 cell",
        "below_2_cells": "< 2 cells", "recall_50": "recall 0.5", "recall_70": "recall 0.7",
    }  # fmt: skip
    unit = next(row["pixels"] for row in fit.input_sizes if row["factor"] == row["max_factor"] == 1)
    levels = list(fit.input_sizes[0]["levels"])
    rows = []
    for row in fit.input_sizes:
        edges = row["short_edges"]
        shown = f"{min(edges)}" if len(set(edges)) == 1 else f"{min(edges)} to {max(edges)}"
        size = f"{shown} / {row['max_size']}" if fit.rule.resizes else "as they are"
        cells = [size, f"{row['pixels'] / unit:.2f}", f"{row['median_size']:.3g}"]
        cells.append(" / ".join(f"{100 * row['levels'][level]:.0f}" for level in levels))
        cells += [f"{row['mean_iou']:.2f}", *(f"{row[key]:.1%}" for key in columns)]
        rows.append(cells)
    named = f"{' / '.join(f'P{level}' for level in levels)} (%)"
    headers = ["MIN / MAX_SIZE", "pixels", "median size", named, "IoU", *columns.values()]
    return _table(rows, headers)


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
