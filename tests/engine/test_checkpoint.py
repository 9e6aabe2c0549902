"""Weights that fit are loaded; weights that do not are named with the key that mends it."""

import copy
import functools
import logging
import pickle
import tarfile
import zipfile
from pathlib import Path

import detectron2
import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from fpn_plugin import UserError, model_zoo
from fpn_plugin.cli.convert import convert_main
from fpn_plugin.engine import StrictCheckpointer
from fpn_plugin.utils.weight_files import read_checkpoint, write_checkpoint
from tests.helpers.runs import Malicious

ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"


def config(*opts) -> CfgNode:
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    model = build_model(config())
    folder = tmp_path_factory.mktemp("run")
    StrictCheckpointer(model, str(folder)).save("model_final")
    return str(folder / "model_final.pth"), model.state_dict()


def load(path: str, *opts, complete: bool = False):
    model = build_model(config(*opts))
    StrictCheckpointer(model, complete=complete).load(path)
    return model


def assert_same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("complete", [True, False])
def test_what_was_saved_is_loaded(saved, complete):
    assert_same(load(saved[0], complete=complete), saved[1])


def test_training_from_scratch_needs_no_weights():
    load("")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN.OUT_CHANNELS", 32], r"fpn_.*is \(64.*and \(32.*MODEL.FPN.OUT_CHANNELS"),
        (["MODEL.FPN.COARSEST_OUTPUT_CONV", True], "COARSEST_OUTPUT_CONV False"),
        (["MODEL.RESNETS.DEPTH", 50], "bottom_up.*MODEL.RESNETS.DEPTH"),
        (["MODEL.ROI_BOX_HEAD.FC_DIM", 77], "box_head.*MODEL.ROI_BOX_HEAD"),
        (
            ["MODEL.ROI_BOX_HEAD.FC_DIM", 77, "MODEL.ROI_HEADS.NUM_CLASSES", 3],
            "box_head.*MODEL.ROI_BOX_HEAD",
        ),
    ],
)
def test_shapes_that_do_not_fit_name_the_key(saved, opts, message, complete):
    with pytest.raises(UserError, match=message) as raised:
        load(saved[0], *opts, complete=complete)
    assert "\n" not in str(raised.value)


def test_a_backbones_weights_are_a_start_for_training_but_not_for_evaluation(saved, tmp_path):
    path = str(tmp_path / "bottom_up.pth")
    start = "backbone.bottom_up."
    torch.save({k: v for k, v in saved[1].items() if k.startswith(start)}, path)
    load(path)
    with pytest.raises(UserError, match=r"lacks \d+ of the model's \d+ tensors, .*fpn_"):
        load(path, complete=True)


