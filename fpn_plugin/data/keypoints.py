"""Keypoints of datasets: their names, the pairs that a mirrored image swaps, and the skeleton."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices

from fpn_plugin.errors import UserError

from .problems import Problem, shortened
from .reading import read_json
from .requirements import Needs

__all__ = [
    "category_keypoint_problems", "check_keypoints", "describe_keypoints", "mirrored_order",
    "swapped_keypoints",
]  # fmt: skip

_EDGE_COLOR = (102, 204, 255)
_COCO_KEYPOINTS = 17
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}
# Left and right anywhere; l and r as a word: l_eye, LEye, eyeL.
_SIDE = re.compile(
    r"(?i:left|right)|(?<![A-Za-z])[lrLR](?![A-Za-z])|(?<![A-Z])[LR](?=[A-Z][a-z])"
    r"|(?<=[a-z])[LR](?![A-Za-z])"
)
# What must have a counterpart; "bright" need not.
_SIDED = re.compile(r"(?<![A-Za-z])(?i:left|right)|Left|Right")
_HOW_TO_NAME_PAIRS = (
    'name them in its JSON, in the category, by "keypoint_flip_map": '
    '[["left_eye", "right_eye"], ...], or [] if none are swapped'
)


def mirrored_order(names: Sequence[str]) -> list[int] | None:
    """Where each keypoint of a mirrored image comes from, as far as names say.

    Two names are a pair if they differ only in their side: ``left_eye`` and ``right_eye``, ``LEye``
    and ``REye``, ``ear.l`` and ``ear.r``. If there are pairs, all others lie in the middle.

    Args:
        names: of the keypoints.

    Returns:
        The indices; None if there are no pairs, or a name has a side and no counterpart.
    """
    if len(names) == 1:
        return [0]
    order = []
    for index, name in enumerate(names):
        partners = [names.index(other) for other in _other_sides(name) if other in names]
        if not partners and _SIDED.search(name):
            return None
        order.append(partners[0] if partners else index)
    whole = all(order[partner] == index for index, partner in enumerate(order))
    return order if whole and order != list(range(len(names))) else None


def _other_sides(name: str) -> Iterator[str]:
    """What a keypoint's counterpart may be called."""
    for side in _SIDE.finditer(name):
        other = _OTHER[side.group().lower()]
        if side.group().isupper():
            other = other.upper()
        elif side.group()[0].isupper():
            other = other.capitalize()
        yield name[: side.start()] + other + name[side.end() :]


def _category_order(category: dict[str, Any]) -> list[int] | None:
    """:func:`mirrored_order` by a category's keypoint_flip_map, if it has one, or else its names.

    None also if the map is no list of pairs of names.
    """
    names, pairs = category["keypoints"], category.get("keypoint_flip_map")
    if "keypoint_flip_map" not in category:
        return mirrored_order(names)
    if type(pairs) is not list:
        return None
    order, seen = list(range(len(names))), []
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or any(name not in names for name in pair):
            return None
        one, other = map(names.index, pair)
        order[one], order[other] = other, one
        seen += pair
    return order if len(set(seen)) == len(seen) else None


def _agreed_order(orders: Sequence[list[int] | None]) -> list[int] | None:
    """What all categories say: a model has one set of keypoints for all of them."""
    return orders[0] if orders and all(order == orders[0] for order in orders) else None


def _skeleton_edges(category: dict[str, Any]) -> list[tuple[int, int]]:
    """Pairs of indices from 0 on; COCO's skeletons count from 1."""
    count, skeleton = len(category["keypoints"]), category.get("skeleton")
    return [
        (edge[0] - 1, edge[1] - 1)
        for edge in (skeleton if type(skeleton) is list else ())
        if type(edge) is list and len(edge) == 2
        if all(type(end) is int and 1 <= end <= count for end in edge)
    ]


def _are_names(given: Any) -> bool:
    if type(given) is not list or any(type(name) is not str for name in given):
        return False
    return len(set(given)) == len(given)


def category_keypoint_problems(records: Sequence[Any], needs: Needs) -> Iterator[Problem]:
    """What is wrong with the keypoints that a JSON's categories name, for a model that has some."""
    orders = []
    for record in records if needs.keypoints else ():
        if not isinstance(record, dict) or not record.get("keypoints"):
            continue
        where, names = f"category {shortened(record.get('id'))}", record["keypoints"]
        if not _are_names(names):
            message = f"keypoints are {shortened(names)}, expected names that differ"
            yield Problem("keypoint_names", where, message)
            continue
        if len(names) != needs.keypoints:
            message = f"names {len(names)} keypoints, and the model has {needs.keypoints}"
            message += " (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS; lazy: num_keypoints)"
            yield Problem("keypoint_names", where, message)
            continue
        orders.append(_category_order(record))
        if orders[-1] is None and "keypoint_flip_map" in record:
            message = f"keypoint_flip_map is {shortened(record['keypoint_flip_map'])}, expected"
            message += " pairs of its keypoints, as [[left, right]]"
            yield Problem("keypoint_names", where, message)
        given = record.get("skeleton") or []
        if type(given) is not list or len(_skeleton_edges(record)) < len(given):
            message = f"skeleton is {shortened(given)}, expected pairs of numbers from 1 to"
            yield Problem("skeleton", where, f"{message} {len(names)}")
    if needs.keypoints and needs.training and not _agreed_order(orders):
        message = f"which keypoints a mirrored image swaps is not known: {_HOW_TO_NAME_PAIRS}"
        yield Problem("keypoint_flips", "categories", message)


