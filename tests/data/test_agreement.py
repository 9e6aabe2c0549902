"""What the check says of data, what the loader does with it, and what reaches a training."""

import contextlib
import io
import json
import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from torch import tensor

from fpn_plugin import UserError
from fpn_plugin.cli.check import check_main
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.data import (
    Needs,
    ReadableImageMapper,
    check_dataset,
    check_records,
    register_datasets,
    registered_specs,
)
from fpn_plugin.fitting import read_ground_truth
from tests.helpers.datasets import forgotten

NAME = "agreeing"
SIZES = {1: (40, 30), 2: (24, 36)}  # width and height by image id


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of the two images."""
    folder = tmp_path_factory.mktemp("agreement") / "images"
    folder.mkdir()
    for number, size in SIZES.items():
        Image.new("RGB", size, (90, 60, 30)).save(folder / f"{number}.png")
    return folder


def coco(annotations: list, categories=("cell", "ring")) -> dict:
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
            for number, (width, height) in SIZES.items()
        ],
        "annotations": annotations,
        "categories": [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(categories)],
    }


def box(number: int = 1, **values) -> dict:
    return {
        "id": number, "image_id": 1, "category_id": 3, "bbox": [2, 3, 10, 12], "area": 120,
        "iscrowd": 0, **values,
    }  # fmt: skip


def written(images: Path, content: dict, name: str = "own.json") -> str:
    path = images.parent / name
    path.write_text(json.dumps(content))
    return str(path)


KINDS = {
    "boxes": Needs(max_size=256),
    "polygons": Needs(max_size=256, masks="polygon"),
    "bitmasks": Needs(max_size=256, masks="bitmask"),
    "keypoints": Needs(max_size=256, keypoints=2),
}


def mapper_for(needs: Needs) -> ReadableImageMapper:
    """Training's mapper; images are made larger, so that no mask is lost by its scale."""
    return ReadableImageMapper(
        is_train=True, augmentations=[T.ResizeShortestEdge(48, 256)], image_format="BGR",
        use_instance_mask=bool(needs.masks), instance_mask_format=needs.masks or "polygon",
        use_keypoint=bool(needs.keypoints),
    )  # fmt: skip


def trained_on(needs: Needs) -> int:
    """Objects of the registered dataset that a training sees."""
    records = get_detection_dataset_dicts(NAME, min_keypoints=1 if needs.keypoints else 0)
    mapper = mapper_for(needs)
    return sum(len(mapper(record)["instances"]) for record in records)


# A box, and whether training keeps it.
BOXES = {
    "inside": ([2, 3, 10, 12], True),
    "reaches out": ([-4, 20, 10, 30], True),
    "as text": (["2", "3", "10", "12"], True),
    "empty": ([2, 3, 0, 5], False),
    "thin": ([2, 3, 5e-4, 5], False),
    "outside": ([-12, 3, 9, 4], False),
    "just outside": ([-8.9995, 3, 9, 4], False),
    "missing": (None, True),
}


def rle(image: int, *, full: bool, compressed: bool) -> dict:
    """Run lengths of a mask of the image's first columns or of nothing."""
    width, height = SIZES[image]
    counts = [0, 8 * height, (width - 8) * height] if full else [width * height]
    if compressed:
        runs = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        counts = runs["counts"].decode()
    return {"size": [height, width], "counts": counts}


# A segmentation by image, and the kinds of model for which it is kept.
MASKS = {
    "triangle": (lambda _: [[2, 3, 12, 3, 12, 15]], set(KINDS)),
    "line": (lambda _: [[2, 3, 12, 3, 7, 3]], set(KINDS) - {"bitmasks"}),
    "two points": (lambda _: [[2, 3, 12, 15]], set()),
    "runs": (lambda i: rle(i, full=True, compressed=False), set(KINDS)),
    "runs as text": (lambda i: rle(i, full=True, compressed=True), set(KINDS)),
    "no runs": (lambda i: rle(i, full=False, compressed=True), set(KINDS) - {"bitmasks"}),
    "none": (lambda _: None, set(KINDS)),
    "a number": (lambda _: 7, set()),
}
KEYPOINTS = {
    "visible": [3, 3, 2, 4, 4, 1],
    "invisible": [0, 0, 0, 0, 0, 0],
    "one": [3, 3, 2],
    "none": None,
}


