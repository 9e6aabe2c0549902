"""Images of one and of four channels (INPUT.FORMAT L, RGBA) in every tool, by values."""

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from matplotlib.figure import Figure
from PIL import Image

from evidence.tiny import make_squares, tiny_options
from fpn_plugin import UserError, model_zoo, optimize_for_inference
from fpn_plugin.cli.check import check_main
from fpn_plugin.cli.convert import convert_main
from fpn_plugin.cli.detect import detect_main
from fpn_plugin.cli.dump_proposals import dump_proposals_main
from fpn_plugin.cli.export import export_main
from fpn_plugin.cli.inspect import inspect_main
from fpn_plugin.cli.optimize import optimize_main
from fpn_plugin.cli.report import report_main
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.cli.visualize import visualize_main
from fpn_plugin.data import channels_first, read_picture, resized_picture, rgb_of
from fpn_plugin.engine import load_config
from fpn_plugin.engine.inference import Detector
from fpn_plugin.inspection.forward_trace import forward_trace

COLOURS = [
    "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]", "MODEL.PIXEL_STD",
    "[1.0, 1.0, 1.0]",
]  # fmt: skip
MEANS = {"L": [60.0], "RGBA": [30.0, 30.0, 30.0, 200.0]}


def made(folder: Path, image_format: str, name: str = "squares") -> str:
    """Squares that only a reader of this format sees: gray levels, or the alpha of noise."""
    dataset = make_squares(folder, 6)
    for path in (folder / "images").iterdir():
        gray = Image.open(path).convert("L")
        if image_format == "RGBA":
            alpha = gray.point(lambda level: 255 - level)
            noise = np.random.default_rng(1).integers(0, 60, (*gray.size[::-1], 3), dtype=np.uint8)
            gray = Image.fromarray(noise)
            gray.putalpha(alpha)
        gray.save(path)
    return dataset.replace("squares=", f"{name}_{image_format}=")


@pytest.fixture(scope="module", params=MEANS)
def run(request, tmp_path_factory) -> SimpleNamespace:
    """A model trained on such images and evaluated on them."""
    image_format, means = request.param, MEANS[request.param]
    folder = tmp_path_factory.mktemp(image_format)
    dataset = made(folder / "data", image_format)
    name = f"('squares_{image_format}',)"
    train_main([
        *tiny_options(dataset, folder / "run", workers=0), "INPUT.FORMAT", image_format,
        "MODEL.PIXEL_MEAN", str(means), "MODEL.PIXEL_STD", str([57.0] * len(means)),
        "DATASETS.TRAIN", name, "DATASETS.TEST", name, "SOLVER.MAX_ITER", "6",
        "SOLVER.BASE_LR", "0.02",
    ])  # fmt: skip
    config = folder / "run" / "config.yaml"
    weights = ["MODEL.WEIGHTS", str(folder / "run" / "model_final.pth")]
    return SimpleNamespace(
        format=image_format, channels=len(means), folder=folder / "run", dataset=dataset,
        images=folder / "data" / "images", config=["--config-file", str(config)], weights=weights,
        registered=["--dataset", dataset], cfg=load_config(str(config), weights),
    )  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Pictures are made up, but not drawn, which takes seconds."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b"drawn"))


def evaluated(folder: Path) -> dict[int, list[tuple]]:
    """Boxes and scores of each image, best first."""
    found: dict[int, list[tuple]] = {}
    for each in json.loads((folder / "inference" / "coco_instances_results.json").read_text()):
        found.setdefault(each["image_id"], []).append((each["score"], *each["bbox"]))
    return found


def test_the_demo_finds_what_the_evaluation_found(run, tmp_path):
    given = [*run.config, *run.registered]
    train_main([*given, "--eval-only", *run.weights, "OUTPUT_DIR", str(tmp_path / "again")])
    expected = evaluated(run.folder)
    assert evaluated(tmp_path / "again") == expected
    for name, opts in (("plain", []), ("fast", ["--optimize", "float32"])):
        output = ["--output", str(tmp_path / name)]
        detect_main([*given, "--input", str(run.images), *output, *opts, *run.weights])
        records = json.loads((tmp_path / name / "detections.json").read_text())
        assert len(records) == len(expected) == 6
        for number, record in enumerate(records):
            ours = [(each["score"], *each["bbox"]) for each in record["detections"]]
            np.testing.assert_allclose(ours, expected[number], atol=0.006 if opts == [] else 0.02)
            assert (tmp_path / name / record["picture"]).is_file()


