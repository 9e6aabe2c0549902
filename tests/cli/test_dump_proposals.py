"""Dumped proposals: those of the model, as Detectron2 reads them, made once."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import get_detection_dataset_dicts
from PIL import Image

from fpn_plugin import UserError
from fpn_plugin.cli.dump_proposals import dump_proposals_main
from fpn_plugin.cli.train import train_main
from fpn_plugin.data import read_image_or_say
from fpn_plugin.data.dataset_records import dataset_records
from fpn_plugin.data.proposal_files import with_proposals
from fpn_plugin.engine import FPNTrainer, load_config, proposal_dump
from tests.helpers.datasets import forgotten

TINY = [
    "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "MODEL.FPN.OUT_CHANNELS", "16", "DATALOADER.NUM_WORKERS", "0", "MODEL.RPN.POST_NMS_TOPK_TEST",
    "30", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "1",
]  # fmt: skip
RPN = "mini/table1_c_FPN.yaml"


@pytest.fixture
def own(tmp_path):
    """Five images, 40 x 32 px so that proposals must be scaled back, one without a label."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    for i in range(5):
        pixels = rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        record = {"id": 10 + i, "file_name": f"{i}.png", "width": 40, "height": 32}
        content["images"].append(record)
        if i:
            label = {"id": i, "image_id": 10 + i, "category_id": 1, "bbox": [2, 3, 20, 18]}
            content["annotations"].append({**label, "area": 360, "iscrowd": 0})
    (tmp_path / "own.json").write_text(json.dumps(content))
    with forgotten():
        yield f"proposed={tmp_path / 'own.json'}:{tmp_path / 'images'}"


@pytest.fixture
def weights(tmp_path) -> Path:
    cfg = load_config(RPN, TINY)
    torch.manual_seed(0)
    file = tmp_path / "rpn.pth"
    torch.save({"model": FPNTrainer.build_model(cfg).state_dict()}, file)
    return file


def args(own: str, weights: Path, output: Path, *more: str) -> list[str]:
    return [
        "--config-file", RPN, "--dataset", own, "--splits", "proposed", "--output", str(output),
        *TINY, "MODEL.WEIGHTS", str(weights), *more,
    ]  # fmt: skip


def fast_args(train: str, test: str, output: Path) -> list[str]:
    """Arguments that train Fast R-CNN on the proposals of two files."""
    return [
        "--config-file", "mini/table2_c_FPN.yaml", *TINY, "DATASETS.TRAIN", "('proposed',)",
        "DATASETS.TEST", "('proposed',)", "DATASETS.PROPOSAL_FILES_TRAIN", train,
        "DATASETS.PROPOSAL_FILES_TEST", test, "OUTPUT_DIR", str(output),
    ]  # fmt: skip


def test_the_file_holds_the_models_proposals_in_pixels_of_the_image(own, weights, tmp_path):
    dump_proposals_main(args(own, weights, tmp_path / "p"))
    saved = pickle.loads((tmp_path / "p" / "proposed.pkl").read_bytes())
    assert saved["ids"] == [10, 11, 12, 13, 14]
    model = FPNTrainer.build_model(load_config(RPN, TINY)).eval()
    model.load_state_dict(torch.load(weights)["model"])
    for i, (boxes, logits) in enumerate(
        zip(saved["boxes"], saved["objectness_logits"], strict=True)
    ):
        image = read_image_or_say(tmp_path / "images" / f"{i}.png")
        resized = np.asarray(Image.fromarray(image).resize((80, 64), Image.BILINEAR))
        inputs = {"image": torch.tensor(resized.transpose(2, 0, 1)), "height": 32, "width": 40}
        with torch.no_grad():
            expected = model([inputs])[0]["proposals"]
        assert 0 < len(boxes) <= 30
        np.testing.assert_allclose(boxes, expected.proposal_boxes.tensor.numpy(), atol=1e-4)
        np.testing.assert_allclose(logits, expected.objectness_logits.numpy(), atol=1e-5)
        assert boxes[:, 2].max() <= 40 and boxes[:, 3].max() <= 32


