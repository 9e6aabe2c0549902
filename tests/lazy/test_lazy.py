"""Lazy configs against the yacs configs they are made from: the same modules, numbers, training."""

import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.model_zoo import get_config as zoo_config
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fpn_plugin import FeaturePyramidNetwork, UserError, add_fpn_config, model_zoo
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.config import flat_keys, value_at
from fpn_plugin.data import Needs, ReadableImageMapper
from fpn_plugin.engine import run
from fpn_plugin.lazy import get_config, load_lazy_config, model_node, trainer, with_pyramid
from fpn_plugin.lazy.trainer import LazyRun, build_node
from fpn_plugin.lazy.training import dataloader_node, optimizer_node, schedule_node, train_node
from fpn_plugin.mini import ensure_mini
from fpn_plugin.modeling import without_network_weights
from fpn_plugin.utils.metrics import loss_rows
from tests.helpers.datasets import forgotten

FASTER = "mini/faster_rcnn_R_18_FPN.yaml"
FCOS = "COCO-Detection/fcos_R_50_FPN_1x.py"
DEFAULTS = get_cfg()
add_fpn_config(DEFAULTS)


def yacs_of(name: str, *opts: object) -> CfgNode:
    """The yacs config that a lazy one is made from."""
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *opts])
    return cfg


def plain(cfg: DictConfig) -> dict[str, object]:
    return OmegaConf.to_container(cfg, resolve=False)


def settings(module: nn.Module) -> dict[str, object]:
    """Every plain attribute of every module in a model, and of what its modules hold."""
    found = {}

    def note(path: str, value: object, depth: int = 0) -> None:
        # A traced network's graph is linked to and fro, and says nothing that its layers do not.
        if isinstance(value, nn.Module | torch.Tensor | type | torch.fx.Graph) or callable(value):
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


def test_every_yaml_has_a_lazy_form_that_builds_its_model():
    built = set()
    for name in model_zoo.names():
        cfg = without_network_weights(yacs_of(name, "MODEL.DEVICE", "meta"))
        lazy = model_node(cfg)
        # Both hand a ResNet's keys to the same builder, and weights are for a checkpointer.
        same = cfg.MODEL.clone()
        same.WEIGHTS, same.RESNETS = "", CfgNode()
        if same.dump() not in built:
            built.add(same.dump())
            with torch.device("meta"):  # weights have their shapes there and cost nothing
                assert_same_model(instantiate(lazy), build_model(cfg), name)
        expected = {k: v for k, v in cfg.MODEL.RESNETS.items() if v != DEFAULTS.MODEL.RESNETS[k]}
        node = lazy.backbone.get("bottom_up", lazy.backbone)
        given = plain(node.get("RESNETS", OmegaConf.create()))
        given = {k: list(v) if isinstance(v, list) else v for k, v in given.items()}
        given.pop("OUT_FEATURES", None)
        expected.pop("OUT_FEATURES", None)
        assert given == expected, name


def assert_same_model(lazy: nn.Module, theirs: nn.Module, name: str = "") -> None:
    assert type(lazy) is type(theirs), name
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (lazy, theirs)]
    assert shapes[0] == shapes[1], name
    # By name: torchvision's extractors are each of a class of their own.
    kinds = [[(n, type(m).__qualname__) for n, m in model.named_modules()]
             for model in (lazy, theirs)]  # fmt: skip
    assert kinds[0] == kinds[1], name
    ours, expected = settings(lazy), settings(theirs)
    differing = {key for key in ours.keys() | expected.keys() if ours.get(key) != expected.get(key)}
    assert not differing, [(k, ours.get(k), expected.get(k)) for k in sorted(differing)[:5]]
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (lazy, theirs)]
    assert trained[0] == trained[1], name


def test_a_written_out_file_has_the_nodes_of_its_yaml():
    name = "lazy/COCO-Detection/faster_rcnn_R_50_FPN_1x.py"
    assert set(model_zoo.lazy_names()) == {name, f"lazy/{FCOS}"}
    assert plain(load_lazy_config(model_zoo.get_config_file(name))) == plain(get_config(name))


