"""Weights of torchvision's and mmdetection's FPN detectors in this plugin's names, and back.

Faster and Mask R-CNN on a ResNet are converted, and torchvision's Keypoint R-CNN and RetinaNet. A
parameter of anything else is refused by its name. :data:`CONFIG_KEYS` are what a config must say to
compute what the original does: input, strides, pooling. The anchors still differ: torchvision
rounds them to whole pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from safetensors import SafetensorError
from torch import Tensor

from .config import value_at
from .engine.build_errors import explained_build_errors
from .engine.settings import load_config
from .errors import UserError, one_line
from .utils.weight_files import read_checkpoint, weights_of, write_checkpoint

__all__ = [
    "CONFIG_KEYS",
    "LIBRARIES",
    "check_config",
    "from_library",
    "library_name",
    "read_weights",
    "to_library",
    "write_for_library",
    "write_from_library",
]

_PYTORCH_STYLE = [
    "INPUT.FORMAT", "RGB",
    "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]",
    "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]",
    "MODEL.RESNETS.STRIDE_IN_1X1", "False",
    "MODEL.FPN.COARSEST_OUTPUT_CONV", "True",
]  # fmt: skip
# What a config must say for converted weights.
CONFIG_KEYS = {
    "torchvision": [
        *_PYTORCH_STYLE,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "2",
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign",
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "2",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlign",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", "2",
    ],
    "mmdet": _PYTORCH_STYLE,
}  # fmt: skip
# What the pyramids of both libraries do, whatever their weights.
_SAME_PYRAMID = [
    "MODEL.FPN.COARSEST_OUTPUT_CONV", "True",
    "MODEL.FPN.TOP_DOWN", "True",
    "MODEL.FPN.LATERAL", "True",
    "MODEL.FPN.FUSE_TYPE", "sum",
    "MODEL.RESNETS.RES5_DILATION", "1",
]  # fmt: skip
# What a config must say so that its weights compute the same in the library. mmdetection's own
# configs state its input and where a stage strides.
_HELD_BY = {
    "torchvision": [
        *CONFIG_KEYS["torchvision"],
        *_SAME_PYRAMID,
        "MODEL.FPN.CANONICAL_LEVEL", "4",
        "MODEL.FPN.CANONICAL_BOX_SIZE", "224",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "False",
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "False",
    ],
    "mmdet": _SAME_PYRAMID,
}  # fmt: skip
# Beginnings of keys that only some models read, and whether a model does.
_READ_WITH = {
    "MODEL.FPN.CANONICAL": lambda model: model.META_ARCHITECTURE == "GeneralizedRCNN",
    "MODEL.ROI_BOX_HEAD": lambda model: model.META_ARCHITECTURE == "GeneralizedRCNN",
    "MODEL.ROI_MASK_HEAD": lambda model: model.MASK_ON,
    "MODEL.ROI_KEYPOINT_HEAD": lambda model: model.KEYPOINT_ON,
}
_BN_EPS = 1e-5  # of Detectron2's frozen batch norm

# The end of a parameter's name; a rule's pattern is all that stands before it.
_PART = "(?P<part>weight|bias|running_mean|running_var)"
# A pattern, and the library's name: a template of the pattern's groups. In braces is what stands
# for the number n of the first group.
Rules = Sequence[tuple[str, str]]
_NUMBERS: dict[str, Callable[[int], int]] = {
    "n-1": lambda n: n - 1,
    "n+5": lambda n: n + 5,
    "n/2": lambda n: n // 2,  # Detectron2 numbers convolutions with the ReLUs between them
    "2n-2": lambda n: 2 * n - 2,  # torchvision does
}


def _resnet(body: str) -> Rules:
    block = r"backbone\.bottom_up\.res(\d)\.(\d+)\."
    theirs = body + r".layer{n-1}.\2."
    return (
        (r"backbone\.bottom_up\.stem\.conv1\.norm\.", f"{body}.bn1."),
        (r"backbone\.bottom_up\.stem\.conv1\.", f"{body}.conv1."),
        (block + r"shortcut\.norm\.", theirs + "downsample.1."),
        (block + r"shortcut\.", theirs + "downsample.0."),
        (block + r"conv(\d)\.norm\.", theirs + r"bn\3."),
        (block + r"conv(\d)\.", theirs + r"conv\3."),
    )


_TORCHVISION: Rules = (
    *_resnet("backbone.body"),
    (r"backbone\.fpn_lateral(\d)\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"backbone\.fpn_output(\d)\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"backbone\.top_block\.(p[67])\.", r"backbone.fpn.extra_blocks.\1."),
    (r"head\.cls_score\.", "head.classification_head.cls_logits."),
    (r"head\.bbox_pred\.", "head.regression_head.bbox_reg."),
    (r"head\.cls_subnet\.(\d)\.", "head.classification_head.conv.{n/2}.0."),
    (r"head\.bbox_subnet\.(\d)\.", "head.regression_head.conv.{n/2}.0."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn.head.conv.0.0."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"roi_heads\.box_head\.fc([12])\.", "roi_heads.box_head.fc{n+5}."),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.", r"roi_heads.box_predictor.\1."),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", "roi_heads.mask_head.{n-1}.0."),
    (r"roi_heads\.mask_head\.deconv\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"roi_heads\.mask_head\.predictor\.", "roi_heads.mask_predictor.mask_fcn_logits."),
    (r"roi_heads\.keypoint_head\.conv_fcn(\d)\.", "roi_heads.keypoint_head.{2n-2}."),
    (r"roi_heads\.keypoint_head\.score_lowres\.", "roi_heads.keypoint_predictor.kps_score_lowres."),
)
_MMDET: Rules = (
    *_resnet("backbone"),
    (r"backbone\.fpn_lateral(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn_output(\d)\.", r"neck.fpn_convs.\1.conv."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn_head.rpn_conv."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn_head.rpn_cls."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.fc(\d)\.", "roi_head.bbox_head.shared_fcs.{n-1}."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", "roi_head.mask_head.convs.{n-1}.conv."),
    (r"roi_heads\.mask_head\.deconv\.", "roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_head\.predictor\.", "roi_head.mask_head.conv_logits."),
)
LIBRARIES = {"torchvision": _TORCHVISION, "mmdet": _MMDET}
_CONVERTED = {
    "torchvision": "Faster, Mask and Keypoint R-CNN and RetinaNet",
    "mmdet": "Faster and Mask R-CNN",
}

# Predictors have rows by class. The background's is torchvision's first and Detectron2's last.
_BY_CLASS = (
    "roi_heads.box_predictor.cls_score.",
    "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.predictor.",
)
_NOT_CONVERTED = ("num_batches_tracked", "pixel_mean", "pixel_std")


def library_name(key: str, library: str, finest: int = 2) -> str:
    """A library's name for a parameter of this plugin's models.

    Args:
        key: the parameter's name here.
        library: one of :data:`LIBRARIES`.
        finest: the pyramid's finest level, which is number 0 in both libraries.

    Raises:
        UserError: the library's models that are converted have no such parameter.
    """
    counted = re.sub(
        r"^(backbone\.fpn_(?:lateral|output))(\d)",
        lambda match: f"{match[1]}{int(match[2]) - finest}",
        key,
    )
    found = ((re.fullmatch(p + _PART, counted), template) for p, template in LIBRARIES[library])
    match, template = next((pair for pair in found if pair[0]), (None, ""))
    if match is None:
        raise UserError(
            f"{key} has no counterpart in {library}: {_CONVERTED[library]} are converted, on a "
            "ResNet with batch norm under a pyramid without norms"
        )
    name = match.expand(template + r"\g<part>")
    return re.sub(r"{(.+?)}", lambda number: str(_NUMBERS[number[1]](int(match[1]))), name)


def from_library(
    state: dict[str, Tensor], cfg: CfgNode, library: str, bn_eps: float = _BN_EPS
) -> dict[str, Tensor]:
    """Converts a library's state dict for a config's model.

    Args:
        state: the library's.
        cfg: of the model; see :data:`CONFIG_KEYS`.
        library: one of :data:`LIBRARIES`.
        bn_eps: what the original adds to the variance of its batch norms. The difference to
            Detectron2's is added to the variance. torchvision's COCO_V1 weights were made with 0.

    Returns:
        Every parameter and buffer of the model, in its order. Of torchvision's 91 COCO category
        numbers, a model of COCO's 80 categories gets the 80.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in the model.
    """
    wanted = _wanted(cfg)
    finest = _finest(wanted)
    converted: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, shape in wanted.items():
        theirs = library_name(key, library, finest)
        name = _present(theirs, state)
        if name is None:
            raise UserError(
                f"{library}'s weights lack {theirs}, which the model's {key} is made of: is the "
                "config of their kind and depth?"
            )
        used.add(name)
        tensor = state[name][_class_rows(key, state[name], shape, library)]
        if tensor.shape != shape:
            raise UserError(
                f"{name} is {tuple(tensor.shape)}, the model's {key} {tuple(shape)}: is the config "
                "of its width, number of classes and image channels (MODEL.PIXEL_MEAN)?"
            )
        converted[key] = tensor.clone()
        if key.endswith("running_var"):
            converted[key] += bn_eps - _BN_EPS
    left = [k for k in state if k not in used and not k.endswith(_NOT_CONVERTED)]
    if left:
        raise UserError(
            f"{len(left)} of {library}'s tensors have no place in this config's model, "
            f"{', '.join(left[:3])} among them: does it lack a head (MODEL.MASK_ON)?"
        )
    return converted


def to_library(
    state: dict[str, Tensor], library: str, into: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Converts a state dict of this plugin's models for a library.

    Args:
        state: of a model.
        library: one of :data:`LIBRARIES`.
        into: a state dict of the library. It gives the layout, and the rows that this plugin's
            models do not have: of torchvision's background box, and of category numbers that COCO
            does not use. Without it, those rows are zero, and categories have no gaps.

    Raises:
        UserError: the library has no such tensor, a tensor does not fit ``into`` or lacks for it,
            or the model lacks a convolution of the library's pyramid.
    """
    converted = {key: value.clone() for key, value in (into or {}).items()}
    finest = _finest(state)
    filled: set[str] = set()
    for key, tensor in state.items():
        if key.endswith(_NOT_CONVERTED):
            continue
        name = library_name(key, library, finest)
        if key.endswith(".norm.weight") and f"{key[:-6]}running_var" not in state:
            raise UserError(
                f"{key} is of a norm without running statistics, and {library}'s ResNets have "
                "batch norms: they are converted of a model with MODEL.RESNETS.NORM FrozenBN, BN "
                "or SyncBN"
            )
        name = _present(name, converted) or name
        if into is None:
            full = _with_background(key, tensor, library)
        elif name in converted:
            full = converted[name].to(tensor)
        else:
            raise UserError(f"{library}'s layout has no {name}, which {key} would become")
        rows = _class_rows(key, full, tensor.shape, library)
        if full[rows].shape != tensor.shape:
            raise UserError(
                f"{key} is {tuple(tensor.shape)} and does not fit {name} of {tuple(full.shape)} in "
                f"{library}'s layout: is it of this depth, width and number of classes?"
            )
        full[rows] = tensor
        converted[name] = full
        filled.add(name)
    _check_pyramid(state, library)
    left = [k for k in converted if k not in filled and not k.endswith(_NOT_CONVERTED)]
    if left:
        raise UserError(
            f"the model gives nothing for {len(left)} tensors of {library}'s layout, "
            f"{', '.join(left[:3])} among them: is the layout that of its kind?"
        )
    return converted


