"""Detections say the level they were pooled from, and pictures show it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import torch
import torchvision
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from matplotlib.colors import to_rgb
from PIL import Image

from fpn_plugin import Detector, UserError, assign_levels, model_zoo
from fpn_plugin.cli.detect import detect_main
from fpn_plugin.engine import StrictCheckpointer
from fpn_plugin.engine.settings import load_config
from fpn_plugin.inspection.forward_trace import recorded_levels
from fpn_plugin.visualization import DrawnBox, draw_detections, level_color, plot_losses
from tests.helpers.datasets import forgotten
from tests.helpers.detectors import scene_image


def small_config(*opts):
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.mark.parametrize("s0", [112, 56])
def test_the_level_recorded_is_that_of_the_proposal(s0):
    model = build_model(small_config("MODEL.FPN.CANONICAL_BOX_SIZE", s0)).eval()
    # Without regression a detection's box is its proposal's.
    torch.nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    image = {"image": torch.randint(0, 256, (3, 256, 256)), "height": 512, "width": 512}
    with torch.no_grad(), recorded_levels(model):
        (found,) = model.inference([image], do_postprocess=False)
        (scaled,) = model([image])
    levels = assign_levels(found.pred_boxes.tensor, 2, 5, s0)
    assert len(levels.unique()) > 1
    assert torch.equal(found.pyramid_level, levels)
    # Boxes scaled to the original image keep the level they were pooled from at the network's.
    assert torch.equal(scaled["instances"].pyramid_level.sort()[0], levels.sort()[0])
    with torch.no_grad():
        assert not model([image])[0]["instances"].has("pyramid_level")


@pytest.mark.parametrize("arch", ["GeneralizedRCNN", "ProposalNetwork"])
def test_detector(arch, tmp_path):
    cfg = small_config("MODEL.META_ARCHITECTURE", arch, "OUTPUT_DIR", str(tmp_path))
    StrictCheckpointer(build_model(cfg), str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    image = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    if arch == "ProposalNetwork":
        with pytest.raises(UserError, match="gives proposals"):
            Detector(cfg)(image)
        return
    found = Detector(cfg)(image)
    assert found.image_size == (120, 200)
    assert len(found) > 0
    assert set(found.pyramid_level.tolist()) <= {2, 3, 4, 5}


def test_a_trained_detector_needs_no_file_of_its_networks_first_weights(tmp_path):
    first = tmp_path / "first.pth"
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), first)
    cfg = small_config(
        "MODEL.FPN.BOTTOM_UP", "build_torchvision_backbone", "MODEL.TORCHVISION.NAME",
        "mobilenet_v3_small", "MODEL.TORCHVISION.WEIGHTS", str(first),
    )  # fmt: skip
    model = build_model(cfg)
    StrictCheckpointer(model, str(tmp_path)).save("weights")
    first.unlink()
    with pytest.raises(UserError, match=r"no file .*first.pth'; MODEL.TORCHVISION.WEIGHTS '' "):
        build_model(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    for key, value in Detector(cfg).model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_detector_without_weights_is_an_error():
    with pytest.raises(UserError, match="MODEL.WEIGHTS"):
        Detector(small_config())


@pytest.fixture
def run(detector, config_of, tmp_path) -> Callable[..., Path]:
    """Makes the folder that a training of a kind of detector leaves, with a photo.png."""

    def run(kind: str) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        StrictCheckpointer(detector(kind), str(folder)).save("model_final")
        cfg = config_of(kind)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("own_train",), ("own_val",)
        (folder / "config.yaml").write_text(cfg.dump())
        bgr = scene_image(1, 256)[:, :200].permute(1, 2, 0).numpy()
        Image.fromarray(bgr[:, :, ::-1].copy()).save(folder / "photo.png")
        return folder

    with forgotten():
        yield run


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint", "cascade"])
def test_a_runs_detections_are_those_of_default_predictor(kind, run):
    folder = run(kind)
    cfg = load_config(str(folder / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    bgr = np.asarray(Image.open(folder / "photo.png"))[:, :, ::-1]
    expected = DefaultPredictor(cfg)(bgr)["instances"]
    coco = expected.pred_boxes.tensor.numpy().copy()
    coco[:, 2:] -= coco[:, :2]
    assert len(expected) >= 5

    detect = Detector(folder)
    for image in (folder / "photo.png", Image.open(folder / "photo.png"), bgr):
        found = detect(image)
        assert len(found) == len(expected)
        assert np.array_equal(found.boxes, expected.pred_boxes.tensor.numpy())
        assert np.array_equal(found.scores, expected.scores.numpy())
        assert np.array_equal(found.classes, expected.pred_classes.numpy())
        assert found.class_names.tolist() == [f"class {i}" for i in expected.pred_classes]
        assert np.array_equal(found.image, bgr[:, :, ::-1])
    if kind == "cascade":
        assert found.levels is None
    else:
        assert np.array_equal(found.levels, Detector(cfg)(bgr).pyramid_level.numpy())
    results = found.to_coco(image_id=7)
    assert {result["image_id"] for result in results} == {7}
    assert [result["category_id"] for result in results] == expected.pred_classes.tolist()
    assert np.array_equal(np.float32([result["bbox"] for result in results]), coco)
    assert np.array_equal(np.float32([result["score"] for result in results]), found.scores)
    assert (found.masks is None) == (kind != "mask")
    assert (found.keypoints is None) == (kind != "keypoint")
    if kind == "mask":
        masks = pycocotools.mask.decode([result["segmentation"] for result in results])
        assert np.array_equal(found.masks, expected.pred_masks.numpy())
        assert np.array_equal(masks.transpose(2, 0, 1) > 0, expected.pred_masks.numpy())
    if kind == "keypoint":
        points = np.float32([result["keypoints"] for result in results]).reshape(len(found), -1, 3)
        assert np.array_equal(found.keypoints, expected.pred_keypoints.numpy())
        assert np.array_equal(points, found.keypoints - np.float32([0.5, 0.5, 0]))
    json.dumps(results)


def test_a_pillow_image_is_read_as_its_file_is(run):
    folder = run("faster")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(folder / "photo.png").save(folder / "turned.png", exif=turned)
    Image.open(folder / "photo.png").convert("L").save(folder / "gray.png")
    detect = Detector(str(folder))
    for name in ("turned.png", "gray.png"):
        found, expected = detect(Image.open(folder / name)), detect(str(folder / name))
        assert np.array_equal(found.image, expected.image)
        assert np.array_equal(found.boxes, expected.boxes)
    assert detect(folder / "turned.png").image.shape == (256, 200, 3)


def write_datasets(folder: Path, ids: dict[str, int], classes: list[str]) -> None:
    """Writes datasets.json as a training does, and the JSON that it names."""
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    (folder / "own.json").write_text(json.dumps({"images": [], "categories": categories}))
    known = {"json": str(folder / "own.json"), "images": str(folder)}
    content = {
        name: {**known, "classes": of_name, "colors": ["#112233"] * len(of_name)}
        for name, of_name in (("other", ["other"]), ("own_train", classes))
    }
    (folder / "datasets.json").write_text(json.dumps(content))


def test_classes_have_the_names_and_ids_of_the_trainings_data(run, caplog):
    folder, names = run("faster"), [f"kind {i}" for i in range(14)]
    photo = folder / "photo.png"
    numbers = Detector(folder)(photo).classes
    assert len(set(numbers.tolist())) > 1

    def named() -> tuple[list[str], list[int]]:
        found = Detector(folder)(photo)
        return found.class_names.tolist(), [result["category_id"] for result in found.to_coco()]

    assert named() == ([f"class {i}" for i in numbers], numbers.tolist())
    assert "ids of categories are unknown" in caplog.text
    caplog.clear()
    ids = {name: 100 - 3 * i for i, name in enumerate(names)}
    registered = MetadataCatalog.get("own_train")
    registered.thing_classes = names
    registered.thing_dataset_id_to_contiguous_id = {200 - i: i for i in range(14)}
    assert named() == ([names[i] for i in numbers], [200 - i for i in numbers])
    write_datasets(folder, ids, names)  # comes before what is registered
    assert named() == ([names[i] for i in numbers], [ids[names[i]] for i in numbers])
    # The weights know their model's order; the JSON may have another.
    content = torch.load(folder / "model_final.pth", weights_only=True)
    torch.save({**content, "classes": names[::-1]}, folder / "model_final.pth")
    assert named() == ([names[13 - i] for i in numbers], [ids[names[13 - i]] for i in numbers])
    assert "unknown" not in caplog.text


@pytest.mark.parametrize("best", [["model_best"], ["model_final"], ["model_0000003"]])
def test_the_best_weights_of_a_run_are_taken(run, detector, best):
    folder = run("faster")
    written = ["model_best", "model_final", "model_0000003"]
    written = written[written.index(*best) :]
    (folder / "model_final.pth").unlink()
    for number, name in enumerate(written):
        model = detector("faster")
        model.roi_heads.box_predictor.bbox_pred.bias.data[0] = number + 1
        StrictCheckpointer(model, str(folder)).save(name)
    assert Detector(folder).model.roi_heads.box_predictor.bbox_pred.bias[0] == 1


def test_jupyter_shows_the_sure_detections_in_the_colours_of_their_levels(run):
    folder = run("faster")
    found = Detector(folder)(folder / "photo.png")
    sure = found.scores >= 0.5
    assert 0 < sure.sum() < len(found)
    png = found._repr_png_()
    assert Image.open(io.BytesIO(png)).format == "PNG"
    found.draw(str(folder / "new" / "drawn.png"))
    assert Image.open(folder / "new" / "drawn.png") == Image.open(io.BytesIO(png))
    for level in range(2, 6):
        expected = level in found.levels[sure]
        assert has_color(io.BytesIO(png), level_color(level)) == expected, level
    counts = [f"{int((found.classes == i).sum())} class {i}" for i in set(found.classes.tolist())]
    assert sorted(repr(found)[len("Detections(") : -1].split(", ")) == sorted(counts)


def test_classes_have_the_colours_that_the_run_has_stored(run):
    folder, names = run("faster"), [f"kind {i}" for i in range(14)]
    write_datasets(folder, {name: i for i, name in enumerate(names)}, names)
    content = json.loads((folder / "datasets.json").read_text())
    colors = [f"#{40 + 15 * i:02X}{250 - 15 * i:02X}{90 + 40 * (i % 4):02X}" for i in range(14)]
    content["own_train"] |= {"classes": names[::-1], "colors": colors[::-1]}  # in another order
    (folder / "datasets.json").write_text(json.dumps(content))
    config = torch.load(folder / "model_final.pth", weights_only=True)
    torch.save({**config, "classes": names}, folder / "model_final.pth")
    found = Detector(folder)(folder / "photo.png")
    found.draw(folder / "drawn.png", color_by="class")
    with pytest.raises(UserError, match="color_by is 'klass', expected 'level' or 'class'"):
        found.draw(folder / "drawn.png", color_by="klass")
    sure = set(found.classes[found.scores >= 0.5].tolist())
    assert sure
    for index, color in enumerate(colors):
        assert has_color(folder / "drawn.png", color) == (index in sure), index
    args = ["--config-file", str(folder / "config.yaml"), "--input", str(folder / "photo.png")]
    args += ["--output", str(folder / "out"), "--color-by", "class"]
    detect_main([*args, "MODEL.WEIGHTS", str(folder / "model_final.pth")])
    assert Image.open(folder / "out" / "photo.png") == Image.open(folder / "drawn.png")


def test_what_is_no_run_or_no_image_is_named(run, tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere.*: give the OUTPUT_DIR"):
        Detector(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        Detector(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {_target_: some.Model}\n")
    with pytest.raises(UserError, match="is the run of a lazy config"):
        Detector(tmp_path)
    folder = run("faster")
    detect = Detector(folder)
    for image, message in (
        ("nowhere.jpg", r"no image 'nowhere\.jpg'"),
        ([[1, 2]], "the image is a list, expected a path"),
        (np.zeros((9, 9, 3)), "array of float64, expected uint8"),
        (np.zeros((9, 9), np.uint8), r"shape \(9, 9\).* must be \(H, W, 3\), BGR"),
        (Image.new("I;16", (9, 9)), r"more than 8 bits \(I;16\)"),
    ):
        with pytest.raises(UserError, match=message):
            detect(image)
    (folder / "datasets.json").write_text("{")
    with pytest.raises(UserError, match=r"datasets\.json "):
        Detector(folder)
    for name in ("model_final.pth", "last_checkpoint"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"no weights yet: none of model_best\.pth, model_final"):
        Detector(folder)


def has_color(path, color: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255
    return bool((np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.02).sum() > 50)


def test_boxes_are_drawn_in_the_colour_of_their_level(tmp_path):
    image = np.zeros((100, 120, 3), np.uint8)
    boxes = [DrawnBox((10, 10, 50, 60), "a", 2), DrawnBox((60, 20, 110, 90), "b", 4)]
    path = draw_detections(image, boxes, tmp_path / "new" / "picture.png")
    for level in range(2, 8):
        assert has_color(path, level_color(level)) == (level in (2, 4)), level
    truth = [DrawnBox((10, 10, 50, 60), "a")]
    beside = draw_detections(image, boxes, tmp_path / "beside.png", truth)
    assert Image.open(beside).size[0] > 1.8 * Image.open(path).size[0]
    assert has_color(beside, level_color(None))
    draw_detections(image, [], tmp_path / "nothing.png")


def test_a_label_is_seen_wherever_its_box_lies(tmp_path):
    image = np.zeros((100, 100, 3), np.uint8)

    def ink(top: int, text: str) -> int:
        box = [DrawnBox((20, top, 60, 90), text, 2)]
        pixels = np.asarray(Image.open(draw_detections(image, box, tmp_path / "x.png")))
        color = np.array(to_rgb(level_color(2))) * 255
        return int((np.abs(pixels[:, :, :3] - color).max(axis=2) < 30).sum())

    label = ink(40, "a long label") - ink(40, "")
    assert ink(0, "a long label") - ink(0, "") > 0.7 * label


def test_level_colors_differ():
    assert len({level_color(level) for level in (None, 2, 3, 4, 5, 6, 7)}) == 7


def test_losses_of_a_resumed_run_are_drawn_once(tmp_path, monkeypatch):
    drawn = {}

    def record(self, x, y, *args, **kwargs):
        if "label" in kwargs:
            drawn[kwargs["label"]] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)

    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", record)
    rows = [
        {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 1.5, "loss_cls": 0.8, "lr": 0.1},
        {"iteration": 39, "total_loss": 1.4, "loss_cls": 0.7, "lr": 0.1},
        {"iteration": 40, "bbox/AP": 12.0},
    ]
    before = [{"iteration": i, "total_loss": 9.0} for i in (19, 39, 59)]  # another run, here too
    metrics = tmp_path / "metrics.json"
    metrics.write_text("\n".join([*map(json.dumps, before), '{"iterat', *map(json.dumps, rows)]))
    assert Image.open(plot_losses(metrics, tmp_path / "losses.png")).size[0] > 500
    assert drawn == {"total_loss": ([19, 39], [2.0, 1.4]), "loss_cls": ([19, 39], [1.0, 0.7])}
