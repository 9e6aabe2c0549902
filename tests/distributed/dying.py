"""Run by test_deaths.py: train_net.py in several processes, of which one fails.

FPN_TEST_DEATH says which process, where ("train", "last", "evaluation") and how: "kill", "raise",
"refuse" (a UserError) or, in training, "nan" (a loss that is none); as in "1 train kill".
FPN_TEST_DIED names the file whose time of change is the moment. Beside it, ``steps_RANK`` gets a
line an iteration that changed weights, ``batch_RANK`` the last batch's files.
"""

import os
import signal
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from fpn_plugin import UserError
from fpn_plugin.cli.train import train_main
from fpn_plugin.engine import FPNTrainer, run_tool

RANK, WHERE, HOW = os.environ["FPN_TEST_DEATH"].split()
DIED = Path(os.environ["FPN_TEST_DIED"])


def die() -> None:
    if comm.get_rank() != int(RANK):
        return
    DIED.touch()
    if HOW == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"raise": ValueError, "refuse": UserError}[HOW](f"process {RANK} was told to fail")


# Started processes import this file again, so that all of them have it.
train_step = FPNTrainer.run_step
build_model = FPNTrainer.build_model.__func__
build_optimizer = FPNTrainer.build_optimizer.__func__


def run_step(self: FPNTrainer) -> None:
    # Else processes wait for each other's losses before they step, and whether the watch holds
    # them back cannot be seen.
    self._trainer.gather_metric_period = 1000
    if HOW != "nan" and self.iter == {"train": 1, "last": self.max_iter - 1}.get(WHERE):
        die()
    train_step(self)


def noted(model: torch.nn.Module, inputs: tuple, output: object) -> object:
    if not model.training:
        return output
    names = [record["file_name"] for record in inputs[0]]
    (DIED.parent / f"batch_{comm.get_rank()}").write_text("\n".join(names))
    if HOW != "nan" or comm.get_rank() != int(RANK) or get_event_storage().iter != 1:
        return output
    DIED.touch()
    return {name: loss * (torch.nan if "rpn" in name else 1) for name, loss in output.items()}


def build_dying_model(cls, cfg):
    model = build_model(cls, cfg)
    if WHERE == "evaluation":
        model.register_forward_pre_hook(lambda model, _: None if model.training else die())
    model.register_forward_hook(noted)
    return model


def build_counted_optimizer(cls, cfg, model):
    def count(*_):
        with open(DIED.parent / f"steps_{comm.get_rank()}", "a") as file:
            file.write(f"{get_event_storage().iter}\n")

    optimizer = build_optimizer(cls, cfg, model)
    optimizer.register_step_post_hook(count)
    return optimizer


FPNTrainer.run_step = run_step
FPNTrainer.build_model = classmethod(build_dying_model)
FPNTrainer.build_optimizer = classmethod(build_counted_optimizer)

if __name__ == "__main__":
    run_tool(train_main)
