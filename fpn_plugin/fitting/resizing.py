"""Boxes resized with their images by Detectron2's ResizeShortestEdge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from fpn_plugin.data import check_resizing

from .ground_truth import GroundTruth

__all__ = ["InputBoxes", "ResizeRule", "boxes_at_input"]

_MOST_SIZES = 9  # in place of a range
_MOST_BOXES = 300_000  # up to so many, each box is taken at every size


@dataclass(frozen=True)
class ResizeRule:
    """How a config resizes images.

    Attributes:
        short_edges: lengths of the shorter side, each as likely, in pixels; nine evenly spaced
            lengths replace a range. 0: images stay as they are.
        max_size: the longer side's upper limit, in pixels.
    """

    short_edges: tuple[int, ...]
    max_size: int

    @classmethod
    def from_config(cls, cfg: CfgNode, training: bool) -> ResizeRule:
        """The rule of INPUT.MIN_SIZE_TRAIN, its SAMPLING and MAX_SIZE_TRAIN, or those of TEST.

        Raises:
            UserError: a range that is not two lengths, or lengths that no image can have.
        """
        check_resizing(cfg, training=training)
        if not training:
            return cls((int(cfg.INPUT.MIN_SIZE_TEST),), int(cfg.INPUT.MAX_SIZE_TEST))
        given = cfg.INPUT.MIN_SIZE_TRAIN
        edges = (given,) if isinstance(given, int) else tuple(given)
        if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and not isinstance(given, int):
            count = min(_MOST_SIZES, edges[1] - edges[0] + 1)
            edges = tuple(int(edge) for edge in np.linspace(*edges, count).round())
        return cls(edges, int(cfg.INPUT.MAX_SIZE_TRAIN))

    @property
    def resizes(self) -> bool:
        """Whether any length is other than 0."""
        return any(self.short_edges)

    def scaled(self, factor: float) -> ResizeRule:
        """The rule with all lengths multiplied by a factor."""
        # Never down to 0, which would leave images as they are.
        edges = tuple(max(round(edge * factor), 1) if edge else 0 for edge in self.short_edges)
        return ResizeRule(edges, max(round(self.max_size * factor), 1))

    def output_shapes(self, shapes: np.ndarray, short_edge: np.ndarray) -> np.ndarray:
        """Shapes of images at the network's input, int64 ``(M, 2)``, height and width.

        Args:
            shapes: int ``(M, 2)``, height and width.
            short_edge: int ``(M,)``, the length that each image's shorter side is to get.
        """
        # Images of a dataset share few shapes, so Detectron2's own function can be called.
        keys = np.column_stack([shapes, short_edge])
        distinct, which = np.unique(keys, axis=0, return_inverse=True)
        found = [
            ResizeShortestEdge.get_output_shape(h, w, edge, self.max_size) if edge else (h, w)
            for h, w, edge in distinct.tolist()
        ]
        # Detectron2 rounds a side of an image that is thousands of times as long down to 0.
        return np.maximum(np.array(found, np.int64).reshape(-1, 2), 1)[which.reshape(-1)]


@dataclass(frozen=True)
class InputBoxes:
    """Boxes as the network sees them.

    Attributes:
        boxes: float64 ``(N, 4)``, XYXY in pixels of the network's input.
        shapes: int64 ``(N, 2)``, height and width there of the image of each box.
        sampled: whether each image is at only one of the rule's lengths, instead of at all.
        limited: share of images whose size MAX_SIZE decides.
        pixels: mean area of an image, in pixels, without padding.
    """

    boxes: np.ndarray
    shapes: np.ndarray
    sampled: bool
    limited: float
    pixels: float

    @property
    def sides(self) -> np.ndarray:
        """Width and height of each box, ``(N, 2)``."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    @property
    def size(self) -> np.ndarray:
        """sqrt(w h) of each box, ``(N,)``, as in Eq. (1)."""
        return np.sqrt(self.sides.prod(axis=1))

    def part(self, which: slice | np.ndarray) -> InputBoxes:
        """Some of the boxes."""
        return replace(self, boxes=self.boxes[which], shapes=self.shapes[which])

    def sample(self, most: int) -> InputBoxes:
        """At most ``most`` of the boxes, drawn at random with a fixed seed."""
        if len(self.boxes) <= most:
            return self
        return self.part(np.random.default_rng(0).choice(len(self.boxes), most, replace=False))


def boxes_at_input(truth: GroundTruth, rule: ResizeRule) -> InputBoxes:
    """Resizes boxes as Detectron2 does with the images they are in.

    If the rule has several lengths, each box is taken at all of them. Above 300,000 boxes in all,
    each image gets one of the lengths instead, at random with a fixed seed and in equal parts.
    """
    edges = np.array(rule.short_edges)
    passes = [np.full(len(truth.shapes), edge) for edge in edges]
    sampled = len(truth.boxes) * len(edges) > _MOST_BOXES and len(edges) > 1
    if sampled:
        order = np.random.default_rng(0).permutation(len(truth.shapes))
        passes = [edges[order % len(edges)]]
    boxes, shapes, limited, pixels = [], [], [], []
    for short_edge in passes:
        new = rule.output_shapes(truth.shapes, short_edge)
        scale = np.tile((new / truth.shapes)[:, ::-1], 2)
        boxes.append(truth.boxes * scale[truth.image])
        shapes.append(new[truth.image])
        limited.append(((new.min(axis=1) < short_edge) & (short_edge > 0)).mean())
        pixels.append(new.prod(axis=1).mean())
    means = float(np.mean(limited)), float(np.mean(pixels))
    return InputBoxes(np.concatenate(boxes), np.concatenate(shapes), sampled, *means)