def test_files_that_are_no_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="no weights file .*nowhere.pth"):
        load(str(tmp_path / "nowhere.pth"))
    torch.save({"model": {"some.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="none of the 1 tensors of .*other.pth"):
        load(str(tmp_path / "other.pth"))


def test_evaluating_without_weights_says_what_to_set():
    with pytest.raises(UserError, match=r"MODEL.WEIGHTS.*--resume"):
        load("", complete=True)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pyth"])
@pytest.mark.parametrize("read", [read_checkpoint, lambda path: load(str(path))])
def test_code_in_a_weights_file_is_not_run(tmp_path, suffix, read, monkeypatch):
    # As torch before 2.6, which unpickles by default.
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    ran = tmp_path / "ran"
    path = tmp_path / f"weights{suffix}"
    content = {"model": {"a": torch.zeros(1)}, "more": Malicious(ran)}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({**content, "model": {}}))
    else:
        torch.save(content, path)
    told = rf"weights{suffix}' is not loaded: .*exec.*If you trust its author.*safetensors"
    with pytest.raises(UserError, match=told) as raised:
        read(path)
    assert "\n" not in str(raised.value)
    assert not ran.exists()


def test_safetensors_load(saved, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_checkpoint(saved[1], path)
    assert_same(load(str(path), complete=True), saved[1])
    path.write_bytes(b"no tensors at all")
    with pytest.raises(UserError, match=r"weights.safetensors"):
        load(str(path))


KINDS = [
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
]


class Told(StrictCheckpointer):
    """Keeps what the checkpoint and the model did not have in common."""

    def _load_model(self, checkpoint):
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def narrow(cfg: CfgNode) -> CfgNode:
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    return cfg


@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_pass_between_stock_models_and_their_twins(tmp_path, name):
    stock = get_cfg()
    stock.merge_from_file(str(ZOO / name))
    theirs, ours = build_model(narrow(stock)), build_model(narrow(model_zoo.get_config(name)))
    DetectionCheckpointer(theirs, str(tmp_path)).save("stock")
    checkpointer = Told(ours, complete=True)
    checkpointer.load(str(tmp_path / "stock.pth"))
    assert not checkpointer.incompatible.missing_keys
    assert not checkpointer.incompatible.unexpected_keys
    assert_same(ours, theirs.state_dict())
    # And back, by Detectron2's own checkpointer.
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    StrictCheckpointer(ours, str(tmp_path)).save("plugin")
    DetectionCheckpointer(theirs).load(str(tmp_path / "plugin.pth"))
    assert_same(theirs, ours.state_dict())


def resnet_names(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A bottom-up pathway's weights without its prefix, which Detectron2 matches by likeness."""
    start = "backbone.bottom_up."
    return {k.removeprefix(start): v.numpy() for k, v in state.items() if k.startswith(start)}


LAYOUTS = {
    "zoo.pkl": lambda state: {
        "model": {k: v.numpy() for k, v in state.items()}, "__author__": "third party"
    },
    "bare.pth": lambda state: state,
    "caffe2.pkl": lambda state: {
        "blobs": {**resnet_names(state), "stem.conv1.weight_momentum": np.zeros(1)}
    },
    "imagenet.pkl": resnet_names,
    "pycls.pyth": lambda state: {"model_state": state, "epoch": 3},
    "liked.pth?matching_heuristics=True": lambda state: {
        "model": {k: torch.from_numpy(v) for k, v in resnet_names(state).items()}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_as_by_detectron2(saved, tmp_path, name):
    path, content = tmp_path / name.partition("?")[0], LAYOUTS[name](saved[1])
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    torch.manual_seed(1)
    theirs = build_model(config())
    ours = copy.deepcopy(theirs)
    DetectionCheckpointer(theirs).load(str(tmp_path / name))
    StrictCheckpointer(ours).load(str(tmp_path / name))
    assert_same(ours, theirs.state_dict())
    key = "backbone.bottom_up.res3.0.conv1.weight"
    assert torch.equal(ours.state_dict()[key], saved[1][key])


NETWORKS = {
    "timm": lambda: timm.create_model("tf_efficientnet_lite0", pretrained=False),
    "torchvision": lambda: torchvision.models.mobilenet_v3_small(weights=None),
}
OPTS = {
    "timm": ["MODEL.TIMM.NAME", "tf_efficientnet_lite0", "MODEL.TIMM.PRETRAINED", False],
    "torchvision": [
        "MODEL.TORCHVISION.NAME", "mobilenet_v3_small", "MODEL.TORCHVISION.WEIGHTS", "",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_classification_networks_weights_get_the_prefix_of_the_model(kind, tmp_path, caplog):
    opts = ["MODEL.FPN.BOTTOM_UP", f"build_{kind}_backbone", *OPTS[kind]]
    state = {k: torch.rand_like(v, dtype=v.dtype) if v.is_floating_point() else v
             for k, v in NETWORKS[kind]().state_dict().items()}  # fmt: skip
    write_checkpoint(state, tmp_path / "bare.pth", bare=True)
    write_checkpoint(state, tmp_path / "bare.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "run.pth")
    for name in ("bare.pth", "bare.safetensors", "run.pth"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model = load(str(tmp_path / name), *opts)
        network = model.backbone.bottom_up.net.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in network.items())
        count = sum("num_batches_tracked" not in key for key in network)
        said = [line for line in caplog.messages if "is loaded as backbone.bottom_up: " in line]
        assert len(said) == 1 and f"{count} of {count} tensors are loaded" in said[0]
        assert "no place for" in said[0] and "classifier" in said[0]
        with pytest.raises(UserError, match=rf"{name}' lacks \d+ of .*; see MODEL.FPN"):
            load(str(tmp_path / name), *opts, complete=True)
    # A detector that was saved out of DataParallel is not taken for its network.
    whole = {f"module.{k}": torch.ones_like(v) for k, v in model.state_dict().items()}
    write_checkpoint(whole, tmp_path / "parallel.pth")
    assert_same(load(str(tmp_path / "parallel.pth"), *opts, complete=True),
                {k.removeprefix("module."): v for k, v in whole.items()})  # fmt: skip


def test_a_network_that_is_not_the_models_is_named_with_its_key(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    write_checkpoint(state, tmp_path / "r18.pth", bare=True)
    expected = r"none of .*r18.pth' fits .*a ResNet of timm or torchvision, for MODEL.TIMM.WEIGHTS"
    with pytest.raises(UserError, match=expected):
        load(str(tmp_path / "r18.pth"))
    opts = ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.PRETRAINED", False]
    with pytest.raises(UserError, match=r"fit in \d+ tensors: backbone.*; see MODEL.TIMM.NAME or"):
        load(str(tmp_path / "r18.pth"), *opts, "MODEL.TIMM.NAME", "resnet26")


def test_an_unknown_query_is_refused(saved):
    with pytest.raises(UserError, match=r"\?heuristics is unknown; .matching_heuristics"):
        load(saved[0] + "?heuristics=1")


def read_linear(path: Path) -> None:
    StrictCheckpointer(torch.nn.Linear(2, 2)).load(str(path))


NO_WEIGHTS = {
    "list.pth": ([1, 2], "holds a value of type list, expected a dict"),
    "tensor.pth": (torch.zeros(3), "holds a value of type Tensor, expected a dict"),
    "none.pth": (None, "holds a value of type NoneType"),
    "number.pth": (3, "holds a value of type int"),
    "empty.pth": ({}, "holds no tensors"),
    "model_none.pth": ({"model": None}, "holds a value of type NoneType"),
    "model_empty.pth": ({"model": {}}, "holds no tensors"),
    "int_keys.pth": ({"model": {1: torch.zeros(2)}}, "has '1' of type int for the name"),
    "int_values.pth": ({"model": {"a": 3}}, "has 'a' of type int, expected a tensor"),
    "no_state.pyth": ({"model": {}}, "no 'model_state'|holds no tensors"),
    "list.pkl": ([1, 2], "holds a value of type list"),
    "number.pkl": (3, "holds a value of type int"),
    "empty.pkl": ({}, "holds no tensors"),
    "text.pkl": ({"a": np.array(["text"])}, "has 'a' of dtype <U4, expected numbers"),
    "objects.pkl": ({"a": np.array([None])}, "has 'a' of dtype object, expected numbers"),
}  # fmt: skip


def convert(path: Path) -> None:
    config = ["--config-file", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"]
    output = ["--output", str(path.parent / "o.pth")]
    convert_main(["--to", "torchvision", *config, "--weights", str(path), *output])


@pytest.mark.parametrize(("name", "case"), NO_WEIGHTS.items(), ids=NO_WEIGHTS)
def test_files_that_hold_no_weights_say_what_they_hold(tmp_path, name, case):
    path = tmp_path / name
    content, told = case
    if name.endswith(".pkl"):
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    for read in (read_linear, convert):
        with pytest.raises(
            UserError, match=rf"{name}' (is not a checkpoint|has no weights): .*{told}"
        ):
            read(path)
    assert not (tmp_path / "o.pth").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("read", [read_linear, read_checkpoint])
def test_what_came_instead_of_a_file_is_told(tmp_path, suffix, read):
    path = tmp_path / f"weights{suffix}"
    cases = {
        b"\n<!DOCTYPE html><html><body>404</body></html>": "it is an HTML page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "git lfs pull",
        b"": "it is empty",
        b"abc": "it begins with b'abc'" if suffix == ".pth" else "",
    }
    for content, told in cases.items():
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=f"weights{suffix}' is not a checkpoint: .*{told}"
        ) as raised:
            read(path)
        assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [read_linear, read_checkpoint])
@pytest.mark.parametrize("kind", ["tar", "TorchScript"])
def test_archives_that_older_torch_runs_are_not_given_to_it(tmp_path, monkeypatch, kind, read):
    path = tmp_path / "weights.pth"
    if kind == "tar":
        (tmp_path / "pickle").write_bytes(b"")
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "pickle", "pickle")
    else:
        torch.save({"weight": torch.zeros(1)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("weights/constants.pkl", b"")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was given to torch"))
    with pytest.raises(UserError, match=rf"weights.pth' is not loaded: it is a {kind}.*trust"):
        read(path)


def resumable(folder: Path) -> tuple[StrictCheckpointer, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return StrictCheckpointer(model, str(folder), optimizer=optimizer), optimizer


def test_what_is_beside_the_weights_is_loaded_to_resume_and_else_given_back(tmp_path):
    checkpointer, optimizer = resumable(tmp_path)
    optimizer.param_groups[0]["lr"] = 0.125
    checkpointer.save("model_1", iteration=7)
    again, loaded = resumable(tmp_path)
    assert again.resume_or_load("", resume=True)["iteration"] == 7
    assert loaded.param_groups[0]["lr"] == 0.125
    again, loaded = resumable(tmp_path)
    rest = again.resume_or_load(str(tmp_path / "model_1.pth"), resume=False)
    assert loaded.param_groups[0]["lr"] == 0.5 and rest["optimizer"]["param_groups"]


@pytest.mark.parametrize(
    "state",
    [3, None, {}, {"state": {}, "param_groups": []}, {"param_groups": 1, "state": 2},
     {"iteration": "a"}],
)  # fmt: skip
def test_a_part_that_cannot_be_gone_on_from_is_named(tmp_path, state):
    checkpointer, _ = resumable(tmp_path)
    torch.save(
        {"model": checkpointer.model.state_dict(), "optimizer": state}, tmp_path / "model_1.pth"
    )
    (tmp_path / "last_checkpoint").write_text("model_1.pth")
    told = r"cannot resume: 'optimizer' of '.*model_1.pth' cannot be loaded .*config.*others"
    with pytest.raises(UserError, match=told) as raised:
        checkpointer.resume_or_load("", resume=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "../run/model_1.pth", ""])
def test_the_last_checkpoint_is_a_file_of_its_folder(tmp_path, name):
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(UserError, match=r"cannot resume: .* leads out .*last_checkpoint names"):
        resumable(tmp_path)[0].resume_or_load("", resume=True)