@pytest.mark.parametrize("before", ["", "lazy/", "configs/", "./configs/lazy/"])
def test_a_lazy_name_is_the_yamls(before):
    expected = plain(get_config(FASTER))
    assert list(expected) == ["model", "optimizer", "lr_multiplier", "dataloader", "train"]
    for ending in (".yaml", ".py"):
        assert plain(load_lazy_config(before + FASTER.replace(".yaml", ending))) == expected
    assert list(get_config(before + FCOS)) == list(expected)


def test_a_settings_difference_would_be_seen():
    cfg = yacs_of(FASTER)
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
    opts += ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)"]
    train_main(["--config-file", "mini/faster_rcnn_R_18_FPN.yaml", *opts])
    args = ["train.max_iter=3", "dataloader.train.num_workers=0", f"train.output_dir={lazy}"]
    args += [f"lr_multiplier.warmup_length={min(150 / 3, 1.0)}"]
    augmented = ["train.tta.enabled=True", "train.tta.min_sizes=[64]"]
    args += augmented
    lazy_main(["--config-file", FASTER, *args])
    weights = [torch.load(path / "model_final.pth")["model"] for path in (yacs, lazy)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key
    results = [(path / "results.json").read_text() for path in (yacs, lazy)]
    assert results[0] == results[1]
    assert list(json.loads(results[0])) == ["bbox", "bbox_TTA"]
    # Evaluating what it left gives the same; resuming it has nothing left to do.
    again = [f"train.output_dir={tmp_path / 'again'}", *augmented]
    again += [f"train.init_checkpoint={lazy / 'model_final.pth'}"]
    lazy_main(["--config-file", FASTER, "--eval-only", *again])
    assert (tmp_path / "again" / "results.json").read_text() == results[1]
    (lazy / "results.json").unlink()
    lazy_main(["--config-file", FASTER, "--resume", *args])
    assert (lazy / "results.json").read_text() == results[1]
    assert len(loss_rows(lazy / "metrics.json")) == 1


def test_a_lazy_configs_data_optimizer_and_schedule_are_its_yacs_configs():
    compared = set()
    for name in [*model_zoo.names(), FCOS]:
        # FCOS has no yacs config; it is trained as RetinaNet is.
        cfg = yacs_of(name.replace("fcos", "retinanet").replace(".py", ".yaml"))
        read = cfg.clone()
        keypoints = cfg.MODEL.KEYPOINT_ON, cfg.MODEL.MASK_ON, cfg.MODEL.LOAD_PROPOSALS
        read.MODEL = CfgNode({"WEIGHTS": cfg.MODEL.WEIGHTS, "PARTS": keypoints})
        if name == FCOS or read.dump() not in compared:
            compared.add(read.dump())
            assert_same_training(get_config(name), cfg)


def assert_same_training(lazy: DictConfig, cfg: CfgNode) -> None:
    for split, training in (("train", True), ("test", False)):
        ours = instantiate(lazy.dataloader[split].mapper)
        theirs = ReadableImageMapper(cfg, training)
        # Lists here are tuples there.
        told = [{k: re.sub(r"[\[\](),]", " ", str(v)).split() for k, v in vars(mapper).items()}
                for mapper in (ours, theirs)]  # fmt: skip
        assert told[0] == told[1]
        has_sides = cfg.MODEL.KEYPOINT_ON and training
        assert len(ours.keypoint_hflip_indices or ()) == (17 if has_sides else 0)
        node, upper = lazy.dataloader[split].dataset, split.upper()
        names = [node.names] if isinstance(node.names, str) else node.names
        assert tuple(names) == cfg.DATASETS[upper]
        files = cfg.DATASETS[f"PROPOSAL_FILES_{upper}"] if cfg.MODEL.LOAD_PROPOSALS else None
        assert (node.proposal_files and tuple(node.proposal_files)) == files
    node, loader = lazy.dataloader.train, cfg.DATALOADER
    assert node.dataset.filter_empty == loader.FILTER_EMPTY_ANNOTATIONS
    assert node.dataset.min_keypoints == (1 if cfg.MODEL.KEYPOINT_ON else 0)
    assert node.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (node.num_workers, node.aspect_ratio_grouping) == (loader.NUM_WORKERS, True)
    evaluators = lazy.dataloader.evaluator
    for evaluator in evaluators if OmegaConf.is_list(evaluators) else [evaluators]:
        assert evaluator.dataset_name == lazy.dataloader.test.dataset.names
    train, solver = lazy.train, cfg.SOLVER
    assert train.max_iter == solver.MAX_ITER
    assert train.init_checkpoint == cfg.MODEL.WEIGHTS
    assert (train.seed, train.amp.enabled) == (cfg.SEED, solver.AMP.ENABLED)
    assert train.checkpointer.period == solver.CHECKPOINT_PERIOD
    assert train.eval_period == cfg.TEST.EVAL_PERIOD
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
        (["--config-file", "lazy/mini/faster_rcnn_R18_FPN.py"], "mini/faster_rcnn_R_18_FPN.yaml"),
        (["--config-file", FASTER, "train.max_iter"], "key=value"),
        (
            ["--config-file", FASTER, "train.device=cuda"],
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
    called = dataset.partition("=")[0]
    names = [f"dataloader.{split}.dataset.names={called}" for split in ("train", "test")]
    output = [f"train.output_dir={tmp_path}", f"dataloader.evaluator.dataset_name={called}"]
    return [
        "--config-file", f"lazy/mini/{name}.py", "--dataset", dataset, *names, *output,
        "model.roi_heads.num_classes=1",
    ]  # fmt: skip


def test_a_config_that_ends_in_py_is_lazy_without_being_said(monkeypatch, squares, tmp_path):
    started = []
    monkeypatch.setattr(run, "launch", lambda work, *_: started.append(work.__self__))
    with forgotten():
        train_main([*lazy_args("faster_rcnn_R_18_FPN", squares, tmp_path), "train.seed=3"])
    assert [(type(each), each.config["seed"]) for each in started] == [(LazyRun, 3)]


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("mask_rcnn_R_18_FPN", [], "has no segmentation, and the model has masks"),
        ("faster_rcnn_R_18_FPN", ["model.roi_heads.num_classes=10"],
         "model.roi_heads.num_classes is 10, but dataset 'unusable' has 1 categories: set it to 1"),
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
    dataset = f"unusable={data}:{squares.rpartition(':')[2]}"
    with forgotten(), pytest.raises(UserError, match=message):
        lazy_main([*lazy_args(name, dataset, tmp_path), *opts])


def test_a_lazy_models_keypoints_are_asked_of_the_data(squares, tmp_path, monkeypatch):
    args = lazy_args("faster_rcnn_R_18_FPN", squares, tmp_path)
    asked = {}
    monkeypatch.setattr(run, "check_records", lambda _, needs: asked.update(n=needs))
    monkeypatch.setattr(run, "launch", lambda *_: None)
    mapper = "dataloader.test.mapper"
    more = ["model.roi_heads.keypoint_head={num_keypoints:4}", f"{mapper}.augmentations=[]"]
    more += ["dataloader.evaluator.kpt_oks_sigmas=[0.1,0.1,0.1,0.1]"]
    with forgotten():
        lazy_main(["--eval-only", *args, *more])
    assert asked["n"] == Needs(max_size=2**31, keypoints=4, training=False)


def test_fcos_has_the_plugins_pyramid():
    node = get_config(FCOS).model
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


# ---- overrides


THIN = ["model.backbone.bottom_up.RESNETS.DEPTH=18",
        "model.backbone.bottom_up.RESNETS.RES2_OUT_CHANNELS=64"]  # fmt: skip
OVERRIDDEN = {
    "mini/faster_rcnn_R_18_FPN": {
        "roi_heads.box_predictor.cls_score.weight": (4, 512),
        "roi_heads.box_predictor.bbox_pred.weight": (12, 512),
        "roi_heads.box_head.fc1.weight": (512, 32 * 49),
        "proposal_generator.rpn_head.conv.weight": (32, 32, 3, 3),
        "backbone.fpn_lateral2.weight": (32, 64, 1, 1),
    },
    "mini/table1_c_FPN_unshared": {
        "proposal_generator.rpn_head.heads.4.conv.weight": (32, 32, 3, 3)
    },
    "mini/table2_c_FPN": {"roi_heads.box_predictor.cls_score.weight": (4, 512)},
    "COCO-Detection/retinanet_R_50_FPN_1x": {
        "head.cls_score.weight": (27, 32, 3, 3),
        "head.cls_subnet.6.weight": (32, 32, 3, 3),
        "backbone.top_block.p6.weight": (32, 512, 3, 3),
    },
    "COCO-Detection/fcos_R_50_FPN_1x": {
        "head.cls_score.weight": (3, 32, 3, 3),
        "head.ctrness.weight": (1, 32, 3, 3),
        "backbone.top_block.p6.weight": (32, 32, 3, 3),
    },
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x": {
        "roi_heads.mask_head.predictor.weight": (3, 256, 1, 1),
        "roi_heads.mask_head.mask_fcn1.weight": (256, 32, 3, 3),
    },
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x": {
        "roi_heads.box_predictor.cls_score.weight": (4, 1024),
        "roi_heads.keypoint_head.conv_fcn1.weight": (512, 32, 3, 3),
    },
    "Misc/cascade_mask_rcnn_R_50_FPN_1x": {
        "roi_heads.box_predictor.0.cls_score.weight": (4, 1024),
        "roi_heads.box_predictor.2.cls_score.weight": (4, 1024),
        "roi_heads.box_head.2.fc1.weight": (1024, 32 * 49),
        "roi_heads.mask_head.predictor.weight": (3, 256, 1, 1),
    },
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x": {
        "roi_heads.mask_head.predictor.weight": (3, 256, 1, 1),
        "sem_seg_head.p2.0.weight": (128, 32, 3, 3),
        "sem_seg_head.p5.0.weight": (128, 32, 3, 3),
    },
}


