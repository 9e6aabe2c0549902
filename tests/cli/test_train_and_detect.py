"""Training, resuming, evaluating and detecting as a user calls them, and bad input."""

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from evidence.tiny import make_squares
from fpn_plugin.cli.detect import detect_main
from fpn_plugin.cli.train import train_main
from fpn_plugin.engine import run_tool
from fpn_plugin.mini import ensure_mini
from fpn_plugin.utils.metrics import loss_rows
from tests.helpers.datasets import forgotten

TOOLS = Path(__file__).parents[2] / "tools"
MINI = "mini/faster_rcnn_R_18_FPN.yaml"
# Small enough for a test: 64 px images, a quarter of the channels.
TINY = [
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.CHECKPOINT_PERIOD", "2", "MODEL.RPN.POST_NMS_TOPK_TEST", "20",
]  # fmt: skip


def run(
    tool: str, *args: str | Path, cwd: Path, launcher: tuple[str, ...] = ()
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a tool in a process of its own."""
    done = subprocess.run(
        [sys.executable, *launcher, str(TOOLS / tool), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    return done.returncode, done.stdout, done.stderr


def one_line(err: str) -> str:
    """The one line that tells the user what to mend."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err[-2000:]
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture
def call(capfd, monkeypatch):
    """Calls a command in this process, which has imported everything, and returns its output.

    With ``refused=True`` it must end with status 2, and its one line of error is returned.
    """
    # Detectron2's log handlers outlive the streams that a test captures.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def call(main, *args: str | Path, refused: bool = False) -> str:
        status = 0
        try:
            run_tool(lambda: main([str(arg) for arg in args]))
        except SystemExit as ended:
            status = ended.code
        out, err = capfd.readouterr()
        assert status == (2 if refused else 0), err[-2000:]
        assert not (refused and "Traceback" in out)
        return one_line(err) if refused else out

    return call


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Iterator[Path]:
    """A folder with six images and their COCO JSON: bright squares on dark ground."""
    folder = tmp_path_factory.mktemp("own") / "data"
    make_squares(folder, 6)
    with forgotten():  # another worker's fixture has another folder
        yield folder


def spec_of(own_data: Path) -> str:
    return f"own={own_data / 'squares.json'}:{own_data / 'images'}"


def own_args(own_data: Path, output: Path, *more: str) -> list[str]:
    return [
        "--config-file", MINI, "--dataset", spec_of(own_data), *more,
        "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", "1", *TINY, "OUTPUT_DIR", str(output),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(own_data, tmp_path_factory) -> Path:
    """The output folder of a training of four iterations on a user's own data."""
    output = tmp_path_factory.mktemp("trained") / "run"
    args = own_args(own_data, output)
    status, out, err = run("train_net.py", *args, "SOLVER.MAX_ITER", "4", cwd=own_data)
    assert status == 0, err[-2000:]
    assert "no GPU found: running on the CPU" in out
    assert f"{MINI} is for the mini dataset" in out
    assert "For own take --config-file own_data/faster_rcnn_R_18_FPN.yaml" in out
    assert "| AP " in out.replace("|   AP", "| AP")
    return output


def test_training_writes_weights_results_and_a_loss_curve(trained):
    assert (trained / "model_final.pth").is_file()
    assert set(json.loads((trained / "results.json").read_text())["bbox"]) >= {"AP", "AP50", "APs"}
    assert "AP50" in (trained / "results.md").read_text()
    assert Image.open(trained / "loss_curve.png").size[0] > 500
    assert (trained / "config.yaml").is_file()


def test_a_run_is_resumed(own_data, tmp_path, call):
    output = tmp_path / "run"
    first = own_args(own_data, output)
    call(train_main, *first, "SOLVER.MAX_ITER", "2")
    again = own_args(own_data, output, "--resume")
    call(train_main, *again, "SOLVER.MAX_ITER", "4")
    assert torch.load(output / "model_final.pth")["iteration"] == 3
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert "Starting training from iteration 2" in (output / "log.txt").read_text()


def test_eval_only_gives_the_results_of_the_training(own_data, trained, tmp_path, call):
    args = own_args(own_data, tmp_path / "eval", "--eval-only")
    weights = trained / "model_final.pth"
    call(train_main, *args, "MODEL.WEIGHTS", weights)
    ours = (tmp_path / "eval" / "results.json").read_text()
    assert ours == (trained / "results.json").read_text()


def test_an_evaluation_on_a_full_disk_is_one_line(own_data, trained, tmp_path, call, monkeypatch):
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "eval"
    output.mkdir()
    (output / "results.json").write_text("the earlier ones")
    monkeypatch.setattr(os, "fsync", full)
    args = [*own_args(own_data, output, "--eval-only"), "MODEL.WEIGHTS"]
    error = call(train_main, *args, trained / "model_final.pth", refused=True)
    assert f"cannot write to {output}: No space left on device; make room" in error
    assert (output / "results.json").read_text() == "the earlier ones"
    assert not list(output.glob("*.partial"))


def test_a_proposal_network_is_evaluated_by_recall(own_data, tmp_path, call):
    args = own_args(own_data, tmp_path / "rpn")
    rpn = ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "SOLVER.MAX_ITER", "2"]
    call(train_main, *args, *rpn)
    results = json.loads((tmp_path / "rpn" / "results.json").read_text())
    assert set(results["box_proposals"]) >= {"AR@100", "AR@1000", "ARs@1000"}


def test_mask_rcnn_trains_and_is_evaluated_by_boxes_and_masks(tmp_path, call):
    ensure_mini({"train": 6, "val": 4})
    args = ["--config-file", "mini/mask_rcnn_R_18_FPN.yaml", *TINY, "SOLVER.MAX_ITER", "4"]
    args += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "OUTPUT_DIR", str(tmp_path)]
    out = call(train_main, *args)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    assert "segm" in out
    assert "is for the mini dataset" not in out  # as here
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[0])
    assert last["loss_mask"] > 0


