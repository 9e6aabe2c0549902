"""COCO-format data that is bad in every way: it loads right or is refused by name."""

import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import EpsImagePlugin, Image
from pycocotools import mask as coco_mask

from evidence.corruptions import CORRUPTIONS, CorruptDataset, make_dataset
from evidence.fuzz_data import judge, load_records, make_mapper
from fpn_plugin import UserError, model_zoo
from fpn_plugin.cli.check import check_main
from fpn_plugin.cli.train import train_main
from fpn_plugin.data import (
    Needs,
    ReadableImageMapper,
    check_coco,
    check_dataset,
    read_image_or_say,
)  # fmt: skip
from fpn_plugin.data.annotations import Known, annotation_problems, first_with
from fpn_plugin.data.dataset_check import read_coco
from fpn_plugin.data.fast_checks import may_break_a_rule
from fpn_plugin.data.problems import KINDS
from fpn_plugin.data.shapes import mask_problem


@pytest.fixture(scope="module")
def mapper():
    return make_mapper()


@pytest.fixture
def whole(tmp_path) -> CorruptDataset:
    made = make_dataset(tmp_path / "ü data", np.random.default_rng(0))
    made.write()
    return made


def found(made: CorruptDataset, **more) -> dict[str, int]:
    made.write()
    return check_dataset(made.json_file, made.images, **more).counts


def test_whole_data_has_no_problem_and_loads(whole, mapper):
    assert found(whole) == {}
    assert judge(whole, mapper) == "loads"


def annotation(made: CorruptDataset, **values) -> None:
    made.content["annotations"][0].update(values)


def image(made: CorruptDataset, **values) -> None:
    made.content["images"][0].update(values)


def twice(made: CorruptDataset, part: str) -> None:
    made.content[part].append(dict(made.content[part][0]))


