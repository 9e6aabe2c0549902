"""Run by test_deaths.py: train_net.py in several processes, of which process 1 fails.

FPN_TEST_DEATH says where ("train", "last", "evaluation") and how ("kill", "raise"), as in
"train kill"; FPN_TEST_DIED names the file whose time of change is the moment.
"""

import os
import signal
from pathlib import Path

from detectron2.utils import comm

from fpn_plugin.engine import FPNTrainer, run_tool
from fpn_plugin.engine.training import train_main

WHERE, HOW = os.environ["FPN_TEST_DEATH"].split()


def die() -> None:
    if comm.get_rank() != 1:
        return
    Path(os.environ["FPN_TEST_DIED"]).touch()
    if HOW == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("process 1 was told to fail")


# Started processes import this file again, so that all of them have it.
train_step = FPNTrainer.run_step
build_model = FPNTrainer.build_model.__func__


def run_step(self: FPNTrainer) -> None:
    if self.iter == {"train": 1, "last": self.max_iter - 1}.get(WHERE):
        die()
    train_step(self)


def build_dying_model(cls, cfg):
    model = build_model(cls, cfg)
    model.register_forward_pre_hook(lambda model, _: None if model.training else die())
    return model


FPNTrainer.run_step = run_step
if WHERE == "evaluation":
    FPNTrainer.build_model = classmethod(build_dying_model)

if __name__ == "__main__":
    run_tool(train_main)
