"""What can be wrong with COCO-format data: its kinds, single problems, and counts of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CONVERT", "KINDS", "Contents", "Kind", "Problem", "Report", "shortened"]


CONVERT = "fpn-plugin check JSON IMAGES --convert NEW.json writes it right"


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Args:
        refused: whether training refuses data that has it. Otherwise it trains, as ``meaning``
            says.
        meaning: what is wrong and, if it is not refused, what becomes of it.
        left_out: whether training leaves the annotation out.
    """

    refused: bool
    meaning: str
    left_out: bool = False


KINDS = {
    "not_coco": Kind(True, "the file is not JSON, or not COCO's"),
    "nothing": Kind(True, "there are no images, annotations or categories, or none to use"),
    "id_missing": Kind(True, "no id, or none that is a number or text"),
    "id_twice": Kind(True, "several records have one id"),
    "id_unusable": Kind(True, "an id that COCO's evaluation cannot take"),
    "value": Kind(True, "a key is missing or has a value of another type or range"),
    "file_name": Kind(True, "a file name that leads out of the image folder, or is none"),
    "image_unknown": Kind(True, "an annotation of an image that is not there"),
    "category_unknown": Kind(True, "an annotation of a category that is not there"),
    "boxes_normalised": Kind(True, "the boxes are fractions of the image, not pixels"),
    "boxes_corners": Kind(True, "the boxes are corners, not width and height"),
    "box_malformed": Kind(True, "bbox is not four numbers"),
    "box_not_finite": Kind(True, "bbox has NaN or infinity"),
    "box_negative": Kind(True, "bbox has a negative width or height"),
    "box_far_out": Kind(True, "bbox reaches more than the image's own size out of it"),
    "segmentation": Kind(True, "segmentation is neither polygons nor RLE of the image's size"),
    "keypoints": Kind(True, "keypoints are not triples of numbers"),
    "mask_missing": Kind(True, "no mask that a model with masks could use"),
    "keypoints_missing": Kind(True, "not the keypoints that a model with keypoints asks for"),
    "keypoint_names": Kind(True, "a category names other keypoints than the model has, or none"),
    "image_missing": Kind(True, "no such image file"),
    "image_unreadable": Kind(True, "the image file cannot be read"),
    "image_thin": Kind(True, "so long and thin that resizing it for the network leaves nothing"),
    "image_depth": Kind(True, "more than 8 bits a pixel, which would be clipped at 255"),
    "image_other_size": Kind(True, "the image has another size than the JSON says"),
    "boxes_centres": Kind(
        False,
        "the boxes look like centres with width and height; they are read as corner, width, height",
    ),
    "filled_in": Kind(False, "a value was missing or of another type, and could be computed"),
    "renumbered": Kind(False, "annotation ids that COCO's evaluation cannot take were replaced"),
    "crowd": Kind(
        False, "iscrowd is 1; training leaves it out, evaluation ignores what is found there", True
    ),
    "box_empty": Kind(
        False, "bbox has no area; training leaves it out, evaluation cannot find it", True
    ),
    "box_outside": Kind(
        False, "bbox is outside the image; training leaves it out, evaluation cannot find it", True
    ),
    "box_reaches_out": Kind(False, "bbox reaches out of the image; training cuts it at the border"),
    "segmentation_unusable": Kind(
        False, "no polygon of three points; Detectron2 leaves the annotation out", True
    ),
    "mask_empty": Kind(False, "the mask has no pixel; training leaves the annotation out", True),
    "keypoints_invisible": Kind(
        False, "an image without enough visible keypoints; training leaves it out"
    ),
    "nothing_to_find": Kind(False, "there are no annotations; evaluation gives no AP"),
    "category_root": Kind(
        False,
        "a category that no annotation has and that seems to be the others' parent; it "
        "counts as a class",
    ),
    "file_name_twice": Kind(False, "several images have one file"),
    "category_name_twice": Kind(
        False, "several categories have one name; results hide all but one"
    ),
    "keypoint_flips": Kind(
        False,
        "which keypoints a mirrored image swaps is not known; training refuses to mirror them",
    ),
    "skeleton": Kind(False, "a skeleton that joins no keypoints; pictures leave it out"),
    "image_converted": Kind(False, "read in INPUT.FORMAT, which loses something"),
}


def shortened(value: Any) -> str:
    """A value as it is shown in messages: one line; the middle of a long one is left out."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:60]}...{shown[-30:]}"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a record.

    Args:
        kind: one of :data:`KINDS`.
        record: the record's name, for example ``"annotation 12"``; "" for the whole file.
        message: what is wrong with it, in one line.
    """

    kind: str
    record: str
    message: str

    @property
    def refused(self) -> bool:
        """Whether training refuses it."""
        return KINDS[self.kind].refused

    def __str__(self) -> str:
        """The record and what is wrong with it."""
        return f"{self.record}: {self.message}" if self.record else self.message


@dataclass
class Contents:
    """What a dataset holds, counted.

    Args:
        images: in its JSON.
        boxes: its annotations.
        classes: its categories.
        trained_on: annotations that reach a training; 0 for data to evaluate on.
    """

    images: int = 0
    boxes: int = 0
    classes: int = 0
    trained_on: int = 0


@dataclass
class Report:
    """Problems by kind: how many, and the first of them.

    Args:
        keep: problems of a kind to keep; None for all.
        contents: what was read.
    """

    keep: int | None = 3
    contents: Contents = field(default_factory=Contents)
    counts: dict[str, int] = field(default_factory=dict)
    kept: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        """Counts a problem, and keeps it if there is room."""
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        kept = self.kept.setdefault(problem.kind, [])
        if self.keep is None or len(kept) < self.keep:
            kept.append(problem)

    def kinds(self, *, refused: bool) -> list[str]:
        """The kinds found that are refused, or that are not, in the order of :data:`KINDS`."""
        return [kind for kind in KINDS if kind in self.counts and KINDS[kind].refused == refused]

    def text(self, examples: int) -> str:
        """The problems as lines to read: by kind with counts and the first examples."""
        lines = []
        for refused, title in ((True, "refused"), (False, "warnings")):
            for kind in self.kinds(refused=refused):
                lines.append(f"{title}: {kind} ({self.counts[kind]}): {KINDS[kind].meaning}")
                shown = self.kept[kind][:examples]
                lines += [f"    {problem}" for problem in shown]
                if len(shown) < self.counts[kind]:
                    lines.append(f"    and {self.counts[kind] - len(shown)} more")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The problems as JSON values."""
        return {
            "refused": sum(self.counts[kind] for kind in self.kinds(refused=True)),
            "warnings": sum(self.counts[kind] for kind in self.kinds(refused=False)),
            "counts": dict(self.counts),
            "contents": asdict(self.contents),
            "problems": [
                {
                    "kind": problem.kind,
                    "refused": problem.refused,
                    "record": problem.record,
                    "told": problem.message,
                }
                for kind in KINDS
                for problem in self.kept.get(kind, [])
            ],
        }
