"""Pictures of a pyramid's features: principal components as colour, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from fpn_plugin.inspection.forward_trace import ForwardTrace

from .figures import panels, save
from .palette import INK, level_title

__all__ = ["FeatureColors", "draw_features", "feature_colors", "feature_norms"]

# Corners of a square: lightness is the first direction, blue to yellow the second. Readers who are
# red-green blind distinguish these too.
_DARK_BLUE, _DARK_YELLOW = np.array([16, 32, 96.0]), np.array([92, 70, 0.0])
_LIGHT_BLUE, _LIGHT_YELLOW = np.array([150, 205, 255.0]), np.array([255, 236, 130.0])
_PANEL_INCHES = 2.3


@dataclass(frozen=True)
class FeatureColors:
    """Features as colours.

    Attributes:
        images: ``{level: uint8 (h, w, 3)}``.
        variance: share of the features' variance along the two directions.
    """

    images: dict[str, np.ndarray]
    variance: float


def feature_colors(features: dict[str, np.ndarray]) -> FeatureColors:
    """Draws the two principal directions of all levels' features as lightness and blue to yellow.

    All levels share the directions and have the same weight: the features of each are first centred
    and scaled to unit variance. The first direction points to larger norms.

    Args:
        features: ``{level: (C, h, w)}``.
    """
    centred, norms = {}, {}
    for name, values in features.items():
        vectors = values.reshape(len(values), -1).T.astype(np.float64)
        norms[name] = np.linalg.norm(vectors, axis=1)
        vectors = vectors - vectors.mean(axis=0)
        spread = np.sqrt((vectors**2).sum(axis=1).mean())
        centred[name] = vectors / spread if spread > 0 else vectors
    covariance = sum(v.T @ v / len(v) for v in centred.values()) / len(centred)
    variances, directions = np.linalg.eigh(covariance)
    axes = directions[:, ::-1][:, :2]
    along = sum(norms[name] @ (v @ axes[:, 0]) / len(v) for name, v in centred.items())
    second = axes[:, -1]
    axes = axes * np.array(
        [1.0 if along >= 0 else -1.0, np.sign(second[np.abs(second).argmax()]) or 1.0]
    )
    images = {
        name: _colored(_stretched(v @ axes), features[name].shape[1:])
        for name, v in centred.items()
    }
    whole = variances.sum()
    return FeatureColors(images, float(variances[-2:].sum() / whole) if whole > 0 else 0.0)


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = np.quantile(values, [0.02, 0.98], axis=0)
    return np.clip((values - low) / np.where(high > low, high - low, 1.0), 0, 1)


def _colored(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    light, yellow = values[:, :1], values[:, 1:]
    dark = _DARK_BLUE * (1 - yellow) + _DARK_YELLOW * yellow
    bright = _LIGHT_BLUE * (1 - yellow) + _LIGHT_YELLOW * yellow
    return (dark * (1 - light) + bright * light).round().astype(np.uint8).reshape(*shape, 3)


def feature_norms(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """L2 norm of every cell's feature vector, ``{level: (h, w)}``."""
    return {name: np.linalg.norm(values, axis=0) for name, values in features.items()}


def draw_features(
    traces: Sequence[ForwardTrace],
    labels: Sequence[str],
    path: Path,
    kinds: Sequence[str] = ("colour", "norm"),
) -> Path:
    """Draws the features of every level, a row for each model and kind.

    Args:
        traces: of one image by several models, or by one.
        labels: the models' names.
        path: the file to write; its suffix sets the format.
        kinds: "colour" (see :func:`feature_colors`), "norm".

    Returns:
        ``path``.
    """
    rows = [(trace, label, kind) for trace, label in zip(traces, labels, strict=True)
            for kind in kinds]  # fmt: skip
    columns = 1 + max(len(trace.features) for trace in traces)
    height = _PANEL_INCHES * traces[0].image.shape[0] / traces[0].image.shape[1]
    size = _PANEL_INCHES * columns, (height + 0.5) * len(rows) + 0.35
    figure, grid = panels(len(rows), columns, size)
    for all_axes, row in zip(grid, rows, strict=True):
        _draw_row(all_axes, *row)
    captions = {
        "colour": "colour: 1st principal component of all levels dark to light, 2nd blue to yellow",
        "norm": "norm: length of a cell's vector; blue to yellow, on each level's own scale",
    }
    figure.supxlabel("\n".join(captions[kind] for kind in kinds), fontsize=12)
    return save(figure, path)


def _draw_row(row: Sequence[Axes], trace: ForwardTrace, label: str, kind: str) -> None:
    features = {name: values.numpy() for name, values in trace.features.items()}
    height, width = trace.image.shape[:2]
    row[0].imshow(trace.image)
    row[0].set_title(label, fontsize=14)
    if kind == "colour":
        colors = feature_colors(features)
        panels, text = colors.images, f"colour: {100 * colors.variance:.0f}% of the variance"
    else:
        panels, text = feature_norms(features), "norm"
    row[0].text(
        0.02, 0.02, text, transform=row[0].transAxes, fontsize=10, color=INK, va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
    )  # fmt: skip
    for axes, (name, panel) in zip(row[1:], panels.items(), strict=False):
        stride = trace.strides[name]
        extent = (0, panel.shape[1] * stride, panel.shape[0] * stride, 0)
        options = {"extent": extent, "interpolation": "nearest"}
        title = f"{level_title(name)}, stride {stride}"
        if kind == "norm":
            low, high = np.quantile(panel, [0.02, 0.98])
            axes.imshow(panel, cmap="cividis", vmin=low, vmax=high, **options)
            title += f"\n{low:.3g} to {high:.3g}"
        else:
            axes.imshow(panel, **options)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_title(title, fontsize=13)
