"""An anatomy as tables of text."""

from __future__ import annotations

import math

from tabulate import tabulate

from .anatomy import Anatomy

__all__ = ["anatomy_text"]


def anatomy_text(anatomy: Anatomy) -> str:
    """Levels, Eq. (1)'s box sizes, and parameters and multiply-adds by part, as Markdown tables."""
    (height, width), (padded_height, padded_width) = anatomy.input_size, anatomy.padded_size
    sections = [
        f"Input {width} x {height} px, padded to {padded_width} x {padded_height} px.",
        "Levels\n\n" + _levels(anatomy),
    ]
    if anatomy.sizes:
        k0, size = anatomy.canonical
        sections.append(
            f"Boxes by Eq. (1), k0 = {k0}, canonical size {size:g} px: "
            "sqrt(w h) in pixels of the network's input\n\n" + _sizes(anatomy)
        )
    sections.append(_counts_title(anatomy) + "\n\n" + _parts(anatomy))
    return "\n\n".join(sections)


def _levels(anatomy: Anatomy) -> str:
    rows = [
        [
            level.name,
            level.stride,
            level.channels,
            f"{level.width} x {level.height}",
            f"{level.anchors:,}",
            level.anchors_per_cell,
            _listed(level.anchor_sizes),
            _listed(level.anchor_ratios),
            "yes" if level.pooled else "no",
        ]
        for level in anatomy.levels
    ]
    rows.append(["all", "", "", "", f"{sum(v.anchors for v in anatomy.levels):,}", *[""] * 4])
    headers = ["level", "stride", "channels", "cells", "anchors", "a cell", "sizes (px)", "h/w"]
    return tabulate(
        rows, headers=[*headers, "pooled"], tablefmt="github", disable_numparse=True,
        colalign=["left", *["right"] * 7, "left"],
    )  # fmt: skip


def _sizes(anatomy: Anatomy) -> str:
    rows = []
    for sizes in anatomy.sizes:
        end = "and above" if math.isinf(sizes.high) else f"to below {sizes.high:g}"
        cells = ", ".join(
            "-" if math.isinf(v) or v == 0 else f"{v / sizes.stride:g}"
            for v in (sizes.low, sizes.high)
        )
        rows.append([sizes.level, sizes.stride, f"{sizes.low:g} {end}", cells])
    headers = ["level", "stride", "box size (px)", "ends in cells"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _counts_title(anatomy: Anatomy) -> str:
    title = "Parameters, and multiply-adds of convolutions and matrix products for an image"
    if anatomy.rois:
        title += f"; box head for {anatomy.rois} RoIs"
    if any(part.name in ("mask head", "keypoint head") for part in anatomy.parts):
        title += f", masks and keypoints for {anatomy.detections} detections"
    return title


def _parts(anatomy: Anatomy) -> str:
    whole = sum(part.parameters for part in anatomy.parts)
    work = sum(part.multiply_adds for part in anatomy.parts)
    rows = [
        [
            part.name,
            f"{part.parameters:,}",
            f"{100 * part.parameters / max(whole, 1):.1f}%",
            f"{part.trained:,}",
            f"{part.multiply_adds / 1e9:.3f}",
            f"{100 * part.multiply_adds / max(work, 1):.1f}%",
        ]
        for part in anatomy.parts
    ]
    trained = sum(part.trained for part in anatomy.parts)
    rows.append(["all", f"{whole:,}", "", f"{trained:,}", f"{work / 1e9:.3f}", ""])
    return tabulate(
        rows, headers=["part", "parameters", "share", "trained", "multiply-adds (G)", "share"],
        tablefmt="github", disable_numparse=True, colalign=["left", *["right"] * 5],
    )  # fmt: skip


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{v:g}" for v in values) or "-"
