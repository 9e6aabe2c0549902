"""Every shell command of README.md, docs/ and the commands' --help: run, or listed with the reason
why not. Of those that differ in values only the first is run, the others are parsed.

They run in one folder, README first, as a reader would give them: as they stand there, but for the
numbers in ``SMALLER``. The configs, images and weights that they name are small ones.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from matplotlib.figure import Figure
from PIL import Image

from fpn_plugin import model_zoo
from fpn_plugin.cli.common import ToolParser
from fpn_plugin.conversion import CONFIG_KEYS
from fpn_plugin.engine import load_config
from fpn_plugin.mini.dataset import ensure_mini, mini_root
from fpn_plugin.mini.scene import CATEGORIES, KINDS
from fpn_plugin.paper import runs
from tests.helpers.commands import NAMES, ROOT, Parsed, main_of, stubs
from tests.helpers.datasets import forgotten
from tests.helpers.label_folders import voc, write_labels, yolo

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STUBS = stubs()

# How a command begins, and why it is not run.
NOT_RUN = {
    "make": "builds an environment, trains or tests for minutes; each change is made with them",
    "git clone": "tests do not touch the network; tests/cli/test_own_data.py has the data",
    "pip install": "tests do not touch the network; tests/test_package.py builds and installs",
    "python exported/onnx_runner.py": "tests/deploy/test_export.py runs it",
    "source": "of the shell",
    "torchrun": "needs 8 GPUs; tests/distributed starts it",
    "fpn-plugin train --num-gpus 8": "needs 8 GPUs",
    "fpn-plugin train --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus":
        "likewise",
    "python -m evidence.benchmark": "a quarter of an hour; tests/evidence",
    "evidence/gpu_check.sh": "needs a GPU; tests/evidence starts it",
    "python -m evidence.kill_and_resume": "minutes; tests/engine/test_resume.py kills as it does",
    "python -m evidence.time_": "large data; tests/evidence/test_timings.py has small ones",
    "python -m evidence.level_statistics_cost": "half a minute; tests/evidence has its parts",
    "python -m evidence.soak": "minutes; tests/evidence/test_soak.py",
    "python -m evidence.fuzz_data --cases 5000": "minutes; tests/data",
}  # fmt: skip
# What these words are followed by.
SMALLER = {
    "--convert": "mended.json", "--cases": "2", "--pairs": "1", "--max-images": "1",
    "SOLVER.MAX_ITER": "1", "SOLVER.STEPS": "()", "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "--formats": "torchscript",
}  # fmt: skip
# What is added to a command, in front.
MORE = {
    "reproduce": ["--dry-run", "--output", "reproduced"],  # tests/paper trains
    "evidence.compare_fitted": ["--dry-run"],  # tests/fitting trains
    "export": ["--formats", "torchscript"],  # tests/deploy has all
    "optimize": ["--dtypes", "float32"],
    "visualize": ["--proposals", "2"],
}

TINY = """
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {DEPTH: 50, RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, WIDTH_PER_GROUP: 4, NORM: BN}
  FPN: {OUT_CHANNELS: 16}
  TIMM: {PRETRAINED: False}
  TORCHVISION: {WEIGHTS: ""}
  ROI_BOX_HEAD: {FC_DIM: 16}
  ROI_MASK_HEAD: {CONV_DIM: 16}
  RPN: {PRE_NMS_TOPK_TRAIN: 50, PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TRAIN: 20}
  ROI_HEADS: {BATCH_SIZE_PER_IMAGE: 16}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64, MAX_SIZE_TRAIN: 96, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 1, EPOCHS: 0, STEPS: [], WARMUP_ITERS: 0}
TEST: {DETECTIONS_PER_IMAGE: 5}
"""
LAZY = """
from fpn_plugin.lazy import get_config

model, optimizer, lr_multiplier, dataloader, train = get_config({!r}).values()
"""


def joined(text: str) -> list[str]:
    """The lines of a text that are commands; comments are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return [shlex.join(found) for found in words if found]


def in_markdown(text: str) -> Iterator[str]:
    """The commands of blocks and of code within lines."""
    for block in re.findall(r"^```[^\n]*\n.*?^```$", text, re.M | re.S):
        language, _, content = block.removeprefix("```").partition("\n")
        if language in ("", "sh", "bash", "console", "shell"):
            yield from joined(content.removesuffix("```"))
    for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        begin, *rest = code.split()
        ours = begin in ("fpn-plugin", "python") and len(rest) > 1 and rest[-1] != "fpn_plugin"
        if ours or begin in ("make", "pip", "torchrun", "source"):
            yield shlex.join(shlex.split(code))