def test_detectron2_reads_the_file_and_fast_rcnn_trains_on_it(own, weights, tmp_path):
    dump_proposals_main(args(own, weights, tmp_path / "p"))
    file = str(tmp_path / "p" / "proposed.pkl")
    stock, ours = (
        read(["proposed"], filter_empty=False, proposal_files=[file])
        for read in (get_detection_dataset_dicts, dataset_records)
    )
    saved = pickle.loads(Path(file).read_bytes())
    for one, other, boxes in zip(stock, ours, saved["boxes"], strict=True):
        np.testing.assert_array_equal(np.sort(one["proposal_boxes"], 0), np.sort(boxes, 0))
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(other[key], value)
    given = fast_args(f"('{file}',)", f"('{file}',)", tmp_path / "fast")
    train_main([*given, "SOLVER.MAX_ITER", "2", "MODEL.WEIGHTS", ""])
    assert "AP50" in json.loads((tmp_path / "fast" / "results.json").read_text())["bbox"]


def test_a_dump_that_was_cut_off_goes_on(own, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(proposal_dump, "_IMAGES_PER_PART", 2)
    whole, made = proposal_dump._write_part, []

    def cut_off(cfg, model, records, part):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append([record["image_id"] for record in records])
        whole(cfg, model, records, part)

    monkeypatch.setattr(proposal_dump, "_write_part", cut_off)
    with pytest.raises(KeyboardInterrupt):
        dump_proposals_main(args(own, weights, tmp_path / "p"))
    assert not (tmp_path / "p" / "proposed.pkl").exists()
    made.clear()
    dump_proposals_main(args(own, weights, tmp_path / "p"))
    assert made == [[14]]  # the two parts before were there
    monkeypatch.undo()
    dump_proposals_main(args(own, weights, tmp_path / "at_once"))
    cut, at_once = ((tmp_path / name / "proposed.pkl").read_bytes() for name in ("p", "at_once"))
    assert cut == at_once
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [
        "proposed.made_by",
        "proposed.pkl",
    ]


def test_parts_of_other_weights_are_refused(own, weights, tmp_path):
    parts = tmp_path / "p" / "proposed.parts"
    parts.mkdir(parents=True)
    (parts / "made_by").write_text("something else")
    with pytest.raises(UserError, match=r"proposed\.parts holds proposals of other weights"):
        dump_proposals_main(args(own, weights, tmp_path / "p"))


def test_proposals_of_other_weights_are_not_taken_for_these(own, weights, tmp_path, capfd):
    dump_proposals_main(args(own, weights, tmp_path / "p"))
    dump_proposals_main(args(own, weights, tmp_path / "p"))
    assert "proposed.pkl exists already" in capfd.readouterr().out
    state = torch.load(weights)
    torch.save(state, weights)  # trained again
    with pytest.raises(UserError, match=r"proposed\.pkl holds proposals of other weights"):
        dump_proposals_main(args(own, weights, tmp_path / "p"))


def test_a_detector_is_told_how_to_give_proposals(own, weights, tmp_path):
    with pytest.raises(UserError, match="MODEL.META_ARCHITECTURE ProposalNetwork"):
        dump_proposals_main(
            args(own, weights, tmp_path / "p", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
        )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("()", r"PROPOSAL_FILES_TRAIN must name a file for each .*proposed.*; it has 0"),
        (
            "('no/proposed.pkl',)",
            r"'no/proposed.pkl', which is not there.*dump-proposals .*--splits proposed",
        ),
    ],
)
def test_a_missing_proposal_file_names_the_command_that_makes_it(own, tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        train_main(["--dataset", own, *fast_args(files, files, tmp_path)])


def of_image(boxes, logits) -> dict[str, object]:
    """A file's content, in which image 11's proposals are these."""
    good = np.array([[1, 2, 9, 8]], np.float32), np.zeros(1, np.float32)
    return {
        "ids": [10, 11],
        "boxes": [good[0], boxes],
        "objectness_logits": [good[1], logits],
        "bbox_mode": 0,
    }


BOX, LOGIT = np.array([[3, 4, 9, 8]], np.float32), np.full(1, 0.5, np.float32)
GOOD = of_image(BOX, LOGIT)
WRONG_PROPOSALS = {
    "number": (3, "it holds a value of type int, expected a dict"),
    "list": ([1], "it holds a value of type list, expected a dict"),
    "empty": ({}, "it has no list 'ids'"),
    "boxes_none": ({**GOOD, "boxes": None}, "it has no list 'boxes'"),
    "boxes_fewer": ({**GOOD, "boxes": [BOX]}, "it has 2 ids, 1 boxes, 2 objectness_logits"),
    "mode": ({**GOOD, "bbox_mode": 99}, r"bbox_mode is '99', expected one of 0 \(XYXY_ABS\), 1"),
    "mode_relative": ({**GOOD, "bbox_mode": 2}, "bbox_mode is '2'"),
    "mode_array": ({**GOOD, "bbox_mode": np.zeros(2)}, "bbox_mode is '"),
    "id_of_what": ({**GOOD, "ids": [10, None]}, "an image id of type NoneType"),
    "id_twice": ({**GOOD, "ids": [10, "10"]}, "image '10' is in it twice"),
    "boxes_narrow": (of_image(BOX[:, :3], LOGIT), r"image '11' has boxes of shape \(1, 3\)"),
    "boxes_flat": (of_image(BOX[0], LOGIT), r"image '11' has boxes of shape \(4,\)"),
    "boxes_nan": (of_image(BOX * np.nan, LOGIT), "image '11' has boxes that are not finite"),
    "boxes_large": (of_image(BOX.astype("f8") * 1e200, LOGIT), "'11' has boxes that are not fin"),
    "boxes_text": (of_image(BOX.astype("U"), LOGIT), "image '11' has boxes of dtype <U"),
    "boxes_list": (of_image(BOX.tolist(), LOGIT), "image '11' has boxes of type list, expected an"),
    "logits_list": (of_image(BOX, [0.5]), "image '11' has logits of type list, expected an array"),
    "logits_more": (of_image(BOX, np.zeros(5)), r"logits of shape \(5,\) for 1 boxes"),
    "logits_nan": (of_image(BOX, LOGIT * np.nan), "image '11' has logits that are not finite"),
    "logits_objects": (of_image(BOX, np.array([None])), "image '11' has logits of dtype object"),
}  # fmt: skip


def records_with(content: object, path: Path) -> list[dict[str, object]]:
    path.write_bytes(pickle.dumps(content))
    records = [{"image_id": 10}, {"image_id": 11}]
    return with_proposals(records, str(path))


@pytest.mark.parametrize(("content", "told"), WRONG_PROPOSALS.values(), ids=WRONG_PROPOSALS)
def test_files_that_are_no_proposals_are_refused_by_image(tmp_path, content, told):
    with pytest.raises(UserError, match=rf"p.pkl' is no file of proposals: .*{told}") as raised:
        records_with(content, tmp_path / "p.pkl")
    assert "fpn-plugin dump-proposals makes such files" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_of_another_datasets_proposals_names_the_image_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"p.pkl' has no proposals of image '11'.*dump-proposals"):
        records_with({**GOOD, "ids": [10, 12]}, tmp_path / "p.pkl")


def test_proposals_in_detectron_1s_names_and_in_arrays_are_read(tmp_path):
    content = {
        "indexes": np.array([10, 11]),
        "boxes": np.stack([BOX * 2, BOX]),
        "scores": np.array([LOGIT, np.zeros(1)], np.float64),
    }
    _, read = records_with(content, tmp_path / "p.pkl")
    np.testing.assert_array_equal(read["proposal_boxes"], BOX)
    assert read["proposal_objectness_logits"].tolist() == [0]
    _, read = records_with(of_image(np.zeros((0, 4)), np.zeros(0)), tmp_path / "p.pkl")
    assert read["proposal_boxes"].shape == (0, 4)


def test_wrong_proposals_of_the_test_set_are_refused_before_training(own, tmp_path):
    paths = []
    for name, content in (("train", GOOD), ("test", of_image(BOX * np.nan, LOGIT))):
        paths.append(tmp_path / f"{name}.pkl")
        paths[-1].write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"test.pkl' is no file of proposals: image '11'"):
        train_main(["--dataset", own, *fast_args(*(f"('{path}',)" for path in paths), tmp_path)])