def example(side: int = 64) -> dict[str, object]:
    """An image with two annotated objects, and whatever any of the models trains on."""
    target = Instances((side, side))
    target.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 40], [20, 10, 60, 50]]))
    target.gt_classes = torch.tensor([0, 2])
    target.gt_masks = BitMasks(torch.ones(2, side, side, dtype=torch.bool))
    target.gt_keypoints = Keypoints(torch.full((2, 17, 3), 24.0))
    proposals = Instances((side, side))
    proposals.proposal_boxes = Boxes(torch.tensor([[5.0, 5, 40, 40], [0, 0, 60, 60]]))
    proposals.objectness_logits = torch.ones(2)
    labels = torch.zeros(side, side, dtype=torch.long)
    return {"image": torch.rand(3, side, side) * 255, "instances": target,
            "proposals": proposals, "sem_seg": labels}  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_pyramids_width_and_the_number_of_classes_are_said_once(name):
    thin = [] if "mini" in name or "fcos" in name else THIN
    overrides = ["model.backbone.out_channels=32", *thin]
    node = load_lazy_config(f"lazy/{name}.py").model
    if "roi_heads" in node:
        overrides.append("model.roi_heads.num_classes=3")
        overrides += ["model.roi_heads.batch_size_per_image=16"]  # few regions: quickly tested
    elif "num_classes" in node:
        overrides.append("model.num_classes=3")
    if node.get("proposal_generator"):
        overrides.append("model.proposal_generator.post_nms_topk=[20,20]")
    model = instantiate(load_lazy_config(f"lazy/{name}.py", overrides).model)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = OVERRIDDEN[name]
    assert {key: shapes[key] for key in expected} == expected
    side = 160 if "fcos" in name else 64  # its group norm wants more than one cell
    with EventStorage(0):
        losses = model.train()([example(side)])
    assert losses
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        model.eval()([example(side)])