def one_or(usual: str, others: dict) -> st.SearchStrategy:
    """Mostly the usual one, so that whole datasets are drawn as well."""
    return st.sampled_from([usual] * 8 + sorted(others))


DRAWN = st.fixed_dictionaries(
    {
        "image": st.sampled_from([1, 2]),
        "box": one_or("inside", BOXES),
        "mask": one_or("triangle", MASKS),
        "keypoints": st.sampled_from(["visible", "invisible"] * 5 + sorted(KEYPOINTS)),
        "crowd": st.sampled_from([0, 0, 0, 1, 1.0, None, "1", True, "absent"]),
        "id": st.integers(0, 40) | st.sampled_from([0, None, "x"]),
        "area": st.sampled_from([120, 0, None]),
    }
)


def record_of(drawn: dict) -> dict:
    image = drawn["image"]
    record = {
        "id": drawn["id"], "image_id": image, "category_id": 3, "iscrowd": drawn["crowd"],
        "bbox": BOXES[drawn["box"]][0], "segmentation": MASKS[drawn["mask"]][0](image),
        "keypoints": KEYPOINTS[drawn["keypoints"]], "area": drawn["area"],
    }  # fmt: skip
    return {key: value for key, value in record.items() if value not in (None, "absent")}


def is_kept(drawn: dict, kind: str, shown: set[int]) -> bool:
    """By the rules as they are documented."""
    crowd = drawn["crowd"] in (1, "1")
    if drawn["box"] == "missing" and drawn["mask"] in ("line", "no runs"):
        return False  # the box of such a mask is empty
    kept = BOXES[drawn["box"]][1] and kind in MASKS[drawn["mask"]][1] and not crowd
    return kept and (kind != "keypoints" or drawn["image"] in shown)


def is_usable(drawn: dict, kind: str) -> bool:
    """Whether nothing is refused, as the model needs it."""
    crowd, mask = drawn["crowd"] in (1, "1"), drawn["mask"]
    if mask == "a number" or (drawn["box"] == "missing" and mask in ("two points", "none")):
        return False
    if kind == "polygons" and not crowd and (mask == "none" or "runs" in mask):
        return False
    if kind == "bitmasks" and not crowd and mask == "none":
        return False
    return kind != "keypoints" or crowd or drawn["keypoints"] in ("visible", "invisible")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(DRAWN, min_size=1, max_size=5))
def test_check_loader_and_training_agree_on_any_dataset(images, kind, drawn):
    needs, json_file = KINDS[kind], written(images, coco([record_of(one) for one in drawn]))
    report = check_dataset(json_file, str(images), look="headers", needs=needs)
    refused, counted = bool(report.kinds(refused=True)), 0
    with forgotten():
        register_datasets([f"{NAME}={json_file}:{images}"], checked=True)
        try:
            check_records([NAME], needs)
        except UserError as error:
            assert refused, error
            assert "\n" not in str(error) and json_file in str(error)
        else:
            assert not refused, report.text(3)
            counted = trained_on(needs)
            assert counted == report.contents.trained_on > 0
            for source in (json_file, NAME):
                assert len(read_ground_truth([source], needs).boxes) == counted
    ids = [one["id"] for one in drawn if one["id"] is not None]
    if len(set(ids)) < len(ids):
        return  # the same object twice is refused; others are numbered anew
    if not all(is_usable(one, kind) for one in drawn):
        assert refused
        return
    shown = {
        one["image"] for one in drawn
        if one["keypoints"] in ("visible", "one") and one["mask"] != "two points"
    }  # fmt: skip
    expected = sum(is_kept(one, kind, shown) for one in drawn)
    assert counted == expected
    assert refused == (expected == 0)