def in_help(name: str, capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    with pytest.raises(SystemExit):
        main_of(name)(["--help"])
    _, example, examples = capsys.readouterr().out.partition("\nExample")
    if example:
        lines = joined(examples.partition(":\n")[2].partition("\n\n")[0])
        yield from (line for line in lines if line.startswith(("fpn-plugin", "python", "torchrun")))


def name_of(command: str) -> tuple[str, list[str]]:
    """A command's name in ``NAMES`` and its arguments; "" if it is none of this project's."""
    words = shlex.split(command)
    for number, word in enumerate(words):
        if word in ("fpn-plugin", "fpn_plugin") and words[number + 1 : number + 2]:
            return words[number + 1], words[number + 2 :]
        name = STUBS.get(Path(word).name, word)
        if (name in NAMES and name != word) or word.startswith("evidence."):
            return name, words[number + 1 :]
    return "", []


def shape_of(command: str) -> tuple[str, ...]:
    """What is the same of commands that differ in values only: the name, options and keys."""
    name, argv = name_of(command)
    named = [word for word in argv if re.match(r"--|[A-Z_]+(\.[A-Z_]+)*$", word)]
    return (name, str(argv[:1] == named[:1]), *named)


def make_data(json_file: str, images: str, count: int, categories: dict[int, str]) -> None:
    rng = np.random.default_rng(0)
    Path(images).mkdir(parents=True, exist_ok=True)
    Path(json_file).parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    for number in range(1, count + 1):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(Path(images, name))
        content["images"].append({"id": number, "file_name": name, "width": 80, "height": 64})
        box = {"bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
        box |= {"id": number, "image_id": number, "category_id": next(iter(categories))}
        box |= {"segmentation": [[10, 10, 50, 10, 50, 40, 10, 40]]}
        content["annotations"].append(box)
    Path(json_file).write_text(json.dumps(content))


def make_config(name: str, path: str | None = None) -> None:
    """A small config under a packaged one's name, which is found before that."""
    path = Path(path or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"_BASE_: {model_zoo.get_config_file(name)}\n{TINY}")


def make_run(folder: str, config: str, opts: list[str] = ()) -> None:
    """A folder that has what a training leaves."""
    cfg = load_config(config, [*opts, "OUTPUT_DIR", folder])
    Path(folder).mkdir(parents=True, exist_ok=True)
    cfg.MODEL.WEIGHTS = ""
    Path(folder, "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, Path(folder, "model_final.pth"))


@pytest.fixture(scope="module")
def datasets() -> Iterator[None]:
    """Few images of each mini dataset and of COCO, where Detectron2 looks for them."""
    new = [kind for kind in KINDS if kind and not mini_root(kind).is_dir()]
    ensure_mini({"train": 6, "val": 4})  # as other tests make it
    for kind in new:
        ensure_mini({"train": 6, "val": 4}, kind=kind)
    coco = [MetadataCatalog.get(f"coco_2017_{split}") for split in ("train", "val")]
    for each in coco:
        categories = zip(each.thing_dataset_id_to_contiguous_id, each.thing_classes, strict=True)
        make_data(each.json_file, each.image_root, 4, dict(categories))
    with forgotten():
        yield
    for folder in [*map(mini_root, new), Path(coco[0].json_file).parents[1]]:
        shutil.rmtree(folder)


@pytest.fixture
def reader(tmp_path, monkeypatch, datasets) -> Iterator[None]:
    """A folder with what the commands name and do not make themselves."""
    monkeypatch.chdir(tmp_path)
    # Drawing takes most of the time, and has tests of its own.
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
    own = [f"own_data/faster_rcnn_{name}_FPN.yaml" for name in ("lite0", "R_18", "R_50")]
    packaged = ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "mini/faster_rcnn_R_18_FPN.yaml")
    for name in (*packaged, *own):
        make_config(name)
    for row in ("table1_c_FPN", "table1_d_bottom_up", "table1_e_no_lateral", "table2_c_FPN"):
        make_config(f"mini/{row}.yaml")
        if "table1" in row:
            make_run(f"output/mini/{row}/seed0", f"mini/{row}.yaml")
    mini = "mini/faster_rcnn_R_18_FPN.yaml"
    make_run("output/demo", mini)
    shutil.copy("output/demo/model_final.pth", ".")
    make_config(mini, "my.yaml")
    Path("my.py").write_text(LAZY.format(str(Path(mini).absolute())))
    for images in ("folder/of/photos", "photos", "output/demo/pictures", "images"):
        make_data("unused.json", images, 2, {1: "a"})
    shutil.copy("photos/1.png", "photo.jpg")
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), "lite0.pth")
    fourteen = {each["id"]: each["name"] for each in CATEGORIES}  # as in mini_val
    three = dict(list(fourteen.items())[:3])
    make_data("cells/train.json", "cells/images", 4, three)
    make_data("cells/export.json", "cells/images", 4, three)
    make_data("cells/val.json", "cells/images", 4, three)
    for split in ("train", "val"):
        content = json.loads(Path(f"cells/{split}.json").read_text())
        write_labels(yolo, content, Path("cells_yolo", split))
        shutil.copytree("cells/images", f"cells_yolo/{split}", dirs_exist_ok=True)
    Path("cells_yolo/classes.txt").write_text("\n".join(three.values()))
    for each, number in zip(content["annotations"], [*three, *three], strict=False):
        each["category_id"] = number  # in VOC files classes are those of the objects
    write_labels(voc, content, Path("BCCD_Dataset/BCCD/Annotations"))
    shutil.copytree("cells/images", "BCCD_Dataset/BCCD/JPEGImages")
    Path("BCCD_Dataset/BCCD/ImageSets/Main").mkdir(parents=True)
    for split in ("train", "val", "test"):
        Path(f"BCCD_Dataset/BCCD/ImageSets/Main/{split}.txt").write_text("1\n2\n3\n4\n")
    make_data("cells.json", "images", 2, fourteen)
    make_data("train.json", "images", 2, fourteen)
    runs._config.cache_clear()
    yield
    runs._config.cache_clear()  # of this folder's configs, whose names are the packaged ones