def test_pooled_sizes_and_hidden_layers_are_said_once():
    changes = ["box_pooler.output_size=5", "mask_pooler.output_size=8", "box_head.fc_dims=[48,40]"]
    changes = [f"model.roi_heads.{change}" for change in changes]
    node = load_lazy_config("lazy/mini/mask_rcnn_R_18_FPN.py", changes).model
    model = instantiate(node)
    assert model.roi_heads.box_head.fc1.weight.shape == (48, 64 * 25)
    assert model.roi_heads.box_predictor.cls_score.weight.shape == (15, 40)
    with EventStorage(0):
        assert torch.isfinite(model.train()([example()])["loss_mask"])


def test_batch_norms_of_retinanets_head_have_statistics_for_each_level():
    opts = ["MODEL.RETINANET.NORM", "BN", "MODEL.RETINANET.NUM_CLASSES", 5, "MODEL.DEVICE", "meta"]
    cfg = yacs_of("COCO-Detection/retinanet_R_50_FPN_1x.yaml", *opts)
    with torch.device("meta"):
        assert_same_model(instantiate(model_node(cfg)), build_model(cfg))


NETWORKS = [
    ("build_timm_backbone", "MODEL.TIMM.NAME", "convnext_atto", "MODEL.TIMM.PRETRAINED", False),
    ("build_torchvision_backbone", "MODEL.TORCHVISION.NAME", "mobilenet_v3_small",
     "MODEL.TORCHVISION.WEIGHTS", ""),
]  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network[0])
@pytest.mark.parametrize(
    "name", ["COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-Detection/rpn_R_50_FPN_1x.yaml"]
)
def test_networks_of_timm_and_torchvision_have_a_lazy_form(network, name):
    if "timm" in network[0]:
        pytest.importorskip("timm")
    builder, *opts = network
    pixels = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", [57.0, 58.0, 59.0]]
    cfg = yacs_of(name, "MODEL.FPN.BOTTOM_UP", builder, *opts, *pixels)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    lazy, theirs = instantiate(model_node(cfg)), build_model(cfg)
    assert_same_model(lazy, theirs)
    ours, expected = lazy.backbone.bottom_up, theirs.backbone.bottom_up
    assert ours._flip is expected._flip is False
    assert torch.equal(ours._scale, expected._scale)
    assert torch.equal(ours._shift, expected._shift)
    assert ours._scale[0] != ours._scale[2]
    node = model_node(cfg)
    node.pixel_std = [1.0, 1.0, 1.0]  # the network's follows it
    torch.testing.assert_close(
        instantiate(node).backbone.bottom_up._scale.flatten() * torch.tensor([57.0, 58.0, 59.0]),
        ours._scale.flatten(),
    )