def evaluated(boxes: dict[int, list]) -> float:
    """AP of a detector that finds these boxes XYXY by image."""
    evaluator = COCOEvaluator(NAME, tasks=("bbox",), distributed=False, use_fast_impl=False)
    records = DatasetCatalog.get(NAME)
    evaluator.reset()
    for record in records:
        found = Instances((record["height"], record["width"]))
        rows = boxes.get(record["image_id"], [])
        found.pred_boxes = Boxes(tensor(rows, dtype=float).reshape(-1, 4))
        found.scores, found.pred_classes = tensor([0.9] * len(rows)), tensor([0] * len(rows))
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize(
    "change",
    [
        lambda records: [record.update(id=i) for i, record in enumerate(records)],
        lambda records: [record.update(id=5) for record in records],
        lambda records: [record.pop(key) for record in records for key in ("area", "iscrowd")],
        lambda records: [record.pop("id") for record in records],
        lambda records: [record.update(image_id=str(record["image_id"])) for record in records],
        lambda records: [record.update(bbox=list(map(str, record["bbox"]))) for record in records],
    ],
    ids=["ids from 0", "one id", "no area", "no ids", "image ids as text", "boxes as text"],
)
def test_a_perfect_detector_gets_full_marks_on_mended_data(images, change):
    content = coco([box(1), box(2, bbox=[20, 8, 12, 9], area=108), box(3, image_id=2)], ["cell"])
    change(content["annotations"])
    path = written(images, content)
    register_datasets([f"{NAME}={path}:{images}"])
    corners = {1: [[2, 3, 12, 15], [20, 8, 32, 17]], 2: [[2, 3, 12, 15]]}
    assert evaluated(corners) == pytest.approx(100)
    corners[1].pop(0)
    assert evaluated(corners) < 70
    assert json.loads(Path(path).read_text()) == content  # the user's file is not touched
    # Started processes take the mended file; so does another registration in this one.
    [spec] = registered_specs([f"{NAME}={path}:{images}"])
    assert not spec.startswith(f"{NAME}={path}:")
    register_datasets([spec], checked=True)
    truth = json.loads(Path(MetadataCatalog.get(NAME).json_file).read_text())["annotations"]
    assert [record["id"] for record in truth] == [1, 2, 3]
    assert [record["area"] for record in truth] == [120, 108, 120]
    assert [record["iscrowd"] for record in truth] == [0, 0, 0]


def test_what_is_all_crowd_is_refused_by_the_check_and_by_training(images, capsys):
    """CVAT's brush writes iscrowd 1 for single objects."""
    runs = rle(1, full=True, compressed=False)
    path = written(images, coco([box(i, iscrowd=1, segmentation=runs) for i in (1, 2)]))
    told = "has nothing to {} on: of 2 annotations, 2 crowd; CVAT's brush .*--no-crowds"
    for more, use in ([], "train"), (["--test"], "evaluate"):
        with pytest.raises(SystemExit) as ended:
            check_main([path, str(images), *more])
        assert ended.value.code == 1
        assert f"has nothing to {use} on" in capsys.readouterr().out
        register_datasets([f"{NAME}={path}:{images}"], checked=True)
        with pytest.raises(UserError, match=told.format(use)):
            check_records([NAME], Needs(training=use == "train"))
    new = str(images.parent / "objects.json")
    check_main([path, str(images), "--convert", new, "--no-crowds"])
    assert "2 annotations with iscrowd 1 are single objects now" in capsys.readouterr().out
    written(images, json.loads(Path(new).read_text()))
    check_records([NAME], Needs(masks="bitmask"))
    assert trained_on(KINDS["bitmasks"]) == 2