def _check_pyramid(state: dict[str, Tensor], library: str) -> None:
    """Refuses a pyramid without a convolution that both libraries have at every level."""
    levels = _levels(state)
    for kind, key in (("lateral", "LATERAL"), ("output", "COARSEST_OUTPUT_CONV")):
        for level in levels:
            name = f"backbone.fpn_{kind}{level}.weight"
            if name not in state:
                raise UserError(
                    f"the model has no {name}, which {library}'s pyramid needs for "
                    f"{library_name(name, library, levels[0])}: train it with MODEL.FPN.{key} True"
                )


def check_config(cfg: CfgNode, library: str) -> None:
    """Refuses a config whose weights would compute something else in the library.

    Raises:
        UserError: names the first such key, its value and the value that the library needs.
    """
    held = cfg.clone()
    held.defrost()
    held.merge_from_list(_HELD_BY[library])
    for key in _HELD_BY[library][::2]:
        if any(key.startswith(what) and not read(cfg.MODEL) for what, read in _READ_WITH.items()):
            continue
        says, expected = value_at(cfg, key), value_at(held, key)
        if says != expected:
            raise UserError(
                f"the config's {key} is {says!r}, and {library} computes what {expected!r} means: "
                f"these weights would detect something else there; train with {key} {expected!r}"
            )


