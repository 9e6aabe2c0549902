"""Keypoints of a user's own: what the JSON says of them reaches training and evaluation."""

import copy
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fpn_plugin import UserError, model_zoo
from fpn_plugin.cli.check import check_main
from fpn_plugin.cli.detect import detect_main
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.data import ReadableImageMapper, register_datasets, swapped_keypoints
from fpn_plugin.data.keypoints import mirrored_order
from fpn_plugin.engine.inference import keypoint_layout
from fpn_plugin.engine.run import YacsRun
from fpn_plugin.engine.trainer import FPNTrainer
from fpn_plugin.visualization.keypoints import KeypointLayout, draw_keypoints
from tests.helpers.datasets import write_dataset as write

NAMES = ["tail", "left_wing", "right_wing"]
SIZE = 80, 64
# Of the beetle in each image: its box, and tail, left wing, right wing.
BOX = [20, 10, 40, 40]
POINTS = [40, 48, 2, 24, 20, 2, 55, 22, 1]
SIGMAS = [0.1, 0.1, 0.1]
KEYPOINTS = [
    "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "MODEL.ROI_HEADS.NUM_CLASSES", "1",
]  # fmt: skip


def beetles() -> dict:
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]}
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 4, "bbox": BOX, "area": 1600, "iscrowd": 0,
             "keypoints": POINTS, "num_keypoints": 3}
            for i in (1, 2, 3)
        ],
        "categories": [
            {"id": 4, "name": "beetle", "keypoints": NAMES, "skeleton": [[1, 2], [1, 3]]}
        ],
    }  # fmt: skip


@pytest.fixture
def spec(tmp_path) -> str:
    return write(tmp_path, "beetles", beetles())


def test_a_json_that_changes_names_its_keypoints_anew(tmp_path):
    content = beetles()
    spec = write(tmp_path, "beetles", content)
    register_datasets([spec])
    assert swapped_keypoints(["beetles"]) == [0, 2, 1]
    content["categories"][0]["keypoints"] = ["left_wing", "right_wing", "head"]
    write(tmp_path, "beetles", content)
    register_datasets([spec])
    assert swapped_keypoints(["beetles"]) == [1, 0, 2]
    assert MetadataCatalog.get("beetles").keypoint_names[2] == "head"


def test_keypoints_that_a_user_named_stay(tmp_path):
    spec = write(tmp_path, "beetles", beetles())
    MetadataCatalog.get("beetles").keypoint_names = ["a_left", "a_right", "b"]
    register_datasets([spec])
    assert swapped_keypoints(["beetles"]) == [1, 0, 2]
    assert MetadataCatalog.get("beetles").keypoint_names == ["a_left", "a_right", "b"]


def config(*opts: str, train: str = "beetles", test: str = "beetles"):
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    more = ["DATASETS.TRAIN", (train,), "DATASETS.TEST", (test,) if test else ()]
    sigmas = ["TEST.KEYPOINT_OKS_SIGMAS", SIGMAS]
    cfg.merge_from_list([*KEYPOINTS, *more, *sigmas, "INPUT.RANDOM_FLIP", "horizontal", *opts])
    return cfg


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ("nose left_eye right_eye", [0, 2, 1]),
        ("LEye REye Nose", [1, 0, 2]),
        ("eyeL eyeR", [1, 0]),
        ("l_ear r_ear tail", [1, 0, 2]),
        ("eye.l eye.r", [1, 0]),
        ("LEFT RIGHT", [1, 0]),
        ("top_left bottom_right top_right bottom_left", [2, 3, 0, 1]),
        ("bright left right", [0, 2, 1]),
        ("center", [0]),
        ("left_hand nose", None),
        ("head tail", None),
        ("1 2 3 4", None),
        ("", None),
    ],
)
def test_sides_in_names_are_pairs(names, order):
    assert mirrored_order(names.split()) == order


def test_persons_are_mirrored_as_detectron2_does():
    stock = create_keypoint_hflip_indices(["keypoints_coco_2017_train"])
    assert mirrored_order(COCO_PERSON_KEYPOINT_NAMES) == stock
    assert swapped_keypoints(["keypoints_coco_2017_train"]) == stock


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4, unique=True),
    middle=st.lists(st.sampled_from("xyz"), max_size=3, unique=True),
    style=st.sampled_from([("left_{}", "right_{}"), ("{}L", "{}R"), ("{}.Left", "{}.Right")]),
    data=st.data(),
)
def test_any_order_of_names_is_mirrored_by_name(pairs, middle, style, data):
    names = [side.format(part) for part in pairs for side in style] + middle
    names = data.draw(st.permutations(names))
    mirrored = [names[i] for i in mirrored_order(names)]
    other = {style[i].format(part): style[1 - i].format(part) for part in pairs for i in (0, 1)}
    assert mirrored == [other.get(name, name) for name in names]


