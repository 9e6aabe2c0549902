"""Lazy configs against the yacs configs they are made from: the same modules, numbers, training."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.model_zoo import get_config as zoo_config
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn

from fpn_plugin import FeaturePyramidNetwork, UserError, model_zoo
from fpn_plugin.data import Needs, ReadableImageMapper, ensure_mini
from fpn_plugin.engine import lazy_training
from fpn_plugin.engine.lazy_training import lazy_main, load_lazy_config
from fpn_plugin.engine.training import train_main
from fpn_plugin.lazy import model_node, twin, with_pyramid
from fpn_plugin.metrics import loss_rows


def small(cfg):
    """A model that a test can build often: its architecture at ResNet-18's or 50's depth."""
    cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.RESNETS.DEPTH > 50:
        cfg.MODEL.RESNETS.DEPTH = 50
    return cfg


def settings(module: nn.Module) -> dict[str, object]:
    """Every plain attribute of every module in a model, and of what its modules hold."""
    found = {}

    def note(path: str, value: object, depth: int = 0) -> None:
        if isinstance(value, nn.Module | torch.Tensor | type) or callable(value):
            return
        if OmegaConf.is_config(value):
            value = OmegaConf.to_object(value)
        if isinstance(value, dict):
            for key, item in value.items():
                note(f"{path}.{key}", item, depth + 1)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                note(f"{path}.{i}", item, depth + 1)
            found[f"{path}.len"] = len(value)
        elif hasattr(value, "__dict__") and depth < 3:
            note(path, vars(value), depth + 1)
        else:
            found[path] = value

    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if not key.startswith("_"):
                note(f"{name}.{key}", value)
        extra = ("_flip", "_size_divisibility", "_fuse_type", "_top_down", "_match_lateral_size")
        found |= {f"{name}.{key}": vars(part)[key] for key in extra if key in vars(part)}
    return found


@pytest.mark.parametrize("name", model_zoo.names())
def test_a_lazy_model_is_its_yacs_model(name):
    cfg = small(model_zoo.get_config(name))
    lazy, theirs = instantiate(model_node(cfg)), build_model(cfg)
    assert type(lazy) is type(theirs)
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (lazy, theirs)]
    assert shapes[0] == shapes[1]
    kinds = [[(n, type(m)) for n, m in model.named_modules()] for model in (lazy, theirs)]
    assert kinds[0] == kinds[1]
    ours, expected = settings(lazy), settings(theirs)
    differing = {key for key in ours.keys() | expected.keys() if ours.get(key) != expected.get(key)}
    assert not differing, [(k, ours.get(k), expected.get(k)) for k in sorted(differing)[:5]]
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (lazy, theirs)]
    assert trained[0] == trained[1]


def test_every_yacs_config_has_its_lazy_twin():
    yacs = {f"lazy/{name.removesuffix('.yaml')}.py" for name in model_zoo.names()}
    assert set(model_zoo.lazy_names()) == yacs | {"lazy/COCO-Detection/fcos_R_50_FPN_1x.py"}
    for name in model_zoo.lazy_names():
        text = Path(model_zoo.get_config_file(name)).read_text()
        assert "fcos" in name or f'"{name[5:-3]}.yaml"' in text


def test_a_settings_difference_would_be_seen():
    cfg = small(model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml"))
    theirs = settings(build_model(cfg))
    for change in (
        {"roi_heads.box_pooler.canonical_level": 3},
        {"proposal_generator.nms_thresh": 0.5},
        {"roi_heads.box_predictor.box2box_transform.weights": [1, 1, 1, 1]},
        {"proposal_generator.pre_nms_topk": [7, 400]},
        {"backbone.coarsest_output_conv": True},
        {"input_format": "RGB"},
    ):
        node = model_node(cfg)
        for key, value in change.items():
            OmegaConf.update(node, key, value)
        assert settings(instantiate(node)) != theirs, change


def test_lazy_and_yacs_train_to_the_same_weights(tmp_path):
    ensure_mini({"train": 6, "val": 4})
    yacs, lazy = tmp_path / "yacs", tmp_path / "lazy"
    opts = ["SOLVER.MAX_ITER", "3", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(yacs)]
    train_main(["--config-file", "mini/faster_rcnn_R_18_FPN.yaml", *opts])
    args = ["train.max_iter=3", "dataloader.train.num_workers=0", f"train.output_dir={lazy}"]
    args += [f"lr_multiplier.warmup_length={min(150 / 3, 1.0)}"]
    lazy_main(["--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", *args])
    weights = [torch.load(path / "model_final.pth")["model"] for path in (yacs, lazy)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key
    results = [(path / "results.json").read_text() for path in (yacs, lazy)]
    assert results[0] == results[1]
    # Evaluating what it left gives the same; resuming it has nothing left to do.
    again = [f"train.output_dir={tmp_path / 'again'}"]
    again += [f"train.init_checkpoint={lazy / 'model_final.pth'}"]
    lazy_main(["--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", "--eval-only", *again])
    assert (tmp_path / "again" / "results.json").read_text() == results[1]
    (lazy / "results.json").unlink()
    lazy_main(["--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", "--resume", *args])
    assert (lazy / "results.json").read_text() == results[1]
    assert len(loss_rows(lazy / "metrics.json")) == 1


LOADED = [
    "mini/faster_rcnn_R_18_FPN.yaml",
    "mini/table2_c_FPN.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "paper/table1_c_FPN.yaml",
]


@pytest.mark.parametrize("name", LOADED)
def test_a_lazy_configs_data_optimizer_and_schedule_are_its_yacs_configs(name, monkeypatch):
    cfg, lazy = small(model_zoo.get_config(name)), twin(name)
    meta = SimpleNamespace(
        keypoint_names=("nose", "left", "right"), keypoint_flip_map=[("left", "right")]
    )
    if cfg.MODEL.KEYPOINT_ON:
        monkeypatch.setattr(detection_utils, "check_metadata_consistency", lambda *_: None)
        monkeypatch.setattr(detection_utils.MetadataCatalog, "get", lambda _: meta)
    for split, training in (("train", True), ("test", False)):
        ours = instantiate(lazy.dataloader[split].mapper)
        theirs = ReadableImageMapper(cfg, training)
        # Lists here are tuples there.
        told = [{k: re.sub(r"[\[\](),]", " ", str(v)).split() for k, v in vars(mapper).items()}
                for mapper in (ours, theirs)]  # fmt: skip
        assert told[0] == told[1]
        node, upper = lazy.dataloader[split].dataset, split.upper()
        assert tuple(node.names) == cfg.DATASETS[upper]
        files = cfg.DATASETS[f"PROPOSAL_FILES_{upper}"] if cfg.MODEL.LOAD_PROPOSALS else None
        assert (node.proposal_files and tuple(node.proposal_files)) == files
    node, loader = lazy.dataloader.train, cfg.DATALOADER
    assert node.dataset.filter_empty == loader.FILTER_EMPTY_ANNOTATIONS
    assert node.dataset.min_keypoints == (1 if cfg.MODEL.KEYPOINT_ON else 0)
    assert node.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (node.num_workers, node.aspect_ratio_grouping) == (loader.NUM_WORKERS, True)
    # The optimizer, parameter by parameter, and the rate at each iteration.
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    theirs = build_optimizer(cfg, model)
    lazy.optimizer.params.model = model
    ours = instantiate(lazy.optimizer)
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        keys = other.keys() - {"params", "foreach"}
        assert {k: mine[k] for k in keys} == {k: other[k] for k in keys}
    schedule, expected = (
        instantiate(lazy.lr_multiplier),
        build_lr_scheduler(cfg, theirs)._multiplier,
    )
    for where in torch.linspace(0, 0.9999, 500).tolist():
        assert schedule(where) == expected(where)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config-file is missing"),
        (["--config-file", "lazy/mini/faster_rcnn_R18_FPN.py"], "lazy/mini/faster_rcnn_R_18_FPN"),
        (["--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", "train.max_iter"], "key=value"),
        (
            ["--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", "train.device=cuda"],
            "train.device cuda asks for more GPUs than the 0",
        ),
        (
            ["--config-file", "lazy/mini/table2_c_FPN.py"],
            "proposals/mini_train.pkl', which is not there",
        ),
        (
            ["--config-file", "lazy/COCO-Detection/faster_rcnn_R_50_FPN_1x.py"],
            "coco_2017_train.* is not there",
        ),
    ],
)
def test_what_does_not_fit_is_named(args, message):
    with pytest.raises(UserError, match=message):
        lazy_main(args)


def lazy_args(name, dataset, tmp_path):
    names = [f"dataloader.{split}.dataset.names=squares" for split in ("train", "test")]
    output = [f"train.output_dir={tmp_path}", "dataloader.evaluator.dataset_name=squares"]
    return [
        "--config-file", f"lazy/mini/{name}.py", "--dataset", dataset, *names, *output,
        "model.roi_heads.num_classes=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("mask_rcnn_R_18_FPN", [], "has no segmentation, and the model has masks"),
        ("faster_rcnn_R_18_FPN", ["model.roi_heads.num_classes=10"],
         "model.roi_heads.num_classes is 10, but dataset 'squares' has 1 categories: set it to 1"),
        ("faster_rcnn_R_18_FPN", ["dataloader.train.mapper.augmentations.0.max_size=1"],
         "resized to a longest side of 1, is 0 wide"),
        ("faster_rcnn_R_18_FPN", ["train.max_iter=0"],
         "train.max_iter is 0, expected a number, 1 or more"),
        ("faster_rcnn_R_18_FPN", ["train.checkpointer.period=0"], "train.checkpointer.period is 0"),
        ("faster_rcnn_R_18_FPN", ["optimizer.lr=nan"], "optimizer.lr is nan"),
        ("faster_rcnn_R_18_FPN", ["train.seed=100000000000000000000000"], "train.seed is 1000"),
    ],
)  # fmt: skip
def test_what_a_lazy_training_could_not_use_is_refused_before(
    squares, tmp_path, name, opts, message
):
    content = json.loads(Path(squares.partition("=")[2].rpartition(":")[0]).read_text())
    if "max_size" in str(opts):  # 3 times as wide as high
        content["images"][0]["width"] = 3 * content["images"][0]["height"]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(content))
    dataset = f"squares={data}:{squares.rpartition(':')[2]}"
    try:
        with pytest.raises(UserError, match=message):
            lazy_main([*lazy_args(name, dataset, tmp_path), *opts])
    finally:
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop("squares", None)


def test_a_lazy_models_keypoints_are_asked_of_the_data(squares, tmp_path, monkeypatch):
    args = lazy_args("faster_rcnn_R_18_FPN", squares, tmp_path)
    asked = {}
    monkeypatch.setattr(lazy_training, "check_records", lambda _, needs: asked.update(n=needs))
    monkeypatch.setattr(lazy_training, "launch", lambda *_: None)
    mapper = "dataloader.test.mapper"
    more = ["model.roi_heads.keypoint_head={num_keypoints:4}", f"{mapper}.augmentations=[]"]
    try:
        lazy_main(["--eval-only", *args, *more])
    finally:
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.pop("squares", None)
    assert asked["n"] == Needs(max_size=2**31, keypoints=4, training=False)


def test_fcos_has_the_plugins_pyramid():
    node = load_lazy_config("lazy/COCO-Detection/fcos_R_50_FPN_1x.py").model
    stock = zoo_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    ours, theirs = instantiate(node).eval(), instantiate(stock).eval()
    assert isinstance(ours.backbone, FeaturePyramidNetwork)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    inputs = [{"image": torch.rand(3, 128, 160) * 255, "height": 128, "width": 160}]
    losses = []
    for model in (ours, theirs):
        model.test_score_thresh = 0.0
        target = Instances((128, 160))
        target.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 90], [50, 40, 150, 120]]))
        target.gt_classes = torch.tensor([0, 5])
        with EventStorage(0):
            losses.append(model.train()([{**inputs[0], "instances": target}]))
        model.eval()
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[1].items():
        torch.testing.assert_close(losses[0][key], value, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        found, expected = (model(inputs)[0]["instances"] for model in (ours, theirs))
    assert len(found) == len(expected) > 10
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)


def test_a_model_without_fpn_is_refused():
    with pytest.raises(UserError, match="no node of detectron2.modeling.FPN"):
        with_pyramid(zoo_config("common/models/mask_rcnn_c4.py").model)