def test_the_network_sees_every_channel(run):
    path = min(run.images.iterdir())
    picture = read_picture(run.cfg, path)
    assert np.array_equal(picture.squeeze(), np.asarray(Image.open(path)))
    assert tuple(channels_first(run.cfg, picture).shape) == (run.channels, *picture.shape[:2])
    shown = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(rgb_of(run.cfg, picture), shown)
    detector = Detector(run.cfg)
    without = picture.copy()
    without[:, :, -1] = 255  # gray levels, or alpha
    assert detector(picture).scores.tolist() != detector(without).scores.tolist()
    with pytest.raises(UserError, match=rf"must be \(H, W, {run.channels}\), {run.format}"):
        detector(picture[:, :, 0])


def test_optimize(run, capsys):
    given = [*run.config, *run.registered, "--input", str(run.images), "--dtypes", "float32"]
    optimize_main([*given, "--max-images", "2", *run.weights])
    [row] = re.findall(r"^\| float32 .*", capsys.readouterr().out, re.M)
    *_, same, missing, extra, box, score = (cell.strip() for cell in row.split("|")[1:-1])
    assert int(same) > 0
    assert (missing, extra) == ("0", "0")
    assert float(box) < 0.02 and float(score) < 1e-4
    model = Detector(run.cfg).model
    example = torch.zeros(run.channels, 64, 80)
    assert "on 80 x 64 px" in str(optimize_for_inference(model, example=example).optimization_steps)
    told = rf"example is \(3, 64, 80\).*a tensor \({run.channels}, H, W\)"
    with pytest.raises(UserError, match=told):
        optimize_for_inference(model, example=torch.zeros(3, 64, 80))


def exported(run, tmp_path, *formats: str) -> dict:
    images = [str(path) for path in sorted(run.images.iterdir())[:2]]
    given = [*run.config, *run.registered, "--formats", *formats, "--input", *images]
    size = ["INPUT.MIN_SIZE_TEST", "160"]  # torch.export wants more than the coarsest stride
    export_main([*given, "--output", str(tmp_path), *run.weights, *size])  # compares detections
    return json.loads((tmp_path / "model.json").read_text())


def test_export(run, tmp_path):
    described = exported(run, tmp_path, "torchscript")
    assert described["channel_order"] == run.format
    assert described["input"]["images"].startswith(f"float32 (N, {run.channels}, H, W), ")


@pytest.mark.long
def test_export_in_other_formats(run, tmp_path):
    exported(run, tmp_path, "torch_export", "onnx")


def test_visualize_and_report(run, tmp_path, undrawn):
    given = [*run.registered, "--ground-truth", f"squares_{run.format}", "--max-images", "1"]
    visualize_main([*run.config, *given, "--output", str(tmp_path / "seen"), *run.weights])
    assert (tmp_path / "seen" / "0000" / "features.png").is_file()
    picture = read_picture(run.cfg, min(run.images.iterdir()))
    detector = Detector(run.cfg)
    seen = forward_trace(detector.model, run.cfg, picture)
    assert torch.equal(seen.detections.scores, detector(picture).scores)
    assert np.array_equal(seen.image, rgb_of(run.cfg, resized_picture(run.cfg, picture)[0]))
    report_main([str(run.folder), *run.registered, "--output", str(tmp_path / "report.html")])
    assert "of 6 objects missed" in (tmp_path / "report.html").read_text()


def test_inspect_model(run, tmp_path, capsys, undrawn):
    parameters = []
    for opts in ([], COLOURS):
        inspect_main([*run.config, "--output", str(tmp_path / "model.png"), *opts])
        [row] = re.findall(r"^\| bottom-up.*$", capsys.readouterr().out, re.M)
        parameters.append(int(row.split("|")[2].replace(",", "")))
    # ResNet's first convolution: 64 of 7 x 7 for each channel.
    assert parameters[1] - parameters[0] == 64 * 49 * (3 - run.channels)


