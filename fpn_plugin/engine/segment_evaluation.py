"""The recall of segment proposals, by COCO's evaluation (paper, section 6 and Table 6)."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.errors import UserError
from fpn_plugin.utils.atomic import written_whole

from .progress import ProgressLine

__all__ = ["SegmentProposalEvaluator", "encoded_segments"]

_PASTED_AT_ONCE = 50  # masks of an image's size


class SegmentProposalEvaluator(DatasetEvaluator):
    """Average recall of segments, whatever their class: AR@100, ARs@100, ..., ARl@1000 in percent.

    AR is COCO's: the part of the objects that are found, mean over IoUs from 0.5 to 0.95. Sizes are
    those of the annotations' areas, small below 32^2 and large above 96^2 px. Crowds do not count.

    pycocotools matches an image's proposals as soon as the model gives them, and only the numbers
    of objects found are kept. So memory does not grow with the number of images.

    Args:
        dataset_name: registered, with a COCO JSON (``json_file`` of its metadata) that has masks.
        output_dir: gets ``segment_recall.json``, recall by IoU; None for no file.
        limits: proposals of an image that are evaluated, ascending.
        distributed: whether to add up the counts of all processes.

    Raises:
        UserError: the JSON has no annotations, or one of them has no mask.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        limits: Sequence[int] = (100, 1000),
        distributed: bool = True,
    ) -> None:
        self._logger = logging.getLogger(__name__)
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        if json_file is None:
            raise UserError(f"dataset {dataset_name!r} has no COCO JSON to evaluate segments by")
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            self._coco = COCO(json_file)
        if not self._coco.anns:
            raise UserError(f"{json_file} of dataset {dataset_name!r} has no annotations")
        without = [each["id"] for each in self._coco.anns.values() if not each.get("segmentation")]
        if without:
            raise UserError(
                f"{json_file}: {len(without)} annotations have no segmentation (first: id "
                f"{without[0]}); segment proposals are evaluated by masks"
            )
        self._output_dir = output_dir
        self._limits = list(limits)
        self._distributed = distributed
        params = COCOeval(iouType="segm").params
        self._ious, self._ranges, self._sizes = params.iouThrs, params.areaRng, params.areaRngLbl

    def reset(self) -> None:
        """Begins an evaluation; a terminal shows its progress."""
        # Objects found, by size, limit and IoU, and objects, by size.
        self._found = np.zeros((len(self._sizes), len(self._limits), len(self._ious)), np.int64)
        self._objects = np.zeros(len(self._sizes), np.int64)
        images = -(-len(self._coco.imgs) // comm.get_world_size())
        self._line = ProgressLine("evaluating", images)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Matches the proposals of images.

        Args:
            inputs: with the ``image_id`` of each.
            outputs: with ``proposals``, as :class:`fpn_plugin.SegmentProposals` gives them.

        Raises:
            UserError: the model gives no segment proposals.
        """
        for given, output in zip(inputs, outputs, strict=True):
            proposals = output.get("proposals")
            if proposals is None or not proposals.has("proposal_masks"):
                raise UserError(
                    "the model gives no segment proposals: set MODEL.PROPOSAL_GENERATOR.NAME to "
                    "SegmentProposals, or evaluate it with DetectionEvaluator"
                )
            self._match(given["image_id"], proposals)
        self._line.update(len(inputs))

    def _match(self, image_id: int, proposals: Instances) -> None:
        """Adds an image's counts."""
        objects = self._coco.imgToAnns[image_id]
        if not objects:
            return
        best = proposals.objectness_logits.argsort(descending=True)[: self._limits[-1]]
        proposals = proposals[best]
        scores = proposals.objectness_logits.tolist()
        common = {"image_id": image_id, "category_id": 1}  # of one class
        truth = COCO()
        truth.dataset = {
            "images": [self._coco.imgs[image_id]],
            # An id of 0 would be "not matched".
            "annotations": [{**each, **common, "id": i + 1} for i, each in enumerate(objects)],
            "categories": [{"id": 1, "name": "object"}],
        }
        found = [
            {**common, "segmentation": segment, "score": score}
            for score, segment in zip(scores, encoded_segments(proposals), strict=True)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), "segm")
            evaluation.params.maxDets = self._limits
            evaluation.evaluate()
        for size, matched in enumerate(evaluation.evalImgs):
            self._objects[size] += np.sum(matched["gtIgnore"] == 0)
            hits = (matched["dtMatches"] > 0) & ~matched["dtIgnore"].astype(bool)
            for place, limit in enumerate(self._limits):
                self._found[size, place] += hits[:, :limit].sum(axis=1)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``{"segment_proposals": {"AR@100": ..., ...}}``; empty if not the main process."""
        self._line.close()
        counts = [(self._found, self._objects)]
        if self._distributed:
            comm.synchronize()
            counts = comm.gather(counts[0], dst=0)
            if not comm.is_main_process():
                return {}
        found, objects = (sum(each) for each in zip(*counts, strict=True))
        with np.errstate(invalid="ignore"):  # NaN for a size without objects
            recall = found / objects[:, None, None]
        results: dict[str, float] = {}
        for (place, limit), (size, name) in itertools.product(
            enumerate(self._limits), enumerate(self._sizes)
        ):
            metric = "AR" if name == "all" else f"AR{name[0]}"
            results[f"{metric}@{limit}"] = float(100 * recall[size, place].mean())
        if self._output_dir:
            self._write(recall, objects)
        self._logger.info("Segment proposals:\n%s", create_small_table(results))
        return {"segment_proposals": results}

    def _write(self, recall: np.ndarray, objects: np.ndarray) -> None:
        """Writes recall by size, limit and IoU, null without objects."""
        content = {
            "iou": self._ious.round(2).tolist(),
            "objects": dict(zip(self._sizes, objects.tolist(), strict=True)),
            "recall": {
                name: {
                    str(limit): recall[size, place].tolist() if objects[size] else None
                    for place, limit in enumerate(self._limits)
                }
                for size, name in enumerate(self._sizes)
            },
        }
        folder = Path(self._output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(str(folder / "segment_recall.json"), "w") as file:
            file.write(json.dumps(content))


def encoded_segments(proposals: Instances) -> Iterator[dict[str, Any]]:
    """The masks of proposals in their image, run-length encoded as COCO's.

    A few masks at a time have the size of the image.

    Args:
        proposals: of :class:`fpn_plugin.SegmentProposals`, in the size of the output.
    """
    height, width = proposals.image_size
    windows = proposals.mask_windows
    windows = windows * windows.new_tensor([width, height, width, height])
    for masks, boxes in zip(
        proposals.proposal_masks.split(_PASTED_AT_ONCE), windows.split(_PASTED_AT_ONCE), strict=True
    ):
        pasted = paste_masks_in_image(masks, boxes, (height, width)).to(torch.uint8)
        by_column = pasted.transpose(1, 2).contiguous().cpu().numpy()  # as COCO's encoding reads
        yield from coco_mask.encode(by_column.transpose(2, 1, 0))
