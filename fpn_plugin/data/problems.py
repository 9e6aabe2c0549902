"""What can be wrong with COCO-format data: kinds of problems, problems, and reports of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CONVERT", "KINDS", "Contents", "Kind", "Problem", "Report", "shortened"]


CONVERT = "fpn-plugin check JSON IMAGES --convert NEW.json writes it correctly"


@dataclass(frozen=True)
class Kind:
    """A kind of problem."""

    refused: bool  # whether training refuses data that has it
    meaning: str  # what is wrong and, if it is not refused, what happens to it
    left_out: bool = False  # whether training leaves the annotation out


KINDS = {
    "label_file": Kind(True, "a label file, or a row of one, that cannot be read"),
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
    "keypoints_missing": Kind(True, "not the keypoints that a model with keypoints needs"),
    "keypoint_names": Kind(True, "a category names other keypoints than the model has, or none"),
    "image_missing": Kind(True, "no such image file"),
    "image_unreadable": Kind(True, "the image file cannot be read"),
    "image_thin": Kind(True, "so long and thin that resizing it for the network leaves nothing"),
    "image_depth": Kind(True, "more than 8 bits a pixel, which would be clipped at 255"),
    "image_other_size": Kind(True, "the image has another size than the JSON says"),
    "label_left_out": Kind(False, "what is no label of an object; it is left out"),
    "labels_from_zero": Kind(False, "corners of VOC that count from 0; all are read so"),
    "image_unlabelled": Kind(False, "an image without a label file; it is one without objects"),
    "boxes_centres": Kind(
        False, "the boxes look like centre, width, height; they are read as corner, width, height"
    ),
    "filled_in": Kind(False, "a value was missing or of another type, and could be computed"),
    "renumbered": Kind(False, "annotation ids that COCO's evaluation cannot take were replaced"),
    "crowd": Kind(False, "iscrowd is 1; training leaves it out, evaluation ignores it", True),
    "box_empty": Kind(
        False, "bbox has no area; training leaves it out, evaluation misses it", True
    ),
    "box_outside": Kind(
        False, "bbox is outside the image; training leaves it out, evaluation misses it", True
    ),
    "box_reaches_out": Kind(False, "bbox reaches out of the image; training cuts it at the border"),
    "segmentation_unusable": Kind(
        False, "no polygon of three points; training leaves it out", True
    ),
    "mask_empty": Kind(False, "the mask has no pixel; training leaves the annotation out", True),
    "keypoints_invisible": Kind(
        False, "an image with too few visible keypoints; training leaves it out"
    ),
    "nothing_to_find": Kind(False, "there are no annotations; evaluation gives no AP"),
    "category_root": Kind(
        False, "a category without annotations, perhaps the others' parent; it counts as a class"
    ),
    "file_name_twice": Kind(False, "several images have one file"),
    "category_name_twice": Kind(False, "several categories have one name; results show only one"),
    "keypoint_flips": Kind(
        False, "which keypoints a mirrored image swaps is not known; training refuses to mirror"
    ),
    "skeleton": Kind(False, "a skeleton that joins no keypoints; pictures leave it out"),
    "image_converted": Kind(False, "read in INPUT.FORMAT, which loses something"),
}


def shortened(value: Any) -> str:
    """A value in one line, for messages; the middle of a long one is left out."""
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:60]}...{shown[-30:]}"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a record."""

    kind: str  # one of KINDS
    record: str  # for example "annotation 12"; "" for the whole file
    message: str  # what is wrong, in one line

    @property
    def refused(self) -> bool:
        """Whether training refuses it."""
        return KINDS[self.kind].refused

    def __str__(self) -> str:
        """The record and the message."""
        return f"{self.record}: {self.message}" if self.record else self.message


@dataclass
class Contents:
    """How many records a dataset has."""

    images: int = 0
    boxes: int = 0
    classes: int = 0
    trained_on: int = 0  # annotations that reach a training; 0 for data to evaluate on


@dataclass
class Report:
    """Problems by kind: how many, and the first of them."""

    keep: int | None = 3  # of a kind; None for all
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
        """The problems as text: kinds with counts and the first examples."""
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
                {"kind": kind, "refused": p.refused, "record": p.record, "message": p.message}
                for kind in KINDS
                for p in self.kept.get(kind, [])
            ],
        }
