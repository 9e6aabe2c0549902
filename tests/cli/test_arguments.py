"""Every command, with each wrong value of each of its arguments: one line, status 2, no traceback.

Arguments come from the commands' own parsers: one without wrong values here fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from fpn_plugin.__main__ import COMMANDS, main
from fpn_plugin.engine import run_tool
from tests.helpers.commands import LAZY, NAMES, main_of, parser_of, stubs
from tests.helpers.datasets import forgotten

CONFIG = "mini/faster_rcnn_R_18_FPN.yaml"

# Of options of a kind that the parser does not tell: a right value, and wrong ones. Names are of
# what the fixture ``files`` makes.
_DATASETS = ["x", "x=", "=data.json:images", "x=data.json", "x=none.json:images", "x=:images"]
_DATASETS += ["x=data.json:none", "x=images:images", "x=data.json:data.json"]
_DATASETS += ["mini_val=data.json:images"]
_NAMES = ["mini_trian", "images", "data.yaml"]
VALUES: dict[str, tuple[str, list[str]]] = {
    "--config-file": (CONFIG, [CONFIG.replace("N", "M"), "images", "photo.png", "data.json"]),
    "--dataset": ("x=data.json:images", _DATASETS),
    "--splits": ("mini_val", _NAMES),
    "--ground-truth": ("mini_val", _NAMES),
    "--input": ("photo.png", ["none.png", "empty"]),
    "--run": ("run", ["none", "a=none", "photo.png", "images"]),
    "--trained": ("run", ["none", "photo.png", "images"]),
    "--cells": ("cells", ["none", "photo.png", "images"]),
    "--data": ("mini_val", [*_NAMES, "none.json", "photo.png", "text.txt"]),
    "dataset": ("data.json", [*_NAMES, "none.json", "photo.png", "text.txt", "empty"]),
    "folder": ("images", ["none", "data.json"]),
    "run": ("run", ["none", "photo.png", "images"]),
    "what": ("1c", ["9", "1z", "mini"]),
    "data": ("small", ["smal", "mini_val"]),
    "--weights": ("weights.pth", ["text.txt", "photo.png", "data.json"]),
    "--into": ("weights.pth", ["text.txt"]),
    "--with": ("data.json", []),
    "--image": ("photo.png", ["text.txt"]),
}  # fmt: skip
# By argparse's ``type``: those of :mod:`fpn_plugin.cli.common` by the name of what made them.
KINDS: dict[str, list[str]] = {
    "int": ["x", "1.5", "nan"],
    "at_least": ["-1", "x", "1.5", "nan", "1e3", "9" * 5000],
    "between": ["-1", "2", "nan", "inf", "x"],
    "input_file": ["none", "images"],
    "output_folder": ["photo.png", "photo.png/sub", "/dev/null/sub"],
    "output_file": ["images", "photo.png/out.png", "photo.png/out.pth", "/dev/null/out.png"],
    "dist_url": ["here", "tcp://", "tcp://127.0.0.1:99999", "tcp://127.0.0.1:0"],
}
RIGHT = {"output_folder": "out", "output_file": "out.pth", "at_least": "1", "between": "0.5"}
KEYS = {
    "MODEL.DEVICE": ["gpu", "", "CUDA", "cuda:x"],
    "MODEL.WEIGTHS": ["x"],
    "SEDE": ["3"],
    "SOLVER.MAX_ITER": ["x", "1.5"],
    "MODEL.PIXEL_MEAN": ["3"],
    "SOLVER.STEPS": ["(1", "nan"],
    "MODEL.FPN": ["x"],
    "INPUT.MIN_SIZE_TEST": ["MODEL.WEIGHTS"],
}
LAZY_KEYS = {"train.device": ["gpu", "mps", "cuda:9"], "train.max_iter": ["x"], "trian.seed": ["1"]}


def actions_of(tool: str) -> list[argparse.Action]:
    found = parser_of(tool)._actions
    return [a for a in found if a.nargs != 0 and a.nargs != argparse.REMAINDER]


def name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else action.dest


def kind_of(action: argparse.Action) -> str:
    return "" if action.type is None else action.type.__qualname__.partition(".")[0]


def right(tool: str, action: argparse.Action) -> list[str]:
    """The option with a value that is taken."""
    if action.choices:
        value = next(iter(action.choices))
    elif name_of(action) in VALUES:
        value = VALUES[name_of(action)][0]
    else:
        value = RIGHT[kind_of(action)]
    return [*action.option_strings[:1], value]


def wrong(action: argparse.Action) -> list[str]:
    values = ["", "  "]
    if action.choices:
        values += ["nonsense", next(iter(action.choices)).upper() + "X"]
    else:
        values += KINDS.get(kind_of(action), []) + VALUES.get(name_of(action), ("", []))[1]
    assert len(values) > 2, f"say what is wrong for {name_of(action)}: in VALUES, or by its type"
    return values


def argv_of(tool: str, given: Sequence[str] = (), of: argparse.Action | None = None) -> list[str]:
    """What the tool must be given, with an argument instead of its right value."""
    chosen = [a for a in actions_of(tool) if a.required or not a.option_strings or a is of]
    if tool == LAZY:
        chosen += [a for a in actions_of(tool) if a.dest == "config_file" and a is not of]
    for group in parser_of(tool)._mutually_exclusive_groups:
        if group.required and of not in group._group_actions:
            chosen.append(group._group_actions[0])
    # Positionals first: an option of several values would take them.
    chosen.sort(key=lambda action: bool(action.option_strings))
    return [word for a in chosen for word in (given if a is of else right(tool, a))]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("files")
    for name in ("images", "empty", "run"):
        (folder / name).mkdir()
    Image.new("RGB", (9, 9)).save(folder / "photo.png")
    Image.new("RGB", (9, 9)).save(folder / "images" / "0.png")
    (folder / "text.txt").write_text("text")
    (folder / "data.yaml").write_text("SEED: 1\n")
    (folder / "run" / "config.yaml").write_text("SEED: 1\n")
    image = {"id": 1, "file_name": "0.png", "width": 9, "height": 9}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    (folder / "data.json").write_text(json.dumps(content))
    torch.save({"weight": torch.zeros(1)}, folder / "weights.pth")
    with pytest.MonkeyPatch.context() as patch, forgotten():
        patch.chdir(folder)
        yield folder


def told(tool: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a tool refuses arguments."""
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: main_of(tool)(argv))
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    error = error.rpartition("\r")[2]  # what a progress bar has cleared is not seen
    assert error.startswith("error: ") and error.count("\n") == 1, error
    options = [o for action in parser_of(tool)._actions for o in action.option_strings]
    if "fpn-plugin" not in error:  # of another command
        advised = set(re.findall(r"(?<!\S)--[a-z][\w-]*", error.split("no option")[0]))
        assert advised <= set(options), error
    return error