def describe_keypoints(name: str) -> None:
    """Puts into a dataset's metadata what Detectron2 reads of keypoints.

    These are ``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules``. They come
    from the categories of the COCO JSON: ``keypoints``, ``skeleton`` and ``keypoint_flip_map``, a
    list of pairs of names that is no part of COCO. Without that list, pairs follow from the names,
    see :func:`mirrored_order`. What the metadata has already stays. What is not known is left out.

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
        records = content.get("categories") if isinstance(content, dict) else None
        named = [
            record
            for record in (records if type(records) is list else ())
            if isinstance(record, dict) and record.get("keypoints")
            if _are_names(record["keypoints"])
        ]
        if len({len(record["keypoints"]) for record in named}) != 1:
            return
        # A model has one set for all categories, which may call them differently.
        alike = zip(*(record["keypoints"] for record in named), strict=True)
        names = ["/".join(dict.fromkeys(each)) for each in alike]
        metadata.keypoint_names = names
        metadata.described_by_json = True  # so that another JSON describes them anew
        metadata.keypoint_connection_rules = [
            (names[one], names[other], _EDGE_COLOR)
            for one, other in _skeleton_edges(named[0])
            if all((one, other) in _skeleton_edges(record) for record in named)
        ]
        order = _agreed_order(list(map(_category_order, named)))
    else:
        return
    if order is not None:
        metadata.keypoint_flip_map = [(names[i], names[j]) for i, j in enumerate(order) if i < j]


def swapped_keypoints(dataset_names: Sequence[str]) -> list[int] | None:
    """Detectron2's create_keypoint_hflip_indices for datasets that are described first.

    Args:
        dataset_names: of registered datasets.

    Returns:
        Where each keypoint of a mirrored image comes from. None if a dataset does not say:
        Detectron2 then refuses to mirror its images.

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
        UserError: names the dataset or key, and what to set.
    """
    train, test = list(train), list(test)
    first: tuple[str, list[str]] | None = None
    for name in (*train, *test):
        describe_keypoints(name)
        names = MetadataCatalog.get(name).get("keypoint_names")
        if names is None:
            continue
        if len(names) != count:
            raise UserError(
                f"dataset {name!r} names {len(names)} keypoints, and the model has {count}: set "
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS (lazy: num_keypoints) to {len(names)}"
            )
        first = first or (name, list(names))
        if list(names) != first[1]:
            raise UserError(
                f"dataset {name!r} has keypoints {shortened(list(names))}, and {first[0]!r} has "
                f"{shortened(first[1])}: the same are needed in the same order"
            )
    for flip in flips:
        for name in train:
            _check_flip(name, flip)
    if test:
        _check_sigmas(count, list(sigmas))


def _check_flip(name: str, flip: str) -> None:
    swapped = MetadataCatalog.get(name).get("keypoint_flip_map")
    off = "INPUT.RANDOM_FLIP none (lazy: a mapper without RandomFlip) does not mirror images"
    if swapped is None:
        raise UserError(
            f"dataset {name!r} does not say which keypoints a mirrored image swaps, as left and "
            f"right: {off}; to mirror them, {_HOW_TO_NAME_PAIRS}"
        )
    if flip == "vertical" and len(swapped):
        raise UserError(
            f"images are mirrored vertically, and Detectron2 swaps keypoints as left and right of "
            f"dataset {name!r} only if they are mirrored horizontally: {off}"
        )


def _check_sigmas(count: int, sigmas: list[float]) -> None:
    key = "TEST.KEYPOINT_OKS_SIGMAS (lazy: the evaluator's kpt_oks_sigmas)"
    if (len(sigmas) or _COCO_KEYPOINTS) != count:
        empty = f"is empty, which means COCO's {_COCO_KEYPOINTS}"
        raise UserError(
            f"{key} {f'has {len(sigmas)} numbers' if sigmas else empty}, and the model has {count} "
            f"keypoints: give one number for each, for example {[0.05] * min(count, 3)}"
            f"{' and so on' if count > 3 else ''}; the larger, the farther off a keypoint may be"
        )
    if any(type(value) not in (int, float) or not 0 < value < math.inf for value in sigmas):
        raise UserError(f"{key} is {sigmas}, expected numbers above 0")