def test_a_panoptic_dataset_without_panopticapi_names_the_command(call):
    args = ["--config-file", "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"]
    MetadataCatalog.get("own_panoptic").evaluator_type = "coco_panoptic_seg"
    DatasetCatalog.register("own_panoptic", list)
    try:
        opts = ["DATASETS.TRAIN", "('own_panoptic',)", "DATASETS.TEST", "('own_panoptic',)"]
        error = call(train_main, *args, *opts, refused=True)
    finally:
        DatasetCatalog.remove("own_panoptic")
        MetadataCatalog.remove("own_panoptic")
    assert "pip install 'git+https://github.com/cocodataset/panopticapi.git'" in error


@pytest.mark.parametrize("how", ["--num-gpus", "torchrun"])
def test_two_processes_on_the_cpu(own_data, tmp_path, how):
    more, launcher = ["--num-gpus", "2", "--dist-url", "auto"], ()
    if how == "torchrun":
        more, launcher = [], ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    args = own_args(own_data, tmp_path / "two", *more)
    opts = ["SOLVER.MAX_ITER", "2", "MODEL.DEVICE", "cpu"]
    status, out, err = run("train_net.py", *args, *opts, cwd=own_data, launcher=launcher)
    assert status == 0, err[-3000:]
    assert "World size: 2" in out + err
    assert "AP50" in (tmp_path / "two" / "results.md").read_text()


def demo_args(own_data: Path, trained: Path, *more: str | Path) -> list[str | Path]:
    weights = ["MODEL.WEIGHTS", trained / "model_final.pth"]
    config = ["--config-file", trained / "config.yaml", "--dataset", spec_of(own_data)]
    return [*config, *more, *weights]


def test_the_demo_draws_a_folder_and_writes_detections(own_data, trained, tmp_path, call):
    more = ["--input", own_data / "images", "--threshold", "0", "--output", tmp_path]
    args = demo_args(own_data, trained, *more)
    every = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    call(detect_main, *args, *every)
    records = json.loads((tmp_path / "detections.json").read_text())
    assert len(records) == 6
    for record in records:
        size = record["width"], record["height"]
        assert size == Image.open(own_data / "images" / record["picture"]).size
        assert (tmp_path / record["picture"]).is_file()
        for found in record["detections"]:
            assert found["category"] == "square"
            assert found["level"] in (2, 3, 4, 5)
            x, y, width, height = found["bbox"]
            assert 0 <= x <= x + width <= size[0] + 0.01
            assert 0 <= y <= y + height <= size[1] + 0.01
    assert any(record["detections"] for record in records)


def test_the_demo_draws_ground_truth_beside(own_data, trained, tmp_path, call):
    more = ["--ground-truth", "own", "--max-images", "1", "--output", tmp_path]
    call(detect_main, *demo_args(own_data, trained, *more))
    (picture,) = tmp_path.glob("*.png")
    assert json.loads((tmp_path / "detections.json").read_text())[0]["picture"] == picture.name
    width, height = Image.open(picture).size
    assert width > 1.4 * height, "two panels of 64 x 80, side by side"


def test_an_unreadable_image_among_others_is_named_at_the_end(own_data, trained, tmp_path, call):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes((own_data / "images" / "0001.png").read_bytes())
    (folder / "b.png").write_text("no image")
    args = demo_args(own_data, trained, "--input", folder, "--output", tmp_path / "out")
    assert "1 of 2 images left out: cannot read image" in call(detect_main, *args, refused=True)
    assert (tmp_path / "out" / "a.png").is_file()