@pytest.mark.parametrize("tool", NAMES)
def test_wrong_values_are_refused_in_one_line(tool, files, capsys):
    for action in actions_of(tool):
        for value in wrong(action):
            values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
            given = argv_of(tool, [*action.option_strings[:1], *values], action)
            error = told(tool, given, capsys)
            known = {name_of(action), repr(value), *re.split("[=:]", value)} - {"", "  "}
            assert any(part in error for part in known), (given, error)


WITH_KEYS = [t for t in NAMES if any(a.dest == "opts" for a in parser_of(t)._actions)]


@pytest.mark.parametrize("tool", WITH_KEYS)
def test_wrong_config_keys_are_refused_in_one_line(tool, files, capsys):
    for key, values in (LAZY_KEYS if tool == LAZY else KEYS).items():
        for value in values:
            given = [f"{key}={value}"] if tool == LAZY else [key, value]
            error = told(tool, [*argv_of(tool), *given], capsys)
            assert key.partition("=")[0].rpartition(".")[2] in error, error
    if tool != LAZY:
        for given, message in {
            ("MODEL.WEIGHTS",): "config key 'MODEL.WEIGHTS' has no value",
            ("SEED", "1", "TEST.EVAL_PERIOD"): "config key 'TEST.EVAL_PERIOD' has no value",
            ("MODEL.WEIGTHS", "w"): "did you mean MODEL.WEIGHTS",
            ("MODLE.WEIGHTS", "w"): "did you mean MODEL.WEIGHTS",
            ("model.weights", "w"): "did you mean MODEL.WEIGHTS",
            ("SEED", "1", "--help"): "--help is among the config options",
            ("SEED", "1", "--no-such"): "no option --no-such",
        }.items():
            assert message in told(tool, [*argv_of(tool), *given], capsys)


RUN_A_MODEL = ["detect", "optimize", "visualize", "inspect", "evidence.level_statistics_cost"]
RUN_A_MODEL += ["dump-proposals", "train"]


@pytest.mark.parametrize("tool", RUN_A_MODEL)
@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "cuda", "cuda:99"])
def test_devices_that_are_not_here_are_refused(tool, device, files, capsys):
    error = told(tool, [*argv_of(tool), "MODEL.DEVICE", device], capsys)
    assert f"MODEL.DEVICE is {device!r}" in error or f"MODEL.DEVICE {device} asks for" in error
    assert "MODEL.DEVICE cpu" in error


@pytest.mark.parametrize("tool", WITH_KEYS)
def test_the_first_config_key_ends_the_values_of_an_option(tool, files):
    parser = parser_of(tool)
    keys = ["MODEL.WEIGHTS", "w", "SEED", "3"]
    for action in actions_of(tool):
        if action.nargs in ("+", "*"):
            value = right(tool, action)[-1]
            others = argv_of(tool, [], action)
            given = [*others, *action.option_strings[:1], value, value]
            for opts in (keys, ["SEED", "3"], ["MODEL.WEIGTHS", "w"]):
                parsed = parser.parse_args([*given, *opts])
                assert parsed.opts == opts, given
                read = action.type or str
                assert getattr(parsed, action.dest) == [read(value)] * 2
    assert parser.parse_args([*argv_of(tool), *keys]).opts == keys
    assert parser.parse_args(argv_of(tool)).opts == []


