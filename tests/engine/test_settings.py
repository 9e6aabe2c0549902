"""Config files and options: found, merged, or refused in one line with near names."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf

from fpn_plugin import UserError, model_zoo
from fpn_plugin.engine.config_files import is_for_mini
from fpn_plugin.engine.run_config import RunConfig
from fpn_plugin.engine.settings import (
    config_on_device,
    find_config_file,
    load_config,
)

MINI = "mini/faster_rcnn_R_18_FPN.yaml"


def test_a_path_comes_before_a_packaged_name(tmp_path, monkeypatch):
    packaged = model_zoo.get_config_file(MINI)
    assert find_config_file(MINI) == packaged
    monkeypatch.chdir(tmp_path)
    assert find_config_file(f"configs/{MINI}") == packaged
    assert find_config_file(f"./configs/{MINI}") == packaged
    (tmp_path / "mini").mkdir()
    shutil.copy(packaged, tmp_path / MINI)
    assert find_config_file(MINI) == MINI
    with pytest.raises(UserError, match="did you mean mini/faster_rcnn_R_18_FPN.yaml"):
        find_config_file("mini/faster_rcn_R18_FPN.yaml")


def test_options_come_last():
    cfg = load_config(MINI, ["MODEL.FPN.CANONICAL_LEVEL", "3", "SEED", "7"])
    assert (cfg.MODEL.FPN.CANONICAL_LEVEL, cfg.SEED) == (3, 7)
    assert load_config().MODEL.FPN.CANONICAL_LEVEL == 4


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN.CANONICAL_LEVL", "3"], "did you mean MODEL.FPN.CANONICAL_LEVEL"),
        (["MODEL.FPN.K0", "3"], "no config key 'MODEL.FPN.K0'"),
        (["SOLVER.MAX_ITER"], "has no value"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER", "6", "--resume"], "--resume is among .* before KEY VALUE"),
        (["DATASETS.TRAIN", "cells"], r"DATASETS.TRAIN; a tuple is written \(value,\)"),
    ],
)
def test_options_that_do_not_fit_are_named(opts, message):
    with pytest.raises(UserError, match=message) as raised:
        load_config(MINI, opts)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n  FPN:\n    CANONICAL_LEVL: 3\n", "did you mean MODEL.FPN.CANONICAL_LEVEL"),
        ("SOLVER:\n  MAX_ITER: many\n", "SOLVER.MAX_ITER"),
        ("_BASE_: nowhere.yaml\n", "_BASE_ 'nowhere.yaml' does not exist"),
        ('_BASE_: "no\\nwhere.yaml"\n', r"_BASE_ 'no\\nwhere.yaml' does not exist"),
        ('_BASE_: "no\\0where.yaml"\n', r"_BASE_ 'no\\x00where.yaml' does not exist"),
        ("_BASE_: .\n", "_BASE_ '.' is a folder"),
        ("_BASE_: 3\n", "_BASE_ is 3: expected a path or a list of them"),
        ("_BASE_: [[own.yaml]]\n", r"_BASE_ is \[\['own.yaml'\]\]: expected a path"),
        ("_BASE_: own.yaml\n", "_BASE_ 'own.yaml' leads back to this file"),
        ("_BASE_: [other.yaml]\n", "other.yaml: its _BASE_ './own.yaml' leads back to"),
        ("_BASE_: twice.yaml\n", "twice.yaml cannot be .* key 'SEED' is there twice: .* line 2"),
        ("SEED: 1\nSOLVER: {}\n'SEED': 2\n", "key 'SEED' is there twice: .* line 3"),
        ("SEED: " + "[" * 5000 + "]" * 5000, "nests lists or mappings too deeply"),
        ("SEED: &a [*a]\n", "cannot be read as plain YAML: .*recursive"),
        ("MODEL: &a {X: *a}\n", "cannot be read as plain YAML: .*recursive"),
        ("MODEL: [1\n", "cannot be read as plain YAML"),
        ("- a list\n", "holds a list: a config has keys and values"),
        ("text\n", "holds a str: a config has keys and values"),
        ("", "is empty: a config has keys and values"),
        ("1: 2\n", "1 is no config key"),
        ("SOLVER:\n  BASE_LR: .nan\n", "SOLVER.BASE_LR is nan"),
        ("MODEL:\n  PIXEL_MEAN: [1.0, .nan, 1.0]\n", "MODEL.PIXEL_MEAN is .*nan"),
        ("SEED: !!python/object/apply:os.getpid []\n", "cannot be read as plain YAML"),
    ],
)
def test_config_files_that_do_not_fit_are_named(text, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("_BASE_: ./own.yaml\n")
    (tmp_path / "twice.yaml").write_text("SEED: 1\nSEED: 2\n")
    with pytest.raises(UserError, match=message) as raised:
        load_config(str(path))
    named = "twice.yaml" if "twice.yaml" in text else "other.yaml" if "other" in text else "own"
    assert str(tmp_path / named) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["http", "https", "detectron2", "file"])
@pytest.mark.parametrize("form", ["_BASE_: {}\n", "_BASE_: [{}]\n"])
def test_a_config_fetches_nothing(scheme, form, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(PathManager, "open", lambda name, *_, **__: opened.append(name))
    monkeypatch.setattr(PathManager, "get_local_path", lambda name, *_, **__: opened.append(name))
    base = f"{scheme}://127.0.0.1:9/x.yaml"
    (tmp_path / "own.yaml").write_text(form.format(base))
    with pytest.raises(UserError, match=f"own.yaml: its _BASE_ '{base}' is a URL"):
        load_config(str(tmp_path / "own.yaml"))
    assert opened == []


def test_bases_are_merged_in_order_and_may_share_one(tmp_path):
    (tmp_path / "root.yaml").write_text("SEED: 1\nVIS_PERIOD: 5\n")
    (tmp_path / "a.yaml").write_text("_BASE_: root.yaml\nSEED: 2\n")
    (tmp_path / "b.yaml").write_text("_BASE_: [root.yaml]\nOUTPUT_DIR: b\n")
    (tmp_path / "own.yaml").write_text("_BASE_: [b.yaml, a.yaml]\nSOLVER: {MAX_ITER: 7}\n")
    cfg = load_config(str(tmp_path / "own.yaml"))
    assert (cfg.SEED, cfg.VIS_PERIOD, cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER) == (2, 5, "b", 7)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("SOLVER.MAX_ITER", 0, "is 0, expected a number, 1 or more"),
        ("SOLVER.MAX_ITER", -5, "is -5, expected a number, 1 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "is 0, expected a number, 1 or more"),
        ("SOLVER.IMS_PER_BATCH", -3, "is -3, expected a number, 1 or more"),
        ("SOLVER.BASE_LR", math.nan, "is nan, expected a number, 0 or more"),
        ("SOLVER.BASE_LR", math.inf, "is inf, expected a number, 0 or more"),
        ("SOLVER.BASE_LR", -0.1, "is -0.1, expected a number, 0 or more"),
    ],
)
def test_numbers_that_no_training_could_begin_with_are_named(key, value, told):
    cfg = load_config(MINI)
    RunConfig(cfg).check_solver()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"{key} {told}"):
        RunConfig(cfg).check_solver()


def test_a_seed_is_one_that_every_generator_takes():
    for seed in (-1, 0, 7, 2**32 - 2**10):
        RunConfig(CfgNode({"SEED": seed})).check_seed()
        seed_all_rng(max(seed, 0) + 1023)
    with pytest.raises(UserError, match="SEED is 1000.*, expected a number, 4294966272 at most"):
        RunConfig(CfgNode({"SEED": 10**23})).check_seed()
    with pytest.raises(UserError, match="train.seed is seven, expected a number"):
        RunConfig(OmegaConf.create({"train": {"seed": "seven"}})).check_seed()


def test_the_cpu_is_taken_where_no_gpu_is_and_none_was_named(capsys):
    assert not torch.cuda.is_available()
    assert config_on_device(MINI, []).MODEL.DEVICE == "cpu"
    assert capsys.readouterr().out.count("\n") == 1


def test_a_gpu_that_was_named_is_not_replaced():
    with pytest.raises(UserError, match="MODEL.DEVICE cuda asks for more GPUs than the 0"):
        config_on_device(MINI, ["MODEL.DEVICE", "cuda"])
    with pytest.raises(UserError, match="--num-gpus 8"):
        config_on_device(MINI, [], num_gpus=8)


def test_the_config_that_a_run_leaves_behind_names_no_device(tmp_path):
    cfg = load_config(MINI)
    assert cfg.MODEL.DEVICE == "cuda"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert config_on_device(str(tmp_path / "config.yaml"), []).MODEL.DEVICE == "cpu"


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="model.pth is not a text file"):
        load_config(str(path))


def test_the_cpu_that_was_named_stays_quiet(capsys):
    assert config_on_device(MINI, ["MODEL.DEVICE", "cpu"], 2).MODEL.DEVICE == "cpu"
    assert capsys.readouterr().out == ""


def test_a_config_for_the_mini_dataset_is_known_by_its_bases(tmp_path):
    names = [name for name in model_zoo.names() if is_for_mini(model_zoo.get_config_file(name))]
    assert names == [name for name in model_zoo.names() if "mini/" in name]
    mine = tmp_path / "mine.yaml"
    for base, expected in ((MINI, True), ("own_data/faster_rcnn_R_18_FPN.yaml", False)):
        mine.write_text(f"_BASE_: {model_zoo.get_config_file(base)}")
        assert is_for_mini(str(mine)) is expected


def test_packaged_configs_are_short_and_stand_over_a_base():
    for name in model_zoo.names():
        lines = Path(model_zoo.get_config_file(name)).read_text().splitlines()
        content = [line for line in lines if line.strip() and not line.startswith("#")]
        assert len(content) <= 18, name
        assert content[0].startswith("_BASE_"), name
