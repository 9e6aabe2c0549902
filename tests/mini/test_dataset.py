"""The mini dataset: what it holds, and that it is whole and the same wherever it is made."""

import hashlib
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fpn_plugin import UserError
from fpn_plugin.mini import dataset, ensure_mini, ensure_mini_datasets, scene
from fpn_plugin.mini.scene import CATEGORIES, IMAGE_SIZE, KINDS, PANEL_SHAPES, draw_scene

FEW = {"train": 12, "val": 6}
FORK = multiprocessing.get_context("fork")  # need not import torch again


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return ensure_mini(FEW, tmp_path_factory.mktemp("mini") / "made")


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_it_is_coco_and_boxes_fit_masks(root):
    for split, count in FEW.items():
        coco = COCO(str(root / f"{split}.json"))
        assert len(coco.imgs) == count
        assert coco.loadCats(coco.getCatIds()) == list(CATEGORIES)
        assert coco.dataset["info"]["version"] == dataset._fingerprint()
        for image in coco.imgs.values():
            pixels = np.asarray(Image.open(root / split / image["file_name"]))
            assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert len(coco.anns) > 3 * count
        for annotation in coco.anns.values():
            x, y, width, height = annotation["bbox"]
            assert 0 <= x < x + width <= IMAGE_SIZE
            assert 0 <= y < y + height <= IMAGE_SIZE
            assert annotation["area"] == width * height
            assert coco_mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


def test_the_same_bytes_again_and_others_for_another_seed(root, tmp_path, monkeypatch):
    again = ensure_mini(FEW, tmp_path / "again")
    assert digests(again) == digests(root)
    monkeypatch.setattr(dataset, "SEED", 1)
    other = ensure_mini(FEW, tmp_path / "other")
    assert digests(other).keys() == digests(root).keys()
    assert not set(digests(other).values()) & set(digests(root).values())


def test_small_medium_and_large_objects_all_occur_and_overlap_little():
    boxes = []
    for index in range(120):
        objects = draw_scene(0, "train", index).objects
        masks = np.array([thing.mask for thing in objects])
        assert masks.sum(axis=0).max() == 1, "a pixel belongs to one object"
        boxes += [(thing.category_id, *thing.box[2:]) for thing in objects]
    area = np.array([w * h for _, w, h in boxes])
    small, large = area < 32**2, area > 96**2
    shares = [small.mean(), (~small & ~large).mean(), large.mean()]
    assert min(shares) > 0.04, shares
    digit_size = np.sqrt([w * h for category, w, h in boxes if category <= 10])
    assert digit_size.min() < 13
    assert 130 < digit_size.max() <= 160
    assert {category for category, *_ in boxes} == {c["id"] for c in CATEGORIES}


def test_discs_look_alike_and_lie_in_the_panel_that_names_them(monkeypatch):
    drawn = []
    shape_stamp = scene._shape_stamp

    def record(shape, box, outline=None):
        drawn.append((shape, box, outline))
        return shape_stamp(shape, box, outline)

    monkeypatch.setattr(scene, "_shape_stamp", record)
    discs = 0
    for index in range(40):
        drawn.clear()
        objects = draw_scene(0, "val", index).objects
        panel = None
        classes = []
        for shape, box, outline in drawn:
            side = box[2] - box[0]
            if outline is not None:
                panel = (shape, box)
                assert 120 <= side <= 220
                continue
            assert shape == "circle"
            assert 12 <= side <= 22
            assert panel[1][0] < box[0] < box[2] < panel[1][2]
            assert panel[1][1] < box[1] < box[3] < panel[1][3]
            classes.append(11 + PANEL_SHAPES.index(panel[0]))
        labelled = [thing.category_id for thing in objects if thing.category_id > 10]
        assert labelled == classes
        discs += len(classes)
    assert discs > 60


def test_splits_share_no_digit_and_no_part_of_a_photograph(monkeypatch):
    train, val = scene._digits("train")[0], scene._digits("val")[0]
    assert len(train) + len(val) == 1797
    train_set = {digit.tobytes() for digit in train}
    assert not any(digit.tobytes() in train_set for digit in val)
    crops = {"train": [], "val": []}

    class Photograph:
        width, height = 640, 427

        def __init__(self, split):
            self.split = split

        def resize(self, size, resample, box):
            crops[self.split].append(box)
            return Image.new("RGB", size, (200, 200, 200))

    for split in crops:
        monkeypatch.setattr(scene, "_photographs", lambda split=split: [Photograph(split)])
        for seed in range(200):
            scene._background(np.random.default_rng(seed), split)
    assert max(box[2] for box in crops["train"]) <= min(box[0] for box in crops["val"])
    for box in crops["train"] + crops["val"]:
        assert 0 <= box[0] < box[2] <= 640
        assert 0 <= box[1] < box[3] <= 427


