"""Pictures of what trained models do with images, level by level."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from tqdm import tqdm

from fpn_plugin.data import read_picture
from fpn_plugin.data.given_images import GivenImage, free_name
from fpn_plugin.inspection.forward_trace import ForwardTrace, forward_trace

from .contributions import contributions, draw_contributions
from .features import draw_features
from .keypoints import KeypointLayout
from .regions import draw_anchors, draw_pooling

__all__ = ["LabelledModel", "draw_models"]


@dataclass(frozen=True)
class LabelledModel:
    """A trained model, its config, and its name in pictures."""

    label: str
    cfg: CfgNode
    model: nn.Module


def draw_models(
    models: Sequence[LabelledModel],
    images: Sequence[GivenImage],
    output: Path,
    class_names: Sequence[str],
    keypoints: KeypointLayout,
    threshold: float = 0.5,
    proposals: int = 50,
    class_colors: Sequence[str] = (),
) -> bool:
    """Writes pictures for each image, and contributions.png and .json over all of them.

    Args:
        models: drawn side by side, with different labels.
        images: at least one.
        output: folder to write to.
        class_names: of the models' classes.
        keypoints: names and skeleton of the models' keypoints.
        threshold: lowest score of a detection to draw and count.
        proposals: how many of the best proposals to draw.
        class_colors: of detections; by default they have the colours of their levels.

    Returns:
        Whether contributions.png is written. Without labels, a model without RoI heads has no
        contributions.

    Raises:
        UserError: an image cannot be read.
    """
    labels = [model.label for model in models]
    traces: list[list[ForwardTrace]] = [[] for _ in models]
    taken: set[str] = set()
    for image in tqdm(images, desc="drawing", unit="image"):
        of_image = [
            forward_trace(m.model, m.cfg, read_picture(m.cfg, image.path), image.annotations)
            for m in models
        ]
        folder = output / free_name(image.path.stem, taken)
        _draw_features_and_anchors(of_image, labels, folder)
        if any(one.proposed is not None or one.detections is not None for one in of_image):
            path = folder / "pooling.png"
            drawn = (path, proposals, threshold, class_names, keypoints, class_colors)
            draw_pooling(of_image, labels, *drawn)
        for kept, trace in zip(traces, of_image, strict=True):
            kept.append(trace)
            trace.features.update({level: maps[:0] for level, maps in trace.features.items()})
    counted = [contributions(of_model, threshold) for of_model in traces]
    by_label = dict(zip(labels, counted, strict=True))
    (output / "contributions.json").write_text(json.dumps(by_label, indent=1))
    if any(counted):
        draw_contributions(counted, labels, output / "contributions.png", len(images))
    return any(counted)


def _draw_features_and_anchors(
    traces: Sequence[ForwardTrace], labels: Sequence[str], folder: Path
) -> None:
    if len(traces) == 1:
        draw_features(traces, labels, folder / "features.png")
    else:
        draw_features(traces, labels, folder / "features.png", kinds=["colour"])
        draw_features(traces, labels, folder / "norms.png", kinds=["norm"])
    drawn: list[Tensor] = []
    for one, label in zip(traces, labels, strict=True):
        # Anchors do not depend on weights: models of one config have the same.
        if one.matched is None or any(torch.equal(one.matched.boxes, other) for other in drawn):
            continue
        suffix = "-" + re.sub(r"[\W_]", "_", label).strip("_") if drawn else ""
        draw_anchors(one, folder / f"anchors{suffix}.png")
        drawn.append(one.matched.boxes)
