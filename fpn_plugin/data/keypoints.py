"""The keypoints of datasets: their names, which of them a mirrored image swaps, what joins them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices

from fpn_plugin.errors import UserError

from .keypoint_names import (
    HOW_TO_TELL_FLIPS,
    agreed_order,
    flip_order,
    mirrored_order,
    named_categories,
    skeleton_edges,
)
from .problems import shortened
from .reading import read_json

__all__ = ["check_keypoints", "describe_keypoints", "swapped_keypoints"]

_EDGE_COLOR = (102, 204, 255)
_COCO_KEYPOINTS = 17


def describe_keypoints(name: str) -> None:
    """Puts into a dataset's metadata what Detectron2 asks for: ``keypoint_names``,
    ``keypoint_flip_map`` and ``keypoint_connection_rules``.

    They come from the categories of its COCO JSON: ``keypoints``, ``skeleton`` and, which is no
    part of COCO, ``keypoint_flip_map`` of pairs of names. Without the last, the pairs follow from
    the names, see :func:`mirrored_order`. What the metadata has already stays. What is not known
    stays out.

    Args:
        name: of a registered dataset.
    """
    metadata = MetadataCatalog.get(name)
    names, json_file = metadata.get("keypoint_names"), metadata.get("json_file")
    if metadata.get("keypoint_flip_map") is not None:
        return
    if names is not None:
        order = mirrored_order(list(names))
    elif json_file and Path(json_file).is_file():
        content, *_ = read_json(json_file)
        named = named_categories(content.get("categories") if isinstance(content, dict) else ())
        if len({len(record["keypoints"]) for record in named}) != 1:
            return
        # A model has one set for all categories, which may call them differently.
        alike = zip(*(record["keypoints"] for record in named), strict=True)
        names = ["/".join(dict.fromkeys(each)) for each in alike]
        metadata.keypoint_names = names
        metadata.described_by_json = True  # so that another JSON describes them anew
        metadata.keypoint_connection_rules = [
            (names[one], names[other], _EDGE_COLOR)
            for one, other in skeleton_edges(named[0])
            if all((one, other) in skeleton_edges(record) for record in named)
        ]
        order = agreed_order([flip_order(record) for record in named])
    else:
        return
    if order is not None:
        metadata.keypoint_flip_map = [(names[i], names[j]) for i, j in enumerate(order) if i < j]


def swapped_keypoints(dataset_names: Sequence[str]) -> list[int] | None:
    """Detectron2's create_keypoint_hflip_indices for datasets that are described first.

    Args:
        dataset_names: of registered datasets.

    Returns:
        Where each keypoint of a mirrored image comes from; None if a dataset does not say, so
        that Detectron2 refuses to mirror its images.

    Raises:
        UserError: the datasets have different keypoints.
    """
    for name in dataset_names:
        describe_keypoints(name)
        if MetadataCatalog.get(name).get("keypoint_flip_map") is None:
            return None
    try:
        return create_keypoint_hflip_indices(list(dataset_names))
    except ValueError as error:
        raise UserError(f"datasets {', '.join(dataset_names)}: {error}") from error


def check_keypoints(
    train: Iterable[str],
    test: Iterable[str],
    count: int,
    *,
    flips: Iterable[str] = (),
    sigmas: Sequence[float] = (),
) -> None:
    """Refuses keypoints that a model cannot be trained on or evaluated by.

    Args:
        train: names of the datasets to train on; empty for an evaluation only.
        test: names of those to evaluate on.
        count: keypoints of the model.
        flips: ``"horizontal"``, ``"vertical"``: how training mirrors images.
        sigmas: TEST.KEYPOINT_OKS_SIGMAS; empty for COCO's.

    Raises:
        UserError: says which dataset or key, and what to set.
    """
    train, test = list(train), list(test)
    first: tuple[str, list[str]] | None = None
    for name in (*train, *test):
        describe_keypoints(name)
        metadata = MetadataCatalog.get(name)
        names = metadata.get("keypoint_names")
        if names is None:
            continue
        if len(names) != count:
            raise UserError(
                f"dataset {name!r} names {len(names)} keypoints, and the model has {count}: set "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS (lazy: num_keypoints) to {len(names)}"
            )
        if first is not None and list(names) != first[1]:
            raise UserError(
                f"dataset {name!r} has keypoints {shortened(list(names))}, and {first[0]!r} has "
                f"{shortened(first[1])}: the same are needed in the same order"
            )
        first = first or (name, list(names))
    for flip in flips:
        for name in train:
            _check_flip(name, flip)
    if test:
        _check_sigmas(count, sigmas)


def _check_flip(name: str, flip: str) -> None:
    swapped = MetadataCatalog.get(name).get("keypoint_flip_map")
    off = "INPUT.RANDOM_FLIP none (lazy: a mapper without RandomFlip) does not mirror images"
    if swapped is None:
        raise UserError(
            f"dataset {name!r} does not tell which keypoints a mirrored image swaps, as left and "
            f"right: {off}; to mirror them, {HOW_TO_TELL_FLIPS}"
        )
    if flip == "vertical" and len(swapped):
        raise UserError(
            f"images are mirrored vertically, and Detectron2 swaps keypoints as left and right of "
            f"dataset {name!r} only if they are mirrored horizontally: {off}"
        )


def _check_sigmas(count: int, sigmas: Sequence[float]) -> None:
    key = "TEST.KEYPOINT_OKS_SIGMAS (lazy: the evaluator's kpt_oks_sigmas)"
    given = list(sigmas)
    if len(given or range(_COCO_KEYPOINTS)) != count:
        has = (
            f"has {len(given)} numbers"
            if given
            else f"is empty, which means COCO's {_COCO_KEYPOINTS}"
        )
        raise UserError(
            f"{key} {has}, and the model has {count} keypoints: give one number for each, for "
            f"example {[0.05] * min(count, 3)}{' and so on' if count > 3 else ''}; the larger, "
            "the farther off a keypoint may be"
        )
    if any(type(value) not in (int, float) or not 0 < value < math.inf for value in given):
        raise UserError(f"{key} is {given}, expected numbers above 0")