# ---- what has no lazy form


MAKERS = (optimizer_node, schedule_node, train_node, dataloader_node, model_node)


def changed(cfg: CfgNode, key: str) -> CfgNode:
    """The config with another value of one key, of the same type."""
    section, _, last = key.rpartition(".")
    cfg = cfg.clone()
    node = value_at(cfg, section) if section else cfg
    value = node[last]
    if isinstance(value, bool):
        node[last] = not value
    elif isinstance(value, int | float):
        node[last] = value + 1
    elif isinstance(value, str):
        node[last] = f"{value}x"
    elif isinstance(value, list | tuple):
        node[last] = value[:-1] if len(value) > 1 else value + type(value)(value or [1])
    else:
        node[last] = 1.0
    return cfg


# Keys that say nothing about a model, its data or its training, or only do with another key set.
UNREAD = {
    "VERSION",
    "GLOBAL.HACK",
    "DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT",  # of DATALOADER.SAMPLER_TRAIN
    "DATALOADER.RANDOM_SUBSET_RATIO", "DATASETS.TRAIN_REPEAT_FACTOR",
    "MODEL.ANCHOR_GENERATOR.ANGLES",  # of rotated boxes
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",  # of USE_FED_LOSS
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",  # of .ENABLED
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "SOLVER.NUM_DECAYS",  # of a schedule that is refused
    "TEST.PRECISE_BN.NUM_ITER",
    # A pyramid gives these to its network in place of the network's own.
    "MODEL.TIMM.OUT_FEATURES", "MODEL.TORCHVISION.OUT_FEATURES",
}  # fmt: skip