def test_a_mirrored_image_swaps_left_and_right(spec):
    register_datasets([spec])
    cfg = config("INPUT.MIN_SIZE_TRAIN", (0,))  # not resized
    mapper = ReadableImageMapper(cfg, is_train=True)
    record = DatasetCatalog.get("beetles")[0]
    found = {}
    for seed in range(20):
        np.random.seed(seed)
        mapped = mapper(copy.deepcopy(record))
        points = mapped["instances"].gt_keypoints.tensor[0]
        found[bool(points[0, 0] == SIZE[0] - 40.5)] = points.tolist()
    tail, left, right = [40.5, 48.5, 2], [24.5, 20.5, 2], [55.5, 22.5, 1]
    assert found[False] == [tail, left, right]

    def mirrored(point):
        return [SIZE[0] - point[0], *point[1:]]

    assert found[True] == [mirrored(tail), mirrored(right), mirrored(left)]


def test_the_metadata_is_what_detectron2_asks_for(spec):
    register_datasets([spec])
    assert swapped_keypoints(["beetles"]) == [0, 2, 1]
    metadata = MetadataCatalog.get("beetles")
    assert metadata.keypoint_names == NAMES
    edges = [rule[:2] for rule in metadata.keypoint_connection_rules]
    assert edges == [("tail", "left_wing"), ("tail", "right_wing")]
    assert keypoint_layout(config()) == KeypointLayout(tuple(NAMES), ((0, 1), (0, 2)))


def test_what_was_registered_with_names_keeps_them():
    metadata = MetadataCatalog.get("by hand")
    DatasetCatalog.register("by hand", list)
    metadata.keypoint_names = ["a_left", "b", "a_right"]
    assert swapped_keypoints(["by hand"]) == [2, 1, 0]


def test_several_categories_share_the_models_keypoints(tmp_path):
    content = beetles()
    content["categories"] += [
        {"id": 7, "name": "bee", "keypoints": ["sting", "left_wing", "right_wing"],
         "skeleton": [[1, 2]]},
        {"id": 9, "name": "stone", "keypoints": []},
    ]  # fmt: skip
    register_datasets([write(tmp_path, "insects", content)])
    assert swapped_keypoints(["insects"]) == [0, 2, 1]
    metadata = MetadataCatalog.get("insects")
    assert metadata.keypoint_names == ["tail/sting", "left_wing", "right_wing"]
    assert [r[:2] for r in metadata.keypoint_connection_rules] == [("tail/sting", "left_wing")]
    # If they disagree about pairs, none are known.
    content["categories"][1]["keypoints"] = ["left_wing", "right_wing", "sting"]
    register_datasets([write(tmp_path, "mixed", content)])
    assert swapped_keypoints(["mixed"]) is None


def shifted(points: list[float], by: float) -> Instances:
    found = Instances((SIZE[1], SIZE[0]))
    x, y, width, height = BOX
    found.pred_boxes = Boxes(torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32))
    found.pred_classes, found.scores = torch.tensor([0]), torch.tensor([0.9])
    found.pred_keypoints = torch.tensor(points).reshape(1, -1, 3) + torch.tensor([by + 0.5, 0.5, 0])
    return found


@pytest.mark.parametrize(("sigma", "precision"), [(0.1, 60), (0.2, 90), (1.0, 100)])
def test_ap_follows_the_sigmas(spec, tmp_path, sigma, precision):
    """OKS of keypoints that are off by d is exp(-d^2 / (2 area (2 sigma)^2))."""
    register_datasets([spec])
    distance = math.sqrt(-math.log(0.77) * 2 * 1600 * 0.2**2)  # 0.77 at a sigma of 0.1
    assert 0.9 < 0.77**0.25 < 0.95  # at 0.2
    for by, expected in ((0.0, 100), (distance, precision)):
        cfg = config("TEST.KEYPOINT_OKS_SIGMAS", [sigma] * 3, "OUTPUT_DIR", str(tmp_path / "out"))
        FPNTrainer.build_test_loader(cfg, "beetles")
        evaluator = FPNTrainer.build_evaluator(cfg, "beetles")
        evaluator.reset()
        for record in DatasetCatalog.get("beetles"):
            evaluator.process([record], [{"instances": shifted(POINTS, by)}])
        results = evaluator.evaluate()
        assert results["keypoints"]["AP"] == pytest.approx(expected)
        assert results["keypoints@100"]["AP"] == pytest.approx(expected)


