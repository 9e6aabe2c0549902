"""Every key of Detectron2's config is read by the tools, or stands in a table with its reason."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator

from evidence.tiny import tiny_options
from fpn_plugin import UserError, model_zoo
from fpn_plugin.cli.train import train_main
from fpn_plugin.config import flat_keys, value_at
from fpn_plugin.data import register_datasets
from fpn_plugin.engine import FPNTrainer
from fpn_plugin.engine.settings import load_config

# Detectron2's keys that no tool of the plugin's reads, and why not.
UNREAD = {
    "VERSION": "of the config file; read when one is merged",
    "GLOBAL.HACK": "nothing in Detectron2 reads it",
    "CUDNN_BENCHMARK": "default_setup reads it in the config's text: see the test",
}


class Recorded(CfgNode):
    """A config that notes which of its keys are read; copies note them in the same place."""

    def __getattr__(self, name):
        self.note(name)
        return super().__getattr__(name)

    def __getitem__(self, name):
        self.note(name)
        return super().__getitem__(name)

    def get(self, name, otherwise=None):
        self.note(name)
        return super().get(name, otherwise)

    def note(self, name):
        if "path" in self.__dict__:
            self.__dict__["read"].add(self.__dict__["path"] + name)


class Notes(set):
    def __deepcopy__(self, memo):
        return self


def recorded(cfg: CfgNode, read: Notes, path: str = "") -> CfgNode:
    node = Recorded()
    for key, value in cfg.items():
        inner = isinstance(value, CfgNode)
        dict.__setitem__(node, key, recorded(value, read, f"{path}{key}.") if inner else value)
    node.__dict__.update(path=path, read=read)
    return node


@pytest.fixture
def tool(squares, tmp_path, monkeypatch):
    """Runs fpn-plugin train on squares; the keys that it read."""

    def run(*args: str) -> Notes:
        read = Notes()
        monkeypatch.setattr(
            "fpn_plugin.cli.train.load_config", lambda *given: recorded(load_config(*given), read)
        )
        options = tiny_options(squares, tmp_path, 0)
        flags = [arg for arg in args if arg.startswith("--")]
        opts = [*options[5:], "SOLVER.MAX_ITER", "1", *OPTS, *args[len(flags) :]]
        train_main([*options[:4], *flags, *opts])
        return read

    return run


# What other keys are read for.
OPTS = [
    "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48,)", "TEST.PRECISE_BN.ENABLED", "True",
    "TEST.PRECISE_BN.NUM_ITER", "1", "INPUT.CROP.ENABLED", "True", "VIS_PERIOD", "100",
    "SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm",
    "SOLVER.REFERENCE_WORLD_SIZE", "1",
]  # fmt: skip

EVALUATION = {
    "TEST.AUG.ENABLED", "TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP",
    "TEST.EXPECTED_RESULTS", "TEST.DETECTIONS_PER_IMAGE", "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST", "DATASETS.TEST", "MODEL.WEIGHTS", "OUTPUT_DIR", "SEED",
}  # fmt: skip


def read_by_models() -> Notes:
    """The keys that building models of each kind reads."""
    read = Notes()
    rcnn = "COCO-Detection/faster_rcnn_R_50_FPN_1x"
    fed_loss = ["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True, "DATASETS.TRAIN", "('counted',)"]
    MetadataCatalog.get("counted").class_image_count = [
        {"id": i, "image_count": i} for i in range(1, 81)
    ]
    for name, opts in (
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", []),
        ("COCO-Detection/retinanet_R_50_FPN_1x", []),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", []),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x", []),
        (rcnn, [*fed_loss, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]),
        (rcnn, ["MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", False]),
    ):
        cfg = model_zoo.get_config(f"{name}.yaml")
        cfg.merge_from_list(["MODEL.DEVICE", "meta", *opts])
        with torch.device("meta"):
            build_model(recorded(cfg, read))
    rotated = load_config("", ["MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"])
    build_anchor_generator(recorded(rotated, read), [ShapeSpec(stride=16)])
    MetadataCatalog.pop("counted")
    return read


def read_by_loaders(squares: str, output: Path) -> Notes:
    """The keys that loaders read with other samplers, and with proposals."""
    read = Notes()
    register_datasets([squares])
    options = tiny_options(squares, output, 0)[5:]

    def config(*opts: str) -> CfgNode:
        return recorded(load_config("mini/faster_rcnn_R_18_FPN.yaml", [*options, *opts]), read)

    FPNTrainer.build_train_loader(config("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"))
    # The files are missing, which is said once they are looked for.
    files = ["DATASETS.PROPOSAL_FILES_TRAIN", "('no.pkl',)"]
    files += ["DATASETS.PROPOSAL_FILES_TEST", "('no.pkl',)"]
    proposals = config("MODEL.LOAD_PROPOSALS", "True", *files)
    with pytest.raises(UserError, match="cannot load dataset"):
        FPNTrainer.build_train_loader(proposals)
    with pytest.raises(UserError, match="cannot load dataset"):
        FPNTrainer.build_test_loader(proposals, "squares")
    # Squares have no keypoints, which its mapper would say first.
    with pytest.raises(AssertionError):
        build_detection_train_loader(config("MODEL.KEYPOINT_ON", "True"), mapper=print)
    return read


def read_by_schedules() -> Notes:
    read = Notes()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for name in ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"):
        cfg = recorded(load_config("", ["SOLVER.LR_SCHEDULER_NAME", name]), read)
        FPNTrainer.build_lr_scheduler(cfg, optimizer)
    return read


def test_every_key_of_detectron2_is_read(squares, tmp_path, tool, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    read = tool("CUDNN_BENCHMARK", "True")
    assert torch.backends.cudnn.benchmark
    read |= read_by_models() | read_by_loaders(squares, tmp_path) | read_by_schedules()
    cfg = get_cfg()
    keys = {key for key in flat_keys(cfg) if not isinstance(value_at(cfg, key), CfgNode)}
    assert keys - read == set(UNREAD)


def test_an_evaluation_reads_what_concerns_it(tool, monkeypatch):
    monkeypatch.setattr("fpn_plugin.engine.checkpoint.StrictCheckpointer.load", lambda *_, **__: {})
    assert tool("--eval-only") >= EVALUATION