def _finest(keys: Iterable[str]) -> int:
    """The finest level of a pyramid, by the names of its parameters."""
    return min(_levels(keys), default=2)


def _levels(keys: Iterable[str]) -> list[int]:
    """The levels of a pyramid's convolutions, finest first."""
    found = (re.match(r"backbone\.fpn_(?:lateral|output)(\d)", key) for key in keys)
    return sorted({int(match[1]) for match in found if match})


def _wanted(cfg: CfgNode) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a config's model, built on the meta device."""
    if cfg.MODEL.FPN.BOTTOM_UP != "build_resnet_backbone":
        raise UserError(
            f"MODEL.FPN.BOTTOM_UP is {cfg.MODEL.FPN.BOTTOM_UP!r}; only weights of models on "
            "build_resnet_backbone are converted"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"), explained_build_errors(cfg):
        state = build_model(cfg).state_dict()
    return {k: v.shape for k, v in state.items() if not k.endswith(_NOT_CONVERTED)}


def _present(name: str, state: dict[str, Tensor]) -> str | None:
    """The name in a state dict, or None: torchvision's older layout lacks some ``.0``."""
    older = re.sub(r"(inner_blocks\.\d|layer_blocks\.\d)\.0\.", r"\1.", name)
    older = re.sub(r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv.", older)
    return next((n for n in (name, older) if n in state), None)


def _class_rows(key: str, full: Tensor, shape: torch.Size, library: str) -> list[int] | slice:
    """Rows of a library's predictor in this plugin's order; all rows of other tensors.

    All rows also if the classes do not fit: the caller compares shapes.
    """
    scores = "cls_score" in key
    if library == "torchvision" and key.startswith(("head.cls_score.", "head.bbox_pred.")):
        return _dense_rows(full.shape[0], shape[0], scores=scores)
    if library != "torchvision" or not key.startswith(_BY_CLASS):
        return slice(None)
    per_class = 4 if "bbox_pred" in key else 1
    classes = shape[0] // per_class - (1 if scores else 0)
    numbers = _class_numbers(full.shape[0] // per_class - 1, classes)
    if numbers is None:
        return slice(None)
    order = [*numbers, 0] if scores else numbers
    return [number * per_class + i for number in order for i in range(per_class)]


def _class_numbers(given: int, classes: int) -> list[int] | None:
    """Numbers of a model's classes in torchvision, from 1 on; None if it has other classes."""
    if (given, classes) == (90, 80):
        return sorted(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)
    return list(range(1, classes + 1)) if given == classes else None


def _dense_rows(given: int, wanted: int, *, scores: bool) -> list[int] | slice:
    """Rows of RetinaNet's predictors; of a cell's nine anchors, torchvision's run over scales first
    and Detectron2's over ratios first.
    """
    anchors = [ratio * 3 + scale for scale in range(3) for ratio in range(3)]
    if scores:
        numbers = _class_numbers(given // 9 - 1, wanted // 9)
        each = given // 9
    else:
        numbers, each = list(range(4)), 4
    if numbers is None or given % 9 or wanted % 9:
        return slice(None)
    return [anchor * each + number for anchor in anchors for number in numbers]


def _with_background(key: str, tensor: Tensor, library: str) -> Tensor:
    """A tensor of zeros of the library's shape, which has rows for the background."""
    rows = tensor.shape[0]
    if library == "torchvision" and key.startswith("head.cls_score."):
        rows += 9  # one for each anchor
    if library == "torchvision" and key.startswith(_BY_CLASS) and "cls_score" not in key:
        rows += 4 if "bbox_pred" in key else 1
    return tensor.new_zeros(rows, *tensor.shape[1:])


def write_from_library(
    state: dict[str, Tensor],
    library: str,
    config_file: str,
    opts: Sequence[str],
    output: Path,
    bn_eps: float = _BN_EPS,
) -> Path:
    """Writes a library's weights in this plugin's names, and the config that loads them.

    Args:
        state: the library's.
        library: one of :data:`LIBRARIES`.
        config_file: of the model, to which :data:`CONFIG_KEYS` are added.
        opts: config keys and values for it.
        output: the file, .pth or .safetensors; the config is written next to it.
        bn_eps: see :func:`from_library`.

    Returns:
        The config's file.

    Raises:
        UserError: the weights do not fit the config, or a file cannot be written.
    """
    keys = [*CONFIG_KEYS[library], *_top_block_keys(state)]
    cfg = load_config(config_file, [*keys, *opts])
    converted = from_library(state, cfg, library, bn_eps)
    cfg.MODEL.WEIGHTS = str(output)
    config = output.with_suffix(".yaml")
    with _explained_writing(output):
        write_checkpoint(converted, output)
        config.write_text(cfg.dump())
    return config


def write_for_library(
    state: dict[str, Tensor],
    library: str,
    config_file: str,
    opts: Sequence[str],
    output: Path,
    into: dict[str, Tensor] | None = None,
) -> None:
    """Writes weights of this plugin's models in a library's names.

    Args:
        state: of a model.
        library: one of :data:`LIBRARIES`.
        config_file: of the model's training.
        opts: config keys and values for it.
        output: the file, .pth or .safetensors.
        into: see :func:`to_library`.

    Raises:
        UserError: the weights are not the config's, would compute something else in the library,
            or the file cannot be written.
    """
    cfg = load_config(config_file, opts)
    converted = to_library(state, library, into)  # its errors come first
    check_config(cfg, library)
    _check_made_by(cfg, state, config_file)
    with _explained_writing(output):
        write_checkpoint(converted, output, bare=True)


def _check_made_by(cfg: CfgNode, state: dict[str, Tensor], config_file: str) -> None:
    """Refuses a config whose model has other names or shapes than the weights."""
    wanted = _wanted(cfg)
    given = {k: v.shape for k, v in state.items() if not k.endswith(_NOT_CONVERTED)}
    for key in [*wanted, *given]:
        if wanted.get(key) != given.get(key):
            has, would = (tuple(s[key]) if key in s else "not there" for s in (given, wanted))
            raise UserError(
                f"{config_file} is not the config of these weights: {key} is {has} in them, and "
                f"{would} in its model"
            )


@contextmanager
def _explained_writing(output: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot write --output {output}: {one_line(error)}") from error


def _top_block_keys(state: dict[str, Tensor]) -> list[str]:
    """The config key that says what a torchvision RetinaNet's P6 reads: P5, or C5."""
    p6 = state.get("backbone.fpn.extra_blocks.p6.weight")
    if p6 is None:
        return []
    return ["MODEL.FPN.TOP_BLOCK", "p6p7_p5" if p6.shape[0] == p6.shape[1] else "p6p7_c5"]


def read_weights(path: str, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a file of weights, .pth, .pkl or .safetensors.

    Args:
        path: of the file.
        trust_pickle: also read what is not a tensor, which runs code that is in the file.

    Raises:
        UserError: the file cannot be read, or has no tensors.
    """
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    try:
        return weights_of(checkpoint, "model", "state_dict")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path!r} has no weights: {error}") from error