# What is done to the data; the only kinds of problems that are then found.
CASES = {
    "image id missing": (lambda m: m.content["images"].append(
        {"file_name": "a"}), "id_missing image_missing"),
    "image twice": (lambda m: twice(m, "images"), "id_twice file_name_twice"),
    "annotation twice": (lambda m: twice(m, "annotations"), "id_twice"),
    "category twice": (lambda m: twice(m, "categories"), "id_twice category_name_twice"),
    "ids of two types": (lambda m: m.content["images"].append(
        {**m.content["images"][0], "id": "x"}), "id_unusable file_name_twice"),
    "image id of 70 bits": (lambda m: m.content["images"].append(
        {**m.content["images"][0], "id": 2**70}), "id_unusable file_name_twice"),
    "id of 70 bits": (lambda m: annotation(m, id=2**70), "renumbered"),
    "id 0": (lambda m: annotation(m, id=0), "renumbered"),
    "id text": (lambda m: annotation(m, id="a"), "renumbered"),
    "id missing": (lambda m: m.content["annotations"][0].pop("id"), "renumbered"),
    "two of one id": (lambda m: annotation(
        m, id=m.content["annotations"][1]["id"]), "renumbered"),
    "area missing": (lambda m: m.content["annotations"][0].pop("area"), "filled_in"),
    "iscrowd missing": (lambda m: m.content["annotations"][0].pop("iscrowd"), "filled_in"),
    "box missing": (lambda m: m.content["annotations"][0].pop("bbox"), "filled_in"),
    "box null": (lambda m: annotation(m, bbox=None), "filled_in"),
    "box and mask missing": (lambda m: annotation(
        m, bbox=None, segmentation=None), "box_malformed"),
    "box with null": (lambda m: annotation(m, bbox=[1, 2, None, 4]), "box_malformed"),
    "image id float": (lambda m: (image(m, id=5.0), annotation(m, image_id=5.0)), "filled_in"),
    "image id half": (lambda m: image(m, id=5.5), "id_missing image_unknown"),
    "image id text": (lambda m: annotation(m, image_id="5"), "filled_in"),
    "category id text": (lambda m: annotation(m, category_id="9"), "filled_in"),
    "crowd": (lambda m: annotation(m, iscrowd=1), "crowd"),
    "box negative": (lambda m: annotation(m, bbox=[9, 9, -3, 4]), "box_negative"),
    "box empty": (lambda m: annotation(m, bbox=[3, 3, 0, 4]), "box_empty"),
    "box outside": (lambda m: annotation(m, bbox=[-12, 3, 9, 4]), "box_outside"),
    "box reaches out": (lambda m: annotation(m, bbox=[-3, 3, 9, 4]), "box_reaches_out"),
    "box NaN": (lambda m: annotation(m, bbox=[math.nan, 3, 9, 4]), "box_not_finite"),
    "box infinite": (lambda m: annotation(m, bbox=[0, 3, 9, math.inf]), "box_not_finite"),
    "box 1e9 wide": (lambda m: annotation(m, bbox=[0, 3, 1e9, 4]), "box_far_out"),
    "box of three": (lambda m: annotation(m, bbox=[0, 3, 9]), "box_malformed"),
    "box of text": (lambda m: annotation(m, bbox=[0, 3, "x", 4]), "box_malformed"),
    "box as text": (lambda m: annotation(m, bbox=["0", "3", "9", " 4.5"]), "filled_in"),
    "no image": (lambda m: annotation(m, image_id=77), "image_unknown"),
    "no category": (lambda m: annotation(m, category_id=77), "category_unknown"),
    "polygon NaN": (lambda m: annotation(m, segmentation=[[math.nan] * 6]), "segmentation"),
    "polygon 1e9": (lambda m: annotation(m, segmentation=[[1e9] * 6]), "segmentation"),
    "polygon of text": (lambda m: annotation(m, segmentation=[["1"] * 6]), "segmentation"),
    "polygon of two": (lambda m: annotation(m, segmentation=[[1] * 4]), "segmentation_unusable"),
    "RLE of other size": (lambda m: annotation(
        m, segmentation={"size": [4, 4], "counts": [16]}), "segmentation"),
    "keypoints of two": (lambda m: annotation(m, keypoints=[1, 2]), "keypoints"),
    "no images": (lambda m: m.content.update(images=[], annotations=[]), "nothing"),
    "no annotations": (lambda m: m.content.update(annotations=[]), "nothing"),
    "no list": (lambda m: m.content.update(images={}), "not_coco"),
    "width text": (lambda m: image(m, width="x"), "value"),
    "width as text": (lambda m: image(m, width=str(size(m)[0])), "filled_in"),
    "width as float": (lambda m: image(m, width=float(size(m)[0])), "filled_in"),
    "width missing": (lambda m: m.content["images"][0].pop("width"), "filled_in"),
    "width missing, no file": (lambda m: (m.content["images"][0].pop("width"), image(
        m, file_name="none.png")), "value image_missing"),
    "height 0": (lambda m: image(m, height=0), "value"),
    "traversal": (lambda m: image(m, file_name="../5.png"), "file_name"),
    "no file": (lambda m: image(m, file_name="none.png"), "image_missing"),
    "name too long": (lambda m: image(m, file_name="n" * 300), "image_missing"),
    "one file twice": (lambda m: m.content["images"].append(
        {**m.content["images"][0], "id": 77}), "file_name_twice"),
    "names alike": (lambda m: m.content["categories"].append(
        {"id": 11, "name": "cell"}), "category_name_twice"),
    "ignore": (lambda m: annotation(m, ignore=1), "value"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_is_found_and_named(whole, mapper, case):
    change, kinds = CASES[case]
    change(whole)
    assert set(found(whole)) == set(kinds.split())
    refused = any(KINDS[kind].refused for kind in kinds.split())
    expected = "refused before training" if refused else "loads"
    assert judge(whole, mapper) == expected


def save(
    made: CorruptDataset, pixels: np.ndarray | Image.Image, kind: str = "PNG", **options
) -> None:
    """Writes the first image."""
    picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    picture.save(Path(made.images, made.content["images"][0]["file_name"]), kind, **options)


def resized(made: CorruptDataset, width: int, height: int) -> None:
    """A first image of another size, which its annotations mark wholly."""
    save(made, np.full((height, width, 3), 80, np.uint8))
    image(made, width=width, height=height)
    for record in made.content["annotations"]:
        if record["image_id"] == made.content["images"][0]["id"]:
            record.update(bbox=[0, 0, width, height], segmentation=[])


def size(made: CorruptDataset) -> tuple[int, int]:
    return made.content["images"][0]["width"], made.content["images"][0]["height"]


def cut(made: CorruptDataset, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size(made)[::-1], 3), dtype=np.uint8)
    save(made, noise, kind)
    path = Path(made.images, "5.png")
    path.write_bytes(path.read_bytes()[:-900])


def deep(made: CorruptDataset, dtype: type) -> None:
    save(made, np.full(size(made)[::-1], 40_000, dtype), "TIFF")


FILES = {
    "PNG cut": (lambda m: cut(m, "PNG"), "image_unreadable"),
    "JPEG cut": (lambda m: cut(m, "JPEG"), "image_unreadable"),
    "TIFF cut": (lambda m: cut(m, "TIFF"), "image_unreadable"),
    "empty": (lambda m: Path(m.images, "5.png").write_bytes(b""), "image_unreadable"),
    "text": (lambda m: Path(m.images, "5.png").write_text("no image"), "image_unreadable"),
    "16 bits": (lambda m: deep(m, np.uint16), "image_depth"),
    "32 bits": (lambda m: deep(m, np.int32), "image_depth"),
    "floats": (lambda m: deep(m, np.float32), "image_depth"),
    "other size": (lambda m: save(m, np.zeros((9, 9, 3), np.uint8)), "image_other_size"),
    "CMYK": (lambda m: save(m, Image.new("CMYK", size(m)), "JPEG"), "image_converted"),
    "alpha": (lambda m: save(m, Image.new("RGBA", size(m))), "image_converted"),
    "grey": (lambda m: save(m, Image.new("L", size(m))), None),
    "palette": (lambda m: save(m, Image.new("P", size(m))), None),
    "black and white": (lambda m: save(m, Image.new("1", size(m))), None),
    "1 x 1": (lambda m: resized(m, 1, 1), None),
    "1 x 128": (lambda m: resized(m, 1, 128), None),
    "1 x 5000": (lambda m: resized(m, 1, 5000), "image_thin"),
    "5000 x 1": (lambda m: resized(m, 5000, 1), "image_thin"),
}


@pytest.mark.parametrize("case", FILES)
def test_each_image_is_found_and_named(whole, mapper, case):
    change, kind = FILES[case]
    change(whole)
    whole.colours.clear()
    assert set(found(whole, needs=Needs(max_size=64))) == ({kind} if kind else set())
    outcome = {True: "refused at an image", False: "loads"}[bool(kind) and KINDS[kind].refused]
    expected = "refused before training" if kind == "image_thin" else outcome
    assert judge(whole, mapper) == expected


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


def iptc_around(image: bytes) -> bytes:
    """A file of IPTC fields, the last of which is an image."""
    fields = {(3, 60): b"\1\0", (3, 20): b"\0\50", (3, 30): b"\0\36", (3, 120): b"\5"}
    head = b"".join(
        bytes([0x1C, *tag]) + len(value).to_bytes(2, "big") + value for tag, value in fields.items()
    )
    return head + bytes([0x1C, 8, 10]) + len(image).to_bytes(2, "big") + image


@pytest.mark.parametrize(
    ("content", "kind"), [(EPS, "EPS"), (iptc_around(EPS), "IPTC")], ids=["EPS", "IPTC"]
)
def test_an_image_starts_no_program(whole, mapper, monkeypatch, content, kind):
    path, mark = Path(whole.images, "5.png"), whole.folder / "started"
    script = whole.folder / "gs"
    script.write_text(f"#!/bin/sh\necho >> '{mark}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(whole.folder), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path.write_bytes(content)
    told = f"is of format {kind}, which is not read"
    assert found(whole) == {"image_unreadable": 1}
    assert found(whole, look="headers") == {"image_unreadable": 1}
    with pytest.raises(UserError, match=f"5.png', which {told}"):
        read_image_or_say(path)
    record = next(r for r in load_records(whole) if r["file_name"] == str(path))
    with pytest.raises(UserError, match=f"5.png', which {told}"):
        mapper(record)
    with pytest.raises(UserError, match=f"5.png', which {told}"):  # as of panoptic data
        mapper({**record, "file_name": f"{whole.images}/2.png", "sem_seg_file_name": str(path)})
    assert not mark.exists()
    with contextlib.suppress(OSError):
        read_image(str(path))  # Detectron2's own
    assert mark.exists()


def test_a_1_x_5000_image_is_refused_where_it_would_become_nothing(whole):
    resized(whole, 1, 2666)
    assert found(whole) == {}
    resized(whole, 1, 2667)
    assert found(whole) == {"image_thin": 1}
    assert found(whole, needs=Needs(max_size=2000)) == {}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(whole, orientation):
    """The stored pixels' top left corner, where the orientation says that it is shown."""
    stored = Image.new("RGB", size(whole))
    stored.paste((255, 255, 255), (0, 0, 8, 8))
    exif = stored.getexif()
    exif[0x0112] = orientation
    save(whole, stored, exif=exif)
    width, height = size(whole)
    if orientation >= 5:
        assert found(whole) == {"image_other_size": 1}
        report = check_dataset(whole.json_file, whole.images)
        assert "before it is turned as its EXIF says" in report.text(1)
        width, height = height, width
    image(whole, width=width, height=height)
    for record in whole.content["annotations"]:
        record.update(bbox=[0, 0, 9, 9], segmentation=[])
    assert found(whole) == {}
    shown = make_mapper()(load_records(whole)[1])["image"]  # id 5
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1),
              8: (1, 0)}[orientation]  # fmt: skip
    bright = (shown[0] > 200).nonzero().float().mean(0) / torch.tensor(shown.shape[1:])
    assert tuple((bright > 0.5).int().tolist()) == corner


