"""Classes are matched by name: the order of categories in a JSON changes no result."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_plugin import UserError
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.data import class_order, follow_classes, register_datasets
from fpn_plugin.engine.class_names import match_datasets
from fpn_plugin.engine.evaluation import DetectionEvaluator
from fpn_plugin.utils.weight_files import classes_in
from tests.helpers.datasets import forgotten
from tests.helpers.datasets import write_dataset as write

CLASSES = ["ant", "bee", "cat", "dog"]


def animals(ids: dict[str, int], order: list[str]) -> dict:
    """Three images with an animal of each class; categories with these ids, in that order."""
    content: dict = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": ids[name], "name": name} for name in order]
    for image in (1, 2, 3):
        content["images"].append(
            {"id": image, "file_name": f"{image}.png", "width": 100, "height": 40}
        )
        for place, name in enumerate(CLASSES):
            content["annotations"].append(
                {"id": 10 * image + place, "image_id": image, "category_id": ids[name],
                 "bbox": [25 * place, 5, 20, 20 + image], "area": 400, "iscrowd": 0}
            )  # fmt: skip
    return content


def in_order(order: list[str] = CLASSES) -> dict:
    return animals({name: number for number, name in enumerate(order, start=1)}, order)


def detections(image: int) -> Instances:
    """A model's whose class numbers are those of CLASSES: better at some classes than at others."""
    found = Instances((40, 100))
    rows = [(25 * place, 5, 25 * place + 20, 25 + image) for place in range(4)]
    found.pred_boxes = Boxes(torch.tensor(rows, dtype=torch.float32))
    found.pred_boxes.tensor[3, 2] += 8  # poorly placed
    found.pred_classes = torch.tensor([0, 1, 1 if image == 2 else 2, 3])
    found.scores = torch.tensor([0.9, 0.6, 0.8, 0.7])
    return found


def results_of(name: str, output: Path) -> dict:
    records = DatasetCatalog.get(name)
    evaluator = DetectionEvaluator(name, ("bbox",), False, str(output))
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"instances": detections(record["image_id"])}])
    return evaluator.evaluate()["bbox"]


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(CLASSES), ids=st.permutations([3, 7, 8, 20]))
def test_any_order_and_ids_give_the_same_results(tmp_path_factory, order, ids):
    folder = tmp_path_factory.mktemp("animals")
    content = animals(dict(zip(CLASSES, ids, strict=True)), order)
    with forgotten():
        register_datasets([write(folder, "first", in_order()), write(folder, "second", content)])
        DatasetCatalog.get("second")  # in the order of its ids
        follow_classes(["second"], class_order("first"), "the first")
        expected = results_of("first", folder)
        assert results_of("second", folder) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        assert MetadataCatalog.get("second").thing_classes == CLASSES
        numbers = [
            [annotation["category_id"] for annotation in record["annotations"]]
            for record in DatasetCatalog.get("second")
        ]
        assert numbers == [[0, 1, 2, 3]] * 3
    assert expected["AP-ant"] == pytest.approx(100)
    assert 0 < expected["AP-cat"] < 100
    assert expected["AP-dog"] == pytest.approx(50)  # an IoU of 20 / 28