def test_keypoint_rcnn_trains_evaluates_and_draws(spec, tmp_path, monkeypatch):
    args = [
        "--config-file", "mini/faster_rcnn_R_18_FPN.yaml", "--dataset", spec, *KEYPOINTS,
        "DATASETS.TRAIN", "('beetles',)", "DATASETS.TEST", "('beetles',)",
        "TEST.KEYPOINT_OKS_SIGMAS", str(SIGMAS), "INPUT.MIN_SIZE_TRAIN", "(64,)",
        "INPUT.MIN_SIZE_TEST", "64", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.DEVICE", "cpu",
        "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2",
        "DATALOADER.NUM_WORKERS", "0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
        "TEST.DETECTIONS_PER_IMAGE", "21", "INPUT.RANDOM_FLIP", "horizontal",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "21",
        "OUTPUT_DIR", str(tmp_path / "run"),
    ]  # fmt: skip
    train_main(args)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"bbox", "keypoints", "keypoints@21"}
    rows = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert json.loads(rows[0])["loss_keypoint"] > 0
    # Evaluating asks nothing of the training's dataset.
    register_datasets([spec.replace("beetles=", "others=")])
    evaluation = ["--eval-only", *args, "MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    train_main([*evaluation, "DATASETS.TRAIN", "('not there',)"])
    weights = ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    detect_main([
        "--config-file", str(tmp_path / "run" / "config.yaml"), "--ground-truth", "beetles",
        "--dataset", spec, "--output", str(tmp_path / "seen"), "--threshold", "0",
        "--max-images", "1", *weights, "TEST.DETECTIONS_PER_IMAGE", "2",
    ])  # fmt: skip
    image = json.loads((tmp_path / "seen" / "detections.json").read_text())[0]
    assert image["detections"]
    for detection in image["detections"]:
        assert [point["name"] for point in detection["keypoints"]] == NAMES


def test_keypoints_are_drawn_with_names_and_skeleton():
    axes = Figure().subplots()
    layout = KeypointLayout(tuple(NAMES), ((0, 1), (0, 2)))
    draw_keypoints(axes, [(4, 5), None, (7, 8)], layout, "#ffffff")
    assert [text.get_text() for text in axes.texts] == ["tail", "right_wing"]
    lines = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    assert lines == [[(4, 5), (7, 8)], [(4, 5)], [(7, 8)]]
    draw_keypoints(axes, [(1, 1)], KeypointLayout(), "#ffffff")
    assert axes.texts[-1].get_text() == "keypoint 1"


def unnamed(content: dict) -> None:
    del content["categories"][0]["keypoints"]


# What is done to the data, options, and the line that says so.
REFUSED = {
    "other number in the JSON": (
        lambda c: c["categories"][0].update(keypoints=["left", "right"]), (),
        "names 2 keypoints, and the model has 3 .MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    ),
    "other number in annotations": (
        lambda c: c["annotations"][1].update(keypoints=[1, 1, 2]), (),
        "annotation 2: has 1 keypoints, and the model has 3",
    ),
    "other number in the model": (
        lambda c: None, ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4),
        "3 keypoints, and the model has 4 .MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
    ),
    "names that are none": (
        lambda c: c["categories"][0].update(keypoints=[1, 2, 3]), (), "expected names that differ",
    ),
    "names twice": (
        lambda c: c["categories"][0].update(keypoints=["a", "a", "b"]), (),
        "expected names that differ",
    ),
    "pairs that are none": (
        lambda c: c["categories"][0].update(keypoint_flip_map=[["left_wing", "nose"]]), (),
        "keypoint_flip_map is .*nose.*expected pairs of its keypoints",
    ),
    "no names": (unnamed, (), "keypoints a mirrored image swaps.*INPUT.RANDOM_FLIP none"),
    "no sides in names": (
        lambda c: c["categories"][0].update(keypoints=["head", "thorax", "tail"]), (),
        "keypoints a mirrored image swaps.*INPUT.RANDOM_FLIP none.*keypoint_flip_map",
    ),
    "vertical": (
        lambda c: None, ("INPUT.RANDOM_FLIP", "vertical"), "vertically.*INPUT.RANDOM_FLIP none"
    ),
    "no sigmas": (
        lambda c: None, ("TEST.KEYPOINT_OKS_SIGMAS", []),
        "TEST.KEYPOINT_OKS_SIGMAS .*is empty, which means COCO's 17, and the model has 3",
    ),
    "too few sigmas": (
        lambda c: None, ("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1]),
        "has 2 numbers, and the model has 3 keypoints: give one number for each",
    ),
    "sigmas of 0": (
        lambda c: None, ("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.0, 0.1]), "expected numbers above 0",
    ),
}  # fmt: skip


def check_config_datasets(cfg, training: bool) -> None:
    YacsRun(cfg, Namespace(eval_only=not training)).check_data()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_or_evaluated_is_one_line(tmp_path, case):
    change, opts, message = REFUSED[case]
    content = beetles()
    change(content)
    register_datasets([write(tmp_path, "beetles", content)], checked=True)
    with pytest.raises(UserError, match=message) as raised:
        check_config_datasets(config(*opts), training=True)
    assert "\n" not in str(raised.value)


def test_images_that_are_not_mirrored_need_no_pairs(tmp_path):
    content = beetles()
    unnamed(content)
    register_datasets([write(tmp_path, "beetles", content)], checked=True)
    cfg = config("INPUT.RANDOM_FLIP", "none")
    check_config_datasets(cfg, training=True)
    check_config_datasets(config(), training=False)
    mapped = ReadableImageMapper(cfg, is_train=True)(DatasetCatalog.get("beetles")[0])
    assert len(mapped["instances"].gt_keypoints) == 1
    # A mapper that mirrors all the same does not do it in silence.
    mapper = ReadableImageMapper(config(), is_train=True)
    with pytest.raises(UserError, match="Cannot flip keypoints without providing flip indices"):
        for _ in range(40):
            mapper(copy.deepcopy(DatasetCatalog.get("beetles")[0]))


@pytest.mark.parametrize("way", ["horizontal", "vertical"])
def test_a_json_may_say_that_no_keypoints_are_swapped(tmp_path, way):
    content = beetles()
    content["categories"][0].update(keypoints=["head", "thorax", "tail"], keypoint_flip_map=[])
    register_datasets([write(tmp_path, "beetles", content)], checked=True)
    check_config_datasets(config("INPUT.RANDOM_FLIP", way), training=True)
    assert swapped_keypoints(["beetles"]) == [0, 1, 2]


def test_sets_with_keypoints_in_another_order_are_refused(spec, tmp_path):
    content = beetles()
    content["categories"][0]["keypoints"] = NAMES[::-1]
    other = write(tmp_path, "others", content)
    register_datasets([spec, other], checked=True)
    with pytest.raises(UserError, match="the same are needed in the same order"):
        check_config_datasets(config(test="others"), training=True)


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        (lambda c: None, 0, "0 refused, 0 warnings"),
        (lambda c: c["categories"][0].update(keypoints=["a", "b"]), 1, "names 2 keypoints"),
        (unnamed, 0, "keypoint_flips (1): which keypoints a mirrored image swaps is not known"),
        (lambda c: c["categories"][0].update(skeleton=[[0, 1]]), 0, "numbers from 1 to 3"),
    ],
)
def test_check_dataset_says_what_training_does(tmp_path, capsys, change, status, told):
    content = beetles()
    change(content)
    write(tmp_path, "beetles", content)
    try:
        check_main([str(tmp_path / "beetles.json"), str(tmp_path / "images"), "--keypoints", "3"])
        ended = 0
    except SystemExit as error:
        ended = error.code
    assert ended == status
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("dataloader.evaluator.kpt_oks_sigmas=[0.1,0.1]", "has 2 numbers, and the model has 3"),
        ("dataloader.train.mapper.augmentations.1.vertical=true", "images are mirrored vertically"),
        ("dataloader.train.dataset.names=[nameless]", "'nameless' does not say which keypoints"),
        ("", None),
    ],
)
def test_a_lazy_configs_keypoints_are_checked_too(spec, tmp_path, monkeypatch, more, message):
    content = beetles()
    unnamed(content)
    nameless = write(tmp_path, "nameless", content)
    begun = []
    monkeypatch.setattr("fpn_plugin.engine.run.launch", lambda *_: begun.append(True))
    args = [
        "--config-file", "lazy/COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py", "--dataset", spec,
        "--dataset", nameless, "model.roi_heads.keypoint_head.num_keypoints=3",
        "dataloader.train.dataset.names=[beetles]", "dataloader.test.dataset.names=beetles",
        "dataloader.evaluator.kpt_oks_sigmas=[0.1,0.1,0.1]", "train.device=cpu",
        f"train.output_dir={tmp_path / 'out'}", *filter(None, [more]),
    ]  # fmt: skip
    if message is None:
        lazy_main(args)
        assert begun
        return
    with pytest.raises(UserError, match=message):
        lazy_main(args)
    assert not begun
