"""COCO's evaluation, also of more detections than COCO counts."""

from __future__ import annotations

import contextlib
import io
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from fpn_plugin.utils.metrics import PRECISION_FILE

from .progress import ProgressLine

__all__ = ["DetectionEvaluator"]

# How many detections of a category in an image COCO's evaluation takes, the best first.
_COCO_LIMITS = {"bbox": 100, "segm": 100, "keypoints": 20}


class DetectionEvaluator(COCOEvaluator):
    """COCOEvaluator that also evaluates all detections that a model may give.

    COCO takes the best 100 detections of a category in an image, and 20 with keypoints. Objects
    beyond that count as missed, even if the model found them. If a model may give more detections,
    the results have each task twice: ``"bbox"`` is COCO's, and ``"bbox@300"`` takes all 300 that
    the model may give. Both then have AR too.

    COCO's precision at each recall is written to ``precision.npz`` in the output folder: for each
    task float64 ``(IoU, recall, class)``, -1 for classes without objects, and names as ``classes``.

    Args:
        dataset_name: see COCOEvaluator.
        tasks: see COCOEvaluator.
        distributed: see COCOEvaluator.
        output_dir: see COCOEvaluator.
        detections_per_image: how many the model may give; negative for no limit (``"bbox@all"``).
        options: further arguments of COCOEvaluator.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        detections_per_image: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(dataset_name, tasks, distributed, output_dir, **options)
        self._limit = detections_per_image
        self._beyond: dict[str, dict[str, float]] = {}
        self._precision: dict[str, np.ndarray] = {}
        objects = [
            sum(not annotation.get("iscrowd", 0) for annotation in annotations)
            for annotations in self._coco_api.imgToAnns.values()
        ]
        crowded = sum(count > self._limit for count in objects)
        if self._limit >= 0 and crowded:
            self._logger.warning(
                f"{crowded} images of {dataset_name!r} have more objects than the "
                f"{self._limit} detections that the model may give, {max(objects)} at most: it "
                "cannot find them all. TEST.DETECTIONS_PER_IMAGE (lazy: the model's "
                "test_topk_per_image or max_detections_per_image) lets it give more"
            )

    def reset(self) -> None:
        """Begins an evaluation; a terminal shows its progress."""
        super().reset()
        images = -(-len(self._coco_api.imgs) // comm.get_world_size())
        self._line = ProgressLine("evaluating", images)

    def process(self, inputs: Any, outputs: Any) -> None:
        """See COCOEvaluator."""
        super().process(inputs, outputs)
        self._line.update(len(inputs))

    def evaluate(self, img_ids: Any = None) -> dict[str, Any]:
        """See COCOEvaluator."""
        self._line.close()
        return super().evaluate(img_ids)

    def _eval_predictions(self, predictions: Any, img_ids: Any = None) -> None:
        self._beyond, self._precision = {}, {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):  # pycocotools prints; this goes to the log
            super()._eval_predictions(predictions, img_ids=img_ids)
        if printed.getvalue():
            self._logger.info("COCO's evaluation printed:\n%s", printed.getvalue())
        self._results.update(self._beyond)
        if self._output_dir:
            path = Path(self._output_dir, PRECISION_FILE)
            path.unlink(missing_ok=True)  # of an evaluation before
            if self._precision:
                np.savez_compressed(path, **self._precision)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if class_names is not None and numbers:
            # COCO's evaluation orders categories by their ids.
            class_names = [class_names[numbers[category]] for category in sorted(numbers)]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        coco_limit = _COCO_LIMITS[iou_type]
        if coco_eval is not None:
            ids = coco_eval.params.catIds
            self._precision["classes"] = np.array([self._coco_api.cats[id_]["name"] for id_ in ids])
            # (IoU, recall, class, size, limit): all sizes, COCO's limit
            self._precision[iou_type] = coco_eval.eval["precision"][:, :, :, 0, -1]
        if 0 <= self._limit <= coco_limit:
            return results
        if coco_eval is None:  # nothing was detected
            beyond = dict(results)
        else:
            results.update(_summary(coco_eval, "AR"))
            found = Counter(
                (found["image_id"], found["category_id"])
                for found in coco_eval.cocoDt.anns.values()
            )
            coco_eval.params.maxDets = [max(found.values())]
            coco_eval.evaluate()
            coco_eval.accumulate()
            beyond = {**_summary(coco_eval, "AP"), **_summary(coco_eval, "AR")}
            if class_names is not None and len(class_names) > 1:
                by_class = coco_eval.eval["precision"][:, :, :, 0, -1]
                for index, name in enumerate(class_names):
                    beyond[f"AP-{name}"] = _mean(by_class[:, :, index])
        task = f"{iou_type}@{self._limit if self._limit >= 0 else 'all'}"
        self._beyond[task] = beyond
        shown = create_small_table({k: v for k, v in beyond.items() if "-" not in k})
        self._logger.info(
            f"The results for {iou_type} above are COCO's, of at most {coco_limit} detections of "
            f"a category in an image. With all that the model gave, {task}:\n{shown}"
        )
        return results


def _summary(coco_eval: Any, metric: str) -> OrderedDict[str, float]:
    """AP or AR in percent at the evaluation's highest limit, over all sizes and by size."""
    # (IoU, recall, category, size, limit); recall has no axis of its own.
    values = coco_eval.eval["precision" if metric == "AP" else "recall"][..., -1]
    summary = OrderedDict({metric: _mean(values[..., 0])})
    if metric == "AP":
        thresholds = coco_eval.params.iouThrs.round(2).tolist()
        for percent in (50, 75):
            summary[f"AP{percent}"] = _mean(values[thresholds.index(percent / 100)][..., 0])
    for place, size in enumerate(coco_eval.params.areaRngLbl[1:], start=1):
        summary[f"{metric}{size[0]}"] = _mean(values[..., place])
    return summary


def _mean(values: Any) -> float:
    """The mean in percent, without COCO's -1 for missing values."""
    there = values[values > -1]
    return float(there.mean() * 100) if there.size else float("nan")
