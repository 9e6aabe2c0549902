"""Trainings on squares: by a lazy config or Detectron2's trainer, cut, and ended by an error."""

from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase

from fpn_plugin.engine import run_tool

LAZY = "lazy/mini/faster_rcnn_R_18_FPN.py"


def lazy_options(squares: str, output: Path, *overrides: str) -> list[str]:
    """Arguments of ``fpn-plugin train`` for a lazy config on squares, on the CPU."""
    names = [f"dataloader.{split}.dataset.names=squares" for split in ("train", "test")]
    model = ["model.roi_heads.num_classes=1", "train.device=cpu", f"train.output_dir={output}"]
    return ["--config-file", LAZY, "--dataset", squares, "--resume", *names, *model, *overrides]


def error_line(capfd: pytest.CaptureFixture, main: Callable[..., None], *args: object) -> str:
    """The one line that a command reports an error by; its exit status is 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: main(*args))
    assert ended.value.code == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


class Cut(HookBase):
    """Cuts a training before an iteration."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_step(self) -> None:
        if self.trainer.iter == self.at:
            raise KeyboardInterrupt


class Stock(DefaultTrainer):
    """Detectron2's trainer with Detectron2's mapper."""

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = DatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


class Malicious:
    """A pickle that writes a file when it is loaded as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (exec, (f"open({self.path!r}, 'w').write('ran')",))
