"""An RPN's proposals of datasets, in files that Detectron2 reads.

Fast R-CNN on fixed proposals (paper, section 5.2) trains on such files, through
MODEL.LOAD_PROPOSALS.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import nn
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from fpn_plugin.data import (
    Needs,
    ReadableImageMapper,
    check_datasets,
    check_records,
    registered_specs,
)
from fpn_plugin.errors import UserError
from fpn_plugin.modeling import without_network_weights
from fpn_plugin.utils.atomic import written_whole
from fpn_plugin.utils.pickles import load_arrays

from .checkpoint import StrictCheckpointer
from .launch import launch
from .logs import add_loggers
from .run_datasets import register_with_runs, run_folders
from .trainer import FPNTrainer

__all__ = ["dump_proposals"]

_IMAGES_PER_PART = 100  # what an interrupted run loses at most


def dump_proposals(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Writes ``<output>/<dataset>.pkl`` for each dataset.

    A file holds, for every image, at most MODEL.RPN.POST_NMS_TOPK_TEST boxes: XYXY in pixels of
    the original image, float32, and their objectness logits.

    Args:
        cfg: of a ProposalNetwork; its MODEL.DEVICE is settled. It is frozen.
        args: ``dataset``, ``splits``, ``output``, and those that :func:`launch` reads.

    Raises:
        UserError: a dataset cannot be used, the model gives no proposals, or the output holds
            proposals of other weights or another config.
    """
    # The next lines check.
    folders = run_folders(args.config_file, cfg.MODEL.WEIGHTS)
    specs = register_with_runs(args.dataset, *folders, checked=True)
    check_datasets(args.splits, "--splits")
    check_records(args.splits, Needs.of(cfg, training=False))
    args.dataset = registered_specs(specs)
    if cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, whose output is not only "
            "proposals: give the config of an RPN, or MODEL.META_ARCHITECTURE ProposalNetwork to "
            "take the RPN of a detector"
        )
    cfg.freeze()
    launch(_worker, args, cfg.MODEL.DEVICE, (cfg, args))


def _worker(cfg: CfgNode, args: argparse.Namespace) -> None:
    register_with_runs(args.dataset, checked=True)
    add_loggers("fvcore", "fpn_plugin")
    model = FPNTrainer.build_model(without_network_weights(cfg)).eval()
    StrictCheckpointer(model, complete=True).load(cfg.MODEL.WEIGHTS)
    for split in args.splits:
        target = Path(args.output) / f"{split}.pkl"
        stamp = target.with_suffix(".made_by")
        if target.is_file() and stamp.is_file():
            _check_stamp(cfg, stamp, target)
            print(f"{target} exists already")
        else:
            _dump(cfg, model, split, target, stamp)


def _dump(cfg: CfgNode, model: nn.Module, split: str, target: Path, stamp: Path) -> None:
    """One dataset's file, merged from parts; a part that exists is not made again."""
    records = DatasetCatalog.get(split)
    parts_folder = target.with_suffix(".parts")
    work = {
        parts_folder / f"{start:07d}.pkl": records[start : start + _IMAGES_PER_PART]
        for start in range(0, len(records), _IMAGES_PER_PART)
    }
    if comm.is_main_process():
        _check_stamp(cfg, parts_folder / "made_by", parts_folder)
        parts_folder.mkdir(parents=True, exist_ok=True)
        (parts_folder / "made_by").write_text(_stamp(cfg))
    comm.synchronize()
    mine = list(work.items())[comm.get_rank() :: comm.get_world_size()]
    with tqdm(
        total=sum(len(of_part) for _, of_part in mine),
        desc=f"proposals of {split}",
        unit="image",
        disable=not comm.is_main_process(),
    ) as bar:
        for part, of_part in mine:
            if not part.is_file():
                _write_part(cfg, model, of_part, part)
            bar.update(len(of_part))
    comm.synchronize()
    if comm.is_main_process():
        # What Detectron2's load_proposals_into_dataset reads: lists with one entry an image.
        merged: dict[str, Any] = {"ids": [], "boxes": [], "objectness_logits": []}
        for part in work:
            with part.open("rb") as file:
                for key, entries in load_arrays(file).items():
                    merged[key] += entries
        _write(target, {**merged, "bbox_mode": BoxMode.XYXY_ABS.value})
        stamp.write_text(_stamp(cfg))
        shutil.rmtree(parts_folder)


def _stamp(cfg: CfgNode) -> str:
    """Digits that change with the config and with the weights file."""
    weights = Path(cfg.MODEL.WEIGHTS)
    written = weights.stat().st_mtime_ns if weights.is_file() else ""
    return hashlib.sha256(f"{cfg.dump()}{written}".encode()).hexdigest()


def _check_stamp(cfg: CfgNode, stamp: Path, what: Path) -> None:
    """Refuses proposals that other weights or settings made or began."""
    if stamp.is_file() and stamp.read_text() != _stamp(cfg):
        raise UserError(
            f"{what} holds proposals of other weights or another config: remove it, or give "
            "another --output"
        )


def _write_part(cfg: CfgNode, model: nn.Module, records: list[dict[str, Any]], part: Path) -> None:
    loader = build_detection_test_loader(
        records,
        mapper=ReadableImageMapper(cfg, is_train=False),
        sampler=SequentialSampler(records),  # processes have divided the parts among them already
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    with torch.inference_mode():
        outputs = [output["proposals"].to("cpu") for inputs in loader for output in model(inputs)]
    content = {
        "ids": [record["image_id"] for record in records],
        "boxes": [output.proposal_boxes.tensor.numpy() for output in outputs],
        "objectness_logits": [output.objectness_logits.numpy() for output in outputs],
    }
    _write(part, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    with written_whole(str(path)) as file:
        pickle.dump(content, file)
