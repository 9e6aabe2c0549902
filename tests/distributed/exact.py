"""Run in several processes by test_exact.py: trains uncut, and cut and resumed.

Usage: exact.py --num-gpus N --folder FOLDER --dataset SPEC, or by torchrun. The folder gets
``uncut`` and ``cut``, with a checkpoint after every second iteration.
"""

import os
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils.env import seed_all_rng

from evidence.tiny import tiny_options
from fpn_plugin.data import register_datasets
from fpn_plugin.engine import FPNTrainer, load_config
from fpn_plugin.engine.launch import launch, run_tool
from tests.helpers.runs import Cut

LENGTH = 5
CUT_AT = 3  # between two checkpoints


def config(dataset: str, output: Path, *opts: str) -> CfgNode:
    """Of a small detector on squares, whose images are scaled and mirrored at random."""
    register_datasets([dataset])
    output.mkdir(exist_ok=True)
    options = tiny_options(dataset, output, workers=0)
    length = ["SOLVER.MAX_ITER", str(LENGTH), "SOLVER.CHECKPOINT_PERIOD", "2"]
    more = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "3", "DATASETS.TEST", "()"]
    return load_config(options[1], [*options[5:], *length, *more, *opts])


def train(cfg: CfgNode, cut_at: int | None = None) -> None:
    seed_all_rng(0)  # as default_setup does for SEED 0
    trainer = FPNTrainer(cfg)
    trainer.resume_or_load(resume=True)
    if cut_at is not None:
        trainer.register_hooks([Cut(cut_at)])
    try:
        trainer.train()
    except KeyboardInterrupt:
        assert trainer.iter == cut_at
    torch.rand(7)  # a new process has drawn other numbers


def work(folder: Path, dataset: str) -> None:
    os.fsync = lambda descriptor: None  # nobody pulls the plug meanwhile
    train(config(dataset, folder / "uncut"))
    for cut in (CUT_AT, None):
        train(config(dataset, folder / "cut"), cut)


def main() -> None:
    parser = default_argument_parser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    args = parser.parse_args()
    launch(work, args, "cpu", (args.folder, args.dataset))


if __name__ == "__main__":
    run_tool(main)