def test_dump_proposals(run, tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "ProposalNetwork", *run.weights]
    name = f"squares_{run.format}"
    given = [*run.config, *run.registered, "--splits", name, "--output", str(tmp_path)]
    dump_proposals_main([*given, *opts])
    dumped = pickle.loads((tmp_path / f"{name}.pkl").read_bytes())
    cfg = run.cfg.clone()
    cfg.merge_from_list(opts)
    detector = Detector(cfg)
    for number, path in enumerate(sorted(run.images.iterdir())):
        picture = read_picture(cfg, path)
        height, width = picture.shape[:2]
        image = channels_first(cfg, resized_picture(cfg, picture)[0])
        with torch.no_grad():
            [output] = detector.model([{"image": image, "height": height, "width": width}])
        boxes = output["proposals"].proposal_boxes.tensor
        assert np.array_equal(boxes.numpy(), dumped["boxes"][number])


NARROW = [
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8",
]  # fmt: skip
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize("image_format", MEANS)
def test_weights_are_converted_or_refused_by_the_key(image_format, tmp_path):
    means = MEANS[image_format]
    channels = [
        "INPUT.FORMAT", image_format, "MODEL.PIXEL_MEAN", str(means), "MODEL.PIXEL_STD", str(means),
    ]  # fmt: skip
    model = build_model(load_config(FASTER, [*NARROW, *channels]))
    state = model.state_dict()
    torch.save({"model": state}, tmp_path / "ours.pth")

    def convert(way: str, library: str, weights: str, to: str, *opts: str) -> None:
        files = ["--weights", str(tmp_path / weights), "--output", str(tmp_path / to)]
        convert_main([way, library, *files, "--config-file", FASTER, *NARROW, *opts])

    # Its configs state how many channels there are, and may read gray levels.
    convert("--to", "mmdet", "ours.pth", "mmdet.pth", *channels)
    theirs = torch.load(tmp_path / "mmdet.pth")
    assert torch.equal(
        theirs["backbone.conv1.weight"], state["backbone.bottom_up.stem.conv1.weight"]
    )
    convert("--from", "mmdet", "mmdet.pth", "back.pth", *channels)
    back = torch.load(tmp_path / "back.pth")["model"]
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    with pytest.raises(UserError, match=f"INPUT.FORMAT.*{image_format}"):
        convert("--to", "torchvision", "ours.pth", "theirs.pth", *channels)
    with pytest.raises(UserError, match=r"image channels \(MODEL.PIXEL_MEAN\)"):
        convert("--from", "mmdet", "mmdet.pth", "colours.pth")


@pytest.mark.parametrize("image_format", MEANS)
def test_a_lazy_model_is_trained_and_evaluated(image_format, tmp_path):
    dataset, means = made(tmp_path / "data", image_format, "lazy"), MEANS[image_format]
    name = f"lazy_{image_format}"
    sets = [f"dataloader.{split}.dataset.names={name}" for split in ("train", "test")]
    formats = [f"dataloader.{s}.mapper.image_format={image_format}" for s in ("train", "test")]
    given = [
        "--config-file", "lazy/mini/faster_rcnn_R_18_FPN.py", "--dataset", dataset, *sets, *formats,
        "model.roi_heads.num_classes=1", "model.backbone.out_channels=16", "train.max_iter=1",
        "dataloader.train.num_workers=0", "dataloader.train.total_batch_size=2",
        f"train.output_dir={tmp_path / 'run'}",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=[64,64]",
    ]  # fmt: skip
    pixels = [f"model.pixel_mean={means}", f"model.pixel_std={means}".replace("[0", "[1")]
    lazy_main([*given, *pixels])
    weights = torch.load(tmp_path / "run" / "model_final.pth")["model"]
    assert weights["backbone.bottom_up.stem.conv1.weight"].shape[1] == len(means)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["bbox"]["AP"] >= 0
    if image_format == "RGBA":
        told = "mapper.image_format RGBA has 4 channels, model.pixel_mean and model.pixel_std 3"
        with pytest.raises(UserError, match=told):
            lazy_main(given)