def test_crowds_among_others_are_said_to_be_left_out(images, caplog, capsys):
    path = written(images, coco([box(1), box(2, iscrowd=1)]), "crowds.json")
    check_main([path, str(images)])
    out = capsys.readouterr().out
    assert "warnings: crowd (1): iscrowd is 1; training leaves it out" in out
    assert "2 images, 2 boxes and 2 classes were read; 1 boxes are trained on" in out
    register_datasets([f"{NAME}={path}:{images}"], checked=True)
    with caplog.at_level(logging.WARNING):
        check_records([NAME], Needs())
    assert "crowd (1), iscrowd is 1; training leaves it out" in caplog.text


def test_a_json_that_changes_is_read_anew(images, caplog):
    """As in a notebook, where one process lives long."""
    path = written(images, coco([box(1)]))
    spec = f"{NAME}={path}:{images}"
    register_datasets([spec])
    assert sum(len(r["annotations"]) for r in DatasetCatalog.get(NAME)) == 1
    MetadataCatalog.get(NAME).thing_colors = [[1, 2, 3]]
    more = coco([box(0, category_id=11), box(1)], ["cell", "ring", "disc"])
    written(images, more)
    with caplog.at_level(logging.WARNING):
        register_datasets([spec])
    assert f"dataset '{NAME}': {path} has changed and is read anew" in caplog.text
    assert MetadataCatalog.get(NAME).thing_classes == ["cell", "ring", "disc"]
    assert MetadataCatalog.get(NAME).thing_colors == [[1, 2, 3]]  # set by hand
    classes = [a["category_id"] for r in DatasetCatalog.get(NAME) for a in r["annotations"]]
    assert sorted(classes) == [0, 2]
    written(images, coco([box(0), box(0, bbox=[1, 1, 9, 9])], ["cell"]))
    # Without being registered again, too, whether or not it had been mended.
    assert len(read_ground_truth([NAME]).boxes) == 2
    assert [len(r["annotations"]) for r in DatasetCatalog.get(NAME)] == [2, 0]
    assert MetadataCatalog.get(NAME).thing_classes == ["cell"]
    written(images, coco([box(4, image_id=77)]))
    with pytest.raises(UserError, match="no image has id 77"):
        DatasetCatalog.get(NAME)


def test_what_a_user_registered_is_mended_if_detectron2_reads_it(images):
    path = written(images, coco([box(0), box(1)]))
    register_coco_instances(NAME, {}, path, str(images))
    check_records([NAME], Needs())
    assert [len(r["annotations"]) for r in DatasetCatalog.get(NAME)] == [2, 0]
    assert MetadataCatalog.get(NAME).json_file != path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: [])
    MetadataCatalog.get(NAME).set(json_file=path, image_root=str(images))
    with pytest.raises(UserError, match="read by a function of its own, so that .* --convert"):
        check_records([NAME], Needs())


@pytest.mark.parametrize("lazy", [False, True])
def test_started_processes_are_given_the_mended_json(images, tmp_path, monkeypatch, lazy):
    path = written(images, coco([box(0), box(1, image_id=2)]))
    given = []
    monkeypatch.setattr("fpn_plugin.engine.run.launch", lambda *args: given.extend(args[1].dataset))
    spec = ["--dataset", f"{NAME}={path}:{images}"]
    if not lazy:
        train_main(
            ["--config-file", "mini/faster_rcnn_R_18_FPN.yaml", *spec,
             "DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)",
             "MODEL.ROI_HEADS.NUM_CLASSES", "2", "OUTPUT_DIR", str(tmp_path / "out")]
        )  # fmt: skip
    else:
        lazy_main(
            ["--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", *spec,
             f"dataloader.train.dataset.names={NAME}", f"dataloader.test.dataset.names={NAME}",
             "model.roi_heads.num_classes=2", f"train.output_dir={tmp_path / 'out'}"]
        )  # fmt: skip
    MetadataCatalog.remove(NAME)
    DatasetCatalog.remove(NAME)
    register_datasets(given, checked=True)  # as in the process that is started
    truth = json.loads(Path(MetadataCatalog.get(NAME).json_file).read_text())
    assert [record["id"] for record in truth["annotations"]] == [1, 2]