def test_whole_numbers_are_scaled_as_exactly_as_others(whole):
    """Detectron2's own mapper cuts off what lies behind the point."""
    resized(whole, 40, 30)
    annotation(whole, bbox=[3, 5, 10, 11], segmentation=[[3, 5, 13, 5, 13, 16]])
    whole.content["annotations"] = whole.content["annotations"][:1]
    whole.write()
    (record,) = (r for r in load_records(whole) if r["image_id"] == 5)
    cfg = model_zoo.get_config("mini/mask_rcnn_R_18_FPN.yaml")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (32,), "none"
    cfg.INPUT.MASK_FORMAT = "polygon"
    mapped = ReadableImageMapper(cfg, True)(record)["instances"]
    across, down = 43 / 40, 32 / 30
    corners = [3 * across, 5 * down, 13 * across, 16 * down]
    np.testing.assert_allclose(mapped.gt_boxes.tensor.numpy(), [corners], rtol=1e-6)
    left, top, right, bottom = corners
    ((polygon,),) = mapped.gt_masks.polygons
    np.testing.assert_allclose(polygon, [left, top, right, top, right, bottom], rtol=1e-6)
    stock = DatasetMapper(cfg, True)(record)["instances"].gt_boxes.tensor
    assert stock.tolist() == [[int(value) for value in corners]]