def test_every_key_is_carried_over_or_refused():
    bottom_up = ("MODEL.FPN.BOTTOM_UP",)
    bases = [
        yacs_of("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"),
        yacs_of("mini/table2_c_FPN.yaml", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1,
                "INPUT.CROP.ENABLED", True),
        yacs_of("COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
        yacs_of("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
                "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", False),
        yacs_of("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"),
        yacs_of("mini/table1_a_C4.yaml"),
        *(yacs_of("mini/table1_c_FPN.yaml", *bottom_up, network[0]) for network in NETWORKS),
        yacs_of("mini/table1_c_FPN.yaml", "MODEL.BACKBONE.NAME", "build_image_pyramid_backbone",
                "MODEL.FPN.IN_FEATURES", ["res4"]),
        yacs_of("mini/table6_5x5.yaml"),
    ]  # fmt: skip
    before = [[plain(make(cfg)) for make in MAKERS] for cfg in bases]

    def shows(key: str) -> bool:
        order = -1 if key.startswith("MODEL.") else 1  # first those that likely show it
        for cfg, nodes in zip(bases, before, strict=True):
            other = changed(cfg, key)
            pairs = list(zip(MAKERS, nodes, strict=True))[::order]
            try:
                if any(plain(make(other)) != expected for make, expected in pairs):
                    return True
            except UserError as error:
                assert key.rpartition(".")[2] in str(error) or "backbone has no map" in str(error)
                return True
        return False

    keys = {k for k in flat_keys(DEFAULTS) if not isinstance(value_at(DEFAULTS, k), CfgNode)}
    silent = {key for key in keys - UNREAD if not shows(key)}
    assert not silent


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("TEST.PRECISE_BN.ENABLED", True),
        ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", 0),
    ],
)
def test_a_setting_without_a_lazy_form_is_refused_by_its_name(key, value):
    with pytest.raises(UserError, match=rf"^{re.escape(key)} .*{value}.* has no lazy form here"):
        for make in MAKERS:
            make(yacs_of(FASTER, key, value))


def test_sigmoid_classification_is_carried_over():
    cfg = yacs_of(FASTER, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    model = instantiate(model_node(cfg))
    assert model.roi_heads.box_predictor.use_sigmoid_ce
    assert_same_model(model, build_model(cfg))


def test_a_detectron2_without_an_end_of_the_rate_has_its_schedules():
    for name, end in (("WarmupMultiStepLR", 1.0), ("WarmupCosineLR", 0.0)):
        cfg = yacs_of(FASTER, "SOLVER.LR_SCHEDULER_NAME", name)
        cfg.SOLVER.pop("BASE_LR_END", None)
        assert instantiate(schedule_node(cfg))(0.99999) == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone.out_chanels=32", "is no argument of build_pyramid: .*out_channels"),
        ("model.roi_heads.num_clases=3", "num_clases is no argument of FPNROIHeads: .*num_classes"),
        ("optimizer.lrr=0.1", "optimizer.lrr is no argument of SGD: did you mean lr"),
        ("optimizer.lr=abc", "optimizer.lr takes a number, as 0.014 was; given was 'abc'"),
        ("optimizer.nesterov=abc", "optimizer.nesterov takes True or False"),
        ("model.backbone=resnet", "model.backbone takes a node; given was 'resnet'"),
        ("train.max_itr=5", "no 'max_itr' there: .*max_iter.* To add one: .train.max_itr=5"),
        ("modle.backbone.out_channels=5", "no 'modle' there: did you mean model"),
        ("dataloader.test.num_worker=5", "num_worker is no argument of .*num_workers"),
        ("model.backbone._target_=fpn_plugin.Pyramid", "'fpn_plugin.Pyramid' does not exist"),
        ("train.max_iter=[", r"\(in \['train.max_iter=\['\]\)"),
    ],
)
def test_an_override_that_names_nothing_is_refused_in_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_lazy_config(FASTER, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("builder=build_timm_backbon", "builder 'build_timm_backbon' is not .*build_timm_backbone"),
        ("RESNETS.DEPHT=50", "MODEL.RESNETS has no key 'DEPHT': did you mean DEPTH"),
        ("RESNET.DEPTH=50", "'RESNET', no section of MODEL: did you mean RESNETS"),
        ("RESNETS.NORM=[1]", "MODEL.RESNETS.NORM"),
        ("RESNETS.DEPTH=51", "model cannot be built: KeyError: 51"),
    ],
)
def test_what_a_network_does_not_know_is_refused_in_one_line(override, message):
    cfg = load_lazy_config(FASTER, [f"model.backbone.bottom_up.{override}"])
    with pytest.raises(UserError, match=message) as error:
        build_node(cfg.model, "model")
    assert "\n" not in str(error.value)