def test_it_is_registered_and_loads(root, monkeypatch):
    assert {"mini_train", "mini_val"} <= set(DatasetCatalog.list())
    metadata = MetadataCatalog.get("mini_val")
    assert metadata.evaluator_type == "coco"
    assert len(metadata.thing_classes) == 14
    made = Path(metadata.json_file).parent
    assert made.parent == Path(os.environ["DETECTRON2_DATASETS"])
    monkeypatch.setattr(dataset, "SPLITS", FEW)  # the whole would take half a minute
    shutil.rmtree(made, ignore_errors=True)  # of other sizes, where another test came first
    records = DatasetCatalog.get("mini_val")
    assert len(records) == FEW["val"]
    assert Path(records[0]["file_name"]).is_file()
    assert digests(made) == digests(root)
    shutil.rmtree(made)


def _make(root: Path, barrier) -> None:
    barrier.wait()
    ensure_mini({"train": 10, "val": 4}, root)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind])
def test_siblings_have_digits_of_their_sizes_and_shapes_alone(kind):
    scenes = [draw_scene(0, "val", index, kind) for index in range(30)]
    things = [thing for each in scenes for thing in each.objects]
    assert {thing.category_id for thing in things} <= {c["id"] for c in KINDS[kind].categories}
    assert len(KINDS[kind].categories) == 10
    width, height = np.array([thing.box[2:] for thing in things], float).T
    size, low, high = np.sqrt(width * height), *KINDS[kind].digit_px
    assert size.max() <= high + 2
    assert np.percentile(size, 10) >= 0.85 * low  # a few are covered in part by others
    longer = np.maximum(width / height, height / width)
    assert (np.median(longer) > 4) == (kind == "thin")
    other = draw_scene(0, "val", 0, "")
    assert not np.array_equal(scenes[0].image, other.image)


def test_siblings_are_registered_and_made_by_name():
    names = [f"mini_{kind}_{split}" for kind in ("small", "large", "thin") for split in FEW]
    assert set(names) <= set(DatasetCatalog.list())
    assert MetadataCatalog.get("mini_thin_val").thing_classes == [str(d) for d in range(10)]
    ensure_mini(FEW, kind="thin")
    ensure_mini_datasets(["mini_thin_val", "coco_2017_val"])  # there, and none of ours
    assert len(DatasetCatalog.get("mini_thin_val")) == FEW["val"]
    shutil.rmtree(dataset.mini_root("thin"))


def test_two_processes_at_once_make_one_dataset(root, tmp_path):
    together = FORK.Barrier(2)
    target = tmp_path / "shared"
    makers = [FORK.Process(target=_make, args=(target, together)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0]
    alone = ensure_mini({"train": 10, "val": 4}, tmp_path / "alone")
    assert digests(target) == digests(alone)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["alone", "shared"]


def test_a_killed_run_leaves_nothing_that_is_trusted(tmp_path):
    target = tmp_path / "made"
    maker = FORK.Process(target=ensure_mini, args=({"train": 5000, "val": 4}, target))
    maker.start()
    partial = tmp_path / "made.partial" / "train" / "000010.jpg"
    while not partial.exists() and maker.is_alive():
        maker.join(0.01)
    maker.kill()
    maker.join()
    assert partial.exists()
    assert not target.exists()
    ensure_mini(FEW, target)
    assert len(list((target / "train").iterdir())) == FEW["train"]
    assert not (tmp_path / "made.partial").exists()


def test_a_changed_generator_has_a_folder_of_its_own(monkeypatch, tmp_path):
    before = dataset.mini_root()
    changed = tmp_path / "scene.py"
    changed.write_text(Path(scene.__file__).read_text() + "# another line\n")
    monkeypatch.setattr(scene, "__file__", str(changed))
    assert dataset.mini_root() != before
    assert dataset.mini_root().parent == before.parent


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
        ensure_mini(FEW, tmp_path / "file" / "mini")


def test_scikit_learn_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        ensure_mini(FEW, tmp_path / "mini")