def test_a_hundred_thousand_categories_load(whole, mapper):
    whole.content["categories"] += [{"id": 100 + i, "name": f"c{i}"} for i in range(100_000)]
    annotation(whole, category_id=100_099)
    whole.write()
    assert check_coco(whole.json_file)[-1] == "c99999"
    (record,) = (r for r in load_records(whole) if r["image_id"] == 5)
    assert mapper(record)["instances"].gt_classes[0] == 100_001


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    breaks=st.lists(st.sampled_from(sorted(CORRUPTIONS)), min_size=1, max_size=3),
)
def test_whatever_is_broken_is_refused_by_name_or_loads_right(
    tmp_path_factory, mapper, seed, breaks
):
    rng = np.random.default_rng(seed)
    made = make_dataset(tmp_path_factory.mktemp("broken") / "data", rng)
    for name in breaks:
        CORRUPTIONS[name](made, rng)
    judge(made, mapper)


JUNK = st.none() | st.booleans() | st.integers(-5, 60) | st.floats() | st.text(max_size=2)
NESTED = st.lists(JUNK | st.lists(st.integers(-90, 90) | JUNK, max_size=7), max_size=5)
BOXES = st.lists(st.floats(-70, 70) | st.sampled_from([math.nan, 1e9]), min_size=4, max_size=4)
ANNOTATIONS = st.fixed_dictionaries(
    {
        "id": st.integers(0, 6) | JUNK,
        "image_id": st.sampled_from([5, 6, 7]) | JUNK,
        "category_id": st.sampled_from([4, 5]),
        "bbox": BOXES | NESTED,
        "area": st.floats(0, 50) | JUNK,
        "iscrowd": st.sampled_from([0, 1, True, 2]),
    },
    optional={
        "segmentation": st.lists(st.lists(st.integers(-90, 90), max_size=8), max_size=2) | NESTED,
        "keypoints": NESTED | st.lists(st.integers(0, 20), max_size=6),
        "ignore": st.sampled_from([0, 1]),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    records=st.lists(ANNOTATIONS, min_size=1, max_size=3),
    needs=st.sampled_from([Needs(), Needs(masks="polygon"), Needs(masks="bitmask", keypoints=2)]),
)
def test_screening_clears_nothing_that_breaks_a_rule(records, needs):
    known = Known({5: (40, 30), 6: None}, {4}, first_with(records, "id"), needs)
    suspect = may_break_a_rule(records, 0, known)
    for i, record in enumerate(records):
        if not suspect[i]:
            assert not list(annotation_problems(i, record, known))


def test_screening_clears_what_is_whole(whole):
    records = whole.content["annotations"]
    sizes = {r["id"]: (r["width"], r["height"]) for r in whole.content["images"]}
    known = Known(sizes, {4, 9}, first_with(records, "id"), Needs(masks="polygon"))
    assert not may_break_a_rule(records, 0, known).any()


@settings(deadline=None)
@given(
    arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1)
    )
)
def test_a_run_length_encoding_is_held_to_its_image(mask):
    height, width = mask.shape
    encoded = coco_mask.encode(np.asfortranarray(mask))
    rle = {"size": [height, width], "counts": encoded["counts"].decode()}
    assert mask_problem(rle, (width, height)) == ("", "")
    assert mask_problem({**rle, "size": [height, width + 1]}, (width + 1, height))[0]
    assert mask_problem({**rle, "counts": rle["counts"][:-1]}, (width, height))[0]