def test_what_a_config_file_has_too_much_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    lines = "from fpn_plugin.lazy import get_config\n"
    lines += f"model, optimizer, lr_multiplier, dataloader, train = get_config({FASTER!r}).values()"
    path.write_text(f"{lines}\noptimizer.momentun = 0.5\ntrain.mine = 3\n")
    with pytest.raises(UserError, match=r"optimizer.momentun is no .* did you mean momentum"):
        load_lazy_config(str(path))
    path.write_text(f"{lines}\noptimizer.dampening = 0.5\ntrain.mine = 3\n")
    cfg = load_lazy_config(str(path), ["train.mine=4", "+train.ours=5", "optimizer.maximize=true"])
    assert (cfg.train.mine, cfg.train.ours, cfg.optimizer.maximize) == (4, 5, True)


# ---- test sets


def evaluated(monkeypatch, tmp_path: Path, *overrides: str) -> list[tuple[str, int]]:
    """The set of each evaluator that a run makes, and the number of images it is given."""
    seen = []

    def inference(model, loader, evaluator):
        seen.append((evaluator._metadata.name, len(loader.dataset)))
        return {"bbox": {"AP": float(len(loader.dataset))}}

    monkeypatch.setattr(trainer, "inference_on_dataset", inference)
    weights = tmp_path / "weights.pth"
    torch.save({"model": instantiate(load_lazy_config(FASTER).model).state_dict()}, weights)
    args = [f"train.output_dir={tmp_path}", f"train.init_checkpoint={weights}", *overrides]
    lazy_main(["--config-file", FASTER, "--eval-only", *args])
    return seen


def test_the_evaluator_follows_the_test_sets(monkeypatch, tmp_path):
    ensure_mini({"train": 6, "val": 4})
    names = "dataloader.test.dataset.names"
    assert evaluated(monkeypatch, tmp_path) == [("mini_val", 4)]
    for value in ("mini_train", "[mini_train]"):
        found = evaluated(monkeypatch, tmp_path, f"{names}={value}")
        assert found == [("mini_train", 6)]
        assert json.loads((tmp_path / "results.json").read_text()) == {"bbox": {"AP": 6.0}}
    both = evaluated(monkeypatch, tmp_path, f"{names}=[mini_train,mini_val]")
    assert both == [("mini_train", 6), ("mini_val", 4)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {"mini_train": {"bbox": {"AP": 6.0}}, "mini_val": {"bbox": {"AP": 4.0}}}
    other = "dataloader.evaluator.dataset_name=mini_train"
    with pytest.raises(UserError, match="dataset_name 'mini_train', and .* has 'mini_val'"):
        evaluated(monkeypatch, tmp_path, other)