def checked(dataset: str, capsys, *opts: str) -> str:
    check_main([*dataset.partition("=")[2].rsplit(":", 1), *opts])
    return capsys.readouterr().out


def test_check_dataset_says_what_a_format_loses(tmp_path, capsys):
    gray, alpha = (made(tmp_path / image_format, image_format) for image_format in MEANS)
    colours = make_squares(tmp_path / "colours", 6)
    for dataset, image_format, told in (
        (gray, "BGR", ""), (gray, "L", ""), (gray, "RGBA", ""),
        (alpha, "RGBA", ""), (alpha, "BGR", "is RGBA, read as BGR without its alpha"),
        (alpha, "L", "is RGBA, read as L without its alpha"), (colours, "RGBA", ""),
        (colours, "L", "is RGB, read as L: colours become gray"),
    ):  # fmt: skip
        said = checked(dataset, capsys, "--format", image_format)
        assert "0 refused, " + ("6" if told else "0") + " warnings" in said
        assert said.count(told or "warnings") == (3 if told else 1)
    assert checked(alpha, capsys) == checked(alpha, capsys, "--format", "BGR")


@pytest.mark.parametrize(
    ("opts", "told"),
    [
        (["INPUT.FORMAT", "GRAY"], "INPUT.FORMAT is 'GRAY': .*RGB"),
        (["INPUT.FORMAT", "RGBA"], "RGBA has 4 channels, .*PIXEL_STD 3: give them 4 values each"),
        (["MODEL.PIXEL_MEAN", "[1.0]"], "PIXEL_MEAN has 1 values and MODEL.PIXEL_STD 3"),
        (["MODEL.PIXEL_MEAN", "[1.0]", "MODEL.PIXEL_STD", "[1.0]"], "BGR has 3 channels, .* 1:"),
        (
            ["INPUT.FORMAT", "L", "MODEL.FPN.BOTTOM_UP", "build_timm_backbone",
             "MODEL.TIMM.PRETRAINED", "False", "MODEL.TIMM.NAME", "resnet18"],
            "INPUT.FORMAT is 'L'; timm's and torchvision's networks take colours",
        ),
    ],
)  # fmt: skip
def test_channels_that_do_not_fit_are_named(opts, told):
    for tool in (inspect_main, detect_main):
        given = ["--input", __file__] if tool is detect_main else []
        output = "nowhere" if tool is detect_main else "nowhere.png"
        with pytest.raises(UserError, match=told) as raised:
            tool(["--config-file", FASTER, *given, "--output", output, *NARROW, *opts])
        assert "\n" not in str(raised.value)


def test_gray_levels_may_be_given_to_each_channel_of_a_network_of_colours(tmp_path):
    """As in Detectron2's training: one channel less three means are three channels."""
    cfg = load_config(FASTER, [*NARROW, "INPUT.FORMAT", "L", "INPUT.MIN_SIZE_TEST", "64"])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    gray = np.random.default_rng(0).integers(0, 256, (64, 96, 1), dtype=np.uint8)
    of_colours = cfg.clone()
    of_colours.INPUT.FORMAT = "RGB"
    expected = Detector(of_colours)(gray.repeat(3, axis=2))
    assert len(expected) > 0
    assert torch.equal(Detector(cfg)(gray).scores, expected.scores)


@pytest.mark.parametrize("name", ["build_regnetx_4gf_backbone", "build_swin_t_backbone"])
def test_detectron2s_other_networks_take_any_number_of_channels(name):
    stages = {"r": ["s1", "s2", "s3", "s4"], "s": ["p0", "p1", "p2", "p3"]}[name[6]]
    cfg = model_zoo.get_config(FASTER)
    cfg.MODEL.FPN.BOTTOM_UP, cfg.MODEL.FPN.IN_FEATURES = name, stages
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [1.0]
    cfg.merge_from_list(NARROW)
    network = build_model(cfg).backbone.bottom_up
    assert next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d)).in_channels == 1