def test_files_that_look_like_keys_stay_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("TEST.JPG").touch()
    parser = parser_of("optimize")
    names = ["IMG_0001.JPG", "TEST.JPG", "TEST", "model.pth"]
    parsed = parser.parse_args(["--config-file", "c", "--input", *names, "SEED", "3"])
    assert parsed.input == names
    assert parsed.opts == ["SEED", "3"]


@pytest.mark.parametrize("tool", NAMES)
def test_help_tells_every_option(tool, capsys):
    with pytest.raises(SystemExit) as ended:
        run_tool(lambda: main_of(tool)(["--help"]))
    assert ended.value.code == 0
    text = capsys.readouterr().out
    if tool in COMMANDS:
        assert text.startswith(f"usage: fpn-plugin {tool} [-h]")
    for action in parser_of(tool)._actions:
        assert name_of(action) in text or action.metavar in text


def test_the_command_lists_the_commands_and_runs_them(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fpn-plugin"])
    main()
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line[:2] == "  "] == list(COMMANDS)
    monkeypatch.setattr("sys.argv", ["fpn-plugin", "--config-file", "none.yaml"])
    for name, message in (("train", "no config file 'none.yaml'"), ("tarin", "did you mean train")):
        with pytest.raises(SystemExit) as ended:
            main(name)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_every_command_has_a_file_in_tools():
    assert {*stubs().values()} == {*COMMANDS, LAZY} - {"evaluate"}


@pytest.mark.parametrize("tool", NAMES)
def test_what_is_missing_or_mistyped_is_named(tool, files, capsys):
    required = [a for a in actions_of(tool) if a.required]
    for action in required:
        error = told(tool, argv_of(tool, [], action) if action.option_strings else [], capsys)
        assert name_of(action) in error or str(action.metavar) in error
    for action in parser_of(tool)._actions:
        for option in action.option_strings:
            if len(option) > 4:
                mistyped = option[:-2] + option[-1] + option[-2]  # neighbours changed places
                if mistyped != option:
                    error = told(tool, [mistyped, *argv_of(tool)], capsys)
                    assert f"no option {mistyped}: did you mean {option}" in error
    assert "no option --nothing-like-it: " in told(tool, ["--nothing-like-it=3"], capsys)
    error = told(tool, [*argv_of(tool), "--threshold-of", "3", "left", "over"], capsys)
    assert "no option --threshold-of: " in error


@pytest.mark.parametrize(
    ("tool", "given", "message"),
    [
        ("check", ["images"], "images has no labels: expected VOC's"),
        (
            "check",
            ["data.jsn"],
            "'data.jsn' is neither a file, a folder of labels nor a registered",
        ),
        ("check", ["images", "data.json"], "no folder 'data.json'"),
        ("reproduce", ["1c", "DATASETS.TRAIN", "('nope',)"], "names dataset 'nope', which"),
        ("evidence.compare_fitted", ["DATASETS.TEST", "('nope',)"], "DATASETS.TEST names dataset"),
        ("fit", ["DATASETS.TRAIN", "('nope',)"], "DATASETS.TRAIN names dataset 'nope'"),
        ("convert", ["--into", "weights.pth"], "--into is for --to"),
        ("train", ["--machine-rank", "1"], "ranks are 0 to 0"),
        ("train", ["--num-machines", "2", "--dist-url", "auto"], "give tcp://HOST:PORT"),
        ("train", ["--optimize", "float32"], "--optimize is for --eval-only"),
        ("evidence.benchmark", ["--parts", "profile", "SEED", "1"], "invalid choice: 'SEED'"),
        ("report", ["MODEL.WEIGHTS", "x"], "unrecognized arguments: x"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(tool, given, message, files, capsys):
    given = given if tool in ("check", "reproduce") else [*argv_of(tool), *given]
    if tool == "report":
        given = given[1:]
    if tool == "train" and "--optimize" not in given:
        own = ["--config-file", CONFIG, "--dataset", "own=data.json:images"]
        given += [*own, "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)"]
        given += ["MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.DEVICE", "cpu"]
        given += ["OUTPUT_DIR", "trained"]
    assert message in told(tool, given, capsys)


def test_output_that_may_not_be_written_is_refused_beforehand(files, capsys, monkeypatch):
    """By root, who runs tests in containers, everything may be written."""
    (files / "locked").mkdir(exist_ok=True)
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    for tool in NAMES:
        for action in actions_of(tool):
            if kind_of(action) in ("output_folder", "output_file"):
                for value in ("locked/out.png", "locked/deep/out.pth"):
                    given = [*action.option_strings[:1], value]
                    error = told(tool, argv_of(tool, given, action), capsys)
                    assert "cannot be written" in error or "expected a name" in error, error


def test_what_the_system_says_of_a_file_is_one_line(capsys):
    def main() -> None:
        Path("/nowhere/x").read_text()

    with pytest.raises(SystemExit) as ended:
        run_tool(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: /nowhere/x: No such file or directory\n"