def test_matching_is_said_and_done_once(tmp_path, capsys):
    register_datasets([write(tmp_path, "other", in_order(CLASSES[::-1]))])
    for _ in range(2):
        follow_classes(["other"], CLASSES, "the training's dataset 'first'")
    told = capsys.readouterr().out.splitlines()
    expected = "dataset 'other' has its categories in another order than the training's dataset"
    assert len([line for line in told if line.startswith(expected)]) == 1
    follow_classes(["other"], CLASSES[::-1], "another model")  # as the next in one process
    assert [a["category_id"] for a in DatasetCatalog.get("other")[0]["annotations"]] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ant", "bee", "cat", "Dog"], r"lacks \['dog'\] and has \['Dog'\] more"),
        (["ant", "bee", "cat"], r"lacks \['dog'\]\. .*a category needs no annotations"),
        ([*CLASSES, "elk"], r"has \['elk'\] more"),
    ],
)
def test_other_names_are_refused(tmp_path, names, message):
    content = in_order()
    content["categories"] = [{"id": i, "name": n} for i, n in enumerate(names, start=1)]
    content["annotations"] = content["annotations"][:3]
    train, val = write(tmp_path, "first", in_order()), write(tmp_path, "second", content)
    args = [
        "--config-file", "mini/faster_rcnn_R_18_FPN.yaml", "--dataset", train, "--dataset", val,
        "DATASETS.TRAIN", "('first',)", "DATASETS.TEST", "('second',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", "4", "OUTPUT_DIR", str(tmp_path / "out"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=message) as raised:
        train_main(args)
    assert "'second'" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_names_that_are_there_twice_are_not_matched(tmp_path):
    content = in_order()
    content["categories"][0]["name"] = "dog"
    register_datasets([write(tmp_path, "twice", content)])
    with pytest.raises(UserError, match="several are named 'dog': give them different names"):
        follow_classes(["twice"], ["bee", "cat", "dog", "dog"], "the model")
    follow_classes(["twice"], ["dog", "bee", "cat", "dog"], "the model")  # the same order


def test_a_json_that_changes_is_matched_again(tmp_path):
    content = in_order(CLASSES[::-1])
    register_datasets([write(tmp_path, "turned", content)])
    follow_classes(["turned"], CLASSES, "the model")
    content["annotations"].pop()
    del content["annotations"][0]["area"]  # filled in, in a copy
    write(tmp_path, "turned", content)
    numbers = [
        annotation["category_id"]
        for record in DatasetCatalog.get("turned")
        for annotation in record["annotations"]
    ]
    assert numbers == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert class_order("turned") == CLASSES


@pytest.mark.parametrize("with_json", [True, False])
def test_a_dataset_with_a_function_of_its_own_is_not_matched(tmp_path, with_json):
    json_file = write(tmp_path, "own", in_order(CLASSES[::-1])).partition("=")[2].partition(":")[0]
    known = {"json_file": json_file, "image_root": str(tmp_path / "images")} if with_json else {}
    DatasetCatalog.register("own", list)
    MetadataCatalog.get("own").set(thing_classes=CLASSES[::-1], **known)
    with pytest.raises(UserError, match=r"no COCO JSON .*register it in the order \['ant', 'bee'"):
        follow_classes(["own"], CLASSES, "the model")


def named(path: Path, dataset: Path) -> list[tuple]:
    """The detections of an evaluation, with the names of their categories."""
    names = {c["id"]: c["name"] for c in json.loads(dataset.read_text())["categories"]}
    found = json.loads((path / "inference" / "coco_instances_results.json").read_text())
    return [(d["image_id"], names[d["category_id"]], d["score"], d["bbox"]) for d in found]


def test_training_keeps_its_classes_and_evaluation_takes_them(tmp_path):
    """Trains on two sets, evaluates on a third, all in another order; then on the first alone."""
    orders = {"first": CLASSES, "more": CLASSES[::-1], "val": ["cat", "ant", "dog", "bee"]}
    specs = [write(tmp_path, name, in_order(order)) for name, order in orders.items()]
    datasets = [part for spec in specs for part in ("--dataset", spec)]
    options = [
        "MODEL.ROI_HEADS.NUM_CLASSES", "4", "INPUT.MIN_SIZE_TRAIN", "(40,)", "MODEL.DEVICE", "cpu",
        "INPUT.MIN_SIZE_TEST", "40", "MODEL.FPN.OUT_CHANNELS", "8",
        "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "0",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.RPN.POST_NMS_TOPK_TEST", "20",
    ]  # fmt: skip
    config = ["--config-file", "mini/faster_rcnn_R_18_FPN.yaml"]
    sets = ["DATASETS.TRAIN", "('first','more')", "DATASETS.TEST", "('val',)"]
    run = tmp_path / "run"
    train_main([*config, *datasets, *sets, *options, "OUTPUT_DIR", str(run)])
    records = get_detection_dataset_dicts(["first", "more"])
    assert [a["category_id"] for r in records for a in r["annotations"]] == [0, 1, 2, 3] * 6
    weights = run / "model_final.pth"
    assert classes_in(weights) == CLASSES
    expected = named(run, tmp_path / "val.json")
    assert len({name for _, name, *_ in expected}) > 1
    # Nothing names the training's sets here; the weights have their classes.
    for name in orders:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    alone = ["DATASETS.TRAIN", "('not there',)", "DATASETS.TEST", "('val',)"]
    evaluation = [*config, "--eval-only", *datasets[-2:], *alone, *options]
    again = tmp_path / "again"
    train_main([*evaluation, "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(again)])
    assert named(again, tmp_path / "val.json") == expected
    assert (again / "results.json").read_text() == (run / "results.json").read_text()


def saved(path: Path, classes: list[str]) -> str:
    torch.save({"model": {}, "classes": classes}, path)
    return str(path)


@pytest.mark.parametrize(
    ("training", "told", "expected"),
    [
        (True, None, CLASSES),
        (False, None, CLASSES),
        # The weights decide, if they know the same classes.
        (True, CLASSES[::-1], CLASSES[::-1]),
        (False, CLASSES[::-1], CLASSES[::-1]),
        # Fine-tuning on others.
        (True, ["elk", "fox", "gnu", "hen"], CLASSES),
    ],
)
def test_whose_order_decides(tmp_path, training, told, expected):
    others = ["dog", "ant", "bee", "cat"]
    register_datasets([write(tmp_path, "first", in_order())])
    register_datasets([write(tmp_path, "val", in_order(others))])
    weights = saved(tmp_path / "last.pth", told) if told else "detectron2://nowhere"
    match_datasets(
        ["first"], ["val"], weights, str(tmp_path), resume=False, training=training, classes=4
    )
    assert class_order("val") == expected
    assert class_order("first") == (expected if training else CLASSES)


def test_a_resumed_run_has_the_order_of_its_checkpoint(tmp_path):
    register_datasets([write(tmp_path, "first", in_order())])
    saved(tmp_path / "model_0001.pth", CLASSES[::-1])
    (tmp_path / "last_checkpoint").write_text("model_0001.pth")
    for resume, expected in ((False, CLASSES), (True, CLASSES[::-1])):
        match_datasets(["first"], [], "", str(tmp_path), resume=resume, training=True, classes=4)
        assert class_order("first") == expected


def test_an_evaluation_on_other_classes_than_the_weights_is_refused(tmp_path):
    register_datasets([write(tmp_path, "val", in_order())])
    weights = saved(tmp_path / "final.pth", ["elk", "fox", "gnu", "hen"])
    options = {"resume": False, "training": False}
    with pytest.raises(UserError, match=r"not those of the weights 'final.pth': it lacks \['elk'"):
        match_datasets([], ["val"], weights, "", classes=4, **options)
    match_datasets([], ["val"], weights, "", classes=None, **options)  # a model without classes


def test_a_lazy_run_matches_by_name_too(tmp_path, monkeypatch):
    monkeypatch.setattr("fpn_plugin.engine.run.launch", lambda *_: None)
    others = ["dog", "ant", "bee", "cat"]
    train, val = write(tmp_path, "first", in_order()), write(tmp_path, "val", in_order(others))
    lazy_main([
        "--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", "--dataset", train, "--dataset", val,
        "model.roi_heads.num_classes=4", "dataloader.train.dataset.names=[first]",
        "dataloader.test.dataset.names=val", "train.device=cpu", "train.init_checkpoint=''",
        f"train.output_dir={tmp_path / 'out'}",
    ])  # fmt: skip
    assert class_order("val") == CLASSES
    assert [a["category_id"] for a in DatasetCatalog.get("val")[0]["annotations"]] == [0, 1, 2, 3]