@settings(deadline=None)
@example("0")  # pycocotools fills the rest of this mask with what was in memory
@example("P" * 40)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=12))
def test_no_text_passes_as_a_run_length_encoding_that_decodes_otherwise(counts):
    if mask_problem({"size": [4, 4], "counts": counts}, (4, 4)) == ("", ""):
        mask = coco_mask.decode({"size": [4, 4], "counts": counts})
        assert coco_mask.area(coco_mask.encode(mask)) == mask.sum() <= 16


def test_what_a_model_with_masks_or_keypoints_cannot_use_is_named(whole):
    whole.content["annotations"][0].pop("segmentation")
    for masks in ("polygon", "bitmask"):
        assert found(whole, needs=Needs(masks=masks)) == {"mask_missing": 1}
    annotation(whole, iscrowd=1)  # is not trained on, but evaluated
    assert found(whole, needs=Needs(masks="polygon")) == {"crowd": 1}
    assert found(whole, needs=Needs(masks="polygon", training=False)) == {
        "crowd": 1, "mask_missing": 1,
    }  # fmt: skip
    width, height = size(whole)
    rle = {"size": [height, width], "counts": [0, width * height]}
    annotation(whole, iscrowd=0, segmentation=rle)
    assert found(whole, needs=Needs(masks="polygon")) == {"mask_missing": 1}
    assert found(whole, needs=Needs(masks="bitmask")) == {}
    assert found(whole, needs=Needs(masks="polygon", training=False)) == {}
    for record in whole.content["annotations"]:
        record["keypoints"] = [1, 1, 2] * 2
        record["num_keypoints"] = 2
    for record in whole.content["categories"]:
        record["keypoints"] = ["left", "right"]
    assert found(whole, needs=Needs(keypoints=2)) == {}
    annotation(whole, keypoints=[1, 1, 2])
    assert found(whole, needs=Needs(keypoints=2)) == {"keypoints_missing": 1}
    annotation(whole, keypoints=[1, 1, 2, 1, 1, 0])
    del whole.content["annotations"][0]["num_keypoints"]
    assert found(whole, needs=Needs(keypoints=2, training=False)) == {"filled_in": 1}
    assert read_coco(whole.json_file).content["annotations"][0]["num_keypoints"] == 1


