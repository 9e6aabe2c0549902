"""What Detectron2's own tools do with an evaluation besides: test-time augmentation, and results
that are expected of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.modeling import GeneralizedRCNN, PanopticFPN

from fpn_plugin.errors import UserError, near_names

__all__ = ["check_augmentation", "check_expected", "verify_expected"]


def check_augmentation(
    key: str, model: object, *, keypoints: bool, proposals: bool, min_sizes: Sequence[int]
) -> None:
    """Refuses test-time augmentation of models that Detectron2 has none for.

    Args:
        key: the config key that asks for it.
        model: class of the model.
        keypoints: whether it has a keypoint head.
        proposals: whether it reads proposals from files.
        min_sizes: shorter sides to resize to.

    Raises:
        UserError: says what it is that has none.
    """
    is_rcnn = isinstance(model, type) and issubclass(model, GeneralizedRCNN)
    if not is_rcnn or issubclass(model, PanopticFPN):
        what = getattr(model, "__name__", str(model))
    elif keypoints:
        what = "a model with keypoints"
    elif proposals:
        what = "a model that reads proposals from files"
    else:
        if not min_sizes or any(type(size) is not int or size < 1 for size in min_sizes):
            raise UserError(
                f"{key} is True, with sizes {list(min_sizes)}: expected one or more in pixels"
            )
        return
    raise UserError(
        f"{key} is True, and Detectron2 has no test-time augmentation for {what}, only for Faster, "
        "Mask and Cascade R-CNN: set it to False"
    )


def check_expected(key: str, expected: Sequence[Any], test_sets: Sequence[str]) -> None:
    """Refuses expected results that no evaluation could be compared with.

    Args:
        key: the config key that has them.
        expected: ``[[task, metric, value, tolerance], ...]``.
        test_sets: names of the sets that are evaluated.

    Raises:
        UserError: one is something else, or there are none or several test sets.
    """
    for entry in expected:
        fits = isinstance(entry, list | tuple) and len(entry) == 4
        if not fits or [type(part) in (int, float) for part in entry] != [False, False, True, True]:
            raise UserError(
                f"{key} has {entry!r}: expected [task, metric, value, tolerance], as "
                "['bbox', 'AP', 37.9, 0.5]"
            )
    if expected and len(test_sets) != 1:
        raise UserError(f"{key} is for one test set, and there are {len(test_sets)}")


def verify_expected(key: str, expected: Sequence[Any], results: dict[str, Any]) -> None:
    """Compares results with those that are expected, by Detectron2's rule.

    Args:
        key: the config key that has them.
        expected: see :func:`check_expected`.
        results: ``{task: {metric: value}}``.

    Raises:
        UserError: one is missing, not finite, or farther off than its tolerance.
    """
    for task, *_ in expected:
        if task not in results:
            raise UserError(f"{key} names {task!r}, no task here: {near_names(task, results)}")
    node = CfgNode({"TEST": {"EXPECTED_RESULTS": [list(entry) for entry in expected]}})
    try:
        verify_results(node, results)
    except SystemExit as error:
        message = ", ".join(
            f"{task} {metric} is {results[task].get(metric, 'not there')} (expected {value} within "
            f"{tolerance})"
            for task, metric, value, tolerance in expected
        )
        raise UserError(f"{key} is not met: {message}") from error
