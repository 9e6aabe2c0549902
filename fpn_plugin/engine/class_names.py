"""The classes of a model by name, from its weights or from the data that it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.data import class_order, follow_classes
from fpn_plugin.utils.weight_files import classes_in

__all__ = ["match_datasets"]


def match_datasets(
    train: Sequence[str],
    test: Sequence[str],
    weights: str,
    output_dir: str,
    *,
    resume: bool,
    training: bool,
    classes: int | None,
) -> None:
    """Makes all datasets of a run number their categories as its model does.

    The order is that of the weights, if the file names classes and they are those trained on.
    Otherwise it is that of the first dataset to train on.

    Args:
        train: names of the datasets to train on.
        test: names of those to evaluate on.
        weights: what the run begins with, unless it resumes a checkpoint of ``output_dir``.
        output_dir: where its checkpoints are.
        resume: whether it resumes the last of these, if there is one.
        training: whether it trains, or only evaluates.
        classes: how many the model has; None for a model without classes.

    Raises:
        UserError: a dataset has categories of other names.
    """
    if classes is None:
        return
    last = Path(output_dir, "last_checkpoint")
    if resume and last.is_file():
        weights = str(Path(output_dir, last.read_text(errors="replace").strip()))
    known, first = classes_in(weights), class_order(train[0]) if train else None
    datasets = (*train, *test) if training else test
    # A training on other classes than the weights' is fine-tuning.
    if known is not None and (not training or sorted(known) == sorted(first or ())):
        follow_classes(datasets, known, f"the weights {Path(weights).name!r}")
    elif first is not None and (training or len(first) == classes):
        follow_classes(datasets, first, f"the training's dataset {train[0]!r}")
