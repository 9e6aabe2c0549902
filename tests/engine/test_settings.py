"""Config files and options: found, merged, or refused in one line with near names."""

import shutil
from pathlib import Path

import pytest
import torch

from fpn_plugin import UserError, model_zoo
from fpn_plugin.engine.settings import (
    find_config_file,
    load_config,
    settle_device,
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
        (["SOLVER.MAX_ITER", "6", "--resume"], "--resume stands among .* before KEY VALUE"),
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
        ("_BASE_: nowhere.yaml\n", "_BASE_ is not there: .*nowhere.yaml"),
        ("MODEL: [1\n", "cannot be read as plain YAML"),
        ("- a list\n", "not a config|list"),
        ("", "not a config|NoneType"),
        ("SEED: !!python/object/apply:os.getpid []\n", "cannot be read as plain YAML"),
    ],
)
def test_config_files_that_do_not_fit_are_named(text, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        load_config(str(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_config_does_not_run_code(tmp_path):
    path, touched = tmp_path / "own.yaml", tmp_path / "touched"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{touched}']\n")
    with pytest.raises(UserError):
        load_config(str(path))
    assert not touched.exists()


def test_the_cpu_is_taken_where_no_gpu_is_and_none_was_named(capsys):
    assert not torch.cuda.is_available()
    cfg = load_config(MINI)
    settle_device(cfg, named=False)
    assert cfg.MODEL.DEVICE == "cpu"
    assert capsys.readouterr().out.count("\n") == 1


def test_a_gpu_that_was_named_is_not_replaced():
    with pytest.raises(UserError, match="MODEL.DEVICE cuda asks for more GPUs than the 0"):
        settle_device(load_config(MINI), named=True)
    with pytest.raises(UserError, match="--num-gpus 8"):
        settle_device(load_config(MINI), named=False, num_gpus=8)


def test_the_config_that_a_run_leaves_behind_names_no_device(tmp_path):
    cfg = load_config(MINI)
    assert cfg.MODEL.DEVICE == "cuda"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    cfg = load_config(str(tmp_path / "config.yaml"))
    settle_device(cfg, named=False)
    assert cfg.MODEL.DEVICE == "cpu"


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="model.pth is not a text file"):
        load_config(str(path))


def test_the_cpu_that_was_named_stays_quiet(capsys):
    cfg = load_config(MINI, ["MODEL.DEVICE", "cpu"])
    settle_device(cfg, named=True, num_gpus=2)
    assert cfg.MODEL.DEVICE == "cpu"
    assert capsys.readouterr().out == ""


def test_packaged_configs_are_short_and_stand_over_a_base():
    for name in model_zoo.names():
        lines = Path(model_zoo.get_config_file(name)).read_text().splitlines()
        content = [line for line in lines if line.strip() and not line.startswith("#")]
        assert len(content) <= 18, name
        assert content[0].startswith("_BASE_"), name