@pytest.fixture
def converter(tmp_path, monkeypatch) -> None:
    """A folder with what the commands that convert name."""
    monkeypatch.chdir(tmp_path)
    for name, theirs in {
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": "fasterrcnn_resnet50_fpn_coco.pth",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": "maskrcnn.pth",
    }.items():
        make_config(name)
        for folder in ("output/finetuned", "output"):
            make_run(folder, name, CONFIG_KEYS["torchvision"])
        shutil.copy("output/model_final.pth", ".")
        args = ["--to", "torchvision", "--weights", "model_final.pth"]
        args += ["--config-file", "output/config.yaml", "--output", theirs]
        main_of("convert")(args)


def commands(capsys: pytest.CaptureFixture[str]) -> list[str]:
    found = [command for text in TEXTS for command in in_markdown(text.read_text())]
    for name in NAMES:
        found += in_help(name, capsys)
    return list(dict.fromkeys(found))


def to_run(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for command in commands(capsys):
        if not command.startswith(tuple(NOT_RUN)):
            assert name_of(command)[0] in NAMES, f"no command, and not in NOT_RUN: {command}"
            found.setdefault(shape_of(command), command)
    return found


def run_all(found: list[str]) -> None:
    failed = []
    for command in found:
        name, argv = name_of(command)
        smaller = [SMALLER.get(before, word) for before, word in pairwise(["", *argv])]
        smaller = [re.sub("^train.max_iter=.*", "train.max_iter=1", word) for word in smaller]
        try:
            main_of(name)([*MORE.get(name, []), *smaller])
        except (Exception, SystemExit) as error:
            failed.append(f"{command}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def test_commands_are_collected(capsys):
    found = commands(capsys)
    assert len(found) > 60
    for command in (
        "make demo",
        "fpn-plugin reproduce 1 2 3 --scale mini --seeds 0 1 2",
        "python -m evidence.compare_fitted cells small large thin --cells cells --seeds 0 1 2 "
        "--device cuda --at-once 12 --opts SOLVER.MAX_ITER 500",
        "fpn-plugin optimize --config-file output/demo/config.yaml --input photos/ MODEL.WEIGHTS "
        "output/demo/model_final.pth",
        "torchrun --nproc-per-node 8 -m fpn_plugin train --config-file my.yaml",
    ):
        assert command in found
    used = [begin for begin in NOT_RUN if any(c.startswith(begin) for c in found)]
    assert used == list(NOT_RUN)  # what is listed is there


def test_those_that_are_not_run_are_parsed(capsys, monkeypatch):
    parse = ToolParser.parse_known_args

    def only_parse(self: ToolParser, *args: object) -> None:
        raise Parsed(parse(self, *args))

    found, run = commands(capsys), to_run(capsys).values()
    monkeypatch.setattr(ToolParser, "parse_known_args", only_parse)
    for command in found:
        name, argv = name_of(command)
        if not name or command in run:
            continue
        with pytest.raises(Parsed) as raised:
            main_of(name)(argv)
        args, left = raised.value.args[0]
        assert not left
        if getattr(args, "config_file", "") in model_zoo.names():
            load_config(args.config_file, getattr(args, "opts", ()))


def test_the_commands_of_the_texts_run(reader, capsys):
    run_all([c for c in to_run(capsys).values() if name_of(c)[0] != "convert"])


def test_the_commands_that_convert_weights_run(converter, capsys):
    run_all([c for c in to_run(capsys).values() if name_of(c)[0] == "convert"])
