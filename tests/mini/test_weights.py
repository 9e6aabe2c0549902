"""Weights that the mini rows start from: what they are, and that rows take them."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from fpn_plugin import UserError, model_zoo
from fpn_plugin.engine import StrictCheckpointer
from fpn_plugin.mini import ensure_mini, ensure_mini_weights
from fpn_plugin.mini import weights as mini_weights
from fpn_plugin.mini.weights import Schedule


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return ensure_mini({"train": 12, "val": 6}, tmp_path_factory.mktemp("mini") / "made")


@pytest.fixture(scope="module")
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "iterations", 4)
        patch.setattr(Schedule, "batch", 4)
        yield


@pytest.fixture(scope="module")
def made(root, short) -> dict:
    """The weights next to ``root``, of a short training."""
    return torch.load(ensure_mini_weights("R-18.pth", root=root), weights_only=True)


@pytest.fixture
def apart(root, tmp_path) -> Path:
    """The same images in another folder, next to which other weights are made."""
    (tmp_path / "mini").symlink_to(root)
    return tmp_path / "mini"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_it_learns_to_tell_digits_apart(apart, monkeypatch):
    monkeypatch.setattr(Schedule, "iterations", 40)
    monkeypatch.setattr(Schedule, "batch", 32)
    monkeypatch.setattr(Schedule, "learning_rate", 0.01)
    monkeypatch.setattr(mini_weights, "_WINDOW_PX", 32)
    windows = mini_weights._windows
    monkeypatch.setattr(mini_weights, "_windows", lambda root, _: windows(root, "train"))
    made = torch.load(ensure_mini_weights("R-18.pth", root=apart), weights_only=True)
    assert made["accuracy"] > 50  # of the digits that it has learnt; 10 by chance


def test_windows_hold_their_digit(root):
    windows, labels = mini_weights._windows(root, "train")
    assert windows.shape == (len(labels), 64, 64, 3)
    assert labels.min() >= 0
    assert labels.max() <= 9
    # A digit is well brighter than what it lies on, and lies within its window.
    bright = windows.float().mean(-1) > 80
    assert (bright.flatten(1).float().mean(1) > 0.02).float().mean() > 0.99


def test_an_interrupted_training_goes_on_to_the_same_weights(made, apart, monkeypatch):
    monkeypatch.setattr(mini_weights, "_KEPT_EVERY", 2)
    entropy = mini_weights.F.cross_entropy
    calls = iter(range(100))

    def interrupted(*args):
        if next(calls) == 6:  # two an iteration: in the fourth
            raise KeyboardInterrupt
        return entropy(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mini_weights.F, "cross_entropy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_mini_weights("R-18.pth", root=apart)
    assert len(list(apart.parent.glob("mini-*.partial"))) == 1
    batches = []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: batches.append(a) or randint(*a, **k))
    path = ensure_mini_weights("R-18.pth", root=apart)
    assert len(batches) == 2  # of four; two were done
    assert same(torch.load(path, weights_only=True)["model"], made["model"])
    assert not list(apart.parent.glob("mini-*.partial"))


@pytest.mark.parametrize(
    ("row", "prefix", "conv5"),
    [
        ("table2_c_FPN", "backbone.bottom_up.", "backbone.bottom_up.res5."),
        ("table2_a_C4", "backbone.", "roi_heads.res5."),
        ("table3_b_C5", "backbone.", "backbone.res5."),
    ],
)
def test_every_row_starts_from_all_of_them(row, prefix, conv5, root, made, monkeypatch):
    monkeypatch.setattr(mini_weights, "mini_root", lambda: root)
    cfg = model_zoo.get_config(f"mini/{row}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    given = made["model"]
    expected = {f"{prefix}{key}": value for key, value in given.items() if "roi_heads" not in key}
    expected |= {key: value for key, value in given.items() if "roi_heads" in key}
    loaded = {key: v for key, v in model.state_dict().items() if key.startswith((prefix, conv5))}
    loaded = {key: value for key, value in loaded.items() if ".fpn_" not in key}
    loaded = {key: v for key, v in loaded.items() if not key.endswith("num_batches_tracked")}
    assert any(key.startswith(conv5) for key in loaded)
    assert same(loaded, {key: expected[key] for key in loaded})


def test_detectron2_opens_them_by_name(root, made, monkeypatch):
    monkeypatch.setattr(mini_weights, "mini_root", lambda: root)
    with PathManager.open("mini://R-18.pth", "rb") as file:
        assert "model" in torch.load(file, weights_only=True)


def test_unknown_weights_list_what_there_is():
    with pytest.raises(UserError, match=r"'mini://R-50.pth'.*R-18.pth"):
        PathManager.get_local_path("mini://R-50.pth")


def test_what_cannot_be_written_is_reported(apart):
    name = f"{apart.name}-{mini_weights._fingerprint()}-R-18.pth.lock"
    apart.with_name(name).mkdir()  # where the lock's file should be
    with pytest.raises(UserError, match="set DETECTRON2_DATASETS"):
        ensure_mini_weights("R-18.pth", root=apart)
