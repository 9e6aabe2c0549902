"""What the categories of a COCO JSON say of keypoints: names, pairs of sides, and a skeleton."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from .problems import Problem, shortened
from .requirements import Needs

__all__ = [
    "HOW_TO_TELL_FLIPS",
    "agreed_order",
    "category_keypoint_problems",
    "flip_order",
    "mirrored_order",
    "named_categories",
    "skeleton_edges",
]

_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}
# Left and right anywhere; l and r as a word: l_eye, LEye, eyeL.
_SIDE = re.compile(
    r"(?i:left|right)|(?<![A-Za-z])[lrLR](?![A-Za-z])|(?<![A-Z])[LR](?=[A-Z][a-z])"
    r"|(?<=[a-z])[LR](?![A-Za-z])"
)
# What must have a counterpart, as "bright" need not.
_SIDED = re.compile(r"(?<![A-Za-z])(?i:left|right)|Left|Right")

HOW_TO_TELL_FLIPS = (
    'say so in its JSON, in the category, by "keypoint_flip_map": '
    '[["left_eye", "right_eye"], ...], or [] if none are swapped'
)


def mirrored_order(names: Sequence[str]) -> list[int] | None:
    """Where each keypoint of a mirrored image comes from, as far as names say.

    Names are pairs if they differ in their side: ``left_eye`` and ``right_eye``, ``LEye`` and
    ``REye``, ``ear.l`` and ``ear.r``. If there are pairs, all others are taken to lie in the
    middle.

    Args:
        names: of the keypoints.

    Returns:
        The indices; None if there are no pairs, or a name has a side without its counterpart.
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


def _declared_order(names: Sequence[str], pairs: Any) -> list[int] | None:
    """The same by a category's keypoint_flip_map; None if that is no list of pairs of names."""
    if type(pairs) is not list:
        return None
    order = list(range(len(names)))
    seen: list[Any] = []
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or any(name not in names for name in pair):
            return None
        one, other = map(names.index, pair)
        order[one], order[other] = other, one
        seen += pair
    return order if len(set(seen)) == len(seen) else None


def flip_order(category: dict[str, Any]) -> list[int] | None:
    """What a category says, by its keypoint_flip_map or else its names.

    Args:
        category: one of :func:`named_categories`.

    Returns:
        See :func:`mirrored_order`.
    """
    if "keypoint_flip_map" in category:
        return _declared_order(category["keypoints"], category["keypoint_flip_map"])
    return mirrored_order(category["keypoints"])


def skeleton_edges(category: dict[str, Any]) -> list[tuple[int, int]]:
    """Pairs of indices from 0 on; COCO's skeletons count from 1."""
    count, skeleton = len(category["keypoints"]), category.get("skeleton")
    return [
        (edge[0] - 1, edge[1] - 1)
        for edge in (skeleton if type(skeleton) is list else ())
        if type(edge) is list and len(edge) == 2
        if all(type(end) is int and 1 <= end <= count for end in edge)
    ]


def _are_names(given: Any) -> bool:
    return (
        type(given) is list
        and all(type(name) is str for name in given)
        and len(set(given)) == len(given)
    )


def named_categories(records: Any) -> list[dict[str, Any]]:
    """Those of a JSON's categories that name their keypoints."""
    return [
        record
        for record in (records if type(records) is list else ())
        if isinstance(record, dict) and record.get("keypoints") and _are_names(record["keypoints"])
    ]


def category_keypoint_problems(records: Sequence[Any], needs: Needs) -> Iterator[Problem]:
    """What is wrong with the keypoints that categories name, for a model that has keypoints.

    Args:
        records: a JSON's categories.
        needs: what the model asks.
    """
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
        orders.append(flip_order(record))
        if orders[-1] is None and "keypoint_flip_map" in record:
            message = (
                f"keypoint_flip_map is {shortened(record['keypoint_flip_map'])}, expected pairs"
            )
            yield Problem(
                "keypoint_names", where, f"{message} of its keypoints, as [[left, right]]"
            )
        given = record.get("skeleton") or []
        if type(given) is not list or len(skeleton_edges(record)) < len(given):
            message = f"skeleton is {shortened(given)}, expected pairs of numbers from 1 to"
            yield Problem("skeleton", where, f"{message} {len(names)}")
    if needs.keypoints and needs.training and not agreed_order(orders):
        message = f"which keypoints a mirrored image swaps is not known: {HOW_TO_TELL_FLIPS}"
        yield Problem("keypoint_flips", "categories", message)


def agreed_order(orders: Sequence[list[int] | None]) -> list[int] | None:
    """What all categories say, because a model has one set of keypoints for all."""
    return orders[0] if orders and all(order == orders[0] for order in orders) else None
