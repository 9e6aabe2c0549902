"""Commands as functions: the same words give the same, and errors are raised."""

import json
import logging
import re
from pathlib import Path

import pytest
import yaml

import fpn_plugin
from fpn_plugin import UserError
from fpn_plugin.cli.check import check_main
from fpn_plugin.cli.common import add_shared, command_parser
from fpn_plugin.cli.fit import fit_main

MINI = "mini/faster_rcnn_R_18_FPN.yaml"


def test_values_by_name_are_parsed_as_the_words_of_a_command():
    parser = command_parser("some", "Some command.")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--resume", action="store_true")
    add_shared(parser, "--config-file", "--threshold", "--dataset")
    words = ["here", "--config-file=-a.yaml", "--threshold", "0.25", "--resume"]
    values = {"config_file": Path("-a.yaml"), "threshold": 0.25, "resume": True, "folder": "here"}
    assert parser.parse_args(values) == parser.parse_args(words)
    left_out = {"config_file": "a.yaml", "resume": False, "threshold": None}
    assert parser.parse_args(left_out) == parser.parse_args(["--config-file", "a.yaml"])
    twice = parser.parse_args({"config_file": "a", "dataset": ["one=a:b", "two=c:d"]})
    assert twice.dataset == ["one=a:b", "two=c:d"]
    assert parser.parse_args({"config_file": "a", "dataset": "one=a:b"}).dataset == ["one=a:b"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataste": "a"}, "no argument dataste: did you mean dataset"),
        ({"data": None}, "arguments are required: --config-file"),
        ({"config_file": MINI, "output": ["a", "b"]}, r"output is \['a', 'b'\], expected a single"),
        ({"config_file": MINI, "output": True}, "output is True, expected a single value"),
        ({"config_file": ""}, "argument --config-file: .* is empty"),
        ({"config_file": MINI, "opts": ["SOLVER.MAX_ITR", 3]}, "did you mean SOLVER.MAX_ITER"),
        ({"config_file": MINI, "opts": ["SOLVER.MAX_ITER"]}, "'SOLVER.MAX_ITER' has no value"),
    ],
)
def test_values_that_a_command_refuses_are_errors(values, message):
    with pytest.raises(UserError, match=message):
        fit_main(values)


def test_a_flag_is_true_or_false():
    with pytest.raises(UserError, match="resume is 'yes', expected True or False"):
        fpn_plugin.train(MINI, resume="yes")


def test_check_returns_what_the_command_writes(squares, tmp_path, capsys):
    json_file, images = squares.partition("=")[2].rsplit(":", 1)
    check_main([json_file, images, "--json", str(tmp_path / "command.json")])
    printed = capsys.readouterr().out
    assert "8 images, 8 boxes and 1 class were read" in printed
    report = fpn_plugin.check(dataset=squares, json=tmp_path / "function.json")
    assert capsys.readouterr().out == printed
    assert report == json.loads((tmp_path / "command.json").read_text())
    assert report["refused"] == 0

    content = json.loads(Path(json_file).read_text())
    content["annotations"][0]["bbox"] = [1, 2, -3, 4]
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(content))
    assert fpn_plugin.check(broken, images)["refused"] == 1  # and does not exit
    with pytest.raises(SystemExit) as ended:
        check_main([str(broken), images])
    assert ended.value.code == 1


def test_fit_writes_what_the_command_writes(squares, tmp_path):
    opts = ["DATASETS.TRAIN", "('squares',)", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    words = ["--config-file", MINI, "--dataset", squares, "--output", str(tmp_path / "a")]
    fit_main([*words, *opts])
    opts = ["DATASETS.TRAIN", ("squares",), "MODEL.ROI_HEADS.NUM_CLASSES", 1]
    folder = fpn_plugin.fit(MINI, dataset=squares, output=tmp_path / "b", opts=opts)
    assert folder == tmp_path / "b"
    for name in ("report.json", "fitted.yaml"):
        assert (folder / name).read_text() == (tmp_path / "a" / name).read_text()
    assert yaml.safe_load((folder / "fitted.yaml").read_text())["MODEL"]["ROI_HEADS"] == {
        "NUM_CLASSES": 1
    }


def test_two_trainings_of_a_process_log_apart_and_errors_are_raised(squares, tmp_path, capsys):
    opts = [
        "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", ("squares",), "DATASETS.TEST", ("squares",),
        "MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.FPN.OUT_CHANNELS", 16, "SOLVER.IMS_PER_BATCH", 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48,
        "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 1,
    ]  # fmt: skip
    handlers = list(logging.getLogger("detectron2").handlers)
    for name in ("first", "second"):
        capsys.readouterr()
        here = [*opts, "OUTPUT_DIR", tmp_path / name]
        assert fpn_plugin.train(MINI, dataset=[squares], opts=here) == tmp_path / name
        assert len(re.findall("Starting training from", capsys.readouterr().out)) == 1
        assert "AP50" in json.loads((tmp_path / name / "results.json").read_text())["bbox"]
        assert (tmp_path / name / "log.txt").read_text().count("Starting training from") == 1
    assert logging.getLogger("detectron2").handlers == handlers
    weights = ["MODEL.WEIGHTS", tmp_path / "none.pth", "OUTPUT_DIR", tmp_path / "third"]
    with pytest.raises(UserError, match=r"none\.pth"):  # found when the model is made
        fpn_plugin.train(MINI, dataset=squares, opts=[*opts, *weights])
