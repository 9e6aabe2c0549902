"""Numbers the categories of datasets as a model numbers its classes, by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from detectron2.data import MetadataCatalog

from fpn_plugin.errors import UserError

from .coco import is_reread, number_classes
from .problems import shortened
from .reading import read_json

__all__ = ["class_order", "follow_classes"]


def class_order(name: str) -> list[str] | None:
    """Names of a dataset's categories in the order of its class numbers; None if not known.

    Args:
        name: of a dataset, registered or not.
    """
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else {}
    known = metadata.get("thing_classes")
    json_file = metadata.get("json_file")
    if known is None and json_file and os.path.isfile(json_file):
        content, *_ = read_json(json_file)
        categories = content.get("categories") if isinstance(content, dict) else None
        if type(categories) is list:
            known = [record["name"] for record in sorted(categories, key=lambda c: c["id"])]
    return None if known is None else list(known)


def follow_classes(names: Iterable[str], classes: Sequence[str], whose: str) -> None:
    """Makes datasets number their categories as a model does.

    Detectron2 numbers the categories of a JSON in the order of their ids. If ids of another JSON
    give another order, the same class has another number.

    Args:
        names: of registered datasets.
        classes: the model's, in its order.
        whose: where these come from, for messages.

    Raises:
        UserError: a dataset has categories of other names.
    """
    for name in names:
        own = class_order(name)
        if own is None or own == list(classes):
            continue
        _check_names(name, own, classes, whose)
        known = MetadataCatalog.get(name)
        in_coco = known.get("evaluator_type", "coco") == "coco"
        files = known.get("json_file"), known.get("image_root")
        if not in_coco or None in files or not is_reread(name):
            raise UserError(
                f"dataset {name!r} has the classes of {whose} in another order, and is read from "
                "no COCO JSON that could be numbered anew: register it in the order "
                f"{shortened(classes)}"
            )
        number_classes(name, classes)
        if os.environ.get("RANK", "0") == "0":  # torchrun starts many
            print(
                f"dataset {name!r} has its categories in another order than {whose}: they are "
                "matched by name",
                flush=True,
            )


def _check_names(name: str, own: Sequence[str], classes: Sequence[str], whose: str) -> None:
    if sorted(own) != sorted(classes):
        lacks = [each for each in classes if each not in own]
        more = [each for each in own if each not in classes]
        message = [f"lacks {shortened(lacks)}"] if lacks else []
        message += [f"has {shortened(more)} more"] if more else []
        raise UserError(
            f"the categories of dataset {name!r} are not those of {whose}: it "
            f"{' and '.join(message) or 'has some of them twice'}. Give them the same names in its "
            "JSON; a category needs no annotations"
        )
    twice = [each for each in own if own.count(each) > 1]
    if twice:
        raise UserError(
            f"dataset {name!r} has its categories in another order than {whose}, and several are "
            f"named {twice[0]!r}: give them different names"
        )