def test_the_demo_does_not_write_over_its_input(own_data, trained, tmp_path, call):
    image = tmp_path / "a.png"
    image.write_bytes((own_data / "images" / "0001.png").read_bytes())
    before = image.read_bytes()
    args = demo_args(own_data, trained, "--input", tmp_path, "--output", tmp_path)
    assert "would write over the image" in call(detect_main, *args, refused=True)
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RPN.IN_FEATURES", "['p2','p9']"], "MODEL.RPN.IN_FEATURES names 'p9'"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "3"], "MODEL.ROI_HEADS.NUM_CLASSES"),
        (["MODEL.FPN.COARSEST_OUTPUT_CONV", "True"], "COARSEST_OUTPUT_CONV False"),
    ],
)
def test_a_demo_of_another_model_is_one_line(own_data, trained, tmp_path, opts, message, call):
    args = demo_args(own_data, trained, "--input", own_data / "images", "--output", tmp_path)
    assert message in call(detect_main, *args, *opts, refused=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config-file", "mini/faster_rcn_R_18_FPN.yaml"], "did you mean mini/faster_rcnn_R_18"),
        (["--config-file", MINI, "DATASETS.TRAIN", "('mini_trian',)"], "did you mean mini_train"),
        (["--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"], "is not there"),
        (["--config-file", MINI, "SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER is 0"),
        (["--config-file", MINI, "SEED", "9" * 23], "SEED is 99"),
        (["--config-file", MINI, "OUTPUT_DIR", f"{__file__}/out"], "Not a directory; give another"),
        (["--config-file", MINI, "OUTPUT_DIR", __file__], "File exists; give another"),
        (["--config-file", MINI, "OUTPUT_DIR", "/proc/none"], "OUTPUT_DIR is '/proc/none', where"),
    ],
)
def test_bad_input_is_one_line_and_a_status(args, message, call):
    assert message in call(train_main, *args, refused=True)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN.IN_FEATURES", "['res3','res5']"], "are not a pyramid"),
        (["MODEL.FPN.IN_FEATURES", "['res2','res7']"], "'res7'"),
        (["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "48"], "multiple of 32"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "no weights file 'nowhere.pth'"),
        (["MODEL.RPN.IN_FEATURES", "['p2','p9']"], "MODEL.RPN.IN_FEATURES names 'p9'"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16]]"], "Detectron2 cannot build this model"),
        (
            ["MODEL.ROI_HEADS.NAME", "FPNROIHead"],
            "'FPNROIHead', which is not in the ROI_HEADS registry: did you mean FPNROIHeads",
        ),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlin"], "did you mean ROIAlign"),
        (["MODEL.ROI_HEADS.IN_FEATURES", "['p2','p4']"], "MODEL.ROI_HEADS.IN_FEATURES"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], "dataset 'own' has 1 categories: set it to 1"),
        (["DATASETS.TEST", "('voc_2007_test',)"], "evaluated as 'pascal_voc'"),
        (["DATASETS.TRAIN", "('keypoints_coco_2017_val',)"], "is not there"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_line(own_data, tmp_path, opts, message, call):
    args = own_args(own_data, tmp_path / "out")
    assert message in call(train_main, *args, *opts, refused=True)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_training_image_is_one_line(own_data, tmp_path, workers, call):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        (images / f"{i:04d}.png").write_text("no image")
    args = own_args(own_data, tmp_path / "out")
    args[3] = f"unreadable{workers}={own_data / 'squares.json'}:{images}"
    opts = ["DATASETS.TRAIN", f"('unreadable{workers}',)", "DATASETS.TEST", "()"]
    opts += ["DATALOADER.NUM_WORKERS", workers]
    assert "cannot read image" in call(train_main, *args, *opts, refused=True)


def test_the_stub_itself_ends_in_one_line(tmp_path):
    status, _, err = run("demo.py", "--config-file", MINI, "--input", "nowhere.jpg", cwd=tmp_path)
    assert status == 2
    assert "nowhere" in one_line(err)


def test_an_error_in_two_processes_is_told_without_a_traceback(own_data, tmp_path):
    args = own_args(own_data, tmp_path / "out", "--num-gpus", "2", "--dist-url", "auto")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "48"]
    status, _, err = run("train_net.py", *args, *opts, cwd=own_data)
    assert status == 2
    assert "multiple of 32" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("network", ["timm", "torchvision"])
def test_a_pyramid_on_another_network_trains_to_a_falling_loss(tmp_path, network, call):
    ensure_mini({"train": 6, "val": 4})
    names = {"timm": ("resnet10t", "PRETRAINED", "False"),
             "torchvision": ("mobilenet_v3_small", "WEIGHTS", "")}  # fmt: skip
    name, key, value = names[network]
    node = f"MODEL.{network.upper()}"
    args = ["--config-file", MINI, "MODEL.FPN.BOTTOM_UP", f"build_{network}_backbone"]
    args += [f"{node}.NAME", name, f"{node}.{key}", value, f"{node}.NORM", ""]
    args += ["INPUT.MIN_SIZE_TRAIN", "(128,)", "SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "5"]
    args += ["DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path)]
    call(train_main, *args)
    first, last = loss_rows(tmp_path / "metrics.json")  # each the median of 20 iterations
    assert last["total_loss"] < 0.8 * first["total_loss"]