@pytest.fixture
def train(whole, tmp_path):
    """Trains on the data by the command line's function."""

    def call(*opts: str) -> None:
        whole.write()
        train_main(
            ["--config-file", "mini/mask_rcnn_R_18_FPN.yaml", "--dataset",
             f"bad={whole.json_file}:{whole.images}", "DATASETS.TRAIN", "('bad',)",
             "DATASETS.TEST", "('bad',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2",
             "OUTPUT_DIR", str(tmp_path / "out"), *opts]
        )  # fmt: skip

    yield call
    assert not (tmp_path / "out").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("change", "opts", "message"),
    [
        (lambda m: Path(m.images, "2.png").unlink(), [], r"image 2: no file '.*2.png'"),
        (lambda m: resized(m, 1, 5000), [], r"images\[0\] \(id 5\): 1 x 5000 pixels"),
        (lambda m: annotation(m, bbox=[0, 0, 1e9, 1]), [], "annotation 1: bbox is .*-plugin check"),
        (lambda m: annotation(m, segmentation=[]), [], "annotation 1: has no segmentation"),
        (lambda m: None, ["MODEL.KEYPOINT_ON", "True"], "annotation 1: has 0 keypoints"),
        (lambda m: None, ["MODEL.ROI_HEADS.NUM_CLASSES", "3"], "'bad' has 2 categories"),
    ],
)
def test_training_does_not_begin_on_data_that_cannot_be_trained_on(
    whole, train, change, opts, message
):
    change(whole)
    with pytest.raises(UserError, match=message) as raised:
        train(*opts)
    assert "\n" not in str(raised.value)


def test_a_test_set_may_come_without_annotations(whole):
    del whole.content["annotations"]
    whole.write()
    assert check_coco(whole.json_file, whole.images, needs=Needs(training=False))
    with pytest.raises(UserError, match="no list 'annotations'"):
        check_coco(whole.json_file, whole.images)


def test_the_tool_tells_all_of_it(whole, tmp_path, capsys):
    check_main([whole.json_file, whole.images])
    assert "0 refused, 0 warnings" in capsys.readouterr().out
    for record in whole.content["annotations"][:4]:
        record["bbox"] = [1, 2, -3, 4]
    annotation(whole, image_id=77)
    cut(whole, "JPEG")
    whole.write()
    with pytest.raises(SystemExit) as ended:
        report = tmp_path / "report.json"
        check_main([whole.json_file, whole.images, "--examples", "2", "--json", str(report)])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "refused: box_negative (4)" in out
    assert "annotation 2: bbox is [1, 2, -3, 4], whose" in out
    assert "annotation 3: bbox" not in out and "and 2 more" in out
    assert "annotation 1: no image has id 77" in out
    assert f"images[0] (id 5) '{Path(whole.images, '5.png')}': cannot be read" in out
    content = json.loads(report.read_text())
    assert content["refused"] == 6 and content["warnings"] == 0
    assert sum(problem["kind"] == "box_negative" for problem in content["problems"]) == 4


def test_headers_alone_tell_sizes_but_not_that_a_file_is_cut_off(whole, capsys):
    cut(whole, "JPEG")
    whole.write()
    check_main([whole.json_file, whole.images, "--images", "headers"])
    assert "cut-off files are not found" in capsys.readouterr().out
    save(whole, np.zeros((9, 9, 3), np.uint8))
    assert found(whole, look="headers") == {"image_other_size": 1}
    assert found(whole, look="none") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{json}"], "give its image folder too"),
        (["{json}", "nowhere"], "no folder 'nowhere'"),
        (["nowhere.json", "{images}"], "cannot read nowhere.json"),
        (["mini_trian"], "did you mean mini_train"),
    ],
)
def test_what_the_tool_cannot_find_is_named(whole, arguments, message):
    given_arguments = [a.format(json=whole.json_file, images=whole.images) for a in arguments]
    with pytest.raises(UserError, match=message):
        check_main(given_arguments)
